"""Feature maps of the language model's visual states, and images redrawn by the decoder."""

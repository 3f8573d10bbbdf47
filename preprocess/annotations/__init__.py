"""Annotation files: the mix, readers, dialogues and the work list."""

"""Ranks: who they are, and collectives over them."""

"""Figures drawn with matplotlib. Only this package imports it, and commands import this package only to draw."""

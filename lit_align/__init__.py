"""Align a language model with preferences: one batch type, one scorer, pure losses, on Lightning."""

__version__ = "0.1.0"

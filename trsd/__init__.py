"""Distil reasoning language models from partial chains of thought."""

__version__ = "0.1.0"

"""Garage: from your documents to a tuned, evaluated, exported and served language model, on your own machine."""

__version__ = "0.1.0"

"""The version of the distribution; setup reads it from here."""

__version__ = "0.1.0"

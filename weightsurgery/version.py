"""The version of this package, as records give it."""

__version__ = "0.1.0"

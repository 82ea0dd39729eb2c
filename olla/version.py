"""The version of OLLA, for those who must not know the rest of it."""

__version__ = "0.1.0"

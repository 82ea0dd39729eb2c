"""The command line. What plans graphs and buffers works without PyTorch; models load it."""

from olla.cli.entry import main

__all__ = ["main"]

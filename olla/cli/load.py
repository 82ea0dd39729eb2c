"""TARGET, as it is written on the command line, into a :class:`Target`."""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from typing import TYPE_CHECKING

from olla.cli.options import is_graph
from olla.errors import OllaError

if TYPE_CHECKING:
    from olla.cli.target import Target

__all__ = ["load"]


def load(options: argparse.Namespace) -> Target:
    """The model that the options name, made on their device.

    Raises
    ------
    OllaError
        If there is no such model, a package is missing, or the code that makes it fails.
    """
    target = options.target
    if is_graph(target):
        raise OllaError(f"{target} is a graph, whose ops nobody can run or time: name a model")
    if find_spec("torch") is None:
        raise OllaError(f"{target} needs PyTorch: pip install torch")
    import torch

    from olla.cli.own_code import module, script
    from olla.cli.target import Request
    from olla.cli.zoo import torchvision_model, transformers_model

    request = Request(options.train, options.batch_size, options.shape, options.optimizer)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise OllaError("--device cuda: PyTorch sees no GPU here")
    kind, separator, name = target.partition(":")
    with torch.device(options.device):
        if target.endswith(".py"):
            return script(target, request)
        if separator and kind == "torchvision":
            return torchvision_model(name, request)
        if separator and kind == "transformers":
            return transformers_model(name, request)
        if separator:
            return module(kind, name, request)
    raise OllaError(
        f"{target!r} is no target: write GRAPH.json, torchvision:NAME, transformers:NAME, MODULE:NAME or FILE.py"
    )

"""What several commands have in common: how they are described, and the options that mean the same in all of them."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

from olla.fit.budget import Budget, bytes_of

__all__ = [
    "GRAPHS",
    "MODELS",
    "Commands",
    "Run",
    "add_budget",
    "add_command",
    "add_model",
    "add_solver",
    "add_spill_dir",
    "add_time_limit",
    "is_graph",
]

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
Run: TypeAlias = Callable[[argparse.Namespace], int]

MODELS = """\
TARGET is a model, in one of these forms:
  torchvision:NAME    a model of torchvision, with its usual loss
  transformers:NAME   a model type of transformers (gpt2, llama, bert, t5, vit, ...)
  MODULE:NAME         a model of yours, or a function without arguments that returns
                      a model, or (model, inputs)
  FILE.py             a script that defines model and inputs; perhaps loss_fn, targets
                      and optimizer, too
Weights are random: nothing is downloaded."""
GRAPHS = "\nOr it is a graph: GRAPH.json, in the format of docs/graphs.md."


def add_command(
    commands: Commands, name: str, run: Run, *, purpose: str, about: str = "", examples: str
) -> argparse.ArgumentParser:
    """A command with a page of help that ends in examples."""
    parser = commands.add_parser(
        name,
        help=purpose,
        description=f"{purpose[0].upper()}{purpose[1:]}.\n\n{about}".strip(),
        epilog=f"examples:\n{examples}".rstrip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def add_model(parser: argparse.ArgumentParser, *, devices: tuple[str, ...]) -> None:
    """TARGET, and how its model is made; on the first of the devices, if not said otherwise."""
    parser.add_argument("target", metavar="TARGET", help="a model; see above")
    group = parser.add_argument_group("the model")
    mode = group.add_mutually_exclusive_group()
    mode.add_argument(
        "--train", action="store_const", const=True, help="a training step; the default, but for a model in eval mode"
    )
    mode.add_argument("--inference", dest="train", action="store_const", const=False, help="forward alone")
    group.add_argument("--batch-size", type=_positive, metavar="N", help="of the inputs that are made; default 1")
    group.add_argument(
        "--shape",
        type=_shape,
        metavar="3x224x224",
        help="of one input, without the batch; for text, its length; default: what the model is made for, 128 for text",
    )
    group.add_argument(
        "--optimizer",
        metavar="NAME",
        help="of torch.optim; default: that of the script; SGD with momentum for torchvision: and transformers:",
    )
    group.add_argument(
        "--device",
        choices=devices,
        default=devices[0],
        help=f"where the model is made; default {devices[0]}"
        + (", which allocates nothing, and plans for a CPU" if devices[0] == "meta" else ""),
    )


def add_budget(parser: argparse.ArgumentParser) -> None:
    """``--budget`` and ``--spill-dir``."""
    parser.add_argument(
        "--budget",
        type=_budget,
        metavar="6GiB|50%",
        help="what the step may hold at once, parameters included: bytes, or a share of what eager PyTorch holds",
    )
    add_spill_dir(parser)


def add_spill_dir(parser: argparse.ArgumentParser) -> None:
    """``--spill-dir``."""
    parser.add_argument("--spill-dir", metavar="DIR", help="where tensors may go if a budget asks for that")


def add_time_limit(parser: argparse.ArgumentParser) -> None:
    """``--time-limit``."""
    parser.add_argument("--time-limit", type=float, default=60.0, metavar="SECONDS", help="default %(default)s")


def add_solver(parser: argparse.ArgumentParser) -> None:
    """``--solver``."""
    parser.add_argument(
        "--solver", metavar="NAME", help="gurobi, cpsat, highs or auto: improve what the planners leave open, if small"
    )


def is_graph(target: str) -> bool:
    """Whether TARGET is the file of a graph, and not a model."""
    return target.endswith(".json") or (not target.endswith(".py") and Path(target).is_file())


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


def _shape(text: str) -> tuple[int, ...]:
    try:
        return tuple(_positive(size) for size in text.split("x"))
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a shape, such as 3x224x224 or 128") from error


def _budget(text: str) -> Budget:
    """Bytes, a share, or what is left to :func:`bytes_of`."""
    budget: Budget
    try:
        budget = float(text) if "." in text else int(text)
    except ValueError:
        budget = text
    bytes_of(budget, 1)  # so that it is known to be one before anything is loaded
    return budget

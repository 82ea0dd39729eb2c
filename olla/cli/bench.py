"""``olla bench``: run the planned and the eager step, and ask the allocator."""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import redirect_stdout

from olla.cli.options import MODELS, Commands, add_budget, add_command, add_model, add_solver, add_time_limit

__all__ = ["add_to"]

_EXAMPLES = """\
  olla bench torchvision:resnet18
  olla bench transformers:gpt2 --batch-size 4 --budget 50% --device cuda
  olla bench train.py --json > report.json
"""


def add_to(commands: Commands) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "bench",
        _run,
        purpose="run a step both ways, and report what it needed",
        about=MODELS,
        examples=_EXAMPLES,
    )
    add_model(parser, devices=("cpu", "cuda"))
    add_budget(parser)
    add_solver(parser)
    add_time_limit(parser)
    parser.add_argument("--json", action="store_true", help="print the report as JSON instead of text")


def _run(options: argparse.Namespace) -> int:
    from olla.cli.load import load  # loads PyTorch

    with redirect_stdout(sys.stderr):  # whatever the model prints
        report = load(options).measured(
            memory_budget=options.budget,
            spill_dir=options.spill_dir,
            solver=options.solver,
            time_limit=options.time_limit,
        )
    print(json.dumps(report.to_dict()) if options.json else report)
    return 0

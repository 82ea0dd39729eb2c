"""``olla frontier``: what smaller and smaller budgets cost."""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import redirect_stdout
from pathlib import Path

from olla.cli.options import MODELS, Commands, add_command, add_model, add_spill_dir, add_time_limit

__all__ = ["add_to"]

_EXAMPLES = """\
  olla frontier torchvision:resnet50 --batch-size 8
  olla frontier train.py --points 6 --spill-dir /fast/disk --draw frontier.png
"""


def add_to(commands: Commands) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "frontier",
        _run,
        purpose="show what smaller and smaller budgets cost, without running anything",
        about=MODELS,
        examples=_EXAMPLES,
    )
    add_model(parser, devices=("meta", "cpu", "cuda"))
    parser.add_argument("--points", type=int, default=12, metavar="N", help="budgets to look at; default %(default)s")
    add_spill_dir(parser)
    add_time_limit(parser)
    parser.add_argument("--draw", type=Path, metavar="FILE.png", help="draw the curve (needs matplotlib)")
    parser.add_argument("--json", action="store_true", help="print the curve as JSON instead of a table")


def _run(options: argparse.Namespace) -> int:
    from olla.cli.load import load  # loads PyTorch

    with redirect_stdout(sys.stderr):  # whatever the model prints
        found = load(options).frontier(
            spill_dir=options.spill_dir, points=options.points, time_limit=options.time_limit
        )
    if options.draw:
        from olla.show.draw import draw_frontier

        draw_frontier(found, options.draw)
    if options.json:
        print(json.dumps(found.to_dict()))
    else:
        print(found)
        print(f"{found.persistent_bytes:,} bytes live across steps: a budget is a peak, and these.")
    return 0

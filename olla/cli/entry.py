"""``olla``: its commands, what goes wrong, and the exit status."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from olla.cli import bench, check, draw, frontier, model, place, plan
from olla.errors import InfeasibleError, OllaError

__all__ = ["main"]

_COMMANDS = (plan, frontier, bench, check, draw, place, model)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``olla``; returns the exit status: 0, 1 for what is not sound or does not fit, 2 for bad input."""
    parser = argparse.ArgumentParser(
        prog="olla",
        description="Plan the order and the addresses of a step's tensors: less memory, the same numbers.",
        epilog="olla COMMAND --help has examples. The exit status is 0, or 1 for what is not sound or does not fit, "
        "or 2 for bad input.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in _COMMANDS:
        command.add_to(commands)
    try:
        options = parser.parse_args(arguments)
        return int(options.run(options))
    except InfeasibleError as error:
        print(f"olla: {error}", file=sys.stderr)
        return 1
    except (OllaError, OSError) as error:
        print(f"olla: {error}", file=sys.stderr)
        return 2

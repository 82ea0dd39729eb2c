"""``olla check``: whether everything that a plan claims is true."""

from __future__ import annotations

import argparse
from pathlib import Path

from olla.cli.options import Commands, add_command
from olla.graph.check import check
from olla.graph.graph import Graph
from olla.graph.plan import Plan

__all__ = ["add_to"]


def add_to(commands: Commands) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "check",
        _run,
        purpose="check everything that a plan claims, independently of the planners",
        examples="  olla check graph.json plan.json",
    )
    parser.add_argument("graph", type=Path, metavar="GRAPH.json")
    parser.add_argument("plan", type=Path, metavar="PLAN.json")


def _run(options: argparse.Namespace) -> int:
    violations = check(Graph.load(options.graph), Plan.load(options.plan))
    for violation in violations:
        print(violation)
    print(f"{len(violations)} violation(s)" if violations else "The plan is sound.")
    return 1 if violations else 0

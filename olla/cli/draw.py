"""``olla draw``: a plan, or a graph, into something to look at."""

from __future__ import annotations

import argparse
from pathlib import Path

from olla.cli.options import Commands, add_command
from olla.graph.graph import Graph
from olla.graph.plan import Plan
from olla.show import draw

__all__ = ["add_to"]

_EXAMPLES = """\
  olla draw graph.json plan.html --plan plan.json
  olla draw graph.json arena.png --plan plan.json --what addresses
  olla draw graph.json graph.dot
"""


def add_to(commands: Commands) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "draw",
        _run,
        purpose="draw a plan, or a graph",
        about="Pictures need matplotlib, those of a graph pydot and Graphviz; .dot pydot; the rest nothing.",
        examples=_EXAMPLES,
    )
    parser.add_argument("graph", type=Path, metavar="GRAPH.json")
    parser.add_argument(
        "out",
        type=Path,
        metavar="FILE",
        help=".png, .svg, .pdf: a picture; .html: a page to explore; .dot: the graph; "
        ".json: a trace for Perfetto; .pickle: a snapshot for PyTorch's memory visualizer",
    )
    parser.add_argument("--plan", type=Path, metavar="PLAN.json", help="without it, only the graph can be drawn")
    parser.add_argument(
        "--what",
        choices=("memory", "addresses", "graph"),
        help="of a picture; default: memory with a plan, else the graph",
    )


def _run(options: argparse.Namespace) -> int:
    graph, plan = Graph.load(options.graph), Plan.load(options.plan) if options.plan else None
    draw(graph, plan, options.out, options.what)
    print(f"{len(graph.ops):,} ops and {len(graph.storages):,} storages are in {options.out}")
    return 0

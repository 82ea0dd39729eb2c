"""``olla model``: a graph into its integer program."""

from __future__ import annotations

import argparse
from pathlib import Path

from olla.cli.options import Commands, add_command
from olla.graph.graph import Graph
from olla.graph.plan import Plan
from olla.show.progress import stage

__all__ = ["add_to"]


def add_to(commands: Commands) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "model",
        _run,
        purpose="write the integer program of a graph, to study it or to solve elsewhere",
        examples="  olla model graph.json joint.mps --form joint",
    )
    parser.add_argument("graph", type=Path, metavar="GRAPH.json")
    parser.add_argument("out", type=Path, metavar="FILE.lp|.mps")
    parser.add_argument(
        "--form", choices=("order", "address", "joint"), default="order", help="what is decided; default %(default)s"
    )


def _run(options: argparse.Namespace) -> int:
    from olla.ilp import AddressForm, JointForm, OrderForm
    from olla.order.schedule import schedule
    from olla.place.allocate import allocate
    from olla.place.place import intervals, padded, place

    graph = Graph.load(options.graph)
    with stage("planning", None):
        found = schedule(graph)
        if options.form == "order":
            model = OrderForm(graph, found).model
        elif options.form == "address":
            buffers = padded(intervals(graph, found.order), 1)
            model = AddressForm(buffers, allocate(buffers)).model
        else:
            model = JointForm(graph, Plan.of(graph, found, place(graph, found.order, alignment=1))).model
    model.write(options.out)
    rows, columns = model.problem().matrix.shape
    print(f"{columns:,} variables and {rows:,} rows are in {options.out}")
    return 0

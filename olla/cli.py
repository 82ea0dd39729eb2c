"""The command line: the planners for people who bring their own graph. Works without PyTorch."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from olla.errors import InfeasibleError, OllaError
from olla.graph.check import check, verify
from olla.graph.graph import Graph
from olla.graph.plan import Plan
from olla.show import draw
from olla.show.progress import stage
from olla.solve import require

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``olla``; returns the exit status: 0, 1 for what is not sound or does not fit, 2 for bad input."""
    parser = argparse.ArgumentParser(
        prog="olla", description="Plan the order of a dataflow graph's operators, and the addresses of buffers."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    plan = commands.add_parser("plan", help="find an order that needs little memory, and prove how little")
    plan.add_argument("graph", type=Path, metavar="GRAPH.json", help="a graph in the format of docs/graphs.md")
    plan.add_argument("--place", action="store_true", help="plan addresses in one arena, too")
    plan.add_argument("--alignment", type=int, default=64, metavar="BYTES", help="of addresses; default %(default)s")
    plan.add_argument(
        "--solver", metavar="NAME", help="gurobi, cpsat, highs or auto: improve what the planners leave open, if small"
    )
    plan.add_argument("--out", type=Path, metavar="PLAN.json", help="write the plan, with the order, here")
    plan.add_argument("--time-limit", type=float, default=60.0, metavar="SECONDS", help="default %(default)s")
    plan.add_argument("--json", action="store_true", help="print the plan as JSON instead of a summary")
    plan.set_defaults(run=_plan)

    checker = commands.add_parser("check", help="check everything that a plan claims, independently of the planners")
    checker.add_argument("graph", type=Path, metavar="GRAPH.json")
    checker.add_argument("plan", type=Path, metavar="PLAN.json")
    checker.set_defaults(run=_check)

    place = commands.add_parser("place", help="give buffers with known lifetimes addresses in one arena")
    place.add_argument("buffers", type=Path, metavar="FILE.csv", help="id,lower,upper,size[,alignment][,offset]")
    place.add_argument(
        "--capacity", type=int, metavar="BYTES", help="what must suffice; default: as little as possible"
    )
    place.add_argument("--alignment", type=int, default=1, metavar="BYTES", help="of all offsets; default %(default)s")
    place.add_argument("--time-limit", type=float, default=60.0, metavar="SECONDS", help="default %(default)s")
    place.add_argument("--out", type=Path, metavar="FILE.csv", help="write the buffers with their offsets here")
    place.add_argument("--draw", type=Path, metavar="FILE.png", help="draw the placement (needs matplotlib)")
    place.set_defaults(run=_place)

    drawing = commands.add_parser(
        "draw",
        help="draw a plan, or a graph",
        description="Pictures need matplotlib, those of a graph pydot and Graphviz; .dot pydot; the rest nothing.",
    )
    drawing.add_argument("graph", type=Path, metavar="GRAPH.json")
    drawing.add_argument(
        "out",
        type=Path,
        metavar="FILE",
        help=".png, .svg, .pdf: a picture; .html: a page to explore; .dot: the graph; "
        ".json: a trace for Perfetto; .pickle: a snapshot for PyTorch's memory visualizer",
    )
    drawing.add_argument("--plan", type=Path, metavar="PLAN.json", help="without it, only the graph can be drawn")
    drawing.add_argument(
        "--what",
        choices=("memory", "addresses", "graph"),
        help="of a picture; default: memory with a plan, else the graph",
    )
    drawing.set_defaults(run=_draw)

    model = commands.add_parser("model", help="write the integer program of a graph, to study it or to solve elsewhere")
    model.add_argument("graph", type=Path, metavar="GRAPH.json")
    model.add_argument("out", type=Path, metavar="FILE.lp|.mps")
    model.add_argument(
        "--form", choices=("order", "address", "joint"), default="order", help="what is decided; default %(default)s"
    )
    model.set_defaults(run=_model)

    options = parser.parse_args(arguments)
    try:
        return int(options.run(options))
    except InfeasibleError as error:
        print(f"olla: {error}", file=sys.stderr)
        return 1
    except (OllaError, OSError) as error:
        print(f"olla: {error}", file=sys.stderr)
        return 2


def _plan(options: argparse.Namespace) -> int:
    from olla.order.schedule import schedule  # loads the compiled kernels

    if options.solver:
        require(options.solver)
    graph = Graph.load(options.graph)
    with stage(f"ordering {len(graph.ops):,} ops", None):
        found = schedule(graph, time_limit=options.time_limit)
        if options.solver:
            from olla.ilp.improve import improved_order

            found = improved_order(graph, found, solver=options.solver, time_limit=options.time_limit)
    plan = Plan.of(graph, found)
    if options.place:
        from olla.place.place import place

        with stage("placing", None):
            limits = {"alignment": options.alignment, "time_limit": options.time_limit}
            plan = plan.at(place(graph, plan.order, **limits))
            if options.solver:
                from olla.ilp.improve import improved_plan

                plan = improved_plan(graph, plan, solver=options.solver, **limits)
    verify(graph, plan)
    if options.out:
        plan.save(options.out)
    if options.json:
        print(json.dumps(plan.to_dict()))
        return 0
    print(f"program order  {plan.baseline_peak_bytes:>20,} bytes")
    print(f"planned        {plan.peak_bytes:>20,} bytes  ({plan.saving:.1%} less, {plan.method}, {plan.seconds:.2f} s)")
    print(f"lower bound    {plan.lower_bound_bytes:>20,} bytes  ({plan.status}, gap {plan.gap:.4%})")
    if plan.arena_bytes is not None:
        wasted = f"{plan.fragmentation:.4%} of it fragmentation"
        print(f"arena          {plan.arena_bytes:>20,} bytes  ({wasted}; outputs are outside)")
    print(f"persistent     {plan.persistent_bytes:>20,} bytes  (not part of the above)")
    return 0


def _check(options: argparse.Namespace) -> int:
    violations = check(Graph.load(options.graph), Plan.load(options.plan))
    for violation in violations:
        print(violation)
    print(f"{len(violations)} violation(s)" if violations else "The plan is sound.")
    return 1 if violations else 0


def _place(options: argparse.Namespace) -> int:
    from olla.place.allocate import allocate  # loads the compiled kernels
    from olla.place.buffers import read_csv, write_csv

    buffers = read_csv(options.buffers)
    with stage(f"placing {len(buffers):,} buffers", None):
        placement = allocate(buffers, options.capacity, alignment=options.alignment, time_limit=options.time_limit)
    if options.out:
        write_csv(options.out, buffers, placement.offsets)
    if options.draw:
        from olla.show.draw import draw_placement

        draw_placement(buffers, placement, options.draw)
    print(f"arena        {placement.arena_bytes:>20,} bytes  ({placement.method}, {placement.seconds:.2f} s)")
    print(f"lower bound  {placement.lower_bound_bytes:>20,} bytes  ({placement.status}, gap {placement.gap:.4%})")
    return 0


def _draw(options: argparse.Namespace) -> int:
    graph, plan = Graph.load(options.graph), Plan.load(options.plan) if options.plan else None
    draw(graph, plan, options.out, options.what)
    print(f"{len(graph.ops):,} ops and {len(graph.storages):,} storages are in {options.out}")
    return 0


def _model(options: argparse.Namespace) -> int:
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

"""The command line: the planners for people who bring their own graph. Works without PyTorch."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from olla.errors import OllaError
from olla.graph.check import check, verify
from olla.graph.graph import Graph
from olla.graph.plan import Plan
from olla.show.progress import stage

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``olla``; returns the exit status: 0, 1 for a plan that is not sound, 2 for bad input."""
    parser = argparse.ArgumentParser(prog="olla", description="Plan the order of a dataflow graph's operators.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    plan = commands.add_parser("plan", help="find an order that needs little memory, and prove how little")
    plan.add_argument("graph", type=Path, metavar="GRAPH.json", help="a graph in the format of docs/graphs.md")
    plan.add_argument("--out", type=Path, metavar="PLAN.json", help="write the plan, with the order, here")
    plan.add_argument("--time-limit", type=float, default=60.0, metavar="SECONDS", help="default %(default)s")
    plan.add_argument("--json", action="store_true", help="print the plan as JSON instead of a summary")
    plan.set_defaults(run=_plan)

    checker = commands.add_parser("check", help="check everything that a plan claims, independently of the planners")
    checker.add_argument("graph", type=Path, metavar="GRAPH.json")
    checker.add_argument("plan", type=Path, metavar="PLAN.json")
    checker.set_defaults(run=_check)

    options = parser.parse_args(arguments)
    try:
        return int(options.run(options))
    except (OllaError, OSError) as error:
        print(f"olla: {error}", file=sys.stderr)
        return 2


def _plan(options: argparse.Namespace) -> int:
    from olla.order.schedule import schedule  # loads the compiled kernels

    graph = Graph.load(options.graph)
    with stage(f"ordering {len(graph.ops):,} ops", None):
        plan = Plan.of(graph, schedule(graph, time_limit=options.time_limit))
    verify(graph, plan)
    if options.out:
        plan.save(options.out)
    if options.json:
        print(json.dumps(plan.to_dict()))
        return 0
    print(f"program order  {plan.baseline_peak_bytes:>20,} bytes")
    print(f"planned        {plan.peak_bytes:>20,} bytes  ({plan.saving:.1%} less, {plan.method}, {plan.seconds:.2f} s)")
    print(f"lower bound    {plan.lower_bound_bytes:>20,} bytes  ({plan.status}, gap {plan.gap:.4%})")
    print(f"persistent     {plan.persistent_bytes:>20,} bytes  (not part of the above)")
    return 0


def _check(options: argparse.Namespace) -> int:
    violations = check(Graph.load(options.graph), Plan.load(options.plan))
    for violation in violations:
        print(violation)
    print(f"{len(violations)} violation(s)" if violations else "The plan is sound.")
    return 1 if violations else 0

"""``olla plan``: a graph, or a model, into a plan."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path

from olla.cli.options import (
    GRAPHS,
    MODELS,
    Commands,
    add_budget,
    add_command,
    add_model,
    add_solver,
    add_time_limit,
    is_graph,
)
from olla.errors import OllaError
from olla.graph.check import verify
from olla.graph.graph import Graph
from olla.graph.plan import Plan
from olla.show.progress import stage
from olla.solve import require

__all__ = ["add_to"]

_EXAMPLES = """\
  olla plan torchvision:resnet50 --batch-size 8
  olla plan transformers:gpt2 --shape 256 --optimizer AdamW --budget 60%
  olla plan train.py --place --out plan.json --graph-out graph.json
  olla plan graph.json --place --out plan.json
"""
_OF_MODELS = {
    "train": None, "batch_size": None, "shape": None, "optimizer": None, "device": "meta", "budget": None,
    "spill_dir": None,
}  # fmt: skip


def add_to(commands: Commands) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "plan",
        _run,
        purpose="find an order that needs little memory, and prove how little",
        about=MODELS + GRAPHS,
        examples=_EXAMPLES,
    )
    add_model(parser, devices=("meta", "cpu", "cuda"))
    add_budget(parser)
    parser.add_argument("--place", action="store_true", help="plan addresses in one arena, too")
    parser.add_argument("--alignment", type=int, default=64, metavar="BYTES", help="of addresses; default %(default)s")
    add_solver(parser)
    add_time_limit(parser)
    parser.add_argument("--out", type=Path, metavar="PLAN.json", help="write the plan, with the order, here")
    parser.add_argument("--graph-out", type=Path, metavar="GRAPH.json", help="write the graph that is planned here")
    parser.add_argument("--json", action="store_true", help="print the plan as JSON instead of a summary")


def _run(options: argparse.Namespace) -> int:
    if options.solver:
        require(options.solver)
    graph, plan = _of_graph(options) if is_graph(options.target) else _of_model(options)
    if options.place:
        plan = _placed(graph, plan, options)
    verify(graph, plan)
    if options.graph_out:
        graph.save(options.graph_out)
    if options.out:
        plan.save(options.out)
    if options.json:
        print(json.dumps(plan.to_dict()))
    else:
        print("\n".join(_summary(plan)))
    return 0


def _of_graph(options: argparse.Namespace) -> tuple[Graph, Plan]:
    from olla.order.schedule import schedule  # loads the compiled kernels

    for name, unset in _OF_MODELS.items():
        if getattr(options, name) != unset:
            option = "--inference" if options.train is False and name == "train" else f"--{name.replace('_', '-')}"
            raise OllaError(f"{options.target} is a graph: {option} is for models")
    graph = Graph.load(options.target)
    with stage(f"ordering {len(graph.ops):,} ops", None):
        found = schedule(graph, time_limit=options.time_limit)
        if options.solver:
            from olla.ilp.improve import improved_order

            found = improved_order(graph, found, solver=options.solver, time_limit=options.time_limit)
    return graph, Plan.of(graph, found)


def _of_model(options: argparse.Namespace) -> tuple[Graph, Plan]:
    from olla.cli.load import load  # loads PyTorch

    with redirect_stdout(sys.stderr):  # whatever the model prints
        return load(options).planned(
            memory_budget=options.budget,
            spill_dir=options.spill_dir,
            solver=options.solver,
            time_limit=options.time_limit,
        )


def _placed(graph: Graph, plan: Plan, options: argparse.Namespace) -> Plan:
    from olla.place.place import place

    limits = {"alignment": options.alignment, "time_limit": options.time_limit}
    with stage("placing", None):
        plan = plan.at(place(graph, plan.order, plan.spills, **limits))
        if options.solver and options.budget is None:
            from olla.ilp.improve import improved_plan

            plan = improved_plan(graph, plan, solver=options.solver, **limits)
    return plan


def _summary(plan: Plan) -> Iterator[str]:
    yield f"program order  {plan.baseline_peak_bytes:>20,} bytes"
    planned = f"{plan.saving:.1%} less, {plan.method}, {plan.seconds:.2f} s"
    yield f"planned        {plan.peak_bytes:>20,} bytes  ({planned})"
    yield f"lower bound    {plan.lower_bound_bytes:>20,} bytes  ({plan.status}, gap {plan.gap:.4%})"
    if plan.arena_bytes is not None:
        wasted = f"{plan.fragmentation:.4%} of it fragmentation"
        yield f"arena          {plan.arena_bytes:>20,} bytes  ({wasted}; outputs are outside)"
    yield f"persistent     {plan.persistent_bytes:>20,} bytes  (not part of the above)"
    if plan.recomputed or plan.spills:
        yield f"recomputed     {len(plan.recomputed):>20,} ops"
        yield f"spilled        {len(plan.spills):>20,} storages"
        least = f"expected; {plan.extra_seconds_lower_bound:.4f} s at least"
        yield f"extra time     {plan.extra_seconds:>20.4f} s  ({least})"

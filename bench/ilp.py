"""Rows of the paper's integer program: one form, given to one solver."""

from __future__ import annotations

import argparse
import time
from typing import Any

import olla
from bench.row import PLACING_SECONDS, Row, captured
from olla.graph.check import verify
from olla.graph.lifetimes import least_bytes
from olla.ilp import AddressForm, FitForm, JointForm, OrderForm
from olla.ilp.fit_form import warm_start
from olla.place.place import Interval, addresses, intervals, pack, padded
from olla.solve import solve

ILP = ("alexnet", "vgg16", "squeezenet1_0", "resnet18")
FORMS = ("order", "address", "joint", "recompute", "spill")
_SECONDS_PER_OP = 1e-5  # an estimate, with the bytes that it touches
_BYTES_PER_SECOND = 1e10


def solve_form(row: Row, options: argparse.Namespace) -> None:
    """State one form of the integer program, and let one solver improve what the planners found."""
    graph, _ = captured(row)
    known = olla.schedule(graph)
    row.ops, row.planning_seconds = len(graph.ops), known.seconds
    lives = intervals(graph, known.order)
    started = time.perf_counter()
    form = _form(row.form, graph, known, lives)
    problem = form.model.problem()
    row.build_seconds = time.perf_counter() - started
    row.constraints, row.variables = problem.matrix.shape
    result = solve(form.model, row.solver, time_limit=options.solve_seconds)
    row.solve_seconds, row.status = result.seconds, result.status.value
    if isinstance(form, AddressForm):
        placement = form.placement(result)
        row.objective, row.bound = placement.arena_bytes, placement.lower_bound_bytes
        verify(graph, olla.Plan.of(graph, known, addresses(graph, known.order, placement)))
    elif isinstance(form, JointForm):
        plan = form.plan(result)
        row.objective, row.bound = plan.arena_bytes, plan.arena_lower_bound_bytes
        verify(graph, plan)
    else:
        found = form.schedule(result)
        is_order = isinstance(form, OrderForm)
        row.objective = found.peak_bytes if is_order else found.extra_seconds
        row.bound = found.lower_bound_bytes if is_order else found.extra_seconds_lower_bound
        verify(graph, olla.Plan.of(graph, found))


def _form(name: str, graph: olla.Graph, known: olla.Schedule, lives: list[Interval]) -> Any:
    if name == "order":
        return OrderForm(graph, known)
    placement = pack(lives, alignment=1, time_limit=PLACING_SECONDS)
    if name == "address":
        return AddressForm(padded(lives, 1), placement)
    if name == "joint":
        return JointForm(graph, olla.Plan.of(graph, known, addresses(graph, known.order, placement)))
    sizes = [sum(graph.storages[storage].size for storage in op.touches) for op in graph.ops]
    seconds = [_SECONDS_PER_OP + size / _BYTES_PER_SECOND for size in sizes]
    budget = (least_bytes(graph)[0] + known.peak_bytes) // 2
    repeats, bandwidth = (3, None) if name == "recompute" else (0, _BYTES_PER_SECOND)
    start = warm_start(graph, known, budget, seconds, repeats, bandwidth, time_limit=PLACING_SECONDS)
    return FitForm(graph, budget, seconds, start=start, repeats=repeats, bytes_per_second=bandwidth)

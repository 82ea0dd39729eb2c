"""What is planned only, on the meta device: nothing is allocated."""

from __future__ import annotations

import argparse
import time

import olla
from bench.row import PLACING_SECONDS, Row, captured, planned_workload_of
from olla.graph.check import verify
from olla.graph.events import Allocate, eager_events_of, events_of
from olla.graph.lifetimes import live_intervals, peak_bytes
from olla.measure.caching_allocator import replay
from olla.order.baselines import INDUCTOR
from olla.order.schedule import program_order
from olla.place.place import place

_CURVE_SECONDS = 10.0  # for the trade of bytes against time


def simulate(row: Row, options: argparse.Namespace) -> None:
    """Plan order and addresses of one case, beside Inductor's orders and what CUDA's caching allocator reserves."""
    graph = captured(row)
    plan = olla.Plan.of(graph, program_order(graph) if options.skip_node_ordering else olla.schedule(graph))
    row.note(plan)
    row.note_simulated(plan)
    for name, rule in INDUCTOR.items():
        setattr(row, f"inductor_{name}_bytes", peak_bytes(graph, rule(graph)))
    started = time.perf_counter()
    plan = plan.at(place(graph, plan.order, time_limit=PLACING_SECONDS))
    row.placing_seconds = time.perf_counter() - started
    verify(graph, plan)
    row.simulated_arena_bytes, row.simulated_fragmentation = plan.arena_bytes, plan.fragmentation
    row.reserved_eager_bytes = replay(eager_events_of(graph)).peak_reserved_bytes
    row.reserved_planned_bytes = replay(events_of(graph, plan.order)).peak_reserved_bytes
    row.reserved_arena_bytes = replay(_blocks(graph, plan)).peak_reserved_bytes
    if row.mode == "train" and not options.skip_node_ordering:
        _halve(row, plan)


def _halve(row: Row, plan: olla.Plan) -> None:
    """What half of eager PyTorch's peak costs: the first point there, or below, on the curve that users ask for."""
    if plan.peak_bytes * 2 <= plan.baseline_peak_bytes:
        row.half_extra = row.half_least_extra = 0.0  # the order alone is enough
        return
    workload, training = planned_workload_of(row)
    curve = olla.frontier(workload.model, workload.inputs, **training, time_limit=_CURVE_SECONDS, progress=False)
    row.smallest_bytes = curve.schedules[-1].peak_bytes
    for found in curve.schedules:
        if found.peak_bytes * 2 <= curve.baseline_peak_bytes:
            row.half_extra = found.extra_seconds / curve.seconds
            row.half_least_extra = found.extra_seconds_lower_bound / curve.seconds
            return


def _blocks(graph: olla.Graph, plan: olla.Plan) -> list[Allocate]:
    """What a step in an arena asks for: the arena, and the results, which outlive the step, outside of it."""
    lives = zip(live_intervals(graph, plan.order), plan.offsets or (), strict=True)
    sizes = [plan.arena_bytes or 0, *(graph.storages[life.storage].size for life, at in lives if at is None)]
    return [Allocate(name, size) for name, size in enumerate(sizes) if size]

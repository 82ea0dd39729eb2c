"""What is planned only, on the meta device: nothing is allocated."""

from __future__ import annotations

import argparse
import time

import olla
from bench.row import FITTING_SECONDS, PLACING_SECONDS, Row, captured
from olla.fit.fitting import fitted
from olla.graph.check import verify
from olla.graph.events import Allocate, eager_events_of, events_of
from olla.graph.lifetimes import live_intervals, peak_bytes
from olla.measure.caching_allocator import replay
from olla.order.baselines import INDUCTOR
from olla.order.schedule import program_order
from olla.place.place import place


def simulate(row: Row, options: argparse.Namespace) -> None:
    """Plan order and addresses of one case, beside Inductor's orders and what CUDA's caching allocator reserves."""
    graph, seconds = captured(row)
    order = program_order(graph) if options.skip_node_ordering else olla.schedule(graph)
    plan = olla.Plan.of(graph, order)
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
    if row.mode == "train" and not (options.quick or options.skip_node_ordering):
        _halve(row, graph, order, seconds)


def _halve(row: Row, graph: olla.Graph, order: olla.Schedule, seconds: tuple[float, ...]) -> None:
    """What half of eager PyTorch's peak costs, in time."""
    half = (row.simulated_eager_bytes or 0) // 2
    try:
        found = fitted(graph, order, seconds, half, time_limit=FITTING_SECONDS)
    except olla.InfeasibleError as error:
        row.smallest_bytes = error.best_bytes
        return
    row.half_extra = found.extra_seconds / sum(seconds)
    row.half_least_extra = found.extra_seconds_lower_bound / sum(seconds)
    row.half_seconds = found.seconds if found is not order else 0.0


def _blocks(graph: olla.Graph, plan: olla.Plan) -> list[Allocate]:
    """What a step in an arena asks for: the arena, and the results, which outlive the step, outside of it."""
    lives = zip(live_intervals(graph, plan.order), plan.offsets or (), strict=True)
    sizes = [plan.arena_bytes or 0, *(graph.storages[life.storage].size for life, at in lives if at is None)]
    return [Allocate(name, size) for name, size in enumerate(sizes) if size]

"""Rows that are only planned, on the meta device: nothing is allocated."""

from __future__ import annotations

import argparse
import statistics
import time

import olla
from bench.row import PLACING_SECONDS, Row, captured
from olla.graph.check import verify
from olla.graph.events import eager_events_of, events_of
from olla.graph.lifetimes import peak_bytes
from olla.measure import caching_allocator
from olla.order.baselines import INDUCTOR
from olla.place.place import place


def simulate(row: Row, options: argparse.Namespace) -> None:
    """Plan one case, and say what PyTorch Inductor's orders and CUDA's caching allocator make of it."""
    graph = captured(row)
    plan = olla.Plan.of(graph, olla.schedule(graph))
    row.note(plan)
    row.note_simulated(plan)
    row.reserved_eager_bytes = caching_allocator.replay(eager_events_of(graph)).peak_reserved_bytes
    row.reserved_planned_bytes = caching_allocator.replay(events_of(graph, plan.order)).peak_reserved_bytes
    for name, rule in INDUCTOR.items():
        setattr(row, f"inductor_{name}_bytes", peak_bytes(graph, rule(graph)))
    if options.generate_addresses:
        started = time.perf_counter()
        plan = plan.at(place(graph, plan.order, time_limit=PLACING_SECONDS))
        row.placing_seconds = time.perf_counter() - started
        verify(graph, plan)
        row.arena_bytes, row.fragmentation = plan.arena_bytes, plan.fragmentation


def summary(rows: list[Row]) -> str:
    """What the simulated rows say together."""
    lines = []
    for mode in ("train", "eval"):
        done = [row for row in rows if row.mode == mode and row.gap is not None]
        if not done:
            continue
        gaps, seconds = [row.gap or 0.0 for row in done], [row.planning_seconds or 0.0 for row in done]
        others = [(row, getattr(row, f"inductor_{name}_bytes")) for row in done for name in INDUCTOR]
        others += [(row, row.simulated_eager_bytes) for row in done]
        beaten = sum(other < row.simulated_planned_bytes for row, other in others)
        lines.append(
            f"{mode}: {len(done)} graphs, gap at most 0.01 % on {sum(gap <= 1e-4 for gap in gaps)}, worst "
            f"{max(gaps):.4%}; planned in {statistics.median(seconds):.2f} s (median), {max(seconds):.2f} s (worst); "
            f"worse than Inductor's orders or program order in {beaten} of {len(others)} comparisons"
        )
    lost = {order: _fragmentation(rows, order) for order in ("eager", "planned")}
    if all(lost.values()):
        shares = (f"{name} {statistics.median(of):.1%} (median), {max(of):.1%} (worst)" for name, of in lost.items())
        lines.append(f"CUDA's caching allocator would lose to fragmentation: {'; '.join(shares)}")
    return "\n".join(lines)


def _fragmentation(rows: list[Row], order: str) -> list[float]:
    """What share of the bytes that the caching allocator reserves is above the simulated peak, row by row."""
    peaks = [(getattr(row, f"simulated_{order}_bytes"), getattr(row, f"reserved_{order}_bytes")) for row in rows]
    return [1 - peak / reserved for peak, reserved in peaks if reserved]

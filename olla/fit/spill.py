"""Which storages to send away for a while, so that a step fits into fewer bytes: those needed last (Belady's rule)."""

from __future__ import annotations

import heapq
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from olla.errors import InfeasibleError
from olla.graph.graph import Graph
from olla.graph.lifetimes import Spill, least_bytes, memory_profile, peak_bytes
from olla.graph.plan import Schedule

__all__ = ["Bandwidth", "belady", "spill", "spill_seconds"]


class Bandwidth(NamedTuple):
    """How fast spilled bytes move, in bytes per second."""

    write: float  # away from the device
    read: float  # and back


def spill(graph: Graph, start: Schedule, bandwidth: Bandwidth, budget_bytes: int) -> Schedule:
    """The order of ``start``, in which ops may repeat, with spills that keep its peak within ``budget_bytes``.

    Persistent storages are no part of the budget, and stay. No bound of ``extra_seconds`` is proven (0).

    Raises
    ------
    InfeasibleError
        If nothing fits, because one op alone needs more; ``best_bytes`` is what that op needs, and can be reached.
    """
    started = time.perf_counter()
    spills = belady(graph, start.order, budget_bytes)
    floor, pinned = least_bytes(graph)
    if spills is None:
        message = f"nothing fits into {budget_bytes:,} bytes: {pinned} alone needs {floor:,} bytes"
        raise InfeasibleError(message, lower_bound_bytes=floor, best_bytes=floor)
    if not spills:
        return start
    peak = peak_bytes(graph, start.order, spills)
    return replace(
        start,
        peak_bytes=peak,
        lower_bound_bytes=min(peak, floor),
        method="spilling",
        seconds=start.seconds + time.perf_counter() - started,
        spills=spills,
        extra_seconds=start.extra_seconds + spill_seconds(graph, spills, bandwidth),
        extra_seconds_lower_bound=0.0,
    )


def spill_seconds(graph: Graph, spills: Sequence[Spill], bandwidth: Bandwidth) -> float:
    """What moving the bytes of ``spills`` away and back takes, if nothing else goes on meanwhile."""
    moved = sum(graph.storages[spill.storage].size for spill in spills)
    return moved / bandwidth.write + moved / bandwidth.read


def belady(graph: Graph, order: Sequence[int], budget_bytes: int) -> tuple[Spill, ...] | None:
    """Wherever ``order`` needs more than ``budget_bytes``, what is needed last of all is away; None: that cannot do.

    Everything that an op does not touch may be away, so only an op (or the outputs) can be too large.
    """
    if budget_bytes < least_bytes(graph)[0]:
        return None
    live = np.array(memory_profile(graph, order), np.int64)
    later = sorted(_gaps(graph, order), key=lambda gap: -gap.start)
    waiting: list[tuple[int, int, Spill]] = []  # a heap; first comes what is needed last, the largest of these
    spills: list[Spill] = []
    for step in range(len(order)):
        while later and later[-1].start <= step:
            gap = later.pop()
            heapq.heappush(waiting, (-gap.end, -graph.storages[gap.storage].size, gap))
        while live[step] > budget_bytes:
            _, minus_size, gap = heapq.heappop(waiting)
            live[gap.start : gap.end] += minus_size
            spills.append(gap)
    needed = []  # what others, spilled later, have made unnecessary comes back, the largest first
    for found in sorted(spills, key=lambda found: -graph.storages[found.storage].size):
        there, size = live[found.start : found.end], graph.storages[found.storage].size
        if there.max() + size <= budget_bytes:
            there += size
        else:
            needed.append(found)
    return tuple(sorted(needed))


def _gaps(graph: Graph, order: Sequence[int]) -> Iterator[Spill]:
    """Wherever a storage waits: from the step after a use to the next use, or to the end, if it is an output."""
    last: dict[int, int] = {}
    for step, index in enumerate(order):
        op = graph.ops[index]
        for storage in op.reads + op.writes:
            if storage in last and last[storage] + 1 < step:
                yield Spill(storage, last[storage] + 1, step)
        for storage in op.touches:
            if graph.storages[storage].size and not graph.storages[storage].persistent:
                last[storage] = step
    for storage in set(graph.outputs):
        if storage in last and last[storage] + 1 < len(order):
            yield Spill(storage, last[storage] + 1, len(order))

"""Which storages to send away for a while, so that a step fits into fewer bytes: those needed last (Belady's rule)."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from olla.graph.graph import Graph
from olla.graph.lifetimes import Spill, least_bytes, memory_profile

__all__ = ["Bandwidth", "belady", "spill_seconds"]


class Bandwidth(NamedTuple):
    """How fast spilled bytes move, in bytes per second."""

    write: float  # away from the device
    read: float  # and back


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

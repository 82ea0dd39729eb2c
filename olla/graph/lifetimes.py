"""When each storage is alive under a given order, and how many bytes that makes at each step.

This is the reference: plain Python, written to be read. The planners use a compiled twin
(``olla/order/problem.py``), which the tests hold against this one.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

from olla.graph.graph import Graph

__all__ = ["LiveInterval", "live_intervals", "memory_profile", "peak_bytes"]


class LiveInterval(NamedTuple):
    """One life of a storage: it holds its bytes at the steps ``start <= step < end``."""

    storage: int
    start: int
    end: int


def live_intervals(graph: Graph, order: Sequence[int]) -> tuple[LiveInterval, ...]:
    """Every life of every storage that is not persistent, sorted by start and storage.

    ``order`` may repeat ops: a storage that is created again starts a new life, and a reader
    uses the latest one. A life lasts from its creation to its last use, both included; the last
    life of an output lasts to the end.
    """
    start: dict[int, int] = {}
    last_use: dict[int, int] = {}
    lives: list[LiveInterval] = []
    for step, index in enumerate(order):
        op = graph.ops[index]
        for storage in op.creates:
            if storage in start:
                lives.append(LiveInterval(storage, start[storage], last_use[storage] + 1))
            start[storage] = step
        for storage in op.touches:
            last_use[storage] = step
    outputs = set(graph.outputs)
    for storage, first in start.items():
        end = len(order) if storage in outputs else last_use[storage] + 1
        lives.append(LiveInterval(storage, first, end))
    return tuple(sorted(lives, key=lambda life: (life.start, life.storage)))


def memory_profile(graph: Graph, order: Sequence[int]) -> tuple[int, ...]:
    """Live bytes at each step of ``order``, workspaces included, persistent storages not.

    ``profile[t] = workspace(order[t]) + sum of sizes of the storages alive at step t``.
    """
    change = [0] * (len(order) + 1)
    for storage, start, end in live_intervals(graph, order):
        change[start] += graph.storages[storage].size
        change[end] -= graph.storages[storage].size
    live = accumulate(change[:-1])
    return tuple(size + graph.ops[index].workspace for size, index in zip(live, order, strict=True))


def peak_bytes(graph: Graph, order: Sequence[int]) -> int:
    """The largest entry of :func:`memory_profile`, in bytes; 0 for an empty order."""
    return max(memory_profile(graph, order), default=0)

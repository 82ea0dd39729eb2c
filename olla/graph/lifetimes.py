"""When each storage is in memory under a given order, and how many bytes that makes at each step.

This is the reference: plain Python, written to be read. The planners use a compiled twin
(``olla/order/problem.py``), which the tests hold against this one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import NamedTuple

from olla.errors import InvalidPlanError
from olla.graph.graph import Graph

__all__ = ["LiveInterval", "Spill", "eager_peak_bytes", "least_bytes", "live_intervals", "memory_profile", "peak_bytes"]


class LiveInterval(NamedTuple):
    """One life of a storage: it holds its bytes at the steps ``start <= step < end``."""

    storage: int
    start: int
    end: int


class Spill(NamedTuple):
    """A storage leaves the device: its bytes are elsewhere at the steps ``start <= step < end``, and then back.

    An output may come back after the last step.
    """

    storage: int
    start: int
    end: int


def live_intervals(graph: Graph, order: Sequence[int], spills: Sequence[Spill] = ()) -> tuple[LiveInterval, ...]:
    """Every life of every storage that is not persistent, sorted by start and storage.

    ``order`` may repeat ops: a storage that is created again starts a new life, and a reader
    uses the latest one. A life lasts from its creation to its last use, both included; the last
    life of an output lasts to the end. What is spilled has a life before and one after.

    Raises
    ------
    InvalidPlanError
        If a spill is not inside of a life.
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
    for storage, away, back in spills:
        for index, life in enumerate(lives):
            needed = life.end - (storage not in outputs or life.end < len(order))
            if life.storage == storage and life.start < away < back <= needed:
                lives[index : index + 1] = [life._replace(end=away), life._replace(start=back)]
                break
        else:
            raise InvalidPlanError(f"storage {storage} cannot be spilled from step {away} to {back}: it is not alive")
    lives = [life for life in lives if life.start < life.end]
    return tuple(sorted(lives, key=lambda life: (life.start, life.storage)))


def memory_profile(graph: Graph, order: Sequence[int], spills: Sequence[Spill] = ()) -> tuple[int, ...]:
    """Live bytes at each step of ``order``, workspaces included, persistent storages not.

    ``profile[t] = workspace(order[t]) + sum of sizes of the storages alive at step t``.
    """
    change = [0] * (len(order) + 1)
    for storage, start, end in live_intervals(graph, order, spills):
        change[start] += graph.storages[storage].size
        change[end] -= graph.storages[storage].size
    live = accumulate(change[:-1])
    return tuple(size + graph.ops[index].workspace for size, index in zip(live, order, strict=True))


def eager_peak_bytes(graph: Graph) -> int:
    """What eager PyTorch needs: program order, and nothing that an op does without."""
    ops = tuple(replace(op, workspace=op.workspace + op.reused) for op in graph.ops)
    storages = tuple(replace(storage, size=storage.eager_size) for storage in graph.storages)
    eager = replace(graph, ops=ops, storages=storages)
    return peak_bytes(eager, range(len(eager.ops)))


def peak_bytes(graph: Graph, order: Sequence[int], spills: Sequence[Spill] = ()) -> int:
    """The largest entry of :func:`memory_profile`, in bytes, or all outputs together if that is more."""
    outputs = sum(
        graph.storages[storage].size for storage in set(graph.outputs) if not graph.storages[storage].persistent
    )
    return max(outputs, *memory_profile(graph, order, spills), 0)


def least_bytes(graph: Graph) -> tuple[int, str]:
    """The bytes that nothing can do without, and what needs them: an op with all that it touches, or the outputs."""

    def size(storages: Iterable[int]) -> int:
        return sum(graph.storages[s].size for s in storages if not graph.storages[s].persistent)

    needs = [(size(op.touches) + op.workspace, f"op {op.name!r}") for op in graph.ops]
    return max([(size(set(graph.outputs)), "the outputs"), *needs], key=lambda need: need[0])

"""The orders that PyTorch Inductor would choose among, to compare with; the library does not use them.

The rules are those of ``topological_sort_lpmf``, ``_bfs`` and ``_dfs`` in ``torch/_inductor/memory.py``
(torch 2.14), applied to the ops of a graph. Inductor computes all of them, and program order, and keeps
the best, for the forward and for the backward graph.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable

from olla.graph.graph import Graph

__all__ = ["INDUCTOR", "breadth_first", "depth_first", "least_peak_memory_first"]


def least_peak_memory_first(graph: Graph) -> tuple[int, ...]:
    """Of the ready ops that do not raise the peak, the one that leaves least; else the smallest one.

    After *Buffer memory optimization for video codec application modeled in Simulink*, DAC 2006.
    """
    sizes = [0 if storage.persistent else storage.size for storage in graph.storages]
    created = [sum(sizes[storage] for storage in op.creates) for op in graph.ops]
    users = [0] * len(sizes)  # ops that have yet to touch a storage; outputs have one more, which never runs
    for storage in (storage for op in graph.ops for storage in op.touches):
        users[storage] += 1
    for storage in set(graph.outputs):
        users[storage] += 1

    def freed(op: int) -> int:
        return sum(sizes[storage] for storage in graph.ops[op].touches if users[storage] == 1)

    waiting = [len(before) for before in graph.predecessors]
    ready = {op for op, count in enumerate(waiting) if not count}
    order: list[int] = []
    live, peak = 0, sum(sizes[storage] for storage in set(graph.outputs))
    while ready:
        room = peak - live
        op = min(ready, key=lambda op: (created[op] if created[op] > room else 0, created[op] - freed(op), op))
        live += created[op]
        peak = max(peak, live)
        live -= freed(op)
        for storage in graph.ops[op].touches:
            users[storage] -= 1
        _run(graph, op, order, waiting, ready.add)
        ready.remove(op)
    return tuple(order)


def breadth_first(graph: Graph) -> tuple[int, ...]:
    """The ready op whose predecessors ran earliest."""
    waiting = [len(before) for before in graph.predecessors]
    place: dict[int, int] = {}
    ready: list[tuple[list[int], int]] = []

    def add(op: int) -> None:
        heapq.heappush(ready, (sorted(place[before] for before in graph.predecessors[op]), op))

    for op, count in enumerate(waiting):
        if not count:
            add(op)
    order: list[int] = []
    while ready:
        _, op = heapq.heappop(ready)
        place[op] = len(order)
        _run(graph, op, order, waiting, add)
    return tuple(order)


def depth_first(graph: Graph) -> tuple[int, ...]:
    """Each op after its predecessors, those that touch least first; ops that touch least are asked for first."""
    sizes = [0 if storage.persistent else storage.size for storage in graph.storages]
    touched = [sum(sizes[storage] for storage in op.touches) for op in graph.ops]
    order: dict[int, None] = {}
    pending = sorted(range(len(graph.ops)), key=lambda op: (touched[op], op), reverse=True)
    while pending:
        op = pending[-1]
        before = [other for other in graph.predecessors[op] if other not in order]
        if op not in order and before:
            pending += sorted(before, key=lambda op: (touched[op], op), reverse=True)
        else:
            order.setdefault(pending.pop())
    return tuple(order)


INDUCTOR: dict[str, Callable[[Graph], tuple[int, ...]]] = {
    "lpmf": least_peak_memory_first,
    "bfs": breadth_first,
    "dfs": depth_first,
}


def _run(graph: Graph, op: int, order: list[int], waiting: list[int], add: Callable[[int], None]) -> None:
    order.append(op)
    for after in graph.successors[op]:
        waiting[after] -= 1
        if not waiting[after]:
            add(after)

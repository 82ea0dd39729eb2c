"""The chain of the collectives of a step: the one order in which they start, in every plan and on every rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from heapq import heapify, heappop, heappush
from itertools import pairwise

from olla.capture.average import PROCESS_GROUP, START_SUM
from olla.capture.lower import Lowered
from olla.graph.graph import Graph

__all__ = ["chained", "collectives", "unchained"]


def collectives(lowered: Lowered) -> list[int]:
    """The ops that start a sum, in program order."""
    return [op for op, node in enumerate(lowered.nodes) if node.target is START_SUM]


def unchained(lowered: Lowered) -> Graph:
    """The graph without the chain: to plan with it is to find out which chain costs nothing. No ranks may run it so."""
    graph = lowered.graph
    group = {
        index for index, storage in enumerate(graph.storages) if storage.name == PROCESS_GROUP and not storage.size
    }
    ops = list(graph.ops)
    for op in collectives(lowered):
        ops[op] = replace(ops[op], writes=tuple(s for s in ops[op].writes if s not in group))
    return replace(graph, ops=tuple(ops))


def chained(lowered: Lowered, order: Sequence[int]) -> Lowered:
    """The same step with its collectives chained as they stand in ``order``, a legal order of :func:`unchained`.

    Program order is what chains them, so they move there, and all that need not move stays.
    """
    starts = set(collectives(lowered))
    free = unchained(lowered)
    after = [[*ops] for ops in free.successors]
    missing = [len(ops) for ops in free.predecessors]
    for earlier, later in pairwise(op for op in order if op in starts):
        after[earlier].append(later)
        missing[later] += 1
    ready = [op for op, count in enumerate(missing) if not count]
    heapify(ready)
    program: list[int] = []
    while ready:
        program.append(heappop(ready))
        for op in after[program[-1]]:
            missing[op] -= 1
            if not missing[op]:
                heappush(ready, op)
    graph = replace(lowered.graph, ops=tuple(lowered.graph.ops[op] for op in program))
    return replace(lowered, graph=graph, nodes=tuple(lowered.nodes[op] for op in program))

"""Large-neighbourhood search: the ops around the peak of an order are ordered anew, by the search for targets."""

from __future__ import annotations

import time

import numpy as np

from olla.order.portfolio import profile
from olla.order.problem import Adjacency, Integers, Problem
from olla.order.search import search

__all__ = ["improved", "window"]

_WIDTHS = (16, 32, 64)  # steps in a window; most searches among so few ops end in milliseconds
_NODES = 500


def improved(problem: Problem, order: Integers, deadline: float) -> Integers:
    """``order``, or one with a lower peak, found by ordering windows of consecutive steps around the peak anew."""
    while time.perf_counter() < deadline:
        memory = profile(problem, order)
        found = _lowered(problem, order, memory, int(np.argmax(memory)), deadline)
        if found is None:
            return order
        order = found
    return order


def _lowered(problem: Problem, order: Integers, memory: Integers, step: int, deadline: float) -> Integers | None:
    """The order with less in memory at most around ``step`` than now."""
    for width in _WIDTHS:
        for share in (2, 4, 1):  # of the window before the step: a half, three quarters, all but a few
            start = max(0, step - width // share)
            end = min(len(order), start + width)
            target = int(memory[start:end].max()) - 1
            answer = search(window(problem, order, start, end), target, nodes=_NODES, deadline=deadline)
            if answer.order is not None and answer.peak <= target:
                return np.concatenate([order[:start], order[start:end][answer.order[1:-1] - 1], order[end:]])
    return None


def window(problem: Problem, order: Integers, start: int, end: int) -> Problem:
    """The problem of ordering the steps ``start .. end-1`` of ``order`` anew, the others being as they are.

    Op 0 stands for all steps before, the last op for all after, and op ``i`` for step ``start + i - 1``.
    """
    count = end - start + 2
    number = np.full(problem.op_count, count - 1)
    number[order[:start]] = 0
    number[order[start:end]] = np.arange(1, count - 1)
    touching, touched = np.unique(np.stack([number[problem.touches.owners], problem.touches.items]), axis=1)
    inside = np.zeros(len(problem.sizes), bool)  # alive while some op of the window runs
    inside[touched[(touching > 0) & (touching < count - 1)]] = True
    inside[np.intersect1d(touched[touching == 0], touched[touching == count - 1])] = True
    kept = inside[touched]
    compact = np.cumsum(inside) - 1
    created = problem.creates.items[inside[problem.creates.items]]
    creator = number[problem.creates.owners[inside[problem.creates.items]]]

    middle = np.arange(1, count - 1)
    earlier = np.concatenate([number[problem.predecessors.items], np.zeros(count - 2, np.int64), middle])
    later = np.concatenate([number[problem.predecessors.owners], middle, np.full(count - 2, count - 1)])
    earlier, later = np.unique(np.stack([earlier, later])[:, earlier != later], axis=1)
    return Problem(
        predecessors=Adjacency.grouped(later, earlier, count),
        successors=Adjacency.grouped(earlier, later, count),
        creates=Adjacency.grouped(creator, compact[created], count),
        touches=Adjacency.grouped(touching[kept], compact[touched[kept]], count),
        sizes=problem.sizes[inside],
        workspace=np.concatenate([[0], problem.workspace[order[start:end]], [0]]),
        priority=np.arange(count),
    )

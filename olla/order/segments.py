"""Parts of a problem that can be ordered on their own: the steps between two given ones."""

from __future__ import annotations

import numpy as np

from olla.order.bits import ancestors, padded, weights
from olla.order.problem import Adjacency, Integers, Problem

__all__ = ["segments", "window", "with_window"]


def segments(problem: Problem) -> list[tuple[int, int]]:
    """The steps ``start .. end-1`` between ops that stand at the same step in every order.

    Such an op runs before or after each other op, whatever the order; so what is between two of them
    is the same ops in every order, and can be ordered without regard to the rest.
    """
    one_each = padded(np.ones(problem.op_count, np.int64))
    before = weights(ancestors(problem), one_each)
    after = weights(ancestors(problem.reversed()), one_each)
    fixed = np.sort(before[before + after == problem.op_count + 1] - 1)
    starts, ends = np.concatenate([[0], fixed]), np.concatenate([fixed + 1, [problem.op_count]])
    return [(start, end) for start, end in zip(starts.tolist(), ends.tolist(), strict=True) if end - start > 2]


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


def with_window(order: Integers, start: int, end: int, inner: Integers) -> Integers:
    """``order`` with its steps ``start .. end-1`` as in ``inner``, an order of their :func:`window`."""
    return np.concatenate([order[:start], order[start:end][inner[1:-1] - 1], order[end:]])

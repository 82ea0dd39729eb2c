"""What no order can avoid: lower bounds on the peak.

Each bound looks at one op ``v`` and asks what is in memory while it runs. The largest over all ops
bounds the peak of every order from below. :mod:`olla.order.precedence` makes both stronger.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import maximum_flow

from olla.order.bits import padded, touched, weights
from olla.order.problem import Adjacency, Integers, Problem

__all__ = ["CutBound", "alike", "must_live", "set_cut"]

_LARGEST_SET = 32
_TOGETHER = 4096  # storages looked at together: a few hundred bytes for each op


def must_live(problem: Problem) -> Integers:
    """For each op, bytes that are in memory when it runs, whatever the order.

    A storage is alive from the first to the last op that touches it. If one of them is op ``v``
    or an ancestor of it, and one is ``v`` or a descendant, then the storage is alive while ``v``
    runs. So ``must_live(v) = workspace(v) + sum of sizes of these storages``.
    """
    result = problem.workspace.copy()
    backwards = problem.reversed()
    for first in range(0, len(problem.sizes), _TOGETHER):
        sizes = problem.sizes[first : first + _TOGETHER]
        made, wanted = (touched(p, first, first + len(sizes)) for p in (problem, backwards))
        result += weights(made & wanted, padded(sizes))
    return result


class CutBound:
    """The cut bound of each op: the least that can be in memory while it runs.

    When ``v`` runs, the ops divide into those that have run and those that have not. The ancestors
    of ``v`` are on the first side, its descendants on the other, and the first side holds all
    ancestors of its members. A storage is alive if its creator is on the first side, and an op that
    touches it is not. The cheapest such division is a minimum cut, which a maximum flow gives
    (Ford and Fulkerson); no order can be at any other division when ``v`` runs.

    It is never below :func:`must_live`, and takes some milliseconds per op where that takes none.
    """

    _LARGEST = 2**30  # the flow is computed in 32-bit integers

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        count = problem.op_count
        self._source, self._sink = count + len(problem.sizes), count + len(problem.sizes) + 1
        self._creator = np.empty(len(problem.sizes), np.int64)
        self._creator[problem.creates.items] = problem.creates.owners
        self._touching = problem.touches.owners
        self._later = problem.predecessors.owners
        # Capacities are rounded down to multiples of a unit, so that the bound stays a bound.
        divisor = math.gcd(*problem.sizes.tolist()) or 1
        self._unit = divisor * (int(problem.sizes.sum()) // divisor // self._LARGEST + 1)

    def at(self, op: int) -> int:
        """Bytes that are in memory while ``op`` runs, at least."""
        problem, count = self._problem, self._problem.op_count
        side = np.arange(count)
        side[_closure(problem.predecessors, op)] = self._source
        side[_closure(problem.successors, op)] = self._sink
        present = problem.touches.row(op)
        certain = int(problem.workspace[op] + problem.sizes[present].sum())
        counted = np.ones(len(problem.sizes), bool)
        counted[present] = False
        counted &= side[self._creator] != self._sink

        storages = np.nonzero(counted)[0]
        touched = problem.touches.items
        of_use = counted[touched] & (side[self._touching] != side[self._creator[touched]])
        of_order = (side[self._later] != self._sink) & (side[problem.predecessors.items] != self._source)
        of_order &= side[self._later] != side[problem.predecessors.items]
        tails = [side[self._creator[storages]], count + touched[of_use], side[self._later[of_order]]]
        heads = [count + storages, side[self._touching[of_use]], side[problem.predecessors.items[of_order]]]
        limits = np.full(len(tails[1]) + len(tails[2]), self._LARGEST)
        capacities = np.concatenate([problem.sizes[storages] // self._unit, limits])
        size = self._sink + 1
        network = coo_matrix((capacities, (np.concatenate(tails), np.concatenate(heads))), (size, size)).tocsr()
        network.data = np.minimum(network.data, self._LARGEST).astype(np.int32)  # parallel edges were summed
        flow = maximum_flow(network, self._source, self._sink).flow_value
        return certain + int(flow) * self._unit


def set_cut(problem: Problem, ops: Sequence[int], floor: int) -> int:
    """Bytes that are in memory, at least, when the first of ``ops`` runs, or the last of them; or ``floor``.

    One of them runs before the others, whatever the order. So the least of their cut bounds, each
    with that op before the others, is a bound; and the same for the last. Of ops that are alike,
    each alone can run cheaply, after some others or before them; but not all can.
    """

    def least(pairs: Callable[[int, int], tuple[int, int]]) -> int:
        smallest = sys.maxsize
        for op in ops:
            chosen = problem.with_pairs([pairs(op, other) for other in ops if other != op])
            smallest = min(smallest, CutBound(chosen).at(op))
            if smallest <= floor:
                return floor
        return smallest

    return max(least(lambda op, other: (op, other)), least(lambda op, other: (other, op)))


def alike(problem: Problem, op: int) -> list[int]:
    """``op`` and others that touch storages of the same sizes, none of which must run before another."""

    def sizes(other: int) -> list[int]:
        return sorted(problem.sizes[problem.touches.row(other)].tolist())

    wanted = sizes(op)
    found, excluded = [op], {*_closure(problem.predecessors, op), *_closure(problem.successors, op)}
    for other in np.nonzero(problem.workspace == problem.workspace[op])[0].tolist():
        if other not in excluded and sizes(other) == wanted:
            found.append(other)
            excluded.update(_closure(problem.predecessors, other), _closure(problem.successors, other))
            if len(found) == _LARGEST_SET:
                break
    return found


def _closure(relation: Adjacency, op: int) -> list[int]:
    """``op`` and everything that it reaches."""
    reached, pending = {op}, [op]
    while pending:
        for other in relation.row(pending.pop()).tolist():
            if other not in reached:
                reached.add(other)
                pending.append(other)
    return list(reached)

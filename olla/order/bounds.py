"""What no order can avoid: lower bounds on the peak.

Each bound looks at one op ``v`` and asks what is in memory while it runs. The largest over all ops
bounds the peak of every order from below. :mod:`olla.order.precedence` makes both stronger.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import maximum_flow

from olla.order.problem import Adjacency, Integers, Problem

__all__ = ["CutBound", "must_live"]


def must_live(problem: Problem) -> Integers:
    """For each op, bytes that are in memory when it runs, whatever the order.

    A storage is alive from the first to the last op that touches it. If one of them is op ``v``
    or an ancestor of it, and one is ``v`` or a descendant, then the storage is alive while ``v``
    runs. So ``must_live(v) = workspace(v) + sum of sizes of these storages``.
    """
    before = _reached(problem)
    after = _reached(problem.reversed())
    size_in_bytes = (len(problem.sizes) + 7) // 8
    padded = np.zeros(size_in_bytes * 8, np.int64)
    padded[: len(problem.sizes)] = problem.sizes
    result = problem.workspace.copy()
    for op in range(problem.op_count):
        packed = (before[op] & after[op]).to_bytes(size_in_bytes, "little")
        bits = np.unpackbits(np.frombuffer(packed, np.uint8), bitorder="little")
        result[op] += int(padded[bits.view(bool)].sum())
    return result


def _reached(problem: Problem) -> list[int]:
    """For each op, as a set of bits, the storages that it or an ancestor touches.

    Python integers as bit sets: one ``|`` per dependency, at memory speed.
    """
    touched = [0] * problem.op_count
    for op in np.argsort(problem.priority).tolist():
        bits = 0
        for storage in problem.touches.row(op).tolist():
            bits |= 1 << storage
        for other in problem.predecessors.row(op).tolist():
            bits |= touched[other]
        touched[op] = bits
    return touched


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
        op_of_creation = np.repeat(np.arange(count), np.diff(problem.creates.start))
        self._creator[problem.creates.items] = op_of_creation
        self._touching = np.repeat(np.arange(count), np.diff(problem.touches.start))
        self._later = np.repeat(np.arange(count), np.diff(problem.predecessors.start))
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


def _closure(relation: Adjacency, op: int) -> list[int]:
    """``op`` and everything that it reaches."""
    reached, pending = {op}, [op]
    while pending:
        for other in relation.row(pending.pop()).tolist():
            if other not in reached:
                reached.add(other)
                pending.append(other)
    return list(reached)

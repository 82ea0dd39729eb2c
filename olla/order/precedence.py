"""What an order within a target must look like: precedences that follow from the target itself.

If running ``u`` before ``v`` would keep more than the target in memory at ``u`` or at ``v``, then
``v`` comes first in every order within the target. Such pairs make others follow, and so on. Either
this contradicts itself, and no order is within the target: a lower bound. Or it ends with fewer
orders to choose among, and a list schedule that respects them is more likely to be within it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from olla.order.problem import Adjacency, Problem

__all__ = ["Precedence", "TooLateError"]

Matrix = npt.NDArray[np.bool_]
Numbers = npt.NDArray[np.float64]


class TooLateError(Exception):
    """The deadline passed before propagation had ended."""


@dataclass(frozen=True)
class Precedence:
    """A partial order of the ops: ``before[v, u]`` says that ``u`` is ``v`` or runs before it."""

    problem: Problem
    before: Matrix

    @classmethod
    def of(cls, problem: Problem) -> Precedence:
        """The order that the dependencies alone demand."""
        before = np.zeros((problem.op_count, problem.op_count), bool)
        for op in np.argsort(problem.priority).tolist():
            before[op] = before[problem.predecessors.row(op)].any(axis=0)
            before[op, op] = True
        return cls(problem, before)

    def within(self, target: int, deadline: float) -> Precedence | None:
        """All precedences that follow from a peak of at most ``target`` bytes; None if there is none.

        Raises
        ------
        TooLateError
            At ``deadline``, a time of ``time.perf_counter()``.
        """
        before = self.before
        while True:
            if time.perf_counter() > deadline:
                raise TooLateError
            excluded = self._excluded(before, target)
            if excluded is None or (excluded & excluded.T).any():
                return None
            if not excluded.any():
                return replace(self, before=before)
            before = _closed(before | excluded)
            if np.count_nonzero(before & before.T) > len(before):
                return None  # a cycle

    def _excluded(self, before: Matrix, target: int) -> Matrix | None:
        """Pairs ``[u, v]`` such that ``u`` cannot run before ``v``; None if some op cannot run at all.

        With ``made[k, v]``: some op that touches storage ``k`` is ``v`` or before it, and
        ``wanted[k, v]``: one is ``v`` or after it, the storages with both are alive while ``v`` runs
        (see ``must_live``). If ``u`` runs before ``v``, then also alive at ``v`` are those that are
        wanted there and made at ``u``; and alive at ``u`` are those made there and wanted at ``v``.
        """
        problem = self.problem
        touches = np.zeros((len(problem.sizes), len(before)), np.float32)
        touches[problem.touches.items, np.repeat(np.arange(len(before)), np.diff(problem.touches.start))] = 1
        relation = before.astype(np.float32)
        made, wanted = touches @ relation.T > 0, touches @ relation > 0
        sizes = problem.sizes.astype(np.float64)  # sums of bytes are exact below 2**53
        alive: Numbers = sizes @ (made & wanted) + problem.workspace
        if alive.max(initial=0) > target:
            return None
        column = sizes[:, None]
        at_later = alive[None, :] + made.T.astype(np.float64) @ (column * (wanted & ~made))
        at_earlier = alive[:, None] + (column * (made & ~wanted)).T @ wanted.astype(np.float64)
        open_pairs = ~(before | before.T)
        excluded: Matrix = open_pairs & ((at_later > target) | (at_earlier > target))
        return excluded

    def restricted(self) -> Problem:
        """The problem of ordering the ops within these precedences."""
        strict = self.before.copy()
        np.fill_diagonal(strict, False)
        relation = strict.astype(np.float32)
        needed = strict & ~(relation @ relation > 0)  # without those that follow from others
        predecessors = Adjacency.of(np.nonzero(row)[0].tolist() for row in needed)
        place = np.empty(len(strict), np.int64)
        place[np.lexsort((self.problem.priority, strict.sum(axis=1)))] = np.arange(len(strict))
        return replace(
            self.problem,
            predecessors=predecessors,
            successors=predecessors.transpose(len(strict)),
            priority=place,
        )


def _closed(relation: Matrix) -> Matrix:
    """The transitive closure, by squaring."""
    while True:
        numbers = relation.astype(np.float32)
        squared: Matrix = numbers @ numbers > 0
        if np.array_equal(squared, relation):
            return relation
        relation = squared

"""The variables of an order: which op runs at which step, and which storage is kept in memory there.

There are as many steps as ops, and one op runs at each, so that nothing is overstated. An op that must run
after three others cannot run before the fourth step, and so on: only within these *windows* are there
variables (OLLA, arXiv 2210.12924, section 4.1).
"""

from __future__ import annotations

from math import ceil, gcd, isfinite

import numpy as np
import numpy.typing as npt

from olla.order.bits import ancestors, has
from olla.order.problem import Integers, Problem
from olla.solve import Model, Result

__all__ = ["Program", "proven_bytes"]

_EPSILON = 1e-6  # by which a solver's bound may be too high


class Program:
    """A model with the variables of an order: ``run[op, step]`` and ``keep[storage, step]``; -1: there is none.

    Storages of one op are created together, so the paper's variables "create" are one for each op.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.model = Model()
        self.before = _before(problem)
        self.first = self.before.sum(axis=1) - 1
        self.last = problem.op_count - self.before.sum(axis=0)
        self.creator = problem.creates.transpose(len(problem.sizes)).items
        self.unit = gcd(*problem.sizes.tolist(), *problem.workspace.tolist()) or 1  # bytes
        steps = np.arange(problem.op_count)
        self.run = self._variables("create", self.first, self.last, steps)
        users = [problem.touchers.row(storage) for storage in range(len(problem.sizes))]
        begin = self.first[self.creator] + 1
        end = np.array([self.last[of].max() for of in users], np.int64)
        self.keep = self._variables("preserve", begin, end, steps)
        # Between the latest creation and the earliest last use, there is no choice.
        surely = np.array([self.first[of].max() for of in users], np.int64)
        certain = (steps > self.last[self.creator][:, None]) & (steps <= surely[:, None])
        kept = self.keep[certain & (self.keep >= 0)]
        self.model.constrain("window", np.arange(len(kept)), kept, 1, "==", np.ones(len(kept)))

    def _variables(self, family: str, begin: Integers, end: Integers, steps: Integers) -> Integers:
        inside = (steps >= begin[:, None]) & (steps <= end[:, None])
        found = np.full(inside.shape, -1, np.int64)
        found[inside] = self.model.binaries(family, int(inside.sum()))
        return found

    def order(self, values: npt.NDArray[np.float64]) -> tuple[int, ...]:
        """The ops as a solution orders them."""
        runs = np.where(self.run >= 0, values[self.run], 0).argmax(axis=1)
        return tuple(np.argsort(runs).tolist())

    def values_of(self, order: Integers) -> tuple[Integers, Integers]:
        """Variables, and their values in an order."""
        place = np.empty(len(order), np.int64)
        place[order] = np.arange(len(order))
        touchers = self.problem.touchers
        end = np.array([place[touchers.row(e)].max() for e in range(len(self.problem.sizes))], np.int64)
        steps = np.arange(len(order))
        alive = (steps > place[self.creator][:, None]) & (steps <= end[:, None])
        runs = steps == place[:, None]
        columns = np.concatenate([self.run[self.run >= 0], self.keep[self.keep >= 0]])
        return columns, np.concatenate([runs[self.run >= 0], alive[self.keep >= 0]]).astype(np.int64)


def proven_bytes(result: Result, unit: int) -> int:
    """The least number of bytes that a solver has not excluded, if they come in units; 0 if it has proven nothing."""
    return ceil(result.bound - _EPSILON) * unit if isfinite(result.bound) else 0


def _before(problem: Problem) -> npt.NDArray[np.bool_]:
    """[op, other]: whether ``other`` must run before ``op``, or is ``op``."""
    before = ancestors(problem)
    ops = range(problem.op_count)
    return np.array([[has(before, op, other) for other in ops] for op in ops])

"""The program of all orders: every op runs once, and there are as many steps as ops.

An op that must run after three others cannot run before the fourth step, and so on: only within
these *windows* are there variables (OLLA, arXiv 2210.12924, section 4.1).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from olla.ilp.program import Program
from olla.order.bits import ancestors, has
from olla.order.problem import Adjacency, Problem

__all__ = ["OrderProgram"]


class OrderProgram(Program):
    """The variables of an order of ``problem``. A storage has one content here: precedence says when it is written."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        creator = problem.creates.transpose(len(problem.sizes)).items
        ops, storages = problem.touches.owners, problem.touches.items
        used = creator[storages] != ops
        super().__init__(
            steps=problem.op_count,
            maker=creator,
            storage=np.arange(len(creator)),
            uses=Adjacency.grouped(ops[used], storages[used], problem.op_count),
            sizes=problem.sizes,
            workspace=problem.workspace,
        )
        self.before = _before(problem)
        self.first = self.before.sum(axis=1) - 1
        self.last = problem.op_count - self.before.sum(axis=0)
        self.run = self.variables("create", self.first, self.last)
        touchers = [problem.touchers.row(storage) for storage in range(len(problem.sizes))]
        begin = self.first[self.maker] + 1
        end = np.array([self.last[of].max() for of in touchers], np.int64)
        self.keep = self.variables("preserve", begin, end)
        # Between the latest creation and the earliest last use, there is no choice.
        surely = np.array([self.first[of].max() for of in touchers], np.int64)
        certain = (self.steps > self.last[self.maker][:, None]) & (self.steps <= surely[:, None])
        kept = self.keep[certain & (self.keep >= 0)]
        self.model.constrain("window", np.arange(len(kept)), kept, 1, "==", np.ones(len(kept)))


def _before(problem: Problem) -> npt.NDArray[np.bool_]:
    """[op, other]: whether ``other`` must run before ``op``, or is ``op``."""
    before = ancestors(problem)
    ops = range(problem.op_count)
    return np.array([[has(before, op, other) for other in ops] for op in ops])

"""The variables of a sequence of ops: which op runs at which step, and what is in memory there.

At most one op runs at each step, so that nothing is overstated. What an op makes of a storage, by creating it or by
writing it in place, is a *content*: a storage has one for each of its makers, and one at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, gcd, isfinite

import numpy as np
import numpy.typing as npt

from olla.graph.lifetimes import Spill
from olla.order.problem import Adjacency, Integers
from olla.solve import Model, Result

__all__ = ["Program", "proven_bytes"]

_EPSILON = 1e-6  # by which a solver's bound may be too high


class Program:
    """A model with ``run[op, step]``, ``keep[content, step]`` and ``fetch[content, step]``; -1: there is none.

    The paper's variables "create" are one for each op here, because all that an op makes is made together.
    """

    def __init__(
        self, *, steps: int, maker: Integers, storage: Integers, uses: Adjacency, sizes: Integers, workspace: Integers
    ) -> None:
        self.model = Model()
        self.steps = np.arange(steps)
        self.maker = maker  # content -> op
        self.storage = storage  # content -> storage; its first content is the one that creates it
        self.uses = uses  # op -> contents that it finds in memory
        self.sizes = sizes  # bytes of each storage
        self.workspace = workspace  # bytes of each op
        self.unit = gcd(*sizes.tolist(), *workspace.tolist()) or 1  # bytes
        self.run = np.full((len(workspace), steps), -1)
        self.keep = np.full((len(maker), steps), -1)
        self.fetch = self.keep.copy()

    @property
    def creator(self) -> Integers:
        """Storage -> op."""
        first = np.unique(self.storage, return_index=True)[1]
        return self.maker[first]

    def variables(self, family: str, begin: Integers, end: Integers) -> Integers:
        """A binary for each row and each step from ``begin`` to ``end``, both included."""
        inside = (self.steps >= begin[:, None]) & (self.steps <= end[:, None])
        found = np.full(inside.shape, -1, np.int64)
        found[inside] = self.model.binaries(family, int(inside.sum()))
        return found

    def sequence(self, values: npt.NDArray[np.float64]) -> Integers:
        """What runs at each step in a solution; -1: nothing."""
        runs = np.where(self.run >= 0, values[self.run], 0)
        return np.where(runs.any(axis=0), runs.argmax(axis=0), -1)

    def values_of(self, sequence: Sequence[int] | Integers, spills: Sequence[Spill] = ()) -> tuple[Integers, Integers]:
        """Variables, and their values if this runs at each step, and is spilled in between."""
        sequence = np.asarray(sequence)
        kept = np.zeros(self.keep.shape, bool)
        fetched = np.zeros(self.keep.shape, bool)
        for op, content in zip(self.uses.owners, self.uses.items, strict=True):
            made = np.flatnonzero(sequence == self.maker[content])
            for step in np.flatnonzero(sequence == op):
                latest = made[made < step].max()
                kept[content, latest + 1 : step + 1] = True
        for spill in spills:
            for content in np.flatnonzero(self.storage == spill.storage):
                fetched[content, spill.end] = kept[content, spill.end]
                kept[content, spill.start : spill.end + 1] = False
        runs = sequence == np.arange(len(self.run))[:, None]
        pairs = ((self.run, runs), (self.keep, kept), (self.fetch, fetched))
        there = [(variables[variables >= 0], value[variables >= 0]) for variables, value in pairs]
        columns, values = (np.concatenate(parts) for parts in zip(*there, strict=True))
        return columns, values.astype(np.int64)


def proven_bytes(result: Result, unit: int) -> int:
    """The least number of bytes that a solver has not excluded, if they come in units; 0 if it has proven nothing."""
    return ceil(result.bound - _EPSILON) * unit if isfinite(result.bound) else 0

"""Sizes as multiples of one unit: a problem with far fewer placements, and at best the same bound.

Steps of transformers and the like consist of a few sizes that are multiples of each other, and of little
beside them. Large buffers are rounded up to whole units; then a search, which otherwise drowns in
offsets that differ by some bytes, has few to try. What is small fills the rest.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from olla.place.buffers import Buffer
from olla.place.problem import Integers, Problem

__all__ = ["Grid", "grids"]

_UNITS = 1_000  # that the bound has, at most: finer grids help little
_COST = 6e-3  # of the bound: what rounding may add to it


@dataclass(frozen=True, slots=True)
class Grid:
    """The large buffers of a problem, in units."""

    unit: int  # bytes
    large: npt.NDArray[np.bool_]  # for each buffer of the problem
    problem: Problem  # of the large ones

    def around(self, whole: Problem, offsets: Integers) -> Problem:
        """What is left of the whole problem when the large buffers are at ``offsets``, in units."""
        fixed = whole.fixed.copy()
        fixed[self.large] = offsets * self.unit
        return replace(whole, fixed=fixed)


def grids(problem: Problem) -> Iterator[Grid]:
    """Those that hardly raise the bound, coarsest first; none if buffers are fixed, or all are whole units already."""
    if (problem.fixed >= 0).any() or not len(problem.sizes):
        return
    alignment = int(np.lcm.reduce(problem.alignment))
    found: list[Grid] = []
    for size in np.unique(problem.sizes[problem.sizes * _UNITS > problem.bound]).tolist():
        unit = -(-size // alignment) * alignment
        large = problem.sizes * 2 >= unit
        if not large.any() or not (problem.sizes % unit).any():
            continue
        small = problem.ordered(np.flatnonzero(~large))
        lives = zip(
            problem.first[large].tolist(), problem.last[large].tolist(), problem.sizes[large].tolist(), strict=True
        )
        coarse = Problem.of([Buffer(first, last + 1, -(-size // unit)) for first, last, size in lives])
        if coarse.bound * unit + small.bound <= problem.bound * (1 + _COST):
            found.append(Grid(unit, large, coarse))
    yield from sorted(found, key=lambda grid: -grid.unit)

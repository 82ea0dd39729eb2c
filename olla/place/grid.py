"""What is large alone, in whole units: a problem with far fewer placements, and at best nearly the same bound.

A search drowns in what is small, and in offsets that differ by some bytes. Steps of transformers and the like consist
of a few sizes that are multiples of each other, and of little beside them: so large buffers are rounded up to whole
units, coarse ones first. Where sizes are of all kinds, as in convolutional networks, the finest unit, which is the
alignment, still leaves out the small ones: often more than half of all. They fill the rest.
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
_COST = 6e-3  # of the bound: what rounding, and filling the rest, may add to it
_SMALL = (1e-3, 1e-4)  # of the bound: what is left out, where nothing is rounded


@dataclass(frozen=True, slots=True)
class Grid:
    """The large buffers of a problem, in units."""

    unit: int  # bytes
    is_rounded: bool  # whether sizes are rounded up to units; else the unit is the alignment
    large: npt.NDArray[np.bool_]  # for each buffer of the problem
    problem: Problem  # of the large ones

    def around(self, whole: Problem, offsets: Integers) -> Problem:
        """What is left of the whole problem when the large buffers are at ``offsets``, in units."""
        fixed = whole.fixed.copy()
        fixed[self.large] = offsets * self.unit
        return replace(whole, fixed=fixed)


def grids(problem: Problem, most: int) -> Iterator[Grid]:
    """Those that hardly raise the bound, first the finest, then the coarsest; none if buffers are fixed.

    Each has ``most`` large buffers or less. Where the problem has more than that, there is the finest one only.
    """
    if (problem.fixed >= 0).any() or not len(problem.sizes):
        return
    alignment, sizes = int(np.lcm.reduce(problem.alignment)), problem.sizes
    for small in _SMALL:
        grid = _grid(problem, alignment, sizes >= small * problem.bound, is_rounded=False)
        if grid:
            if grid.large.sum() <= most:
                yield grid
            break
    if len(problem.sizes) > most:
        return
    units = {-(-size // alignment) * alignment for size in sizes[sizes * _UNITS > problem.bound].tolist()}
    for unit in sorted(units, reverse=True):
        grid = _grid(problem, unit, sizes * 2 >= unit, is_rounded=True) if (sizes % unit).any() else None
        if grid:
            yield grid


def _grid(problem: Problem, unit: int, large: npt.NDArray[np.bool_], *, is_rounded: bool) -> Grid | None:
    """None if nothing is gained, or if that costs too much."""
    if not large.any() or (large.all() and not is_rounded):
        return None
    small, coarse = (problem.ordered(np.flatnonzero(chosen)) for chosen in (~large, large))
    coarse = replace(coarse, sizes=-(-coarse.sizes // unit), alignment=np.ones_like(coarse.sizes))
    if is_rounded:
        coarse = _with_sections_of_its_own(coarse)
    if coarse.bound * unit + small.bound > problem.bound * (1 + _COST):
        return None
    return Grid(unit, is_rounded, large, coarse)


def _with_sections_of_its_own(problem: Problem) -> Problem:
    """Where sizes are few, searches take seconds with them (ViT) and find nothing without; else it is the reverse."""
    lives = zip(problem.first.tolist(), problem.last.tolist(), problem.sizes.tolist(), strict=True)
    return Problem.of([Buffer(first, last + 1, size) for first, last, size in lives])

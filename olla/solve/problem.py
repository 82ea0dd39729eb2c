"""A mixed-integer linear program as flat arrays: what solvers are given, and answers are held against."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import fsum, isfinite

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array

__all__ = ["EXACT", "Booleans", "Floats", "Integers", "Names", "Problem"]

Booleans = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

EXACT = 2.0**53  # integers below it are exact in floats, and so are their sums
_ABSOLUTE, _RELATIVE = 1e-6, 1e-9  # the errors of solvers that compute in floats: of a row, and of a sum


@dataclass(slots=True)
class Names:
    """Names of variables or of rows: a family, and the index in there."""

    count: int = 0
    _blocks: list[tuple[int, str, int]] = field(default_factory=list)  # first of all, family, first of the family
    _sizes: dict[str, int] = field(default_factory=dict)

    def extend(self, family: str, count: int) -> Integers:
        """Name ``count`` more, and say which they are; a family may grow in several turns."""
        first, size = self.count, self._sizes.get(family, 0)
        self._blocks.append((first, family, size))
        self._sizes[family] = size + count
        self.count += count
        return np.arange(first, self.count)

    def __getitem__(self, index: int) -> str:
        first, family, start = self._blocks[bisect_right(self._blocks, index, key=lambda block: block[0]) - 1]
        return f"{family}({index - first + start})"

    def __iter__(self) -> Iterator[str]:
        return (self[index] for index in range(self.count))


@dataclass(frozen=True, slots=True, eq=False)
class Problem:
    """Minimize ``cost @ x`` where ``row_lower <= matrix @ x <= row_upper`` and ``lower <= x <= upper``.

    Numbers are floats below 2**53, so that those which are integers are exact.
    """

    lower: Floats
    upper: Floats
    is_integer: Booleans  # is this variable an integer one?
    cost: Floats
    matrix: csr_array  # rows by variables, no entry twice
    row_lower: Floats
    row_upper: Floats
    hint: Floats  # a value for each variable; NaN: no idea
    variables: Names
    rows: Names

    @property
    def fraction(self) -> str | None:
        """Something that is not an integer, in words; None in a program of integers alone."""
        if len(found := np.flatnonzero(~self.is_integer)):
            return f"{self.variables[found[0]]} is continuous"
        if len(found := np.flatnonzero(_is_fraction(self.cost))):
            return f"the cost of {self.variables[found[0]]} is {self.cost[found[0]]}"
        if len(found := np.flatnonzero(_is_fraction(self.matrix.data))):
            return f"a coefficient of {self.rows[self._row_of_entry[found[0]]]} is {self.matrix.data[found[0]]}"
        return None

    def rounded(self, values: Floats) -> Floats:
        """The values, with those of integer variables rounded."""
        return np.where(self.is_integer, np.rint(values), values)

    def violation(self, values: Floats) -> str | None:
        """Say what ``values`` break, None if nothing. Sums of integers are exact; others have a tolerance."""
        if not np.isfinite(values).all():
            return f"{self.variables[int(np.argmin(np.isfinite(values)))]} has no value"
        size = abs(self.matrix) @ abs(values)
        sums = self.matrix @ values  # exact, where it is of integers and no partial sum can reach 2**53
        is_exact = self._is_of_integers
        for row in np.flatnonzero(is_exact & (size >= EXACT)):
            entries = slice(*self.matrix.indptr[row : row + 2])
            sums[row] = _exact_sum(self.matrix.data[entries], values[self.matrix.indices[entries]])
        row_slack = np.where(is_exact, 0.0, _ABSOLUTE + _RELATIVE * size)
        slack = np.where(self.is_integer, 0.0, _ABSOLUTE + _RELATIVE * abs(values))
        return _outside(self.variables, values, self.lower - slack, self.upper + slack) or _outside(
            self.rows, sums, self.row_lower - row_slack, self.row_upper + row_slack
        )

    def objective(self, values: Floats) -> int | float:
        """What ``values`` cost: an int, and exact, where everything that costs is an integer."""
        costly = np.flatnonzero(self.cost)
        if self._costs_integers:
            return _exact_sum(self.cost[costly], values[costly])
        return fsum(self.cost[costly] * values[costly])

    def proven(self, bound: float) -> float:
        """A bound computed in floats, as far as it is sure: without their errors, and an integer if costs are."""
        if not isfinite(bound):
            return bound
        lower = bound - _RELATIVE * max(1.0, abs(bound))
        return float(np.ceil(lower)) if self._costs_integers else lower

    @property
    def _costs_integers(self) -> bool:
        return bool(self.is_integer[self.cost != 0].all() and not _is_fraction(self.cost).any())

    @property
    def _row_of_entry(self) -> Integers:
        return np.repeat(np.arange(self.rows.count), np.diff(self.matrix.indptr))

    @property
    def _is_of_integers(self) -> Booleans:
        """Which rows are sums of integers: integer coefficients times integer variables."""
        is_other = _is_fraction(self.matrix.data) | ~self.is_integer[self.matrix.indices]
        is_sum: Booleans = np.bincount(self._row_of_entry[is_other], minlength=self.rows.count) == 0
        return is_sum


def _is_fraction(numbers: Floats) -> Booleans:
    is_fraction: Booleans = np.rint(numbers) != numbers
    return is_fraction


def _exact_sum(coefficients: Floats, values: Floats) -> int:
    return sum(int(c) * int(v) for c, v in zip(coefficients.tolist(), values.tolist(), strict=True))


def _outside(names: Names, found: Floats, lower: Floats, upper: Floats) -> str | None:
    broken = np.flatnonzero((found < lower) | (found > upper))
    if not len(broken):
        return None
    i = int(broken[0])
    return f"{names[i]} is {found[i]:.17g}, not within [{lower[i]:.17g}, {upper[i]:.17g}]"

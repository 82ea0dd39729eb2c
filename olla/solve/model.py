"""Build a mixed-integer linear program, whole families of variables and rows at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array

from olla.errors import InvalidModelError
from olla.solve.problem import EXACT, Booleans, Floats, Integers, Names, Problem

__all__ = ["Model"]


class Model:
    """What to minimize, over which variables, within which rows.

    Variables and rows come in families, and have names like ``preserve(17)`` and ``continuity(4)``. A variable is known
    by its index, and a family is added as arrays, in one call. All numbers are below 2**53, where floats hold integers
    exactly.

    Raises
    ------
    InvalidModelError
        From every method, if a number is too large or none at all, bounds cross, or there is no such row or variable.

    Examples
    --------
    The best of three things, in a bag for 5 kilograms:

    >>> model = Model()
    >>> take = model.binaries("take", 3)
    >>> model.constrain("weight", 0, take, [4, 3, 2], "<=", 5)
    >>> model.minimize(take, [-5, -3, -3])
    >>> model.problem().matrix.toarray().tolist()
    [[4.0, 3.0, 2.0]]
    """

    def __init__(self) -> None:
        self._variables = Names()
        self._rows = Names()
        self._bounds: list[tuple[Floats, Floats, Booleans]] = []
        self._entries: list[tuple[Integers, Integers, Floats]] = []
        self._ranges: list[tuple[Floats, Floats]] = []
        self._cost: tuple[Integers, Floats] = (np.zeros(0, np.int64), np.zeros(0))
        self._hint = self._cost

    def binaries(self, family: str, count: int) -> Integers:
        """Add variables that are 0 or 1; returns their indices."""
        return self.integers(family, count, 0, 1)

    def integers(self, family: str, count: int, lower: npt.ArrayLike = 0, upper: npt.ArrayLike = np.inf) -> Integers:
        """Add integer variables between ``lower`` and ``upper``, both included; returns their indices."""
        return self._add(family, count, np.ceil(lower), np.floor(upper), True)

    def continuous(self, family: str, count: int, lower: npt.ArrayLike = 0, upper: npt.ArrayLike = np.inf) -> Integers:
        """Add variables of any value between ``lower`` and ``upper``; returns their indices."""
        return self._add(family, count, lower, upper, False)

    def constrain(
        self,
        family: str,
        rows: npt.ArrayLike,
        columns: npt.ArrayLike,
        coefficients: npt.ArrayLike,
        sense: Literal["<=", "==", ">="],
        right: npt.ArrayLike,
    ) -> None:
        """Add rows: sums of variables that are at most, exactly or at least ``right``.

        Parameters
        ----------
        family
            The name of these rows.
        rows, columns, coefficients
            Triplets, broadcast against each other: a row of this call, counted from 0, a variable, and what it is
            multiplied by. Triplets of the same row and variable add up.
        sense, right
            What holds for the sums. An array ``right`` has an entry for each row, a number holds for all of them.
        """
        rows, columns, coefficients = (part.ravel() for part in np.broadcast_arrays(rows, columns, coefficients))
        count = np.size(right) if np.ndim(right) else int(rows.max(initial=-1)) + 1
        rows = _indices(rows, count, f"{family} has no such row")
        columns = _indices(columns, self._variables.count, f"{family} asks for a variable that is not there")
        bound = np.broadcast_to(_numbers(right, family), count)
        unbounded = np.full(count, np.inf)
        first = self._rows.count
        self._rows.extend(family, count)
        self._entries.append((rows + first, columns, _numbers(coefficients, family)))
        self._ranges.append((-unbounded if sense == "<=" else bound, unbounded if sense == ">=" else bound))

    def minimize(self, columns: npt.ArrayLike, coefficients: npt.ArrayLike) -> None:
        """Say what a unit of each variable costs, instead of what was said before; others cost nothing."""
        self._cost = self._values("the objective", columns, coefficients)

    def hint(self, columns: npt.ArrayLike, values: npt.ArrayLike) -> None:
        """Suggest values, of all variables or of a few, instead of those suggested before."""
        self._hint = self._values("the hint", columns, values)

    def problem(self) -> Problem:
        """Everything said so far, as flat arrays."""
        nothing = np.zeros(0)
        lower, upper, is_integer = map(np.concatenate, zip((nothing, nothing, nothing > 0), *self._bounds, strict=True))
        row_lower, row_upper = map(np.concatenate, zip((nothing, nothing), *self._ranges, strict=True))
        rows, columns, coefficients = map(
            np.concatenate, zip((nothing.astype(int), nothing.astype(int), nothing), *self._entries, strict=True)
        )
        cost, hint = np.zeros(len(lower)), np.full(len(lower), np.nan)
        np.add.at(cost, *self._cost)
        hint[self._hint[0]] = self._hint[1]
        return Problem(
            lower=lower,
            upper=upper,
            is_integer=is_integer,
            cost=cost,
            matrix=csr_array((coefficients, (rows, columns)), shape=(len(row_lower), len(lower))),
            row_lower=row_lower,
            row_upper=row_upper,
            hint=hint,
            variables=self._variables,
            rows=self._rows,
        )

    def write(self, path: str | Path) -> None:
        """Write the model for study, as ``.lp`` or ``.mps``; HiGHS does it."""
        from olla.solve import highs  # every other method works without it

        highs.write(self.problem(), Path(path))

    def _add(self, family: str, count: int, lower: npt.ArrayLike, upper: npt.ArrayLike, is_integer: bool) -> Integers:
        low, high = (np.broadcast_to(_numbers(bound, family, np.inf), count) for bound in (lower, upper))
        if not (low <= high).all():
            raise InvalidModelError(f"{family} has a lower bound above the upper one")
        self._bounds.append((low, high, np.full(count, is_integer)))
        return self._variables.extend(family, count)

    def _values(self, what: str, columns: npt.ArrayLike, values: npt.ArrayLike) -> tuple[Integers, Floats]:
        columns, values = (part.ravel() for part in np.broadcast_arrays(columns, values))
        columns = _indices(columns, self._variables.count, f"{what} asks for a variable that is not there")
        return columns, _numbers(values, what)


def _indices(given: npt.NDArray[np.generic], count: int, message: str) -> Integers:
    indices = given.astype(np.int64)
    if len(indices) and not 0 <= indices.min() <= indices.max() < count:
        raise InvalidModelError(message)
    return indices


def _numbers(given: npt.ArrayLike, what: str, besides: float = 0.0) -> Floats:
    """The numbers as floats that hold integers exactly; ``besides``, up to its sign, is allowed too."""
    numbers = np.array(given, np.float64)  # a copy: the caller's array may change
    if not ((abs(numbers) < EXACT) | (abs(numbers) == besides)).all():
        raise InvalidModelError(f"{what} has a number that is not below 2**53")
    return numbers

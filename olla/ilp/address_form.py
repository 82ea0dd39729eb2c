"""The address form: the smallest arena for buffers with known lifetimes, by integer programming."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from math import gcd

import numpy as np

from olla.graph.plan import Placement
from olla.ilp.address_families import arena, one_above_the_other
from olla.ilp.program import proven_bytes
from olla.place.allocate import allocate
from olla.place.buffers import Buffer
from olla.solve import Model, Result, solve

__all__ = ["AddressForm", "address"]

_WARM_START = 0.25  # of the time limit, for the heuristics that find a first placement


def address(
    buffers: Sequence[Buffer], *, start: Placement | None = None, solver: str = "auto", time_limit: float = 60.0
) -> Placement:
    """The lowest placement of ``buffers`` that a solver finds, and what it proves.

    The solver starts from ``start`` and its bound; default: the placement of :func:`olla.allocate`, and the load.

    Raises
    ------
    SolverUnavailableError
        If the solver is not installed, or has no licence for a model of this size.
    """
    started = time.perf_counter()
    known = start or allocate(buffers, time_limit=_WARM_START * time_limit)
    form = AddressForm(buffers, known)
    result = solve(form.model, solver, time_limit=max(0.0, time_limit - (time.perf_counter() - started)))
    return replace(form.placement(result), seconds=time.perf_counter() - started)


class AddressForm:
    """The model that minimizes the arena; ``known`` is its hint, and its bound is believed."""

    def __init__(self, buffers: Sequence[Buffer], known: Placement) -> None:
        self._placed, self._known = buffers, known
        sizes = np.array([buffer.size for buffer in buffers], np.int64)
        steps = np.array([buffer.alignment for buffer in buffers], np.int64)
        unit = self._unit = gcd(*sizes.tolist(), *steps.tolist()) or 1
        top = known.arena_bytes
        fixed = np.array([-1 if buffer.offset is None else buffer.offset for buffer in buffers], np.int64)
        model = self.model = Model()
        highest = (top - sizes) // steps
        offsets = self._offsets = model.integers(
            "address",
            len(buffers),
            np.where(fixed >= 0, fixed // steps, 0),
            np.where(fixed >= 0, fixed // steps, highest),
        )
        size = int(model.integers("arena", 1, known.lower_bound_bytes // unit, -(-top // unit))[0])
        lower, upper = (np.array([getattr(b, name) for b in buffers], np.int64) for name in ("lower", "upper"))
        one, other = np.nonzero(np.triu((lower[:, None] < upper) & (lower < upper[:, None]), 1))
        solid = (sizes[one] > 0) & (sizes[other] > 0)
        one, other = one[solid], other[solid]
        below, above = model.binaries("below", len(one)), model.binaries("above", len(one))
        model.constrain(
            "together", np.tile(np.arange(len(one)), 2), np.concatenate([below, above]), 1, "==", np.ones(len(one))
        )
        in_units = steps // unit
        one_above_the_other(model, offsets, in_units, sizes // unit, one, other, below, above, -(-top // unit))
        arena(model, offsets, in_units, sizes // unit, size)
        model.minimize([size], [1])
        at = np.array(known.offsets, np.int64)
        model.hint(
            np.concatenate([offsets, below, above, [size]]),
            np.concatenate([at // steps, at[one] < at[other], at[one] > at[other], [-(-top // unit)]]),
        )

    def placement(self, result: Result) -> Placement:
        """What a solver's answer says."""
        assert result.values is not None, "the known placement is a solution"
        found = result.values[self._offsets].astype(np.int64) * [buffer.alignment for buffer in self._placed]
        top = max((int(at) + buffer.size for at, buffer in zip(found, self._placed, strict=True)), default=0)
        bound = min(top, max(self._known.lower_bound_bytes, proven_bytes(result, self._unit)))
        return Placement(tuple(found.tolist()), top, bound, f"integer program ({result.solver})", result.seconds)

"""The form under a byte limit: which ops run again and which storages leave the device, for the least added time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from math import gcd, inf

import numpy as np
import numpy.typing as npt

from olla.errors import InfeasibleError, InvalidGraphError
from olla.fit.fitting import fitted
from olla.fit.spill import Bandwidth, belady
from olla.graph.graph import Graph
from olla.graph.lifetimes import Spill, least_bytes, peak_bytes
from olla.graph.plan import Schedule, extra_runs
from olla.ilp.families import SEQUENCE, resident_set
from olla.ilp.program import proven_bytes
from olla.ilp.sequences import SequenceProgram
from olla.order.schedule import schedule
from olla.solve import Model, Result, Status, solve

__all__ = ["FitForm", "fit", "warm_start"]

_NANOSECONDS = 10**9
_WARM_START = 0.25  # of the time limit, for an order to begin with


def fit(
    graph: Graph,
    budget_bytes: int,
    seconds: Sequence[float],
    *,
    repeats: int | None = None,
    bytes_per_second: float | None = None,
    solver: str = "auto",
    time_limit: float = 60.0,
) -> Schedule:
    """The sequence that stays within ``budget_bytes`` and takes the least added time that a solver finds.

    For graphs of some tens of ops. Ops that change persistent state (as draws of random numbers do) run once.

    Parameters
    ----------
    graph
        What to run. Persistent storages are no part of the budget, and stay.
    budget_bytes
        What the peak must not exceed.
    seconds
        How long each op takes.
    repeats
        How many ops may run again, in all; default: as many as there are ops. The bound holds for such sequences.
    bytes_per_second
        Between the device and where storages are spilled to; a spill moves its bytes there and back. None: nothing
        is spilled.
    solver, time_limit
        As for :func:`olla.solve.solve`.

    Returns
    -------
    Schedule
        With its spills, the seconds that it adds and a proven bound of these; both are counted in nanoseconds.

    Raises
    ------
    InfeasibleError
        If nothing fits, or nothing that fits was found in time; the message says which.
    InvalidGraphError
        If there is not one time for each op, or one is negative.
    SolverUnavailableError
        If the solver is not installed, or has no licence for a model of this size.
    """
    started = time.perf_counter()
    known = schedule(graph, time_limit=_WARM_START * time_limit)
    if known.peak_bytes <= budget_bytes:
        _Costs.of(graph, seconds, bytes_per_second)  # they are looked at, used or not
        return known
    repeats = len(graph.ops) if repeats is None else repeats
    limit = _WARM_START * time_limit
    start = warm_start(graph, known, budget_bytes, seconds, repeats, bytes_per_second, time_limit=limit)
    form = FitForm(graph, budget_bytes, seconds, repeats=repeats, bytes_per_second=bytes_per_second, start=start)
    result = solve(form.model, solver, time_limit=max(0.0, time_limit - (time.perf_counter() - started)))
    return replace(form.schedule(result), seconds=time.perf_counter() - started)


class FitForm:
    """The model that minimizes the time, within the budget; ``start`` is its hint, if it fits."""

    def __init__(
        self,
        graph: Graph,
        budget_bytes: int,
        seconds: Sequence[float],
        *,
        start: Schedule,
        repeats: int,
        bytes_per_second: float | None = None,
    ) -> None:
        self._graph, self._start, self._budget = graph, start, budget_bytes
        self._costs = _Costs.of(graph, seconds, bytes_per_second)
        self._least, pinned = least_bytes(graph)
        if budget_bytes < self._least:
            raise InfeasibleError(
                f"nothing fits into {budget_bytes:,} bytes: {pinned} alone needs {self._least:,} bytes",
                lower_bound_bytes=self._least,
                best_bytes=start.peak_bytes,
            )
        self._repeats = repeats
        program = self._program = SequenceProgram(graph, repeats=repeats, spilling=bytes_per_second is not None)
        for family in SEQUENCE:
            family(program)
        units = budget_bytes // program.unit
        budget = program.model.integers("budget", 1, units, units)
        resident_set(program, int(budget[0]), np.arange(len(program.sizes)))
        self._unit = _minimize_time(program, self._costs)
        idle = repeats - len(extra_runs(start.order))
        if start.peak_bytes <= budget_bytes and idle >= 0:
            sequence = [*[-1] * idle, *start.order, len(graph.ops)]
            columns, values = program.values_of(sequence, [program.shifted(spill, idle) for spill in start.spills])
            program.model.hint(np.append(columns, budget), np.append(values, units))

    @property
    def model(self) -> Model:
        """What a solver is given."""
        return self._program.model

    def schedule(self, result: Result) -> Schedule:
        """What a solver's answer says; see :func:`fit` for what it raises."""
        if result.values is None:
            proven = result.status is Status.INFEASIBLE
            why = f"no sequence with {self._repeats} repeats" if proven else "nothing that was found in time"
            raise InfeasibleError(
                f"{why} fits into {self._budget:,} bytes; {self._start.peak_bytes:,} bytes suffice without repeats",
                lower_bound_bytes=self._least,
                best_bytes=self._start.peak_bytes,
            )
        order, spills = _decoded(self._graph, self._program, result.values)
        peak, added = peak_bytes(self._graph, order, spills), self._costs.added(self._graph, order, spills)
        return Schedule(
            order,
            peak,
            min(peak, self._least),
            f"integer program ({result.solver})",
            result.seconds,
            spills,
            added / _NANOSECONDS,
            min(added, max(0, proven_bytes(result, self._unit) - sum(self._costs.of_ops))) / _NANOSECONDS,
        )


@dataclass(frozen=True, slots=True)
class _Costs:
    """Integers, in nanoseconds."""

    of_ops: tuple[int, ...]
    per_byte: float  # spilled: there and back; infinite: never

    @classmethod
    def of(cls, graph: Graph, seconds: Sequence[float], bytes_per_second: float | None) -> _Costs:
        if len(seconds) != len(graph.ops):
            raise InvalidGraphError(f"{len(seconds)} times for {len(graph.ops)} ops: give one for each")
        for op, time_ in zip(graph.ops, seconds, strict=True):
            if not 0 <= time_ < inf:
                raise InvalidGraphError(f"op {op.name!r} takes {time_} seconds: give a number that is not negative")
        if bytes_per_second is not None and not bytes_per_second > 0:
            raise InvalidGraphError(f"{bytes_per_second} bytes per second: give a positive number, or None")
        per_byte = inf if bytes_per_second is None else 2 * _NANOSECONDS / bytes_per_second
        return cls(tuple(round(time_ * _NANOSECONDS) for time_ in seconds), per_byte)

    def of_spill(self, size: int) -> int:
        return round(size * self.per_byte)

    def added(self, graph: Graph, order: Sequence[int], spills: Sequence[Spill]) -> int:
        moved = sum(self.of_spill(graph.storages[spill.storage].size) for spill in spills)
        return sum(self.of_ops[op] for op in order) - sum(self.of_ops) + moved


def warm_start(
    graph: Graph,
    known: Schedule,
    budget_bytes: int,
    seconds: Sequence[float],
    repeats: int,
    bytes_per_second: float | None,
    *,
    time_limit: float,
) -> Schedule:
    """The better one of what the planner finds and what Belady's rule spills; ``known``, if neither fits."""
    costs = _Costs.of(graph, seconds, bytes_per_second)
    found = []
    bandwidth = None if bytes_per_second is None else Bandwidth(bytes_per_second, bytes_per_second)
    if repeats:
        with suppress(InfeasibleError):
            found.append(fitted(graph, known, seconds, budget_bytes, bandwidth=bandwidth, time_limit=time_limit))
    if bytes_per_second is not None and (spills := belady(graph, known.order, budget_bytes)) is not None:
        peak = peak_bytes(graph, known.order, spills)
        found.append(replace(known, peak_bytes=peak, spills=spills))
    fitting = [one for one in found if len(extra_runs(one.order)) <= repeats]
    return min(fitting, key=lambda one: costs.added(graph, one.order, one.spills), default=known)


def _minimize_time(program: SequenceProgram, costs: _Costs) -> int:
    """Make the time the objective; returns its unit, in nanoseconds."""
    ops, steps = np.nonzero(program.run >= 0)
    contents, at = np.nonzero(program.fetch >= 0)
    of_ops = np.array([*costs.of_ops, 0], np.int64)
    of_spills = np.array([costs.of_spill(size) if program.spilling else 0 for size in program.sizes.tolist()], np.int64)
    unit = gcd(*of_ops.tolist(), *of_spills.tolist()) or 1
    program.model.minimize(
        np.concatenate([program.run[ops, steps], program.fetch[contents, at]]),
        np.concatenate([of_ops[ops], of_spills[program.storage[contents]]]) // unit,
    )
    return unit


def _decoded(
    graph: Graph, program: SequenceProgram, values: npt.NDArray[np.float64]
) -> tuple[tuple[int, ...], tuple[Spill, ...]]:
    """The order and the spills of a solution."""
    sequence = program.sequence(values)
    idle = int((sequence < 0).sum())
    order = tuple(sequence[idle:-1].tolist())
    spills = set()
    for content, step in zip(*np.nonzero(np.where(program.fetch >= 0, values[program.fetch], 0)), strict=True):
        storage = program.storages[program.storage[content]]
        touched = [at for at, op in enumerate(order) if storage in graph.ops[op].touches]
        if storage in graph.outputs:
            touched.append(len(order))  # in the end
        before = max(at for at in touched if at < step - idle)
        after = min((at for at in touched if at >= step - idle), default=0)
        is_used = after == len(order) or storage not in graph.ops[order[after]].creates
        if before + 1 < after and is_used:
            spills.add(Spill(storage, before + 1, after))
    return order, tuple(sorted(spills))

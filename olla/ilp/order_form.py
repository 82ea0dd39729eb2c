"""The order form: the least peak of all orders."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from olla.graph.graph import Graph
from olla.graph.lifetimes import peak_bytes
from olla.graph.plan import Schedule
from olla.ilp.families import ORDER, resident_set
from olla.ilp.orders import OrderProgram
from olla.ilp.program import proven_bytes
from olla.order.portfolio import list_schedules, peak
from olla.order.problem import Integers, Problem
from olla.order.reduce import Reduced
from olla.solve import Model, Result, solve

__all__ = ["OrderForm", "order"]


def order(graph: Graph, *, start: Schedule | None = None, solver: str = "auto", time_limit: float = 60.0) -> Schedule:
    """The best order that a solver finds for ``graph``, and what it proves.

    The graph is reduced first, as the planners do; the solver starts from the best list schedule, and from
    ``start``, which is returned with the better bound if nothing better is found.

    Raises
    ------
    SolverUnavailableError
        If the solver is not installed, or has no licence for a model of this size.
    """
    started = time.perf_counter()
    form = OrderForm(graph, start)
    result = solve(form.model, solver, time_limit=max(0.0, time_limit - (time.perf_counter() - started)))
    return replace(form.schedule(result), seconds=time.perf_counter() - started)


class OrderForm:
    """The model that minimizes the peak over all orders; the best one that is known is its hint."""

    def __init__(self, graph: Graph, start: Schedule | None = None) -> None:
        self._graph, self._start = graph, start
        self._reduced = Reduced.of(Problem.of(graph)).merged()
        problem = self._reduced.problem
        program = self._program = OrderProgram(problem)
        for family in ORDER:
            family(program)
        orders = [*_as_runs(self._reduced, start), *(found for _, found in list_schedules(problem))]
        known = min(orders, key=lambda found: peak(problem, found))
        units = peak(problem, known) // program.unit
        limit = program.model.integers("peak", 1, 0, units)
        resident_set(program, int(limit[0]), np.arange(len(problem.sizes)))
        program.model.minimize(limit, [1])
        columns, values = program.values_of(known)
        program.model.hint(np.append(columns, limit), np.append(values, units))

    @property
    def model(self) -> Model:
        """What a solver is given."""
        return self._program.model

    def schedule(self, result: Result) -> Schedule:
        """What a solver's answer says."""
        assert result.values is not None, "the hint is a solution"
        runs = self._reduced.expanded(self._program.sequence(result.values))
        found = tuple(op for op in runs.tolist() if op < len(self._graph.ops))
        least, bound = peak_bytes(self._graph, found), proven_bytes(result, self._program.unit)
        start = self._start
        if start is not None and start.peak_bytes <= least:
            return replace(start, lower_bound_bytes=min(start.peak_bytes, max(bound, start.lower_bound_bytes)))
        return Schedule(found, least, min(least, bound), f"integer program ({result.solver})", result.seconds)


def _as_runs(reduced: Reduced, start: Schedule | None) -> Iterator[Integers]:
    """The order of the runs in ``start``, if it is one: a run counts from its last op on."""
    if start is not None:
        place = {op: step for step, op in enumerate(start.order)}
        ends = [place.get(int(reduced.runs.row(run)[-1]), len(place)) for run in range(reduced.problem.op_count)]
        order = np.argsort(ends, kind="stable")
        position = np.argsort(order)
        before = reduced.problem.predecessors
        if (position[before.items] < position[before.owners]).all():
            yield order

"""The order form: the least peak of all orders."""

from __future__ import annotations

import time

import numpy as np

from olla.graph.graph import Graph
from olla.graph.lifetimes import peak_bytes
from olla.graph.plan import Schedule
from olla.ilp.families import ORDER, resident_set
from olla.ilp.program import Program, proven_bytes
from olla.order.portfolio import list_schedules, peak
from olla.order.problem import Problem
from olla.order.reduce import Reduced
from olla.solve import solve

__all__ = ["order", "order_program"]


def order(graph: Graph, *, solver: str = "auto", time_limit: float = 60.0) -> Schedule:
    """The best order that a solver finds for ``graph``, and what it proves.

    The graph is reduced first, as the planners do; the solver starts from the best list schedule.

    Raises
    ------
    SolverUnavailableError
        If the solver is not installed, or has no licence for a model of this size.
    """
    started = time.perf_counter()
    reduced = Reduced.of(Problem.of(graph)).merged(started + time_limit)
    program = order_program(reduced.problem)
    result = solve(program.model, solver, time_limit=max(0.0, time_limit - (time.perf_counter() - started)))
    assert result.values is not None, "the list schedule is a solution"
    runs = np.array(program.order(result.values))
    found = tuple(op for op in reduced.expanded(runs).tolist() if op < len(graph.ops))
    least = peak_bytes(graph, found)
    bound = min(least, proven_bytes(result, program.unit))
    return Schedule(found, least, bound, f"integer program ({result.solver})", time.perf_counter() - started)


def order_program(problem: Problem) -> Program:
    """The model that minimizes the peak over all orders."""
    program = Program(problem)
    for family in ORDER:
        family(program)
    known = min((found for _, found in list_schedules(problem)), key=lambda found: peak(problem, found))
    units = peak(problem, known) // program.unit
    limit = program.model.integers("peak", 1, 0, units)
    resident_set(program, int(limit[0]), np.arange(len(problem.sizes)))
    program.model.minimize(limit, [1])
    columns, values = program.values_of(known)
    program.model.hint(np.append(columns, limit), np.append(values, units))
    return program

"""CP-SAT of OR-Tools: programs of integers alone, in exact arithmetic. Free (Apache licence)."""

from __future__ import annotations

from math import inf
from typing import Any

import numpy as np

from olla.errors import InvalidModelError
from olla.solve.problem import Floats, Problem
from olla.solve.result import Status
from olla.solve.run import Answer, Run, imported

__all__ = ["PACKAGE", "solve"]

PACKAGE = "ortools"
_INFINITE = 2**63 - 1  # CP-SAT's word for it


def solve(problem: Problem, run: Run) -> Answer:
    """Minimize ``problem``. A hint is tried first; with several threads, runs of the same seed can differ.

    Raises
    ------
    InvalidModelError
        Something is not an integer, an integer has no bounds, or sums can exceed 64 bits; the message names it.
    """
    cp_model = imported("ortools.sat.python.cp_model")
    model, solver = _model(cp_model, problem), cp_model.CpSolver()
    solver.parameters.max_time_in_seconds = run.seconds_left
    solver.parameters.relative_gap_limit = run.gap
    solver.parameters.random_seed = run.seed
    solver.parameters.num_workers = run.threads
    solver.parameters.catch_sigint_signal = False  # Python's own handler should hear it
    listener = _listener(cp_model, run)
    solver.best_bound_callback = listener.on_bound
    status = run.until_stopped(lambda: solver.solve(model, listener), solver.stop_search)
    if status == cp_model.MODEL_INVALID:
        raise InvalidModelError(f"CP-SAT cannot take this model: {model.validate()}")
    if status == cp_model.INFEASIBLE:
        return Answer(Status.INFEASIBLE)
    if status == cp_model.UNKNOWN:
        return Answer(Status.NO_SOLUTION, None, listener.bound)  # the response says 0
    response = solver.response_proto
    values = np.array(list(response.solution), np.float64)
    return Answer(
        Status.OPTIMAL if status == cp_model.OPTIMAL else Status.FEASIBLE, values, response.best_objective_bound
    )


def _model(cp_model: Any, problem: Problem) -> Any:
    """The model, built as a protocol buffer: its lists take whole rows."""
    if problem.fraction is not None:
        raise InvalidModelError(
            f"CP-SAT takes integers alone, and {problem.fraction}; multiply, or take another solver"
        )
    if len(found := np.flatnonzero(np.isinf(problem.lower) | np.isinf(problem.upper))):
        raise InvalidModelError(f"CP-SAT takes bounded variables alone, and {problem.variables[found[0]]} is not")
    model = cp_model.CpModel()
    proto = model.proto
    for domain in np.stack([problem.lower, problem.upper], 1).astype(np.int64).tolist():
        proto.variables.add().domain.extend(domain)
    matrix = problem.matrix
    columns, coefficients = matrix.indices.tolist(), matrix.data.astype(np.int64).tolist()
    ranges = zip(_integers(np.ceil(problem.row_lower)), _integers(np.floor(problem.row_upper)), strict=True)
    for start, end, domain in zip(matrix.indptr[:-1].tolist(), matrix.indptr[1:].tolist(), ranges, strict=True):
        row = proto.constraints.add().linear
        row.vars.extend(columns[start:end])
        row.coeffs.extend(coefficients[start:end])
        row.domain.extend(domain)
    costly, hinted = np.flatnonzero(problem.cost), np.flatnonzero(~np.isnan(problem.hint))
    if len(costly):
        proto.objective.vars.extend(costly.tolist())
        proto.objective.coeffs.extend(problem.cost[costly].astype(np.int64).tolist())
    proto.solution_hint.vars.extend(hinted.tolist())
    proto.solution_hint.values.extend(np.rint(problem.hint[hinted]).astype(np.int64).tolist())
    return model


def _listener(cp_model: Any, run: Run) -> Any:
    class Listener(cp_model.CpSolverSolutionCallback):  # type: ignore[misc]
        best, bound = inf, -inf

        def on_solution_callback(self) -> None:
            self.best = min(self.best, self.objective_value)
            run.tell(self.best, self.bound)

        def on_bound(self, bound: float) -> None:
            self.bound = max(self.bound, bound)
            run.tell(self.best, self.bound)

    return Listener()


def _integers(bounds: Floats) -> list[int]:
    """The bounds of rows; infinite ones are as large as they can be."""
    return [int(max(-_INFINITE, min(bound, _INFINITE))) for bound in bounds.tolist()]

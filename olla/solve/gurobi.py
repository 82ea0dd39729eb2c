"""Gurobi: any mixed-integer program, in floats. Commercial; what ``pip install`` brings solves small models only."""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from typing import Any

import numpy as np

from olla.errors import SolverUnavailableError
from olla.solve.problem import Problem
from olla.solve.result import Status
from olla.solve.run import Answer, Run, imported

__all__ = ["PACKAGE", "solve"]

PACKAGE = "gurobipy"  # not through a shared library of another layer: pip's licence works in this package alone
_INFINITE = 1e100
_TOLERANCE = 1e-9  # of integers and of rows; the default, 1e-5, times a size of gigabytes is many kilobytes


def solve(problem: Problem, run: Run) -> Answer:
    """Minimize ``problem``. A hint is completed by a short search.

    Raises
    ------
    SolverUnavailableError
        There is no licence, or the model is too large for it.
    """
    gurobi = imported(PACKAGE)
    try:
        with gurobi.Env(params={"OutputFlag": 0}) as environment, gurobi.Model(env=environment) as model:
            _fill(model, problem, run)
            run.until_stopped(lambda: model.optimize(_listener(gurobi, run)), model.terminate)
            if model.Status == gurobi.GRB.INF_OR_UNBD:  # which of them, it knows without some reductions
                model.Params.DualReductions = 0
                model.Params.TimeLimit = run.seconds_left
                run.until_stopped(model.optimize, model.terminate)
            if model.Status == gurobi.GRB.INTERRUPTED and run.interruption is None:
                run.interruption = KeyboardInterrupt()  # it hears Ctrl-C itself, and Python does not
            return _answer(gurobi, model, problem)
    except gurobi.GurobiError as error:
        if error.errno not in (gurobi.GRB.ERROR_SIZE_LIMIT_EXCEEDED, gurobi.GRB.ERROR_NO_LICENSE):
            raise
        rows, columns = problem.matrix.shape
        raise SolverUnavailableError(
            f"Gurobi has no licence for {columns:,} variables and {rows:,} rows ({error}; 2,000 of each are free): "
            "put gurobi.lic into the home directory, or take a free solver: pip install highspy ortools"
        ) from error


def _fill(model: Any, problem: Problem, run: Run) -> None:
    model.Params.TimeLimit = run.seconds_left
    model.Params.MIPGap = run.gap
    model.Params.Seed = run.seed
    model.Params.Threads = run.threads
    model.Params.IntFeasTol = model.Params.FeasibilityTol = _TOLERANCE
    kinds = np.where(problem.is_integer, "I", "C")
    variables = model.addMVar(len(kinds), lb=problem.lower, ub=problem.upper, obj=problem.cost, vtype=kinds)
    senses = np.where(np.isinf(problem.row_lower), "<", np.where(np.isinf(problem.row_upper), ">", "="))
    right = np.where(senses == ">", problem.row_lower, problem.row_upper)
    model.addMConstr(problem.matrix, variables, senses, right)
    is_hinted = ~np.isnan(problem.hint)
    variables[is_hinted].Start = problem.hint[is_hinted]


def _listener(gurobi: Any, run: Run) -> Callable[[Any, int], None]:
    def listen(model: Any, where: int) -> None:
        event = gurobi.GRB.Callback
        if where == event.MIP:
            best, bound = model.cbGet(event.MIP_OBJBST), model.cbGet(event.MIP_OBJBND)
        elif where == event.MIPSOL:
            best = min(model.cbGet(event.MIPSOL_OBJ), model.cbGet(event.MIPSOL_OBJBST))
            bound = model.cbGet(event.MIPSOL_OBJBND)
        else:
            return
        run.tell(_infinite(best), _infinite(bound))

    return listen


def _answer(gurobi: Any, model: Any, problem: Problem) -> Answer:
    if model.Status == gurobi.GRB.INFEASIBLE:
        return Answer(Status.INFEASIBLE)
    if model.Status == gurobi.GRB.UNBOUNDED:
        return Answer(Status.UNBOUNDED)
    is_optimal = model.Status == gurobi.GRB.OPTIMAL
    bound = model.ObjVal if is_optimal else -inf
    if model.IsMIP:
        bound = _infinite(model.ObjBound)
    bound = problem.proven(bound)
    if not model.SolCount:
        return Answer(Status.NO_SOLUTION, None, bound)
    return Answer(Status.OPTIMAL if is_optimal else Status.FEASIBLE, np.array(model.getAttr("X")), bound)


def _infinite(number: float) -> float:
    """Gurobi's infinity is 1e100."""
    return number if abs(number) < _INFINITE else float(np.copysign(inf, number))

"""HiGHS: any mixed-integer program, in floats. Free (MIT licence)."""

from __future__ import annotations

from dataclasses import replace
from math import inf
from pathlib import Path
from typing import Any

import numpy as np

from olla.errors import InvalidModelError
from olla.solve.problem import Problem
from olla.solve.result import Status
from olla.solve.run import Answer, Run, imported

__all__ = ["PACKAGE", "solve", "write"]

PACKAGE = "highspy"


def solve(problem: Problem, run: Run) -> Answer:
    """Minimize ``problem``. What a hint leaves open is searched for; ``threads`` is for the whole process.

    Raises
    ------
    InvalidModelError
        A coefficient is too large for it.
    """
    highspy = imported(PACKAGE)
    highs = _silent(highspy)
    if run.threads:
        highs.resetGlobalScheduler(True)  # else the number of the first run stays
    # Tolerances stay as they are: stricter ones made it miss solutions, of 4,000 random models with coefficients
    # up to 2**44 in 8 instead of 2. What looser ones let through is found out afterwards.
    for option, value in {
        "mip_rel_gap": run.gap,
        "random_seed": run.seed,
        "threads": run.threads,
        "time_limit": run.seconds_left,
    }.items():
        highs.setOptionValue(option, value)
    if highs.passModel(_linear_program(highspy, problem)) == highspy.HighsStatus.kError:
        raise InvalidModelError("HiGHS cannot take this model: coefficients of 1e15 and more are too large for it")
    hinted = np.flatnonzero(~np.isnan(problem.hint)).astype(np.int32)
    if len(hinted):
        highs.setSolution(len(hinted), hinted, problem.hint[hinted])

    def listen(event: Any) -> None:
        run.tell(event.data_out.mip_primal_bound, event.data_out.mip_dual_bound)

    if problem.cost.any():  # else there is nothing to improve
        for callback in (highs.cbMipImprovingSolution, highs.cbMipInterrupt):
            callback.subscribe(listen)
    highs.HandleUserInterrupt = True
    run.until_stopped(highs.solve, highs.cancelSolve)
    if highs.getModelStatus() == highspy.HighsModelStatus.kSolveError or not _is_honest(highs, problem):
        highs.setOptionValue("presolve", "off")  # which, in 1.16, now and then cannot undo its own reductions
        run.until_stopped(highs.solve, highs.cancelSolve)
    return _answer(highspy, highs, problem, run)


def write(problem: Problem, path: Path) -> None:
    """Write ``problem`` to a file, in the format that its name ends with: ``.lp`` or ``.mps``."""
    highspy = imported(PACKAGE)
    highs = _silent(highspy)
    program = _linear_program(highspy, problem)
    program.col_names_, program.row_names_ = list(problem.variables), list(problem.rows)
    highs.passModel(program)
    if highs.writeModel(str(path)) != highspy.HighsStatus.kOk:
        raise InvalidModelError(f"HiGHS cannot write {path}: it writes .lp and .mps")


def _silent(highspy: Any) -> Any:
    class Silent(highspy.Highs):  # type: ignore[misc]
        def enableCallbacks(self) -> None:  # noqa: N802  # the constructor calls it, and it prints a banner
            self.setOptionValue("output_flag", False)
            super().enableCallbacks()

    return Silent()


def _linear_program(highspy: Any, problem: Problem) -> Any:
    program = highspy.HighsLp()
    program.num_row_, program.num_col_ = problem.matrix.shape
    program.col_cost_, program.col_lower_, program.col_upper_ = problem.cost, problem.lower, problem.upper
    program.row_lower_, program.row_upper_ = problem.row_lower, problem.row_upper
    kinds = np.array([highspy.HighsVarType.kContinuous, highspy.HighsVarType.kInteger])
    program.integrality_ = kinds[problem.is_integer.astype(int)].tolist()
    program.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
    program.a_matrix_.start_ = problem.matrix.indptr
    program.a_matrix_.index_ = problem.matrix.indices
    program.a_matrix_.value_ = problem.matrix.data
    return program


def _is_honest(highs: Any, problem: Problem) -> bool:
    """Whether its solution, if there is one, costs what it says. If not, its bound is wrong, too."""
    values, claimed = np.array(highs.getSolution().col_value), highs.getInfo().objective_function_value
    return len(values) != len(problem.cost) or bool(np.isclose(problem.cost @ values, claimed, atol=1e-3))


def _answer(highspy: Any, highs: Any, problem: Problem, run: Run) -> Answer:
    status, ended, info = highs.getModelStatus(), highspy.HighsModelStatus, highs.getInfo()
    if status == ended.kInfeasible:
        return Answer(Status.INFEASIBLE)
    if status == ended.kUnbounded:
        return Answer(Status.UNBOUNDED)
    if status == ended.kModelEmpty:
        return Answer(Status.OPTIMAL, np.zeros(0), 0.0)
    if status == ended.kUnboundedOrInfeasible:  # which of them, tells the same program without costs
        without = solve(replace(problem, cost=np.zeros(len(problem.cost))), run)
        return Answer(Status.UNBOUNDED if without.status is Status.OPTIMAL else without.status)
    is_optimal = status == ended.kOptimal
    bound = info.mip_dual_bound
    if not problem.is_integer.any():
        bound = info.objective_function_value if is_optimal else -inf
    bound = problem.proven(bound)
    if info.primal_solution_status != highspy.SolutionStatus.kSolutionStatusFeasible:
        return Answer(Status.NO_SOLUTION, None, bound)
    return Answer(Status.OPTIMAL if is_optimal else Status.FEASIBLE, np.array(highs.getSolution().col_value), bound)

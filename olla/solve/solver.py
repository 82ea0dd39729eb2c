"""Solve a model with one of the solvers that are there, and believe its answer only after looking."""

from __future__ import annotations

import logging
import os
from importlib.util import find_spec
from math import inf
from pathlib import Path

from olla.errors import InvalidModelError, SolverUnavailableError
from olla.solve import cpsat, gurobi, highs
from olla.solve.model import Model
from olla.solve.problem import Floats, Problem
from olla.solve.result import Result, Status
from olla.solve.run import Answer, Progress, Run

__all__ = ["available", "require", "solve"]

log = logging.getLogger(__name__)

_SOLVERS = {"cpsat": cpsat, "gurobi": gurobi, "highs": highs}
_CLOSE = 1e-8  # a gap, relative to the objective, that is none in floats


def available() -> list[str]:
    """The solvers whose packages are installed; none is loaded, and no licence taken."""
    return [name for name, solver in _SOLVERS.items() if find_spec(solver.PACKAGE)]


def require(solver: str) -> None:
    """Raise unless there is such a solver; none is loaded, and no licence taken.

    Raises
    ------
    SolverUnavailableError
        Its package is not installed, or no solver has this name.
    """
    if solver not in ("auto", *_SOLVERS):
        raise SolverUnavailableError(f"no such solver: {solver!r}; there are auto, {', '.join(_SOLVERS)}")
    if solver == "auto" and not available():
        raise SolverUnavailableError("no solver is installed: pip install highspy ortools")
    if solver != "auto" and solver not in available():
        package = _SOLVERS[solver].PACKAGE
        raise SolverUnavailableError(f"{package} is not installed: pip install {package}")


def solve(
    model: Model,
    solver: str = "auto",
    *,
    time_limit: float = 60.0,
    gap: float = 0.0,
    seed: int = 0,
    threads: int = 0,
    progress: Progress | None = None,
) -> Result:
    """Minimize ``model``, and check the solution: integers are rounded, and rows of integers hold exactly.

    Ctrl-C ends the search and returns the best solution so far; without one, KeyboardInterrupt is raised.

    Parameters
    ----------
    model
        What to minimize.
    solver
        ``"cpsat"``, ``"gurobi"``, ``"highs"``, or ``"auto"``: the most suited one that is there.
    time_limit
        Seconds, including those to load the solver and the model. Not a hard limit: solvers look at
        the clock when they like.
    gap
        The solution is good enough if the optimum is at most this much better, relative to its objective.
    seed
        For what the solver draws. The same seed gives the same result with one thread, if time does not run out.
    threads
        How many to use at most; 0: as many as the solver likes.
    progress
        Called with the best objective (inf: none yet), the bound (-inf: none yet) and the seconds since the start
        when one of the first two has changed, from another thread. What it raises ends the search: KeyboardInterrupt
        like Ctrl-C; anything else is raised.

    Returns
    -------
    Result
        The best solution, which solver found it, and how good one can be. A full hint that breaks nothing is a
        solution, too.

    Raises
    ------
    SolverUnavailableError
        There is no such solver, it is not installed, or it has no licence for this model.
    InvalidModelError
        The solver cannot take the model: CP-SAT takes bounded integers alone.
    """
    require(solver)
    problem = model.problem()
    run = Run(time_limit, gap, seed, threads, progress)
    passed_over = []
    for name in _suited(problem) if solver == "auto" else [solver]:
        try:
            answer = _SOLVERS[name].solve(problem, run)
        except (SolverUnavailableError, InvalidModelError) as error:
            if solver != "auto":
                raise
            log.info("%s", error)
            passed_over.append(str(error))
        else:
            return _result(problem, answer, run, name, passed_over)
    raise SolverUnavailableError("; ".join(["no solver takes this model: pip install highspy ortools", *passed_over]))


def _suited(problem: Problem) -> list[str]:
    """The solvers that are there and can take the model, the most suited one first.

    CP-SAT proved orders of 20 ops in 0.1 to 0.4 s (HiGHS: 2.6 to 3.8; Gurobi: 0.4 to 1.6), and 100,000 variables in
    rows like those of an order in 10 s (HiGHS: 55 s). Of 100,000 loose knapsacks HiGHS is the better judge: after a
    minute, it was within 3 %, and CP-SAT within 39 %. Gurobi with a licence could not be measured; who has paid for it
    wants it.
    """
    order = ["cpsat", "highs"] if problem.fraction is None else ["highs"]
    order.insert(0 if _is_licensed() else len(order), "gurobi")
    there = available()
    return [name for name in order if name in there]


def _is_licensed() -> bool:
    """Is there a file where Gurobi looks for a licence? What it allows is known only to Gurobi."""
    return "GRB_LICENSE_FILE" in os.environ or any(
        (folder / "gurobi.lic").exists() for folder in (Path.home(), Path("/opt/gurobi"))
    )


def _result(problem: Problem, answer: Answer, run: Run, solver: str, notes: list[str]) -> Result:
    """What is left of an answer after a look at it."""
    status = answer.status
    found, broken = _checked(problem, answer.values)
    if broken:
        status = Status.INEXACT
        notes = [*notes, f"the solver's solution is none: {broken}"]
    hint, _ = _checked(problem, problem.hint)
    solutions = [values for values in (found, hint) if values is not None and status is not Status.UNBOUNDED]
    best = min(solutions, key=problem.objective, default=None)
    objective = inf if best is None else problem.objective(best)
    bound = inf if status is Status.INFEASIBLE and best is None else min(answer.bound, objective)
    if best is not None:
        best.setflags(write=False)
        run.tell(objective, bound)
        is_close = objective - bound <= (run.gap + _CLOSE) * max(1.0, abs(objective))
        status = Status.OPTIMAL if answer.status is Status.OPTIMAL and is_close else Status.FEASIBLE
    if run.interruption is not None and (best is None or not isinstance(run.interruption, KeyboardInterrupt)):
        raise run.interruption
    return Result(status, best, objective, bound, run.seconds, solver, "; ".join(notes))


def _checked(problem: Problem, values: Floats | None) -> tuple[Floats | None, str | None]:
    """The values, rounded, if they break nothing; else what they break."""
    if values is None:
        return None, None
    rounded = problem.rounded(values)
    broken = problem.violation(rounded)
    return (rounded, None) if broken is None else (None, broken)

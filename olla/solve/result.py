"""What a solver came back with."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from math import inf

from olla.solve.problem import Floats

__all__ = ["Result", "Status"]


class Status(Enum):
    """How a search ended."""

    OPTIMAL = "optimal"  # within the gap that was asked for; or 1e-8, from solvers that compute in floats
    FEASIBLE = "feasible"  # stopped with a solution
    NO_SOLUTION = "no solution"  # stopped without one
    INFEASIBLE = "infeasible"  # there is none; solvers in floats can err, with coefficients beyond 2**30
    UNBOUNDED = "unbounded"  # there is always a better one
    INEXACT = "inexact"  # the solver's solution breaks a row once integers are integers


@dataclass(frozen=True, slots=True, eq=False)
class Result:
    """The best solution found, and how good one can be."""

    status: Status
    values: Floats | None  # of all variables, integers among them exact; None: no solution
    objective: int | float  # of the values, an int where everything that costs is one; inf: no solution
    bound: float  # no solution is below; lower by the errors of solvers that compute in floats
    seconds: float  # including the time to load the solver and the model
    solver: str
    note: str = ""  # what else there is to know: solvers that were passed over, the row that was broken

    @property
    def gap(self) -> float:
        """How far the objective can be from the optimum, relative to the objective; inf without a solution."""
        if self.values is None:
            return inf
        difference = self.objective - self.bound
        return difference / abs(self.objective) if self.objective else (inf if difference else 0.0)

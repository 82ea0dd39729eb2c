"""Mixed-integer linear programs as flat arrays, and a file for each solver; none is loaded until it is asked for."""

from olla.solve.model import Model
from olla.solve.result import Result, Status
from olla.solve.solver import available, require, solve

__all__ = ["Model", "Result", "Status", "available", "require", "solve"]

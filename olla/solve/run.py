"""One run of a solver: what is asked of it, what it answers, and the line to the user in between."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from importlib import import_module
from math import inf
from typing import Any, TypeVar

from olla.errors import SolverUnavailableError
from olla.solve.problem import Floats
from olla.solve.result import Status

__all__ = ["Answer", "Progress", "Run", "imported"]

Progress = Callable[[float, float, float], None]
T = TypeVar("T")

_POLL = 0.02  # seconds


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """What a solver says, unchecked."""

    status: Status
    values: Floats | None = None
    bound: float = -inf


@dataclass(slots=True)
class Run:
    """What is asked of a solver, and what the user says meanwhile."""

    time_limit: float
    gap: float
    seed: int
    threads: int  # 0: as many as the solver likes
    progress: Progress | None
    started: float = field(default_factory=time.perf_counter)
    interruption: BaseException | None = None  # Ctrl-C, or what the progress callback raised: it is time to stop
    _told: tuple[float, float] | None = None

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self.started

    @property
    def seconds_left(self) -> float:
        """Seconds to the time limit."""
        return max(0.0, self.time_limit - self.seconds)

    def tell(self, objective: float, bound: float) -> None:
        """Call the user's progress callback, if there is news. Called by solvers, from any thread; raises nothing."""
        news = (objective, min(bound, objective))
        if self.progress is None or self.interruption is not None or news == self._told:
            return
        self._told = news
        try:
            self.progress(*news, self.seconds)
        except BaseException as error:  # it must not unwind a solver's own code
            self.interruption = error

    def until_stopped(self, search: Callable[[], T], stop: Callable[[], object]) -> T:
        """Run ``search``; call ``stop``, from another thread, when it is interrupted."""
        with ThreadPoolExecutor(1) as pool:  # while a solver's own code runs in this thread, Ctrl-C is not heard
            searching = pool.submit(search)
            while not searching.done():
                try:
                    wait([searching], timeout=_POLL)
                except KeyboardInterrupt as error:
                    self.interruption = error
                if self.interruption is not None:
                    stop()  # again and again, because the first may come before the solver listens
            return searching.result()


def imported(module: str) -> Any:
    """A solver's module.

    Raises
    ------
    SolverUnavailableError
        It cannot be imported, as a rule because its package is not installed.
    """
    try:
        return import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise SolverUnavailableError(f"{package} cannot be imported ({error}): pip install {package}") from error

"""Buffers to placement: many first fits, ejections, then a search for lower capacities."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import numpy as np

from olla.errors import InfeasibleError, InvalidBuffersError
from olla.graph.plan import Placement
from olla.place.buffers import Buffer
from olla.place.eject import lowered
from olla.place.greedy import first_fits, mended_fits
from olla.place.grid import grids
from olla.place.problem import Integers, Problem, Tries
from olla.place.restarts import searches
from olla.place.search import INFEASIBLE, SOLVED
from olla.place.windows import rebuilt

__all__ = ["allocate"]

_SEARCHED = (
    3_000  # buffers; above, nothing is searched for as a whole: first fits, ejections and windows take turns, and end
)
_CLOSE = 1e-4  # of the bound above it, after a round, or
_IDLE_ROUNDS = 3  # after so many in a row
_LEAST = 1e-5  # that gained less of the bound than that
_IDLE_TRIES = 15  # mended first fits in a row in vain, after which the ejections have their turn
_STARTS = 8  # first fits that ejections begin with: few buffers of them stand too high
_TURNS = 48  # of searches for a capacity that is given, before they begin anew
_FEW_TURNS = 6  # of searches for one capacity, before another one, or another way, is tried
_BEFORE_SEARCH = 0.05  # of the time that is left: a turn of ejections, or of mended first fits
_UNKNOWN = 2**62


def allocate(
    buffers: Sequence[Buffer],
    capacity: int | None = None,
    *,
    alignment: int = 1,
    gap: float = 0.0,
    time_limit: float = 60.0,
) -> Placement:
    """Give each buffer an offset, so that buffers alive at the same time share no byte.

    The result depends on the buffers alone, unless time runs out: the search draws its orders of
    preference with a fixed seed. This is dynamic storage allocation; the lower bound is the load, the most bytes alive
    at once, or more if the search has proven more (docs/how_it_works.md).

    Parameters
    ----------
    buffers
        What to place.
    capacity
        Bytes that must suffice. The first placement within them is returned. None: the lowest that
        can be found.
    alignment
        All offsets are multiples of it, and of each buffer's own alignment.
    gap
        Without a capacity: how far above the lower bound is near enough, as a share of it.
    time_limit
        Seconds after which the best placement so far is returned. One is always made. What takes time once,
        because the search has never been compiled on this machine, is not counted.

    Returns
    -------
    Placement
        The offsets, in the order of ``buffers``; what they need, and what any placement needs.

    Raises
    ------
    InfeasibleError
        If no placement within ``capacity`` exists, or none was found in time; the message says which.
    InvalidBuffersError
        If two buffers with fixed offsets are in each other's way, or ``alignment`` is below 1.
    """
    _compile_first_fits()
    started = time.perf_counter()
    if alignment < 1:
        raise InvalidBuffersError(f"the alignment is {alignment}: it must be at least 1")
    solid = [index for index, buffer in enumerate(buffers) if buffer.size]  # what has no bytes can be anywhere
    _require_room_for_fixed(buffers, alignment)
    problem = _aligned(Problem.of([buffers[index] for index in solid]), alignment)
    found = _Search(problem, capacity, gap, started + time_limit)
    found.run()
    offsets = np.array([buffer.offset or 0 for buffer in buffers], np.int64)
    offsets[solid] = found.offsets
    placement = Placement(
        offsets=tuple(offsets.tolist()),
        arena_bytes=found.top,
        lower_bound_bytes=found.bound,
        method=found.method,
        seconds=time.perf_counter() - started,
    )
    if capacity is not None and found.top > capacity:
        why = (
            f"at least {found.bound:,} are needed"
            if found.bound > capacity
            else f"none was found in {placement.seconds:.1f} s; the best needs {found.top:,}"
        )
        raise InfeasibleError(f"no placement within {capacity:,} bytes: {why}", found.bound, found.top)
    return placement


class _Search:
    """The lowest placement so far, and what is proven about lower ones."""

    def __init__(self, problem: Problem, capacity: int | None, gap: float, deadline: float) -> None:
        self._problem = problem
        self._capacity = capacity
        self._gap = gap
        self._deadline = deadline
        self._random, self._others = (np.random.default_rng(seed) for seed in (0, 1))
        self._blame = np.zeros(len(problem.load), np.int64)
        self.bound = problem.bound
        self._first_fits: list[Integers] = []
        self.offsets: Integers = np.zeros(len(problem.sizes), np.int64)
        self.top = _UNKNOWN if len(problem.sizes) else 0
        self.method = "nothing to place"

    @property
    def _ended(self) -> bool:
        if self.top == _UNKNOWN:
            return False
        goal = self._goal
        return self.top <= max(goal, self.bound) or self.bound > goal or time.perf_counter() > self._deadline

    @property
    def _goal(self) -> int:
        """What is low enough: the capacity, or near the bound."""
        return self._near(self.bound) if self._capacity is None else self._capacity

    def _near(self, bound: int) -> int:
        return int(bound * (1 + self._gap))

    def run(self) -> None:
        """Try first fits, improve them, then search, until the bound or the capacity is met or time is over."""
        self._try(self._noted(first_fits(self._problem)), self._deadline)
        if self._ended:
            return
        started = time.perf_counter()
        _compile_searches()
        self._deadline += time.perf_counter() - started
        if len(self._problem.sizes) > _SEARCHED:
            if self._capacity is not None or not self._search_grids():
                self._lower_first_fits()
            self._improve_in_rounds()
        else:
            if self._capacity is None:  # one that is tight enough to be given is a matter for the search
                if not self._search_grids():
                    self._lower_first_fits()
                self._improve()
            self._bisect()

    def fit(self) -> None:
        """Try first fits, and mend them until that seems to be in vain."""
        self._try(first_fits(self._problem), self._deadline)
        self._try(mended_fits(self._problem, self._others), self._deadline, _IDLE_TRIES)

    def _improve_in_rounds(self) -> None:
        """Improve until that seems to be in vain, or what is left to gain is nothing that matters."""
        idle = 0
        while not self._ended and idle < _IDLE_ROUNDS:
            before = self.top
            self._improve(_IDLE_TRIES)
            if self._capacity is None:
                idle = 0 if before - self.top > _LEAST * self.bound else idle + 1
                if self.top - self.bound <= _CLOSE * self.bound:
                    return

    def _lower_first_fits(self) -> None:
        """Ejections where few buffers stand too high: more is left to move there than where all are a little lower."""
        fits = sorted(self._first_fits, key=lambda offsets: int((offsets + self._problem.sizes > self._goal).sum()))
        self._try(lowered(self._problem, fits[:_STARTS], self._others, self.top), self._end_of_turn)

    def _search_grids(self) -> bool:
        """Place what is large by itself, then what is small around it; whether that was the best so far."""
        before = self.top
        for grid in grids(self._problem, _SEARCHED):
            near = grid.problem.bound if grid.is_rounded else self._near(grid.problem.bound)
            large = _Search(grid.problem, near, 0.0, self._half_of_the_rest)
            if grid.is_rounded:
                large.run()
            else:
                large.fit()
                large._reach(near, _FEW_TURNS)
            if large.top > near:
                continue
            rest = _Search(grid.around(self._problem, large.offsets), None, self._gap, self._half_of_the_rest)
            rest.fit()
            self._keep(f"grid of {grid.unit:,} bytes", rest.offsets)
            if self._ended:
                break
        return self.top < before

    def _bisect(self) -> None:
        """Search for what is low enough, then for what is half way between what was tried in vain and the best."""
        unit = self._problem.unit
        target, turns = self._goal, _FEW_TURNS if self._capacity is None else _TURNS
        lowest = self.bound  # below it, it was tried in vain
        while not self._ended:
            target -= target % unit
            reached = self._reach(target, turns)
            if self._capacity is not None:
                continue
            lowest = max(self.bound, (self.bound + lowest) // 2 if reached else target + unit)
            target = (lowest + self.top) // 2
            if lowest >= self.top:  # begin again, with four times as many nodes
                lowest, target, turns = self.bound, self._goal, turns + 2 * _FEW_TURNS

    def _improve(self, patience: int = _UNKNOWN) -> None:
        """Mend first fits, then lower the best placement, by windows only when ejections no longer do."""
        problem, random = self._problem, self._others
        self._try(mended_fits(problem, random), self._end_of_turn, patience)
        while self._gains(lowered(problem, [self.offsets], random)) or self._gains(
            rebuilt(problem, self.offsets, random)
        ):
            pass

    def _gains(self, tries: Tries) -> bool:
        """Make them for a turn; whether it was worth while."""
        before = self.top
        self._try(tries, self._end_of_turn)
        return not self._ended and before - self.top > _LEAST * self.bound

    @property
    def _half_of_the_rest(self) -> float:
        return self._after(0.5)

    @property
    def _end_of_turn(self) -> float:
        """Half of the time that is left; little of it where a search for the whole comes later."""
        return self._after(_BEFORE_SEARCH if len(self._problem.sizes) <= _SEARCHED else 0.5)

    def _after(self, share: float) -> float:
        """When this share of the time that is left is over."""
        now = time.perf_counter()
        return now + share * (self._deadline - now)

    def _try(self, tries: Tries, until: float, patience: int = _UNKNOWN) -> None:
        """Keep the best of the tries until some time, or until so many in a row were in vain."""
        idle = 0
        while not self._ended and (self.top == _UNKNOWN or time.perf_counter() < until) and idle < patience:
            found = next(tries, ())
            if found == ():
                return
            if found:
                idle = 0 if self._keep(*found) else idle + 1

    def _noted(self, tries: Tries) -> Tries:
        """The same tries, with which ejections may begin later."""
        for found in tries:
            if found:
                self._first_fits.append(found[1])
            yield found

    def _reach(self, target: int, turns: int) -> bool:
        """Look for a placement within ``target``."""
        if self.top <= target:
            return True
        for status, offsets in searches(self._problem, target, turns, self._random, self._blame):
            if status == SOLVED:
                self._keep("search", offsets)
                return True
            if status == INFEASIBLE:
                self.bound = max(self.bound, (target // self._problem.unit + 1) * self._problem.unit)
            if self._ended:
                break
        return False

    def _keep(self, method: str, offsets: Integers) -> bool:
        """Keep the placement if it is the lowest so far."""
        top = int((offsets + self._problem.sizes).max(initial=0))
        if top >= self.top:
            return False
        self.offsets, self.top, self.method = offsets, top, method
        return True


def _pair() -> Problem:
    return Problem.of([Buffer(0, 2, 1), Buffer(1, 3, 1)])


@cache
def _compile_first_fits() -> None:
    next(first_fits(_pair()))


@cache
def _compile_searches() -> None:
    """That takes some ten seconds, once, so it is done only when a first fit is not good enough."""
    problem, random = _pair(), np.random.default_rng(0)
    for tries in (
        lowered(problem, [np.array([0, 9])], random),
        searches(problem, 2, 1, random, np.zeros_like(problem.load)),
    ):
        next(tries)


def _aligned(problem: Problem, alignment: int) -> Problem:
    return replace(problem, alignment=np.lcm(problem.alignment, alignment))


def _require_room_for_fixed(buffers: Sequence[Buffer], alignment: int) -> None:
    fixed = [(i, buffer) for i, buffer in enumerate(buffers) if buffer.offset is not None and buffer.size]
    for place, (i, one) in enumerate(fixed):
        start = one.offset or 0
        if start % alignment:
            raise InvalidBuffersError(f"{_name(i, one)} is fixed at {start}, which is not a multiple of {alignment}")
        for j, other in fixed[:place]:
            begin = other.offset or 0
            together = one.lower < other.upper and other.lower < one.upper
            if together and start < begin + other.size and begin < start + one.size:
                raise InvalidBuffersError(f"{_name(j, other)} and {_name(i, one)} have fixed offsets that overlap")


def _name(index: int, buffer: Buffer) -> str:
    return f"buffer {buffer.name or index}"

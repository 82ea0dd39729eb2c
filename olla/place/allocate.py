"""Buffers to placement: many first fits, ejections, then a search for lower capacities."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from olla.errors import InfeasibleError, InvalidBuffersError
from olla.graph.plan import Placement
from olla.place.buffers import Buffer
from olla.place.eject import lowered
from olla.place.greedy import first_fits, mended_fits
from olla.place.problem import Integers, Problem
from olla.place.search import INFEASIBLE, SOLVED, search

__all__ = ["allocate"]

_SEARCHED = 3_000  # buffers; above, first fits and ejections take turns until time is over
_NODES = 1_000  # of the first searches; some later ones get more, see _luby,
_WORK = 20_000_000  # but not more than this, divided by the number of buffers: a second or two
_RESTARTS = 60  # searches for one capacity, before another one is tried
_UNKNOWN = 2**62
_FORGETTING = 0.9  # of the blame of a section that is left after each search


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
    preference with a fixed seed.

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
        Seconds after which the best placement so far is returned. One is always made.

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
        self.bound = problem.bound
        self.offsets: Integers = np.zeros(len(problem.sizes), np.int64)
        self.top = _UNKNOWN if len(problem.sizes) else 0
        self.method = "nothing to place"

    @property
    def _ended(self) -> bool:
        if self.top == _UNKNOWN:
            return False
        capacity = int(self.bound * (1 + self._gap)) if self._capacity is None else self._capacity
        return self.top <= max(capacity, self.bound) or self.bound > capacity or time.perf_counter() > self._deadline

    def run(self) -> None:
        """Try first fits, improve them, then search, until the bound or the capacity is met or time is over."""
        self._try(first_fits(self._problem), self._deadline)
        self._improve()
        if len(self._problem.sizes) > _SEARCHED:
            while not self._ended:
                self._improve()
            return
        self._blame = np.zeros(len(self._problem.load), np.int64)
        restarts, lowest = _RESTARTS, self.bound  # below `lowest`, it was tried in vain
        target = self.bound if self._capacity is None else self._capacity
        while not self._ended:
            reached = self._reach(target, restarts)
            if self._capacity is not None:
                continue
            lowest = self.bound if reached else max(self.bound, target + 1)
            if lowest >= self.top:
                lowest, restarts = self.bound, restarts * 4
            target = lowest if lowest == self.bound else (lowest + self.top) // 2

    def _improve(self) -> None:
        """Mend first fits, then lower the best placement: each for half of the time that is left, at most."""
        self._try(mended_fits(self._problem, self._others), self._half_of_the_rest)
        self._try(lowered(self._problem, self.offsets, self._others), self._half_of_the_rest)

    @property
    def _half_of_the_rest(self) -> float:
        return (time.perf_counter() + self._deadline) / 2

    def _try(self, tries: Iterator[tuple[str, Integers] | None], until: float) -> None:
        """Keep the best of the tries until some time."""
        while not self._ended and (self.top == _UNKNOWN or time.perf_counter() < until):
            found = next(tries, ())
            if found == ():
                return
            if found:
                self._keep(*found)

    def _reach(self, target: int, restarts: int) -> bool:
        """Look for a placement within ``target``."""
        for number in range(1, restarts + 1):
            if self._ended:
                return False
            order = np.argsort(-self._preference(), kind="stable")
            chosen = self._problem.ordered(order)
            start, others = chosen.overlaps()
            status, _, offsets = search(
                target,
                chosen.first,
                chosen.last,
                chosen.sizes,
                chosen.alignment,
                chosen.fixed,
                start,
                others,
                self._blame,
                min(_NODES * _luby(number), 1 + _WORK // len(order)),
            )
            if status == SOLVED:
                result = np.empty(len(order), np.int64)
                result[order] = offsets
                self._keep("search", result)
                return True
            if status == INFEASIBLE:
                self.bound = max(self.bound, target + 1)
                return False
            self._blame = (self._blame * _FORGETTING).astype(np.int64)
        return False

    def _preference(self) -> npt.NDArray[np.float64]:
        """How early each buffer is tried: size, lifetime, load and blame, in proportions drawn anew."""
        problem = self._problem
        share = self._random.uniform(size=4)
        noise = self._random.normal(size=len(problem.sizes))
        blame = problem.largest(self._blame) / max(1.0, float(problem.largest(self._blame).mean()))
        preference: npt.NDArray[np.float64] = (
            0.8 * share[0] * np.log(problem.sizes)
            + (0.5 + 0.5 * share[1]) * np.log(problem.last - problem.first + 1)
            + 3 * share[2] * np.log(problem.largest(problem.load))
            + 0.3 * share[3] * noise
            + 2 * np.log(0.1 + blame)
        )
        return preference

    def _keep(self, method: str, offsets: Integers) -> None:
        top = int((offsets + self._problem.sizes).max(initial=0))
        if top < self.top:
            self.offsets, self.top, self.method = offsets, top, method


def _luby(number: int) -> int:
    """1, 1, 2, 1, 1, 2, 4, 1, ...: Luby, Sinclair, Zuckerman, *Optimal speedup of Las Vegas algorithms*, 1993."""
    power = number.bit_length()
    while number != 2**power - 1:
        number -= 2 ** (power - 1) - 1
        power = number.bit_length()
    return int(2 ** (power - 1))


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

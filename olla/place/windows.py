"""Lower a placement window by window: all that lives around a buffer that stands too high is placed anew.

The window is a stretch of time. What lives within it is free, what reaches beyond it stays where it is,
and the exact search places both below a ceiling. It is large neighbourhood search: Shaw, *Using
constraint programming and local search methods to solve vehicle routing problems*, CP 1998.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from olla.place.problem import Integers, Problem, Tries
from olla.place.restarts import searches
from olla.place.search import SOLVED

__all__ = ["rebuilt"]

_SHARE = 0.5  # of the way to the bound, by which the ceiling is lowered first
_CLOSE = 1e-4  # of the bound above it: a search is not worth while
_FREE = 800  # buffers of a window; after each failure
_GROWTH = 1.5  # times as many,
_MOST = 3_000  # up to this many with those that stay
_FAILURES = 3  # in a row
_TURNS = 7  # of searches for one window


def rebuilt(problem: Problem, offsets: Integers, random: np.random.Generator) -> Tries:
    """Lower and lower placements."""
    bound, top = problem.bound, int((offsets + problem.sizes).max())
    share, free, failures = _SHARE, _FREE, 0
    while top - bound > _CLOSE * bound and failures < _FAILURES:
        ceiling = min(top - 1, int(top - share * (top - bound)))
        for found in _below(problem, offsets, ceiling, free, random):
            if found is None:
                yield None
                continue
            offsets, share, failures = found, min(1.0, 2 * share), 0
            top = int((offsets + problem.sizes).max())
            yield "windows", offsets
            break
        else:
            share, free, failures = share / 2, int(_GROWTH * free), failures + 1


def _below(
    problem: Problem, offsets: Integers, ceiling: int, free: int, random: np.random.Generator
) -> Iterator[Integers | None]:
    """None after each search, and the offsets at last, if all windows are placed below the ceiling."""
    offsets = offsets.copy()
    tops = offsets + problem.sizes
    while tops.max() > ceiling:
        first, last = _window(problem, int(tops.argmax()), free)
        within = (problem.first >= first) & (problem.last <= last)
        stays = (problem.first <= last) & (problem.last >= first) & ~within & (tops <= ceiling)
        members = np.nonzero(within | stays)[0]
        if len(members) > _MOST or 2 * within.sum() > len(offsets):  # as well search for the whole at once
            return
        part = Problem(
            np.maximum(problem.first[members], first) - first,
            np.minimum(problem.last[members], last) - first,
            problem.lifetimes[members],
            problem.sizes[members],
            problem.alignment[members],
            np.where(stays, offsets, problem.fixed)[members],
        )
        for status, found in searches(part, ceiling, _TURNS, random, np.zeros_like(part.load)):
            if status == SOLVED:
                offsets[members] = found
                tops[within] = 0
                break
            yield None
        else:
            return
    yield offsets


def _window(problem: Problem, buffer: int, free: int) -> tuple[int, int]:
    """The sections around a buffer within which so many others live."""
    first, last = problem.first[buffer], problem.last[buffer]
    reach = np.maximum(first - problem.first, problem.last - last)  # how far it must grow to hold each
    free = min(free, len(reach))
    grown = max(0, int(np.partition(reach, free - 1)[free - 1]))
    return max(0, int(first) - grown), min(int(problem.last.max()), int(last) + grown)

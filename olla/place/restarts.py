"""Searches for a placement within one capacity, each with another preference.

Two threads take turns of as many nodes; always two, so that what is found does not depend on the machine. One goes
through a short list, every other turn and with more and more nodes: the largest load first, then what is long or
large, after MiniMalloc's heuristics (see ``search.py``). Each of its eleven instances is solved by one of the list
within 23,000 nodes: the one called I in 0.8 s, and in 17 on average where all preferences were drawn. The other
turns are for these. A search that starts badly rarely ends well, so it is given up after some nodes, and the next
preference is drawn towards the sections that made the earlier ones fail.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Event
from typing import NamedTuple

import numpy as np

from olla.place.problem import Integers, Problem
from olla.place.search import UNDECIDED, Floats, search

__all__ = ["searches"]

_NODES = 1_000  # of the first searches, or as many for each buffer,
_NODES_EACH = 1.25  # because what is found is found almost straight away (RAFT); later ones get more, see _luby,
_WORK = 20_000_000  # but not more than this, divided by the number of buffers: a second or two
_FORGETTING = 0.9  # of the blame of a section that is left after each search
_ROUND = 6  # turns, in which each of the list has one; the next ones have twice as many nodes
_FIRST = 1e9  # so heavy that nothing else matters where loads differ

Result = tuple[int, Integers]  # how a search ended, and its offsets


class _Preference(NamedTuple):
    worth: Floats  # how early each buffer is tried,
    weight: float  # to which the logarithm of the load of its sections is added, times this


def searches(
    problem: Problem, capacity: int, turns: int, random: np.random.Generator, blame: Integers
) -> Iterator[Result]:
    """How each turn of each thread ended, until one is decided; failures add to the blame of the sections."""
    task, listed, ended = _Task(problem, capacity), _listed(problem), Event()
    drawing, instead = _Drawing(task, random, blame), _Drawing(task, random.spawn(1)[0], np.zeros_like(blame))
    with ThreadPoolExecutor(2) as pool:
        try:
            for turn in range(turns):
                nodes = task.few * 2 ** (turn // _ROUND)
                if turn % 2 == 0 and nodes < 2 * task.many:
                    first = pool.submit(task.search, listed[turn % _ROUND // 2], nodes, np.zeros_like(blame))
                else:
                    first = pool.submit(instead.search, nodes, ended)
                for running in (first, pool.submit(drawing.search, nodes, ended)):
                    status, offsets = running.result()
                    yield status, offsets
                    if status != UNDECIDED:
                        return
        finally:
            ended.set()


class _Task:
    """A capacity to keep, and how many nodes searches get."""

    def __init__(self, problem: Problem, capacity: int) -> None:
        count = len(problem.sizes)
        self.problem, self.capacity, self.overlaps = problem, capacity, problem.overlaps()
        self.few = max(_NODES, int(_NODES_EACH * count))
        self.many = 1 + _WORK // count

    def search(self, preference: _Preference, nodes: int, blame: Integers) -> Result:
        """Search once, for so many nodes if they are not too many."""
        problem = self.problem
        status, _, offsets = search(
            self.capacity,
            problem.first,
            problem.last,
            problem.sizes,
            problem.alignment,
            problem.fixed,
            *self.overlaps,
            *preference,
            blame,
            min(nodes, self.many),
        )
        return status, offsets


@dataclass(slots=True)
class _Drawing:
    """Searches whose preferences are drawn, towards sections that are to blame."""

    task: _Task
    random: np.random.Generator
    blame: Integers
    number: int = 0

    def search(self, nodes: int, ended: Event) -> Result:
        """Search until one is decided, for so many nodes in all if they are not too many."""
        used = 0
        while True:
            self.number += 1
            once, own = self.task.few * _luby(self.number), np.zeros_like(self.blame)
            status, offsets = self.task.search(self._drawn(), once, own)
            used += once
            if status != UNDECIDED or used >= min(nodes, self.task.many) or ended.is_set():
                return status, offsets
            self.blame[:] = (self.blame + own) * _FORGETTING

    def _drawn(self) -> _Preference:
        """Size, lifetime, load and blame, in proportions drawn anew."""
        problem = self.task.problem
        share = self.random.uniform(size=4)
        noise = self.random.normal(size=len(problem.sizes))
        blamed = problem.largest(self.blame) / max(1.0, float(problem.largest(self.blame).mean()))
        worth = (
            0.8 * share[0] * np.log(problem.sizes)
            + (0.5 + 0.5 * share[1]) * np.log(problem.last - problem.first + 1)
            + 0.3 * share[3] * noise
            + 2 * np.log(0.1 + blamed)
        )
        return _Preference(worth, 3 * share[2])


def _listed(problem: Problem) -> list[_Preference]:
    """The load first, then the length, then the size: in time, in sections, or the largest area and then the length."""
    sections = problem.last - problem.first + 1
    keys = (problem.lifetimes, problem.sizes), (sections, problem.sizes), (sections * problem.sizes, sections)
    return [_Preference(-np.argsort(np.lexsort((-next_key, -key))) / len(key), _FIRST) for key, next_key in keys]


def _luby(number: int) -> int:
    """1, 1, 2, 1, 1, 2, 4, 1, ...: Luby, Sinclair, Zuckerman, *Optimal speedup of Las Vegas algorithms*, 1993."""
    power = number.bit_length()
    while number != 2**power - 1:
        number -= 2 ** (power - 1) - 1
        power = number.bit_length()
    return int(2 ** (power - 1))

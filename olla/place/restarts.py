"""Searches for a placement within one capacity, each in another order of preference.

A search that starts badly rarely ends well, so it is given up after some nodes. The next order is drawn
anew, and drawn towards the sections that made the earlier ones fail. Two run at once, on two threads; always two,
so that what is found does not depend on the machine.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import numpy.typing as npt

from olla.place.problem import Integers, Problem
from olla.place.search import UNDECIDED, search

__all__ = ["searches"]

_NODES = 1_000  # of the first searches, or as many for each buffer,
_NODES_EACH = 1.25  # because what is found is found almost straight away (RAFT); some later ones get more, see _luby,
_WORK = 20_000_000  # but not more than this, divided by the number of buffers: a second or two
_AT_ONCE = 2
_FORGETTING = 0.9  # of the blame of a section that is left after each search


def searches(
    problem: Problem, capacity: int, most: int, random: np.random.Generator, blame: Integers
) -> Iterator[tuple[int, Integers]]:
    """How each search ended, and its offsets, until one is decided; each adds to the blame of the sections."""
    count = len(problem.sizes)
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for number in range(1, -(-most // _AT_ONCE) + 1):
            nodes = min(max(_NODES, int(_NODES_EACH * count)) * _luby(number), 1 + _WORK // count)
            orders = [np.argsort(-_preference(problem, random, blame), kind="stable") for _ in range(_AT_ONCE)]
            blames = [np.zeros_like(blame) for _ in orders]
            for status, offsets in pool.map(partial(_searched, problem, capacity, nodes), orders, blames):
                yield status, offsets
                if status != UNDECIDED:
                    return
            blame[:] = (blame + sum(blames)) * _FORGETTING


def _searched(problem: Problem, capacity: int, nodes: int, order: Integers, blame: Integers) -> tuple[int, Integers]:
    """Search in an order of preference."""
    chosen = problem.ordered(order)
    status, _, found = search(
        capacity,
        chosen.first,
        chosen.last,
        chosen.sizes,
        chosen.alignment,
        chosen.fixed,
        *chosen.overlaps(),
        blame,
        nodes,
    )
    offsets = np.empty(len(order), np.int64)
    offsets[order] = found
    return status, offsets


def _preference(problem: Problem, random: np.random.Generator, blame: Integers) -> npt.NDArray[np.float64]:
    """How early each buffer is tried: size, lifetime, load and blame, in proportions drawn anew."""
    share = random.uniform(size=4)
    noise = random.normal(size=len(problem.sizes))
    blamed = problem.largest(blame) / max(1.0, float(problem.largest(blame).mean()))
    preference: npt.NDArray[np.float64] = (
        0.8 * share[0] * np.log(problem.sizes)
        + (0.5 + 0.5 * share[1]) * np.log(problem.last - problem.first + 1)
        + 3 * share[2] * np.log(problem.largest(problem.load))
        + 0.3 * share[3] * noise
        + 2 * np.log(0.1 + blamed)
    )
    return preference


def _luby(number: int) -> int:
    """1, 1, 2, 1, 1, 2, 4, 1, ...: Luby, Sinclair, Zuckerman, *Optimal speedup of Las Vegas algorithms*, 1993."""
    power = number.bit_length()
    while number != 2**power - 1:
        number -= 2 ** (power - 1) - 1
        power = number.bit_length()
    return int(2 ** (power - 1))

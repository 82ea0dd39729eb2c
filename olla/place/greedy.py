"""First fit: one buffer after another, each at the lowest offset that is free for its whole life.

Everything depends on the order. Several are tried, and then each is mended: what ended above the load
comes earlier next time, and so on (squeaky wheel optimization: Joslin and Clements, *Journal of
Artificial Intelligence Research* 10, 1999).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from numba import njit

from olla.place.problem import Integers, Problem, Tries
from olla.place.tiles import Tiles, empty_tiles, insert, lowest_free

__all__ = ["first_fits", "mended_fits"]

_TIMES = 6  # that each order is mended, and then
_ROUNDS = ((4, 16), (2, 32))  # so many of the best ones so many times
_FIRST = 1e9  # what is multiplied by it decides, and the rest only where that is equal
_BAND = 0.1  # of the largest load: sections whose loads differ by less are as full as each other
_NARROW_BAND = 0.01  # the same, where lifetimes decide
_FULL = 0.99  # of the largest load, and more
_CHUNK = 2**27  # placed buffers looked at, at most, between two looks at the clock

Numbers = npt.NDArray[np.float64]


def first_fits(problem: Problem) -> Tries:
    """First fit in several orders."""
    for name, preference in _preferences(problem).items():
        for offsets in _first_fit(problem, preference):
            yield None if offsets is None else (f"first fit by {name}", offsets)


def mended_fits(problem: Problem, random: np.random.Generator) -> Tries:
    """The same, again and again: what ends above the bound is preferred by a factor of about e next time."""
    bound = problem.bound
    chains = [(0, name, preference) for name, preference in _preferences(problem).items()]
    for kept, times in ((len(chains), _TIMES), *_ROUNDS):
        chains = sorted(chains, key=lambda chain: chain[0])[:kept]
        for index, (_, name, preference) in enumerate(chains):
            lowest = 2**62
            for _ in range(times):
                for offsets in _first_fit(problem, preference):
                    if offsets is None:
                        yield None
                        continue
                    yield f"mended first fit by {name}", offsets
                    tops = offsets + problem.sizes
                    lowest = min(lowest, int(tops.max()))
                    preference = preference + (tops > bound) * random.uniform(0.5, 1.5, len(tops))
            chains[index] = (lowest, name, preference)


def _preferences(problem: Problem) -> dict[str, Numbers]:
    """How early each buffer comes: logarithms of products of size, lifetime and load."""
    size = np.log(problem.sizes)
    lifetime = np.log(problem.last - problem.first + 1)
    loads = problem.load
    largest = problem.largest(loads)
    load, share = np.log(largest), largest / max(1, int(loads.max(initial=0)))
    fullest = int(loads.argmax()) if len(loads) else 0
    distance = np.maximum(0, np.maximum(problem.first - fullest, fullest - problem.last))
    return {
        "size": size,
        "size and load": size + 8 * load,
        "size, load and lifetime": size + 8 * load + 0.2 * lifetime,
        "size and lifetime": size + 0.5 * lifetime,
        "load and lifetime": 100 * load + lifetime,
        "load": 100 * load + size,
        "load, then size": _FIRST * load + size,
        "area": size + lifetime,
        "lifetime, then size": _FIRST * lifetime + size,
        "begin": -problem.first + size / 100,
        "tenths of the load, then size": _FIRST * np.floor(share / _BAND) + size,
        "the fullest, then size": _FIRST * (share >= _FULL) + size,
        "hundredths of the load, then lifetime": _FIRST * np.floor(share / _NARROW_BAND) + lifetime,
        "distance from the fullest, then size": -_FIRST * distance + size,
    }


def _first_fit(problem: Problem, preference: Numbers) -> Iterator[Integers | None]:
    """The offsets, after what is fixed; first None after each piece of the work.

    What is preferred equally comes in the order of its begin. Programs have few sizes, and many buffers of each:
    in an order of chance they need 5 to 25 % more.
    """
    order = np.lexsort((problem.first, -preference, problem.fixed < 0))
    tiles = empty_tiles(problem)
    step = 1 + _CHUNK // max(1, len(order))
    for begin in range(0, len(order), step):
        if begin:
            yield None
        _place(tiles, order[begin : begin + step])
    yield tiles.offsets


@njit(cache=True, nogil=True)
def _place(tiles: Tiles, order: Integers) -> None:
    for buffer in order:
        insert(tiles, buffer, tiles.fixed[buffer] if tiles.fixed[buffer] >= 0 else lowest_free(tiles, buffer))

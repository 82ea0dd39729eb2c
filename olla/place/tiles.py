"""The placed buffers, kept so that those alive at some time are found fast, lowest first.

Time is cut into tiles of equally many sections, and each tile has a list of the placed buffers that are
alive in it, by offset. A buffer stands in the list of every tile that it touches. Tiles are so wide that
these are three on average, whatever the lifetimes: so the lists are short, and few have to be changed.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from olla.place.problem import Integers, Problem

__all__ = ["Tiles", "copied", "empty_tiles", "insert", "lowest_free", "neighbours", "remove"]

_CROSSED = 2  # borders between tiles, by an average buffer


class Tiles(NamedTuple):
    """Buffers, of which some are placed."""

    first: Integers  # as in Problem
    last: Integers
    sizes: Integers
    alignment: Integers
    fixed: Integers
    offsets: Integers  # negative: not placed
    width: int  # sections of a tile
    start: Integers  # the placed buffers of tile t are listed[start[t] : end[t]]
    end: Integers
    listed: Integers
    cursor: Integers  # scratch, for each tile


def empty_tiles(problem: Problem) -> Tiles:
    """Nothing is placed yet."""
    count = max(1, len(problem.sizes))
    width = max(1, -(-int((problem.last - problem.first).sum()) // (_CROSSED * count)))
    tiles = int(problem.last.max(initial=0)) // width + 1
    change = np.zeros(tiles + 1, np.int64)
    np.add.at(change, problem.first // width, 1)
    np.subtract.at(change, problem.last // width + 1, 1)
    start = np.concatenate([[0], np.cumsum(np.cumsum(change[:-1]))])
    return Tiles(
        problem.first,
        problem.last,
        problem.sizes,
        problem.alignment,
        problem.fixed,
        np.full(len(problem.sizes), -1, np.int64),
        width,
        start[:-1],
        start[:-1].copy(),
        np.zeros(start[-1], np.int64),
        np.zeros(tiles, np.int64),
    )


def copied(tiles: Tiles) -> Tiles:
    """The same placement, to be changed by itself."""
    return tiles._replace(offsets=tiles.offsets.copy(), end=tiles.end.copy(), listed=tiles.listed.copy())


@njit(cache=True, nogil=True)
def lowest_free(tiles: Tiles, buffer: int) -> int:
    """The lowest offset at which no placed buffer is in the way."""
    first, last, size, step = tiles.first[buffer], tiles.last[buffer], tiles.sizes[buffer], tiles.alignment[buffer]
    low, high = first // tiles.width, last // tiles.width + 1
    for tile in range(low, high):
        tiles.cursor[tile] = tiles.start[tile]
    at, settled, tile = 0, 0, low
    while settled < high - low:  # so many tiles in a row had nothing new below at + size
        settled += 1
        k = tiles.cursor[tile]
        while k < tiles.end[tile]:
            other = tiles.listed[k]
            if tiles.offsets[other] >= at + size:
                break
            top = tiles.offsets[other] + tiles.sizes[other]
            if top > at and tiles.first[other] <= last and first <= tiles.last[other]:
                at = -(-top // step) * step
                settled = 1
            k += 1
        tiles.cursor[tile] = k
        tile = tile + 1 if tile + 1 < high else low
    return int(at)


@njit(cache=True, nogil=True)
def neighbours(tiles: Tiles, buffer: int) -> Integers:
    """The placed buffers that are alive together with a buffer that is not placed."""
    first, last = tiles.first[buffer], tiles.last[buffer]
    low, high = first // tiles.width, last // tiles.width + 1
    found = np.empty((tiles.end[low:high] - tiles.start[low:high]).sum(), np.int64)
    count = 0
    for tile in range(low, high):
        begin = 0 if tile == low else tile * tiles.width  # what began before was found in the tile before
        for k in range(tiles.start[tile], tiles.end[tile]):
            other = tiles.listed[k]
            if begin <= tiles.first[other] <= last and first <= tiles.last[other]:
                found[count] = other
                count += 1
    return found[:count]


@njit(cache=True, nogil=True)
def insert(tiles: Tiles, buffer: int, offset: int) -> None:
    """Place a buffer."""
    tiles.offsets[buffer] = offset
    for tile in range(tiles.first[buffer] // tiles.width, tiles.last[buffer] // tiles.width + 1):
        k = tiles.end[tile]
        while k > tiles.start[tile] and tiles.offsets[tiles.listed[k - 1]] > offset:
            tiles.listed[k] = tiles.listed[k - 1]
            k -= 1
        tiles.listed[k] = buffer
        tiles.end[tile] += 1


@njit(cache=True, nogil=True)
def remove(tiles: Tiles, buffer: int) -> None:
    """Take a placed buffer out again."""
    for tile in range(tiles.first[buffer] // tiles.width, tiles.last[buffer] // tiles.width + 1):
        k = tiles.start[tile]
        while tiles.listed[k] != buffer:
            k += 1
        tiles.end[tile] -= 1
        for j in range(k, tiles.end[tile]):
            tiles.listed[j] = tiles.listed[j + 1]
    tiles.offsets[buffer] = -1

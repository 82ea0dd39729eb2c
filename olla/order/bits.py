"""Sets of ops and of storages as rows of bits, 64 to a word: a thousand ops in 128 kB."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numba import njit

from olla.order.problem import Integers, Problem

__all__ = ["Bits", "ancestors", "has", "padded", "touched", "weight", "weights"]

Bits = npt.NDArray[np.uint64]

_ONE = np.uint64(1)


def ancestors(problem: Problem) -> Bits:
    """For each op, itself and all ops that must run before it."""
    ops = np.arange(problem.op_count)
    return _collected(ops, ops, problem.op_count, *_predecessors(problem))


def touched(problem: Problem, first: int = 0, end: int | None = None) -> Bits:
    """For each op, which of the storages ``first .. end-1`` it or an op that must run before it touches."""
    end = len(problem.sizes) if end is None else end
    owner = problem.touches.owners
    inside = (problem.touches.items >= first) & (problem.touches.items < end)
    return _collected(owner[inside], problem.touches.items[inside] - first, end - first, *_predecessors(problem))


def padded(sizes: Integers) -> Integers:
    """The sizes of the items, up to a whole number of words."""
    result = np.zeros(-(-len(sizes) // 64) * 64, np.int64)
    result[: len(sizes)] = sizes
    return result


def _predecessors(problem: Problem) -> tuple[Integers, Integers, Integers]:
    return np.argsort(problem.priority), problem.predecessors.start, problem.predecessors.items


@njit(cache=True, nogil=True)
def _collected(
    owner: Integers, item: Integers, items: int, order: Integers, pred_start: Integers, pred: Integers
) -> Bits:
    """For each op, the items that it owns, or an op that must run before it."""
    rows = np.zeros((len(order), (items + 63) // 64), np.uint64)
    for k in range(len(owner)):
        rows[owner[k], item[k] >> 6] |= _ONE << np.uint64(item[k] & 63)
    for op in order:
        for k in range(pred_start[op], pred_start[op + 1]):
            rows[op] |= rows[pred[k]]
    return rows


@njit(cache=True, nogil=True)
def has(rows: Bits, row: int, item: int) -> bool:
    """Whether ``item`` is in the set ``row``."""
    return bool((rows[row, item >> 6] >> np.uint64(item & 63)) & _ONE)


@njit(cache=True, nogil=True)
def weight(bits: np.uint64, word: int, sizes: Integers) -> int:
    """The summed sizes of the items in one word; ``sizes`` are :func:`padded`."""
    total = 0
    while bits:
        lowest = bits & (~bits + _ONE)
        position = word * 64
        if lowest & np.uint64(0xFFFFFFFF00000000):
            position += 32
        if lowest & np.uint64(0xFFFF0000FFFF0000):
            position += 16
        if lowest & np.uint64(0xFF00FF00FF00FF00):
            position += 8
        if lowest & np.uint64(0xF0F0F0F0F0F0F0F0):
            position += 4
        if lowest & np.uint64(0xCCCCCCCCCCCCCCCC):
            position += 2
        if lowest & np.uint64(0xAAAAAAAAAAAAAAAA):
            position += 1
        total += sizes[position]
        bits ^= lowest
    return total


@njit(cache=True, nogil=True)
def weights(rows: Bits, sizes: Integers) -> Integers:
    """The summed sizes of the items in each set; ``sizes`` are :func:`padded`."""
    total = np.zeros(len(rows), np.int64)
    for row in range(len(rows)):
        for word in range(rows.shape[1]):
            total[row] += weight(rows[row, word], word, sizes)
    return total

"""Lower a placement: what stands too high is forced in further down, and what is in its way moves on.

Buffers above a ceiling are taken out. One after another goes where it is free; if it is nowhere, where
those in its way are lightest, and these are taken out in its place. Whoever had to be forced in becomes
heavier, so the next one looks elsewhere. That is guided ejection search: Nagata and Braysy, *A powerful
route minimization heuristic for the vehicle routing problem with time windows*, Operations Research
Letters 37, 2009. What goes astray begins again where the fewest were out, with other weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt
from numba import njit

from olla.place.problem import Integers, Problem, Tries
from olla.place.tiles import Tiles, copied, empty_tiles, insert, lowest_free, neighbours, remove

__all__ = ["lowered"]

_SHARE = 0.25  # of the way to the bound, by which the ceiling is lowered first
_LEAST = 1e-5  # of the bound: a smaller step is not worth while
_LITTLE = 250_000  # buffers, times those waiting: where it is less, the end may be near, and there are
_MANY_SHORT = (20, 300)  # tries from where the fewest were waiting, and moves of each since then; else
_ONE_LONG = (1, 3_000)
_PATIENCE_EACH = 3  # more moves, for each that was waiting
_CHUNK = 2_000_000  # moves times buffers, between two looks at the clock
_FULLEST = 10  # the power of the largest load of its time, by which a buffer is heavier
_GROWTH = 1.3  # of the weight of a buffer that was forced in,
_HEAVIEST = 1e9  # up to this many average ones
_MANY = 400  # values, to be sorted by digits
_DIGIT = 12  # bits

Numbers = npt.NDArray[np.float64]


def lowered(
    problem: Problem, starts: Iterable[Integers], random: np.random.Generator, below: int | None = None
) -> Tries:
    """Lower and lower placements, the first one below what is known.

    Of several starts, the first one below the ceiling goes on. When none comes below it, the better half
    goes on, with a ceiling that is not lowered by as much.
    """
    turns = [(0, offsets) for offsets in starts]  # with the highest ceiling that was tried in vain
    top = min(int((offsets + problem.sizes).max()) for _, offsets in turns)
    bound, share, top = problem.bound, _SHARE, top if below is None else min(top, below)
    area = problem.sizes * (problem.last - problem.first + 1.0)
    heaviness = area * (problem.largest(problem.load) / bound) ** _FULLEST
    heaviness /= heaviness.mean()
    while top > bound and share * (top - bound) >= _LEAST * bound:
        ceiling = min(top - 1, int(top - share * (top - bound)))
        turn = next((index for index, (vain, _) in enumerate(turns) if vain < ceiling), None)
        if turn is None:
            share /= 2
            del turns[(len(turns) + 1) // 2 :]
            continue
        _, offsets = turns.pop(turn)
        for found in _below(problem, offsets, ceiling, heaviness, random):
            if found is None:
                yield None
                continue
            turns.insert(0, (0, found))
            top, share = int((found + problem.sizes).max()), min(1.0, 2 * share)
            yield "ejections", found
            break
        else:
            turns.insert(turn, (ceiling, offsets))


def _below(
    problem: Problem, offsets: Integers, ceiling: int, heaviness: Numbers, random: np.random.Generator
) -> Iterator[Integers | None]:
    """None after each piece of work, and the offsets at last, if they are found."""
    fewest = np.nonzero(offsets + problem.sizes > ceiling)[0]
    best = empty_tiles(problem)
    order = np.argsort(offsets, kind="stable")
    _fill(best, order[~np.isin(order, fewest)], offsets)
    steps = min(1 + _CHUNK // len(offsets), _MANY_SHORT[1] // 10)
    tries = 0
    while tries < _limits(problem, fewest)[0]:
        tries += 1
        weight = heaviness * random.uniform(0.5, 2, len(heaviness))
        tiles, pool, waiting = copied(best), np.zeros(len(offsets), np.int64), len(fewest)
        pool[:waiting] = fewest[np.argsort(weight[fewest], kind="stable")]  # the last one is next
        moves = 0
        while moves < _limits(problem, fewest)[1]:
            waiting = _move(tiles, pool, waiting, ceiling, weight, steps)
            if waiting == 0:
                yield tiles.offsets
                return
            yield None
            moves += steps
            if waiting < len(fewest):
                best, fewest = copied(tiles), pool[:waiting].copy()
                moves = tries = 0


def _limits(problem: Problem, waiting: Integers) -> tuple[int, int]:
    """Tries in a row that are in vain, and moves of one of them."""
    tries, moves = _MANY_SHORT if len(waiting) * len(problem.sizes) < _LITTLE else _ONE_LONG
    return tries, moves + _PATIENCE_EACH * len(waiting)


@njit(cache=True, nogil=True)
def _fill(tiles: Tiles, order: Integers, offsets: Integers) -> None:
    for buffer in order:
        insert(tiles, buffer, offsets[buffer])


@njit(cache=True, nogil=True)
def _move(tiles: Tiles, pool: Integers, waiting: int, ceiling: int, weight: Numbers, steps: int) -> int:
    """Place the last of those waiting, again and again; how many are left."""
    for _ in range(steps):
        if waiting == 0:
            break
        buffer = pool[waiting - 1]
        size, at = tiles.sizes[buffer], lowest_free(tiles, buffer)
        if at + size <= ceiling:
            waiting -= 1
        else:
            around = neighbours(tiles, buffer)
            at = _lightest(tiles, buffer, around, ceiling, weight)
            if at < 0:
                break
            waiting -= 1
            begin = waiting
            for other in around:
                if tiles.offsets[other] < at + size and at < tiles.offsets[other] + tiles.sizes[other]:
                    remove(tiles, other)
                    k = waiting
                    while k > begin and weight[pool[k - 1]] > weight[other]:
                        pool[k] = pool[k - 1]
                        k -= 1
                    pool[k] = other
                    waiting += 1
            weight[buffer] = min(_HEAVIEST, _GROWTH * weight[buffer])
        insert(tiles, buffer, at)
    return waiting


@njit(cache=True, nogil=True)
def _lightest(tiles: Tiles, buffer: int, around: Integers, ceiling: int, weight: Numbers) -> int:
    """The offset below the ceiling where those in the way weigh least; negative: what is fixed is always in it."""
    size, step = tiles.sizes[buffer], tiles.alignment[buffer]
    bottoms = tiles.offsets[around]
    tops = bottoms + tiles.sizes[around]
    by_bottom, by_top = _sorted_by(bottoms), _sorted_by(tops)
    bottoms, tops = bottoms[by_bottom], tops[by_top]
    # It is best to stand on another one, or the ground, or right below another one, or the ceiling.
    standing, hanging = np.append(0, tops), np.append(bottoms, ceiling) - size
    if step > 1:
        standing, hanging = -(-standing // step) * step, hanging // step * step
    weights, is_fixed = weight[around], (tiles.fixed[around] >= 0).astype(np.float64)
    entering, leaving = _sums(weights, by_bottom), _sums(weights, by_top)
    entering_fixed, leaving_fixed = np.zeros(len(around) + 1), np.zeros(len(around) + 1)
    if np.any(is_fixed):
        entering_fixed, leaving_fixed = _sums(is_fixed, by_bottom), _sums(is_fixed, by_top)
    least, best = np.inf, -1
    for places in (standing, hanging):
        entered, left = 0, 0
        for at in places:
            if at < 0 or at + size > ceiling:
                continue
            while entered < len(bottoms) and bottoms[entered] < at + size:
                entered += 1
            while left < len(tops) and tops[left] <= at:
                left += 1
            total = entering[entered] - leaving[left]
            if total < least and entering_fixed[entered] == leaving_fixed[left]:
                least, best = total, int(at)
    return best


@njit(cache=True, nogil=True)
def _sums(values: Numbers, order: Integers) -> Numbers:
    """The sum of none of the values, of the first one of the order, of the first two, and so on."""
    sums = np.zeros(len(order) + 1)
    for i in range(len(order)):
        sums[i + 1] = sums[i] + values[order[i]]
    return sums


@njit(cache=True, nogil=True)
def _sorted_by(values: Integers) -> Integers:
    """Where the values are, from the lowest to the highest; many are sorted digit by digit, as moves do little else."""
    if len(values) < _MANY:
        return np.argsort(values)
    order, other = np.arange(len(values)), np.empty(len(values), np.int64)
    lowest, shift = values.min(), 0
    highest = values.max() - lowest
    while shift < 63 and highest >> shift > 0:
        begin = np.zeros((1 << _DIGIT) + 1, np.int64)
        for value in values:
            begin[(value - lowest >> shift & (1 << _DIGIT) - 1) + 1] += 1
        for digit in range(1, len(begin)):
            begin[digit] += begin[digit - 1]
        for i in order:
            digit = values[i] - lowest >> shift & (1 << _DIGIT) - 1
            other[begin[digit]] = i
            begin[digit] += 1
        order, other = other, order
        shift += _DIGIT
    return order

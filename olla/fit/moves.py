"""What a walk does to a sequence: at random, some ops move, and repeats go or come, before it is repaired.

Which ops run again is half of a solution; in which order all of them run first is the other half, and takes no time. So
what exceeds the budget after such a change is first moved out of the way, as far as that is possible: from one side of
a step that exceeds it to the other. What a ViT-B/16 makes again within 50 MiB is 18.7 % of its step in the order of its
author, and 18.1 % in another one.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from olla.fit.program import READS, Booleans, Floats, Program
from olla.fit.repair import DEPTHS, chain_of, excess_of, states, waiting
from olla.order.problem import Integers

__all__ = ["changed", "cleared", "moved"]

_ANOTHER = 0.1  # of all changes: a repeat more, instead of fewer
_NEARBY = 30  # ops, in the sequence or in program order, whose repeats go together
_FARTHEST = 300  # ops that one may pass, at once
_MOVES = 2  # at random
_ATTEMPTS = 200  # to move what exceeds the budget


def changed(program: Program, sequence: Integers, seconds: Floats, draw: np.random.Generator) -> Integers:
    """The sequence in another order, with fewer repeats, or more; it may exceed any budget."""
    for place, far in zip(draw.integers(len(sequence), size=_MOVES), _distances(draw, _MOVES), strict=True):
        sequence = moved(program, sequence, place, place + far * draw.choice([-1, 1]))
    if draw.random() < _ANOTHER:
        return _with_another(program, sequence, seconds, draw)
    return _with_less(program, sequence, draw)


def cleared(program: Program, sequence: Integers, budget: int, draw: np.random.Generator) -> Integers:
    """The sequence after moves, drawn at random, of what exceeds the budget, until nothing does, or too many fail."""
    side = draw.choice([-1, 1], size=_ATTEMPTS)
    begin, end = side * _distances(draw, _ATTEMPTS), -side * (_distances(draw, _ATTEMPTS) - 1)
    return _reordered(program, sequence, budget, draw.random(_ATTEMPTS), begin, end)


def _distances(draw: np.random.Generator, count: int) -> Integers:
    """At least 1, and short ones as likely as long ones."""
    return np.exp(draw.uniform(0, np.log(_FARTHEST), size=count)).astype(np.int64)


def _with_less(program: Program, sequence: Integers, draw: np.random.Generator) -> Integers:
    """The sequence without some repeats and loads of ops that are near one another."""
    again = sequence >= program.loads
    again |= ~np.isin(np.arange(len(sequence)), np.unique(sequence, return_index=True)[1])
    if not again.any():
        return sequence
    middle = draw.choice(np.flatnonzero(again))
    where = np.arange(len(sequence)) if draw.random() < 1 / 2 else sequence
    is_near = np.abs(where - where[middle]) <= draw.integers(1, _NEARBY)
    return np.delete(sequence, np.flatnonzero(again & is_near))


def _with_another(program: Program, sequence: Integers, seconds: Floats, draw: np.random.Generator) -> Integers:
    """The sequence with one more chain: something that waits somewhere is dropped."""
    _, places, storages = waiting(program, sequence, int(draw.integers(len(sequence))))
    if len(places) == 0:
        return sequence
    chosen = draw.integers(len(places))
    place, depth = places[chosen], draw.choice(DEPTHS)
    (version,), (waits,) = states(program, sequence, places[[chosen]])
    chain = chain_of(program, version, waits, sequence[place], storages[chosen], depth)
    if not np.isfinite(seconds[chain].sum()):
        return sequence
    return np.concatenate([sequence[:place], chain, sequence[place:]])


@njit(cache=True, nogil=True)
def _reordered(
    program: Program, sequence: Integers, budget: int, where: Floats, begin: Integers, end: Integers
) -> Integers:
    """The sequence after moves that leave no more byte-steps above the budget than there were.

    Each one is from ``begin`` to ``end``, counted from one of the steps that exceed the budget: ``where`` among these.
    """
    best = sequence
    excess, above = excess_of(program, best, budget)
    for i in range(len(where)):
        if excess == 0 or excess == np.inf:
            break
        middle = above[int(where[i] * len(above))]
        place = min(max(middle + begin[i], 0), len(best) - 1)
        candidate = moved(program, best, place, middle + end[i])
        found, still = excess_of(program, candidate, budget)
        if found <= excess:
            best, excess, above = candidate, found, still
    return best


@njit(cache=True, nogil=True)
def moved(program: Program, sequence: Integers, place: int, target: int) -> Integers:
    """The sequence with the op at ``place`` taken to ``target``, and those in between that must not be passed."""
    target = min(max(target, 0), len(sequence) - 1)
    between = sequence[min(place, target) : max(place, target) + 1]
    goes_along = np.zeros(len(between), np.bool_)
    reads, changes = np.zeros(len(program.sizes), np.bool_), np.zeros(len(program.sizes), np.bool_)
    _note(program, sequence[place], reads, changes)
    for i in range(len(between)) if target > place else range(len(between) - 1, -1, -1):
        if _meets(program, between[i], reads, changes):
            goes_along[i] = True
            _note(program, between[i], reads, changes)
    one, other = between[~goes_along], between[goes_along]
    result = sequence.copy()
    result[min(place, target) : max(place, target) + 1] = np.concatenate(
        (one, other) if target > place else (other, one)
    )
    return result


@njit(cache=True, nogil=True)
def _note(program: Program, op: int, reads: Booleans, changes: Booleans) -> None:
    """Mark what the op reads, and what it changes."""
    for k in range(program.start[op], program.start[op + 1]):
        if program.kind[k] == READS:
            reads[program.storage[k]] = True
        else:
            changes[program.storage[k]] = True


@njit(cache=True, nogil=True)
def _meets(program: Program, op: int, reads: Booleans, changes: Booleans) -> bool:
    """Whether the op touches what others change, or changes what others read."""
    for k in range(program.start[op], program.start[op + 1]):
        storage = program.storage[k]
        if changes[storage] or (reads[storage] and program.kind[k] != READS):
            return True
    return False

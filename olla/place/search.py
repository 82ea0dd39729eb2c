"""Is there a placement within a capacity? Depth-first search over bottom-left placements.

Any placement can be pushed down until every buffer rests on another, on a fixed one's place or on the
ground. So it is enough to place buffers in the order of their offsets, each at the lowest offset that
is free above what was placed before (the canonical placements of Moffitt, *MiniMalloc: A Lightweight
Memory Allocator for Hardware-Accelerated Machine Learning*, ASPLOS 2023). Time is cut into sections,
within which the same buffers are alive. What prunes:

- In each section, the lowest offset that is left and the sizes that are left must fit below the capacity. A buffer
  that would be too high as the lowest of a section is above another one there.
- A buffer whose lowest offset has been passed needs a new support: another unplaced buffer that it
  overlaps, so it cannot be lower than the lowest top of these.
- If a buffer fits entirely below the next offset, it should have been placed there.
- Where no unplaced buffer crosses from one section to the next, both sides are placed on their own.

Which buffer is tried first at an offset is a matter of preference: of its worth, and of the load of its sections.
That is the load of what is left to place when its group is made, not of the whole, and that makes the difference: an
instance of MiniMalloc's (I) takes 4,469 nodes so, and more than a million otherwise.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit

from olla.place.problem import Integers

__all__ = ["INFEASIBLE", "SOLVED", "UNDECIDED", "Floats", "search"]

Floats = npt.NDArray[np.float64]

SOLVED, INFEASIBLE, UNDECIDED = range(3)
_FAR = 2**62
_ROUNDS = 4  # of raising


class _Board(NamedTuple):
    """What is known of each buffer and of each section."""

    first: Integers  # the sections first[b] .. last[b] are those in which buffer b is alive
    last: Integers
    sizes: Integers
    alignment: Integers
    fixed: Integers  # the only offset that a buffer may have; negative: any
    start: Integers  # the buffers alive together with b are others[start[b] : start[b + 1]]
    others: Integers
    worth: Floats
    offsets: Integers  # of the placed buffers; negative: not placed
    lowest: Integers  # offset above all placed buffers that overlap
    left: Integers  # summed sizes of the unplaced buffers in each section
    least: Integers  # for unplaced buffers: no lower offset is possible
    bottom: Integers  # scratch: in each section, the lowest of these,
    support: Integers  # the lowest top of an unplaced buffer,
    second: Integers  # and the next one
    failures: Integers  # how often each section was to blame
    undo_buffer: Integers  # buffers whose lowest offset rose, and from what
    undo_offset: Integers


class _Groups(NamedTuple):
    """Groups of unplaced buffers that do not overlap with those of other groups, waiting to be placed in this order."""

    members: Integers
    start: Integers  # members[start[g] : end[g]]
    end: Integers
    level: Integers  # whose placement made the group; -1: none
    ahead: Integers  # so many members, the first ones, were preferred to what was placed
    reach: Integers  # scratch: for each section, the last section of a member that begins there


@njit(cache=True, nogil=True)
def search(
    capacity: int,
    first: Integers,
    last: Integers,
    sizes: Integers,
    alignment: Integers,
    fixed: Integers,
    start: Integers,
    others: Integers,
    worth: Floats,
    weight: float,
    failures: Integers,
    nodes: int,
) -> tuple[int, int, Integers]:
    """Place all buffers: how it ended, the nodes it took, the offsets.

    The arrays are those of :class:`_Board`; ``failures`` is added to. Preferred are buffers of much worth and, by its
    logarithm times ``weight``, of a large load.
    """
    count, sections = len(sizes), len(failures)
    left = np.zeros(sections, np.int64)
    for b in range(count):
        left[first[b] : last[b] + 1] += sizes[b]
    room = (count + 1) * (count + 2)
    board = _Board(
        first,
        last,
        sizes,
        alignment,
        fixed,
        start,
        others,
        worth,
        np.full(count, -1, np.int64),
        np.maximum(fixed, 0),
        left,
        np.zeros(count, np.int64),
        np.zeros(sections, np.int64),
        np.zeros(sections, np.int64),
        np.zeros(sections, np.int64),
        failures,
        np.zeros(len(others) + 1, np.int64),
        np.zeros(len(others) + 1, np.int64),
    )
    groups = _Groups(
        np.zeros(room, np.int64),
        np.zeros(2 * count + 2, np.int64),
        np.zeros(2 * count + 2, np.int64),
        np.zeros(2 * count + 2, np.int64),
        np.zeros(2 * count + 2, np.int64),
        np.zeros(sections, np.int64),
    )
    # A level places one buffer of a group. If no choice works, the placement that made the group fails.
    parent, placed = np.zeros(count + 1, np.int64), np.full(count + 1, -1, np.int64)
    choices, next_choice = np.zeros(room, np.int64), np.zeros(count + 1, np.int64)
    choices_start, choices_end = np.zeros(count + 2, np.int64), np.zeros(count + 1, np.int64)
    member_start, member_end = np.zeros(count + 1, np.int64), np.zeros(count + 1, np.int64)
    undo_start, groups_left = np.zeros(count + 1, np.int64), np.zeros(count + 1, np.int64)
    groups.members[:count] = np.arange(count)
    waiting = _split(board, groups, 0, count, 0, -1, -1, weight)
    level, undo, visited = -1, 0, 0
    while waiting > 0:
        if visited == nodes:
            return UNDECIDED, visited, board.offsets
        visited += 1
        waiting -= 1
        level += 1
        maker = groups.level[waiting]
        floor = board.offsets[placed[maker]] if maker >= 0 else 0
        parent[level], placed[level] = maker, -1
        member_start[level], member_end[level] = groups.start[waiting], groups.end[waiting]
        groups_left[level], undo_start[level] = waiting, undo
        members = groups.members[member_start[level] : member_end[level]]
        next_choice[level] = choices_start[level]
        found = _choose(board, members, floor, groups.ahead[waiting], capacity, choices[choices_start[level] :])
        choices_end[level] = choices_start[level] + found
        while True:  # until a buffer is placed, here or further up
            if placed[level] >= 0:
                _take_back(board, placed[level], undo_start[level], undo)
                undo, placed[level] = undo_start[level], -1
            if next_choice[level] == choices_end[level]:
                if parent[level] < 0:
                    return INFEASIBLE, visited, board.offsets
                back_to = parent[level]
                level -= 1
                while level > back_to:
                    _take_back(board, placed[level], undo_start[level], undo)
                    undo = undo_start[level]
                    level -= 1
                continue
            placed[level] = choices[next_choice[level]]
            next_choice[level] += 1
            fits, undo = _place(board, placed[level], capacity, undo)
            if fits:
                break
        waiting = groups_left[level] + _split(
            board, groups, member_start[level], member_end[level], groups_left[level], level, placed[level], weight
        )
        choices_start[level + 1] = choices_end[level]
    return SOLVED, visited, board.offsets


@njit(cache=True, nogil=True)
def _choose(board: _Board, members: Integers, floor: int, ahead: int, capacity: int, choices: Integers) -> int:
    """The members that may be placed next, lowest first; none if not all can fit.

    What was placed last is at ``floor``, and the first members were ``ahead`` of it.
    """
    lowest, sizes, least = board.lowest, board.sizes, board.least
    first_section, last_section, top = _FAR, -1, _FAR
    for b in members:
        first_section = min(first_section, board.first[b])
        last_section = max(last_section, board.last[b])
        top = min(top, lowest[b] + sizes[b])  # what is placed at or above it should have let this one go first
    for turn in range(len(members)):
        b = members[turn]
        least[b] = lowest[b]
        if lowest[b] < floor or (lowest[b] == floor and turn < ahead):
            # Its turn has passed: it needs a new support.
            least[b] = _FAR
            for k in range(board.start[b], board.start[b + 1]):
                other = board.others[k]
                if board.offsets[other] < 0:
                    least[b] = min(least[b], max(lowest[other], floor) + sizes[other])
            if board.fixed[b] >= 0 or least[b] + sizes[b] > capacity:
                board.failures[board.first[b] : board.last[b] + 1] += 1
                return 0
    for _ in range(_ROUNDS):
        state = _lift(board, members, first_section, last_section, capacity)
        if state < 0:
            return 0
        if state == 0:
            break
    found = 0
    for turn in range(len(members)):
        b = members[turn]
        offset = lowest[b]
        if offset == least[b] and offset < top and not (offset == floor and turn < ahead):
            position = found
            while position > 0 and lowest[choices[position - 1]] > offset:
                choices[position] = choices[position - 1]
                position -= 1
            choices[position] = b
            found += 1
    return found


@njit(cache=True, nogil=True)
def _lift(board: _Board, members: Integers, first_section: int, last_section: int, capacity: int) -> int:
    """Raise what cannot be the lowest of a section above another; 1: some rose, 0: none, -1: not all can fit."""
    least, sizes = board.least, board.sizes
    for scratch in (board.bottom, board.support, board.second):
        scratch[first_section : last_section + 1] = _FAR
    for b in members:  # its sections are sliced, so that the loops over them are done several at once
        first, end = board.first[b], board.last[b] + 1
        bottom, support, second = board.bottom[first:end], board.support[first:end], board.second[first:end]
        low, top = least[b], least[b] + sizes[b]
        for k in range(len(bottom)):
            bottom[k] = min(bottom[k], low)
        for k in range(len(support)):
            second[k] = min(second[k], max(support[k], top))
            support[k] = min(support[k], top)
    for section in range(first_section, last_section + 1):
        if board.left[section] > 0 and board.bottom[section] + board.left[section] > capacity:
            board.failures[section] += 1
            return -1
    rose = 0
    for b in members:
        first, end = board.first[b], board.last[b] + 1
        left, support, second = board.left[first:end], board.support[first:end], board.second[first:end]
        room, top, offset = capacity - least[b], least[b] + sizes[b], least[b]
        for k in range(len(left)):
            above = second[k] if support[k] == top else support[k]
            offset = max(offset, above if left[k] > room else 0)
        if offset > least[b]:
            least[b] = offset
            rose = 1
            if (board.fixed[b] >= 0 and offset > board.fixed[b]) or offset + sizes[b] > capacity:
                board.failures[board.first[b] : board.last[b] + 1] += 1
                return -1
    return rose


@njit(cache=True, nogil=True)
def _place(board: _Board, buffer: int, capacity: int, undo: int) -> tuple[bool, int]:
    """Place a buffer at its lowest offset; whether all that overlap still fit above it."""
    top = board.lowest[buffer] + board.sizes[buffer]
    board.offsets[buffer] = board.lowest[buffer]
    for section in range(board.first[buffer], board.last[buffer] + 1):
        board.left[section] -= board.sizes[buffer]
    for k in range(board.start[buffer], board.start[buffer + 1]):
        other = board.others[k]
        if board.offsets[other] < 0 and board.lowest[other] < top:
            board.undo_buffer[undo], board.undo_offset[undo] = other, board.lowest[other]
            undo += 1
            board.lowest[other] = -(-top // board.alignment[other]) * board.alignment[other]
            if board.fixed[other] >= 0 or board.lowest[other] + board.sizes[other] > capacity:
                board.failures[board.first[other] : board.last[other] + 1] += 1
                return False, undo
    return True, undo


@njit(cache=True, nogil=True)
def _take_back(board: _Board, buffer: int, undo_start: int, undo_end: int) -> None:
    board.offsets[buffer] = -1
    for section in range(board.first[buffer], board.last[buffer] + 1):
        board.left[section] += board.sizes[buffer]
    for k in range(undo_end - 1, undo_start - 1, -1):
        board.lowest[board.undo_buffer[k]] = board.undo_offset[k]


@njit(cache=True, nogil=True)
def _split(
    board: _Board, groups: _Groups, start: int, end: int, waiting: int, level: int, placed: int, weight: float
) -> int:
    """Let the unplaced members wait in groups that no buffer connects; how many groups they make.

    If there are several, each is put in order anew.
    """
    members, reach = groups.members, groups.reach
    first_section, last_section = _FAR, -1
    for k in range(start, end):
        b = members[k]
        if board.offsets[b] < 0:
            first_section = min(first_section, board.first[b])
            last_section = max(last_section, board.last[b])
    reach[first_section : last_section + 1] = -1
    for k in range(start, end):
        b = members[k]
        if board.offsets[b] < 0:
            reach[board.first[b]] = max(reach[board.first[b]], board.last[b])
    used, found, section = end, 0, first_section
    while section <= last_section:
        until = reach[section]
        if until < 0:
            section += 1
            continue
        inside = section
        while inside <= until:
            until = max(until, reach[inside])
            inside += 1
        groups.start[waiting + found], groups.level[waiting + found] = used, level
        groups.ahead[waiting + found] = 0
        for k in range(start, end):
            b = members[k]
            if b == placed:
                groups.ahead[waiting + found] = used - groups.start[waiting + found]
            if board.offsets[b] < 0 and section <= board.first[b] <= until:
                members[used] = b
                used += 1
        groups.end[waiting + found] = used
        found += 1
        section = until + 1
    if found > 1 or level < 0:
        for group in range(waiting, waiting + found):
            _put_in_order(board, members[groups.start[group] : groups.end[group]], weight)
            groups.ahead[group] = 0
    return found


@njit(cache=True, nogil=True)
def _put_in_order(board: _Board, members: Integers, weight: float) -> None:
    """By preference, the largest first."""
    preference = np.empty(len(members))
    for k in range(len(members)):
        b = members[k]
        load = board.left[board.first[b] : board.last[b] + 1].max()
        preference[k] = board.worth[b] + weight * np.log(load)
    members[:] = members[np.argsort(-preference, kind="mergesort")]

"""The compiled inner loops: memory profile, list scheduling, swaps of neighbours.

Numba compiles each at first use and keeps the result on disk. ``olla/graph/lifetimes.py`` is the
plain reference for :func:`profile`; the tests compare the two.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from olla.order.problem import Integers

__all__ = ["BREADTH", "DEPTH", "FREE_FIRST", "LEAST_NET", "LEAST_PEAK", "flatten", "list_schedule", "profile", "settle"]

# The rules by which list scheduling chooses among the ops that are ready.
FREE_FIRST = 0  # an op that frees at least what it allocates, else the next in program order
LEAST_NET = 1  # the op that allocates least beyond what it frees
LEAST_PEAK = 2  # the op that raises the peak least, then LEAST_NET
DEPTH = 3  # the op that became ready last
BREADTH = 4  # the op that became ready first

_GROUP = 16  # ops that are delayed together, at most


@njit(cache=True, nogil=True)
def profile(
    order: Integers,
    create_start: Integers,
    create: Integers,
    touch_start: Integers,
    touch: Integers,
    sizes: Integers,
    workspace: Integers,
) -> Integers:
    """Live bytes at each step of ``order``, in which ops may repeat; see ``memory_profile``."""
    steps = len(order)
    change = np.zeros(steps + 1, np.int64)
    last = np.full(len(sizes), -1, np.int64)
    for step in range(steps):
        op = order[step]
        for k in range(create_start[op], create_start[op + 1]):
            storage = create[k]
            if last[storage] >= 0:
                change[last[storage] + 1] -= sizes[storage]
            change[step] += sizes[storage]
        for k in range(touch_start[op], touch_start[op + 1]):
            last[touch[k]] = step
    for storage in range(len(sizes)):
        if last[storage] >= 0:
            change[last[storage] + 1] -= sizes[storage]
    live = 0
    for step in range(steps):
        live += change[step]
        change[step] = live + workspace[order[step]]
    return change[:steps]


@njit(cache=True, nogil=True)
def list_schedule(
    rule: int,
    pred_start: Integers,
    succ_start: Integers,
    succ: Integers,
    touch_start: Integers,
    touch: Integers,
    sizes: Integers,
    workspace: Integers,
    priority: Integers,
) -> Integers:
    """Run one ready op after another, chosen by ``rule``; ties go to the smaller ``priority``."""
    count = len(workspace)
    waiting = np.zeros(count, np.int64)
    for op in range(count):
        waiting[op] = pred_start[op + 1] - pred_start[op]
    uses = np.zeros(len(sizes), np.int64)
    for k in range(len(touch)):
        uses[touch[k]] += 1
    alive = np.zeros(len(sizes), np.bool_)
    ready = np.empty(count, np.int64)
    since = np.zeros(count, np.int64)
    ready_count = 0
    for op in range(count):
        if waiting[op] == 0:
            ready[ready_count] = op
            ready_count += 1
    order = np.empty(count, np.int64)
    live = 0
    peak = 0
    for step in range(count):
        best = -1
        best_first = 0
        best_second = 0
        for position in range(ready_count):
            op = ready[position]
            allocated = 0
            freed = 0
            for k in range(touch_start[op], touch_start[op + 1]):
                storage = touch[k]
                if not alive[storage]:
                    allocated += sizes[storage]
                if uses[storage] == 1:
                    freed += sizes[storage]
            net = allocated - freed
            first = 0
            second = net
            if rule == FREE_FIRST:
                first = 0 if net <= 0 else 1
                second = net if net <= 0 else 0
            elif rule == LEAST_PEAK:
                first = max(live + allocated + workspace[op], peak)
            elif rule == DEPTH:
                first = -since[op]
            elif rule == BREADTH:
                first = since[op]
            better = best < 0 or first < best_first
            if best >= 0 and first == best_first:
                if second < best_second:
                    better = True
                elif second == best_second:
                    better = priority[op] < priority[ready[best]]
            if better:
                best = position
                best_first = first
                best_second = second
        op = ready[best]
        ready_count -= 1
        ready[best] = ready[ready_count]
        order[step] = op
        for k in range(touch_start[op], touch_start[op + 1]):
            storage = touch[k]
            if not alive[storage]:
                alive[storage] = True
                live += sizes[storage]
        peak = max(peak, live + workspace[op])
        for k in range(touch_start[op], touch_start[op + 1]):
            storage = touch[k]
            uses[storage] -= 1
            if uses[storage] == 0:
                live -= sizes[storage]
        for k in range(succ_start[op], succ_start[op + 1]):
            other = succ[k]
            waiting[other] -= 1
            if waiting[other] == 0:
                ready[ready_count] = other
                since[other] = step + 1
                ready_count += 1
    return order


@njit(cache=True, nogil=True)
def settle(
    order: Integers,
    memory: Integers,
    ceiling: int,
    swaps: int,
    priority: Integers,
    pred_start: Integers,
    pred: Integers,
    touch_start: Integers,
    touch: Integers,
    sizes: Integers,
    workspace: Integers,
) -> Integers:
    """Swap neighbours that are not in the order of their priority, where that is legal.

    Memory may rise up to ``ceiling``, and where it is above, not at all. ``memory`` is that of
    ``order``. Stops after that many swaps.
    """
    order, memory = order.copy(), memory.copy()
    first, last = _lives(order, touch_start, touch, len(sizes))
    for end in range(1, len(order)):
        for step in range(end, 0, -1):
            early, late = order[step - 1], order[step]
            if swaps == 0 or priority[early] < priority[late]:
                break
            if _needs_any(late, order[step - 1 : step], pred_start, pred):
                break
            at_late, at_early = _swapped(step, order, memory, first, last, touch_start, touch, sizes, workspace)
            if max(at_late, at_early) > max(ceiling, memory[step - 1], memory[step]):
                break
            _swap(step, order, first, last, touch_start, touch)
            memory[step - 1], memory[step] = at_late, at_early
            swaps -= 1
    return order


@njit(cache=True, nogil=True)
def flatten(
    order: Integers,
    memory: Integers,
    ceiling: int,
    swaps: int,
    pred_start: Integers,
    pred: Integers,
    touch_start: Integers,
    touch: Integers,
    sizes: Integers,
    workspace: Integers,
) -> Integers:
    """Delay ops at which memory is above ``ceiling``, with those close behind that need them, to where it is lower.

    Nowhere it rises to more than is left there. ``memory`` is that of ``order``. Stops after that many swaps of
    neighbours.
    """
    best, best_memory = order.copy(), memory.copy()
    order, memory = order.copy(), memory.copy()
    first, last = _lives(order, touch_start, touch, len(sizes))
    for op in order[np.argsort(-memory)]:
        start, group = int(np.argmax(order == op)), 1
        lowest, raised = memory[start], 0
        if lowest <= ceiling or swaps <= 0:
            break
        is_best = True  # of what was tried for this op, what it is now
        while start + group < len(order) and group <= _GROUP and raised < lowest:
            end = start + group
            if _needs_any(order[end], order[start:end], pred_start, pred):
                group += 1
                continue
            before = memory[end]
            for step in range(end, start, -1):
                memory[step - 1], memory[step] = _swapped(
                    step, order, memory, first, last, touch_start, touch, sizes, workspace
                )
                _swap(step, order, first, last, touch_start, touch)
            swaps -= group
            raised = max(raised, memory[start] if memory[start] > before else 0)
            start += 1
            highest = max(raised, memory[start : start + group].max())
            is_best = highest < lowest
            if is_best:
                lowest = highest
                best[:], best_memory[:] = order, memory
        if not is_best:
            swaps -= len(order)
            order[:], memory[:] = best, best_memory
            first, last = _lives(order, touch_start, touch, len(sizes))
    return best


@njit(cache=True, nogil=True)
def _lives(order: Integers, touch_start: Integers, touch: Integers, storages: int) -> tuple[Integers, Integers]:
    """The step at which each storage's life begins, and ends."""
    first = np.full(storages, len(order), np.int64)
    last = np.full(storages, -1, np.int64)
    for step in range(len(order)):
        for k in range(touch_start[order[step]], touch_start[order[step] + 1]):
            first[touch[k]] = min(first[touch[k]], step)
            last[touch[k]] = step
    return first, last


@njit(cache=True, nogil=True)
def _needs_any(op: int, others: Integers, pred_start: Integers, pred: Integers) -> bool:
    found = False
    for k in range(pred_start[op], pred_start[op + 1]):
        found |= bool(np.any(others == pred[k]))
    return found


@njit(cache=True, nogil=True)
def _swapped(
    step: int,
    order: Integers,
    memory: Integers,
    first: Integers,
    last: Integers,
    touch_start: Integers,
    touch: Integers,
    sizes: Integers,
    workspace: Integers,
) -> tuple[int, int]:
    """Bytes at ``step - 1`` and ``step``, if their ops change places.

    What only the one or only the other touches begins or ends one step later, or earlier.
    """
    early, late = order[step - 1], order[step]
    at_late = memory[step - 1] - workspace[early] + workspace[late]
    at_early = memory[step] - workspace[late] + workspace[early]
    for k in range(touch_start[early], touch_start[early + 1]):
        storage = touch[k]
        if not _touches(late, storage, touch_start, touch):
            at_late -= sizes[storage] if first[storage] == step - 1 else 0
            at_early += sizes[storage] if last[storage] == step - 1 else 0
    for k in range(touch_start[late], touch_start[late + 1]):
        storage = touch[k]
        if not _touches(early, storage, touch_start, touch):
            at_late += sizes[storage] if first[storage] == step else 0
            at_early -= sizes[storage] if last[storage] == step else 0
    return at_late, at_early


@njit(cache=True, nogil=True)
def _swap(step: int, order: Integers, first: Integers, last: Integers, touch_start: Integers, touch: Integers) -> None:
    early, late = order[step - 1], order[step]
    for k in range(touch_start[early], touch_start[early + 1]):
        storage = touch[k]
        if not _touches(late, storage, touch_start, touch):
            first[storage] += 1 if first[storage] == step - 1 else 0
            last[storage] += 1 if last[storage] == step - 1 else 0
    for k in range(touch_start[late], touch_start[late + 1]):
        storage = touch[k]
        if not _touches(early, storage, touch_start, touch):
            first[storage] -= 1 if first[storage] == step else 0
            last[storage] -= 1 if last[storage] == step else 0
    order[step - 1], order[step] = late, early


@njit(cache=True, nogil=True)
def _touches(op: int, storage: int, touch_start: Integers, touch: Integers) -> bool:
    found = False
    for k in range(touch_start[op], touch_start[op + 1]):
        found |= touch[k] == storage
    return found

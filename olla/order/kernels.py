"""The compiled inner loops: memory profile, list scheduling, moves of single ops.

Numba compiles each at first use and keeps the result on disk. ``olla/graph/lifetimes.py`` is the
plain reference for :func:`profile`; the tests compare the two.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from olla.order.problem import Integers

__all__ = ["BREADTH", "DEPTH", "FREE_FIRST", "LEAST_NET", "LEAST_PEAK", "improve", "list_schedule", "profile"]

# The rules by which list scheduling chooses among the ops that are ready.
FREE_FIRST = 0  # an op that frees at least what it allocates, else the next in program order
LEAST_NET = 1  # the op that allocates least beyond what it frees
LEAST_PEAK = 2  # the op that raises the peak least, then LEAST_NET
DEPTH = 3  # the op that became ready last
BREADTH = 4  # the op that became ready first


@njit(cache=True)
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


@njit(cache=True)
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


@njit(cache=True)
def improve(
    order: Integers,
    bound: int,
    rounds: int,
    pred_start: Integers,
    pred: Integers,
    succ_start: Integers,
    succ: Integers,
    create_start: Integers,
    create: Integers,
    touch_start: Integers,
    touch: Integers,
    sizes: Integers,
    workspace: Integers,
) -> Integers:
    """Move one op at a time as early or as late as it may run, keeping what helps.

    A move helps if the peak falls, or stays and the excess over ``bound``, summed over all steps,
    falls. At most ``rounds`` passes over all ops; stops when a pass changes nothing.
    """
    count = len(order)
    order = order.copy()
    place = np.empty(count, np.int64)
    for step in range(count):
        place[order[step]] = step
    memory = profile(order, create_start, create, touch_start, touch, sizes, workspace)
    peak = memory.max()
    excess = np.maximum(memory - bound, 0).sum()
    for _ in range(rounds):
        if peak <= bound:
            break
        changed = False
        for op in range(count):
            here = place[op]
            low = 0
            for k in range(pred_start[op], pred_start[op + 1]):
                low = max(low, place[pred[k]] + 1)
            high = count - 1
            for k in range(succ_start[op], succ_start[op + 1]):
                high = min(high, place[succ[k]] - 1)
            for side in range(2):
                there = low if side == 0 else high
                if there == here:
                    continue
                if memory[min(here, there) : max(here, there) + 1].max() <= bound:
                    continue  # nothing in between is over the bound: the move cannot help
                _move(order, here, there)
                tried = profile(order, create_start, create, touch_start, touch, sizes, workspace)
                tried_peak = tried.max()
                tried_excess = np.maximum(tried - bound, 0).sum()
                if tried_peak < peak or (tried_peak == peak and tried_excess < excess):
                    memory = tried
                    peak = tried_peak
                    excess = tried_excess
                    for step in range(min(here, there), max(here, there) + 1):
                        place[order[step]] = step
                    changed = True
                    break
                _move(order, there, here)
        if not changed:
            break
    return order


@njit(cache=True)
def _move(order: Integers, source: int, target: int) -> None:
    op = order[source]
    if target < source:
        for step in range(source, target, -1):
            order[step] = order[step - 1]
    else:
        for step in range(source, target):
            order[step] = order[step + 1]
    order[target] = op

"""Greedy repair: the compiled moves that bring a sequence within a byte budget.

While the peak exceeds the budget, something is dropped that waits through it, and made again right before it is needed:
by its own op, or also by those whose results would have to wait for it, and so on, or loaded from where it was spilled
to. Of all these chains, the one that removes most of what exceeds the budget for its time is taken. Then what is not
needed any more is taken out, the dearest first. Every sequence is simulated in full, so a chain is judged by the true
profile, and never by the bytes of what it drops.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from olla.fit.program import CREATES, LOADS, WRITES, WRITES_ONCE, Booleans, Floats, Program, completed, simulated
from olla.order.problem import Integers

__all__ = [
    "DEPTHS",
    "chain_of",
    "excess_of",
    "is_needed",
    "peak_of",
    "repaired",
    "states",
    "unrolled",
    "uses_in",
    "waiting",
]

LOAD = -1
_WORTH = 1e-3  # of the bytes that dropping one storage frees above the budget: of another one that is looked at
_TRIED = 12  # chains, the most promising ones, before one of them is taken
_LONGEST = 50_000  # ops in a chain or a sequence
DEPTHS = np.array([LOAD, 0, 1, 2, 3, 5, 8, 1_000_000], np.int64)  # of chains


class Uses(NamedTuple):
    """What the ops of a sequence are to those before and after them."""

    live: Integers  # the most bytes in memory at each op, late ops after it included
    is_awaited: Booleans  # whether late ops come right after it
    start: Integers  # of the touches of each op, and their count; for each touch:
    before: Integers  # where the same storage is touched before; -1: nowhere
    is_last: Booleans  # whether its contents are not touched any more, nor wanted in the end


@njit(cache=True, nogil=True)
def repaired(
    program: Program, sequence: Integers, seconds: Floats, budget: int, power: float, limit: float
) -> Integers:
    """The sequence with more repeats and loads, until it fits or nothing helps any more; then without needless ones.

    ``power`` is that of seconds in the score of a chain. What takes more than ``limit`` seconds is given up.
    """
    best, excess = sequence, excess_of(program, sequence, budget)[0]
    if excess == np.inf:
        return sequence
    while excess > 0:
        if seconds[best].sum() > limit:
            return best
        place, chains, promise, power_of_cost = _chains(program, best, seconds, budget, power)
        found, score = best, 0.0
        for tried, i in enumerate(np.argsort(-promise, kind="mergesort")):
            if tried >= _TRIED and score > 0.0:
                break
            candidate = np.concatenate((best[: place[i]], chains[i], best[place[i] :]))
            removed = excess - excess_of(program, candidate, budget)[0]
            if removed > 0 and removed / power_of_cost[i] > score:
                found, score = candidate, removed / power_of_cost[i]
        if score == 0.0:
            break
        best, excess = found, excess_of(program, found, budget)[0]
    return _pruned(program, best, seconds, budget if excess == 0 else peak_of(program, best))


@njit(cache=True, nogil=True)
def _chains(
    program: Program, sequence: Integers, seconds: Floats, budget: int, power: float
) -> tuple[Integers, list[Integers], Floats, Floats]:
    """For all that waits at the peak: where chains may go, the chains, their promises, and their seconds to the power.

    A chain promises the excess at the steps through which the storages that it makes need not wait.
    """
    whole, owner = completed(program, sequence)
    profile = simulated(program, whole)[1]
    before, after, storages = waiting(program, sequence, owner[np.argmax(profile)])
    relief = np.zeros(len(program.sizes), np.float64)
    exceeding = np.flatnonzero(profile > budget)
    for i in range(len(storages)):
        for step in exceeding:
            if before[i] < owner[step] < after[i]:
                relief[storages[i]] += min(program.sizes[storages[i]], profile[step] - budget)
    places, chains = [np.int64(0) for _ in range(0)], [sequence for _ in range(0)]
    promise, costs = [0.0 for _ in range(0)], [0.0 for _ in range(0)]
    goal_of = np.zeros(len(sequence), np.int64)  # of each position where something is needed, a number
    goal_of[after] = 1
    goals = np.flatnonzero(goal_of)
    goal_of[goals] = np.arange(len(goals))
    versions, waits = states(program, sequence, goals)
    least = _WORTH * relief.max()
    for i in range(len(storages)):
        if relief[storages[i]] < least:
            continue
        goal = goal_of[after[i]]
        length = 0
        for depth in DEPTHS:
            chain = chain_of(program, versions[goal], waits[goal], sequence[after[i]], storages[i], depth)
            cost = seconds[chain].sum() ** power
            if depth > 0 and len(chain) == length:
                break  # deeper ones are no longer
            if len(chain) == 0 or cost == np.inf:
                continue
            length = 0 if depth == LOAD else len(chain)
            gain = 0.0
            for op in chain:
                for k in range(program.start[op], program.start[op + 1]):
                    if program.kind[k] == CREATES or program.kind[k] == LOADS:
                        gain += relief[program.storage[k]]
            places.append(after[i])
            chains.append(chain)
            promise.append(gain / cost)
            costs.append(cost)
    return np.array(places), chains, np.array(promise), np.array(costs)


@njit(cache=True, nogil=True)
def _pruned(program: Program, sequence: Integers, seconds: Floats, budget: int) -> Integers:
    """The sequence without repeats and loads that the budget does not need, the dearest taken out first."""
    runs = np.zeros(len(seconds), np.int64)
    for op in sequence:
        runs[op] += 1
    best, place = sequence, np.arange(len(sequence))  # of each op of the sequence, in the best one
    uses = uses_in(program, best)
    for i in np.argsort(-seconds[sequence], kind="mergesort"):
        op = sequence[i]
        if (runs[op] == 1 and op < program.loads) or is_needed(program, best, uses, place[i], budget):
            continue
        candidate = np.concatenate((best[: place[i]], best[place[i] + 1 :]))
        if peak_of(program, candidate) <= budget:
            best, uses = candidate, uses_in(program, candidate)
            runs[op] -= 1
            place[i:] -= 1
    return best


@njit(cache=True, nogil=True)
def is_needed(program: Program, sequence: Integers, uses: Uses, place: int, budget: int) -> bool:
    """Whether the budget, or who reads its results, surely needs the op at ``place``. False: perhaps.

    Without it, what it makes waits there since it was used before, if it was; and what it uses last has gone.
    """
    if uses.is_awaited[place]:
        return False
    op, begin = sequence[place], uses.start[place]
    count = uses.start[place + 1] - begin
    change, first = np.zeros(count, np.int64), place
    for j in range(count):
        k, before, is_last = program.start[op] + j, uses.before[begin + j], uses.is_last[begin + j]
        is_made = program.kind[k] == CREATES or program.kind[k] == LOADS
        if not is_last and (program.kind[k] == WRITES or (is_made and before < 0)):
            return True
        if is_made and not is_last:
            change[j] = program.sizes[program.storage[k]]
            first = min(first, before + 1)
        elif not is_made and is_last:
            change[j] = -program.sizes[program.storage[k]]
    for step in range(first, place):
        live = uses.live[step]
        for j in range(count):
            if step > uses.before[begin + j]:
                live += change[j]
        if live > budget:
            return True
    return False


@njit(cache=True, nogil=True)
def uses_in(program: Program, sequence: Integers) -> Uses:
    """What each op of a sequence is to those before and after it."""
    whole, owner = completed(program, sequence)
    live = np.zeros(len(sequence), np.int64)
    is_awaited = np.zeros(len(sequence), np.bool_)
    for step, found in enumerate(simulated(program, whole)[1]):
        live[owner[step]] = max(live[owner[step]], found)
        is_awaited[owner[step]] = step > 0 and owner[step] == owner[step - 1]
    start = np.zeros(len(sequence) + 1, np.int64)
    for place, op in enumerate(sequence):
        start[place + 1] = start[place] + program.start[op + 1] - program.start[op]
    before, is_last = np.full(start[-1], -1, np.int64), np.ones(start[-1], np.bool_)
    latest, latest_place = np.full(len(program.sizes), -1, np.int64), np.full(len(program.sizes), -1, np.int64)
    for place, op in enumerate(sequence):
        for j in range(start[place + 1] - start[place]):
            k = program.start[op] + j
            storage, touch = program.storage[k], start[place] + j
            if latest[storage] >= 0:
                before[touch] = latest_place[storage]
                is_last[latest[storage]] = program.kind[k] == CREATES or program.kind[k] == LOADS
            latest[storage], latest_place[storage] = touch, place
    for op in program.late:
        is_last[_found(latest[program.storage[program.start[op] : program.start[op + 1]]])] = False
    is_last[_found(latest[program.outputs])] = False
    return Uses(live, is_awaited, start, before, is_last)


@njit(cache=True, nogil=True)
def _found(places: Integers) -> Integers:
    return places[places >= 0]


@njit(cache=True, nogil=True)
def peak_of(program: Program, sequence: Integers) -> int:
    """The largest entry of the profile; more than any budget, if the sequence is not sound."""
    is_sound, profile = simulated(program, completed(program, sequence)[0])
    return int(profile.max()) if is_sound else 2**62


@njit(cache=True, nogil=True)
def excess_of(program: Program, sequence: Integers, budget: int) -> tuple[float, Integers]:
    """Byte-steps above the budget, and the positions where; infinitely many, if the sequence is not sound."""
    whole, owner = completed(program, sequence)
    is_sound, profile = simulated(program, whole)
    if not is_sound:
        return np.inf, owner[:0]
    excess = 0.0
    for live in profile:
        excess += max(0, live - budget)
    return excess, owner[profile > budget]


@njit(cache=True, nogil=True)
def waiting(program: Program, sequence: Integers, position: int) -> tuple[Integers, Integers, Integers]:
    """What waits in memory at a position: where it was needed last, and will be needed next, and storages."""
    before = np.full(len(program.sizes), -1, np.int64)
    after = np.full(len(program.sizes), -1, np.int64)
    for other in range(len(sequence)):
        op = sequence[other]
        for k in range(program.start[op], program.start[op + 1]):
            storage = program.storage[k]
            if program.sizes[storage] == 0:
                continue
            if other < position:
                before[storage] = other
            elif other == position:
                before[storage] = -1  # needed right now
            elif after[storage] < 0:
                is_made = program.kind[k] == CREATES or program.kind[k] == LOADS
                after[storage] = len(sequence) if is_made else other
    found = np.flatnonzero((before >= 0) & (after >= 0) & (after < len(sequence)))
    return before[found], after[found], found


@njit(cache=True, nogil=True)
def chain_of(
    program: Program,
    version: Integers,
    waits: Booleans,
    op: int,
    storage: int,
    depth: int,
) -> Integers:
    """Ops that make what ``op`` expects in ``storage``, in order; empty: there is no such chain.

    What they need and is not in memory then is made again, too, up to ``depth`` ops back, and kept for them beyond.
    The chain of depth ``LOAD`` is a load. The rest is what :func:`states` says.
    """
    wanted = np.int64(0)
    for k in range(program.start[op], program.start[op + 1]):
        if program.storage[k] == storage:
            wanted = program.version[k]
    chain = np.empty(program.loads, np.int64)
    if depth == LOAD:
        chain[0] = program.loads + program.maker_start[storage] + wanted - 1
        return chain[: 1 if version[storage] == wanted and op < program.loads else 0]
    length = 0
    in_chain = np.zeros(program.loads, np.bool_)
    # A stack of makers to run: (op, distance, whether its inputs were looked at).
    stack = [(np.int64(0), 0, False) for _ in range(0)]
    for j in range(wanted - 1, -1, -1):
        stack.append((program.maker[program.maker_start[storage] + j], 0, False))
    while len(stack) > 0:
        maker, distance, is_ready = stack.pop()
        if in_chain[maker]:
            continue
        if is_ready:
            in_chain[maker] = True
            chain[length] = maker
            length += 1
            continue
        stack.append((maker, distance, True))
        for k in range(program.start[maker], program.start[maker + 1]):
            used = program.storage[k]
            first, end = program.maker_start[used], program.maker_start[used + 1]
            if program.kind[k] == CREATES or first == end:
                continue
            needed = program.version[k]
            is_there = waits[used] and version[used] == needed
            if used == storage or is_there or (version[used] == needed and distance >= depth):
                continue
            if len(stack) > _LONGEST:
                return chain[:0]
            for j in range(needed - 1, -1, -1):
                stack.append((program.maker[first + j], distance + 1, False))
    return chain[:length]


@njit(cache=True, nogil=True)
def states(program: Program, sequence: Integers, places: Integers) -> tuple[Integers, Booleans]:
    """Before the ops at ``places``, a row for each, in order: the version of each storage, and whether it waits."""
    versions = np.zeros((len(places), len(program.sizes)), np.int64)
    version, done = np.zeros(len(program.sizes), np.int64), 0
    for position in range(len(sequence)):
        while done < len(places) and places[done] == position:
            versions[done] = version
            done += 1
        op = sequence[position]
        for k in range(program.start[op], program.start[op + 1]):
            storage, kind = program.storage[k], program.kind[k]
            if kind == CREATES:
                version[storage] = 1
            elif kind == WRITES and version[storage] == program.version[k]:
                version[storage] += 1
    waiting = np.zeros((len(places), len(program.sizes)), np.bool_)
    waits = np.zeros(len(program.sizes), np.bool_)
    for position in range(len(sequence) - 1, -1, -1):
        op = sequence[position]
        for k in range(program.start[op], program.start[op + 1]):
            waits[program.storage[k]] = program.kind[k] != CREATES and program.kind[k] != LOADS
        while done > 0 and places[done - 1] == position:
            done -= 1
            waiting[done] = waits
    return versions, waiting


@njit(cache=True, nogil=True)
def unrolled(program: Program, order: Integers, places: Integers, kept: Booleans, loaded: Booleans) -> Integers:
    """The order in which what was not kept at one of ``places`` is made again, or loaded, right before it is needed.

    Or right before the next of the places, if it is kept there. ``kept`` and ``loaded`` have a row for each place, by
    index in ``program.maker``. What cannot be made again is always kept: ops that do not depend on a place may read it
    later; and what the caller or late ops read is there in the end. Empty: what to keep cannot be kept together.
    """
    version = np.zeros(len(program.sizes), np.int64)
    there = np.zeros(len(program.sizes), np.bool_)
    seen = np.zeros(program.loads, np.bool_)
    sequence = np.empty(_LONGEST + len(order), np.int64)
    length, passed = 0, 0
    for position in range(len(order) + 1):
        if passed < len(places) and position == places[passed] + 1:
            for storage in range(len(there)):
                first = program.maker_start[storage]
                if there[storage] and first < program.maker_start[storage + 1]:
                    content = first + version[storage] - 1
                    makers = program.maker[first : content + 1]
                    there[storage] = kept[passed, content] or np.any(program.runs_once[makers])
            passed += 1
        if position == len(order):
            targets = _last_targets(program)
        else:
            is_place = passed < len(places) and position == places[passed]
            targets = _targets(program, order[position], is_place, kept[passed % len(places)])
        for target in targets:
            is_content = target >= program.loads
            stack = [target]
            if is_content:
                storage = program.storage[program.start[target]]
                number = program.version[program.start[target]]
                maker = program.maker[target - program.loads]
                if not seen[maker] or (there[storage] and version[storage] == number):
                    continue
                can_load = passed > 0 and loaded[passed - 1, target - program.loads] and version[storage] == number
                stack[0] = target if can_load else maker
            while len(stack) > 0:
                op = stack[-1]
                missing = np.int64(-1)
                for k in range(program.start[op], program.start[op + 1]):
                    storage, kind = program.storage[k], program.kind[k]
                    first = program.maker_start[storage]
                    if kind in (CREATES, LOADS) or first == program.maker_start[storage + 1]:
                        continue
                    if not there[storage] or version[storage] != program.version[k]:
                        content = first + program.version[k] - 1
                        can_load = passed > 0 and loaded[passed - 1, content] and version[storage] == program.version[k]
                        missing = program.loads + content if can_load else program.maker[content]
                        break
                if len(stack) + length >= _LONGEST:
                    return sequence[:0]
                if missing >= 0:
                    stack.append(missing)
                    continue
                stack.pop()
                sequence[length] = op
                length += 1
                for k in range(program.start[op], program.start[op + 1]):
                    storage, kind = program.storage[k], program.kind[k]
                    there[storage] = True
                    if kind == CREATES:
                        version[storage] = 1
                    elif kind == LOADS:
                        version[storage] = program.version[k]
                    elif kind == WRITES or (kind == WRITES_ONCE and not seen[op]):
                        version[storage] += 1
                if op < program.loads:
                    seen[op] = True
    return sequence[:length]


@njit(cache=True, nogil=True)
def _targets(program: Program, op: int, is_place: bool, kept: Booleans) -> Integers:
    """What to run next: loads of what is to be kept beside ``op``, if that is a place, and then ``op``."""
    targets = np.empty(len(kept) + 1, np.int64)
    touched = program.storage[program.start[op] : program.start[op + 1]]
    length = 0
    for content in np.flatnonzero(kept) if is_place else np.flatnonzero(kept)[:0]:
        storage = program.storage[program.start[program.loads + content]]
        if program.sizes[storage] > 0 and not np.any(touched == storage):
            targets[length] = program.loads + content
            length += 1
    targets[length] = op
    return targets[: length + 1]


@njit(cache=True, nogil=True)
def _last_targets(program: Program) -> Integers:
    """Loads of the contents that late ops and the caller read."""
    wanted = np.zeros(len(program.maker), np.bool_)
    for op in program.late:
        for k in range(program.start[op], program.start[op + 1]):
            storage = program.storage[k]
            if program.maker_start[storage] < program.maker_start[storage + 1]:
                wanted[program.maker_start[storage] + program.version[k] - 1] = True
    for storage in program.outputs:
        if program.maker_start[storage] < program.maker_start[storage + 1]:
            wanted[program.maker_start[storage + 1] - 1] = True
    return program.loads + np.flatnonzero(wanted)

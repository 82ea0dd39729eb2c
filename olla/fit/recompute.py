"""Which ops to run again, so that a step fits into fewer bytes at little extra time.

Greedy repair: while the peak exceeds the budget, something is dropped that waits through it, and made again right
before it is needed: by its own op, or also by those whose results would have to wait for it, and so on. Of all these
chains, the one that removes most of what exceeds the budget for its time is taken. Then repeats that are not needed
any more are taken out, the dearest first. That is done from several orders and for several weights of time against
bytes, and the cheapest result counts. Every sequence is simulated in full, so a chain is judged by the true profile,
and never by the bytes of what it drops.

The problem is that of Checkmate (Jain et al., arXiv 1910.02653); the integer program in ``olla/ilp`` solves it exactly
for small graphs.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from numba import njit

from olla.errors import InfeasibleError
from olla.fit.program import CREATES, WRITES, Program, as_sequence, completed, program_of, simulated
from olla.graph.graph import Graph
from olla.graph.lifetimes import least_bytes, peak_bytes
from olla.graph.plan import Schedule
from olla.order.problem import Integers

__all__ = ["Recomputation", "recompute"]

Floats = npt.NDArray[np.float64]

_DEPTHS = np.array([0, 1, 2, 3, 5, 8, 1_000_000], np.int64)
_POWERS = (1.0, 0.5, 0.25)  # of seconds, in the score of a chain
_CLOSE = 0.01  # of a budget: what is not worth another search for the smallest one
_SMALLEST_SECONDS = 1e-7  # no chain is for nothing


def recompute(
    graph: Graph, start: Schedule, seconds: Sequence[float], budget_bytes: int, *, time_limit: float = 30.0
) -> Schedule:
    """A sequence of the ops of ``graph`` whose peak is at most ``budget_bytes``, at little extra time.

    Parameters
    ----------
    graph
        What to run.
    start
        An order of its ops; it is returned if it fits.
    seconds
        How long each op takes.
    budget_bytes
        What live bytes must not exceed, persistent storages left out.
    time_limit
        Seconds after which the best sequence so far is returned.

    Returns
    -------
    Schedule
        With the ops that run again, and ``extra_seconds``. No bound of these is proven (0).

    Raises
    ------
    InfeasibleError
        If nothing was found that fits; ``best_bytes`` is about the smallest peak that can be reached.
    """
    return Recomputation(graph, start, seconds).within(budget_bytes, time_limit=time_limit)


class Recomputation:
    """What is known of a graph, and found so far; budgets asked one after the other share it."""

    def __init__(self, graph: Graph, start: Schedule, seconds: Sequence[float]) -> None:
        self._graph, self._start = graph, start
        self._program = program_of(graph)
        self._seconds = np.maximum(np.array(seconds, np.float64), _SMALLEST_SECONDS)
        orders = {start.order: None, tuple(range(len(graph.ops))): None}
        self._floor, self._pinned = least_bytes(graph)
        self._orders = [as_sequence(self._program, order) for order in orders]
        self._found: list[tuple[float, int, Integers]] = []  # extra seconds, peak, whole sequence

    def within(self, budget_bytes: int, *, time_limit: float = 30.0) -> Schedule:
        """See :func:`recompute`. Of what was found for other budgets, the cheapest that fits counts, too."""
        started = time.perf_counter()
        deadline = started + time_limit
        if self._start.peak_bytes <= budget_bytes:
            return self._start
        if not self._reaches(budget_bytes, deadline) and budget_bytes < (least := self._smallest(deadline)):
            raise InfeasibleError(
                f"recomputation reaches {least:,} bytes, not {budget_bytes:,} ({self._pinned} needs {self._floor:,})",
                lower_bound_bytes=self._floor,
                best_bytes=least,
            )
        fitting = [found for found in self._found if found[1] <= budget_bytes]
        extra, peak, whole = min(fitting, key=lambda found: found[:2])
        assert peak == peak_bytes(self._graph, whole.tolist())
        bound, seconds = min(peak, self._floor), time.perf_counter() - started
        return Schedule(tuple(whole.tolist()), peak, bound, "recomputation", seconds, extra_seconds=extra)

    def _reaches(self, budget_bytes: int, deadline: float) -> bool:
        """Whether a sequence is found that fits."""
        for power in _POWERS:
            for sequence in self._orders:
                if not self._found or time.perf_counter() < deadline:
                    self._keep(_repaired(self._program, sequence, self._seconds, budget_bytes, power))
        return self._least <= budget_bytes

    def _smallest(self, deadline: float) -> int:
        """About the smallest budget that can be reached, by bisection."""
        low = self._floor
        while self._least - low > max(1, _CLOSE * self._least) and time.perf_counter() < deadline:
            middle = (low + self._least) // 2
            if not self._reaches(middle, deadline):
                low = middle
        return self._least

    @property
    def _least(self) -> int:
        return min(peak for _, peak, _ in self._found)

    def _keep(self, sequence: Integers) -> None:
        whole, _ = completed(self._program, sequence)
        is_sound, profile = simulated(self._program, whole)
        assert is_sound
        self._found.append((self._extra(whole), int(profile.max(initial=0)), whole))

    def _extra(self, whole: Integers) -> float:
        return float(max(0.0, self._seconds[whole].sum() - self._seconds.sum()))


@njit(cache=True)
def _repaired(program: Program, sequence: Integers, seconds: Floats, budget: int, power: float) -> Integers:
    """The sequence with repeats, until it fits or nothing helps any more; then without those that are not needed."""
    best, excess = sequence, _excess(program, sequence, budget)
    while excess > 0:
        found, score = best, 0.0
        place, storages = _waiting(program, best)
        for i in range(len(storages)):
            length = 0
            for depth in _DEPTHS:
                chain = _chain(program, best, place[i], storages[i], depth)
                if len(chain) == 0 or len(chain) == length:
                    continue
                length = len(chain)
                candidate = np.concatenate((best[: place[i]], chain, best[place[i] :]))
                removed = excess - _excess(program, candidate, budget)
                if removed > 0:
                    cost = 0.0
                    for op in chain:
                        cost += seconds[op]
                    if removed / cost**power > score:
                        found, score = candidate, removed / cost**power
        if score == 0.0:
            break
        best, excess = found, _excess(program, found, budget)
    return _pruned(program, best, seconds, budget if excess == 0 else _peak(program, best))


@njit(cache=True)
def _pruned(program: Program, sequence: Integers, seconds: Floats, budget: int) -> Integers:
    """The sequence without repeats that the budget does not need, the dearest taken out first."""
    best = sequence
    turn = np.argsort(-seconds[best], kind="mergesort")
    gone = np.zeros(len(best), np.bool_)
    for place in turn:
        gone[place] = True
        candidate = sequence[~gone]
        if np.any(candidate == sequence[place]) and _peak(program, candidate) <= budget:
            best = candidate
        else:
            gone[place] = False
    return best


@njit(cache=True)
def _peak(program: Program, sequence: Integers) -> int:
    """The largest entry of the profile; more than any budget, if the sequence is not sound."""
    is_sound, profile = simulated(program, completed(program, sequence)[0])
    return int(profile.max()) if is_sound else 2**62


@njit(cache=True)
def _excess(program: Program, sequence: Integers, budget: int) -> float:
    """Byte-steps above the budget; infinite, if the sequence is not sound."""
    is_sound, profile = simulated(program, completed(program, sequence)[0])
    if not is_sound:
        return np.inf
    excess = 0.0
    for live in profile:
        excess += max(0, live - budget)
    return excess


@njit(cache=True)
def _waiting(program: Program, sequence: Integers) -> tuple[Integers, Integers]:
    """What waits at the peak: positions of the ops that need it next, and storages."""
    whole, owner = completed(program, sequence)
    peak = owner[np.argmax(simulated(program, whole)[1])]
    before = np.full(len(program.sizes), -1, np.int64)
    after = np.full(len(program.sizes), -1, np.int64)
    for position in range(len(sequence)):
        op = sequence[position]
        for k in range(program.start[op], program.start[op + 1]):
            storage = program.storage[k]
            if program.sizes[storage] == 0:
                continue
            if position < peak:
                before[storage] = position
            elif position == peak:
                before[storage] = -1  # needed at the peak itself
            elif after[storage] < 0:
                after[storage] = position if program.kind[k] != CREATES else len(sequence)
    at_the_peak = sequence[peak]
    for k in range(program.start[at_the_peak], program.start[at_the_peak + 1]):
        before[program.storage[k]] = -1
    waiting = np.flatnonzero((before >= 0) & (after >= 0) & (after < len(sequence)))
    return after[waiting], waiting


@njit(cache=True)
def _chain(program: Program, sequence: Integers, place: int, storage: int, depth: int) -> Integers:
    """Ops that make what the op at ``place`` expects in ``storage``, in order; empty: there is no such chain.

    What they need and is not in memory then is made again, too, up to ``depth`` ops back, and kept for them beyond.
    """
    version, waits = _state(program, sequence, place)
    op = sequence[place]
    wanted = 0
    for k in range(program.start[op], program.start[op + 1]):
        if program.storage[k] == storage:
            wanted = program.version[k]
    chain = np.empty(len(program.workspace), np.int64)
    length = 0
    in_chain = np.zeros(len(program.workspace), np.bool_)
    # A stack of makers to run: (op, distance, whether its inputs were looked at).
    stack = [(np.int64(0), np.int64(0), False)]
    stack.pop()
    for j in range(wanted - 1, -1, -1):
        stack.append((program.maker[program.maker_start[storage] + j], np.int64(0), False))
    while len(stack) > 0:
        op, distance, is_ready = stack.pop()
        if in_chain[op]:
            continue
        if is_ready:
            in_chain[op] = True
            chain[length] = op
            length += 1
            continue
        stack.append((op, distance, True))
        for k in range(program.start[op], program.start[op + 1]):
            used = program.storage[k]
            first, end = program.maker_start[used], program.maker_start[used + 1]
            if program.kind[k] == CREATES or first == end:
                continue
            needed = program.version[k]
            is_there = waits[used] and version[used] == needed
            if used == storage or is_there or (version[used] == needed and distance >= depth):
                continue
            if len(stack) > 10_000:
                return chain[:0]
            for j in range(needed - 1, -1, -1):
                stack.append((program.maker[first + j], distance + 1, False))
    return chain[:length]


@njit(cache=True)
def _state(program: Program, sequence: Integers, place: int) -> tuple[Integers, npt.NDArray[np.bool_]]:
    """Before the op at ``place``: the version of each storage, and whether it waits in memory for somebody."""
    version = np.zeros(len(program.sizes), np.int64)
    for position in range(place):
        op = sequence[position]
        for k in range(program.start[op], program.start[op + 1]):
            storage, kind = program.storage[k], program.kind[k]
            if kind == CREATES:
                version[storage] = 1
            elif kind == WRITES and version[storage] == program.version[k]:
                version[storage] += 1
    waits = np.zeros(len(program.sizes), np.bool_)
    settled = np.zeros(len(program.sizes), np.bool_)
    for position in range(place, len(sequence)):
        op = sequence[position]
        for k in range(program.start[op], program.start[op + 1]):
            storage = program.storage[k]
            if not settled[storage]:
                settled[storage] = True
                waits[storage] = program.kind[k] != CREATES
    return version, waits

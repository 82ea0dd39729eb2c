"""Which ops to run again, and what to spill, so that a step fits into fewer bytes at little extra time.

The dearest moment of the step says what is best kept in memory (``moment.py``): from there on, what is not kept is made
again right before it is needed. Such sequences, for that and for smaller budgets, and plain orders, are repaired
greedily (``repair.py``) for several weights of time against bytes. The cheapest ones are improved, by moving some of
their ops, leaving out some of their repeats, or putting in others (``moves.py``), and repairing them again, until one
is as good as the bound. Where none is, the bound is raised, by telling apart what comes when (``cases.py``), and the
cheapest one is improved once more, along with one that keeps what is best kept at several moments.

The problem is that of Checkmate (Jain et al., arXiv 1910.02653); the integer program in ``olla/ilp`` solves it exactly
for small graphs.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import cycle, repeat
from typing import NamedTuple

import numpy as np

from olla.errors import InfeasibleError
from olla.fit.cases import Cases
from olla.fit.moment import Kept, Moments
from olla.fit.moves import changed, cleared
from olla.fit.program import as_sequence, completed, program_of, simulated, spilled, with_loads
from olla.fit.repair import peak_of, repaired, unrolled
from olla.fit.spill import Bandwidth, belady
from olla.graph.graph import Graph, Op, Storage
from olla.graph.lifetimes import least_bytes, peak_bytes
from olla.graph.plan import Schedule
from olla.order.problem import Integers

__all__ = ["Fitting", "fitted"]

_POWERS = (1.0, 0.5, 0.25)  # of seconds, in the score of a chain
_TIGHTER = (1.0, 0.95, 0.9, 0.85, 0.8)  # budgets that starts are made for
_STARTING = 1 / 3  # of the time, for starts, once one of them fits
_MOMENTS = 24  # that are looked at
_WALKING = 0.6  # of the time that is left then, for the walks after a bound is raised
_OPEN = 5e-3  # of all seconds, between what is found and the bound: worth to look at several moments
_MANY = 1_500  # ops, for programs of several moments to stay small
_NAMING = 0.6  # of the time, to find anything that fits, once starts do not,
_NAMED = 0.8  # and of that, to find what is named if nothing does
_LOWER = (0.003, 0.3)  # of the peak, that a trial tries to be lower by,
_HIGHER = 0.005  # and that it may be higher by, on average
_SETTLED = 1e-3  # of all seconds: as good as the bound
_TRIALS = 150  # to improve a sequence, or, in a row and in vain, to lower its peak
_MORE_TRIALS = 3_000  # if it is not close to the bound then, but no more than
_TRIALS_PER_OP = 10  # of the step
_WALKS = 2  # at a time,
_WORTH = 1.5  # from what takes so many times the extra time of the cheapest, at most
_HEAT = 2e-3  # of all seconds: what a trial may lose in the beginning
_WASTE = 0.005  # of all seconds: what repeats that turn out to be needless take, at most, as a rule
_SMALLEST_SECONDS = 1e-7  # no chain is for nothing


def fitted(
    graph: Graph,
    start: Schedule,
    seconds: Sequence[float],
    budget_bytes: int,
    *,
    bandwidth: Bandwidth | None = None,
    known: Schedule | None = None,
    improve: bool = True,
    time_limit: float = 30.0,
    patience: float = 0.0,
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
    bandwidth
        Between the device and where storages are spilled to. None: nothing is spilled.
    known
        What was found before, for other seconds or sizes, say: it is repaired, too.
    improve
        False: time goes to the bound alone, once something fits.
    time_limit
        Seconds after which the best sequence so far is returned.
    patience
        Seconds that it may take to find anything that fits, if that is more than the limit.

    Returns
    -------
    Schedule
        With the ops that run again, its spills, ``extra_seconds`` and a bound of these.

    Raises
    ------
    InfeasibleError
        If nothing was found that fits; ``best_bytes`` is about the smallest peak that can be reached, unless it says
        that time was over.
    """
    work = Fitting(graph, start, seconds, bandwidth=bandwidth, known=known)
    return work.within(budget_bytes, improve=improve, time_limit=time_limit, patience=patience)


class Found(NamedTuple):
    """A sequence without late ops."""

    extra: float  # seconds
    peak: int
    sequence: Integers


class Fitting:
    """What is known of a graph, and found so far; budgets asked one after the other share it."""

    def __init__(
        self,
        graph: Graph,
        start: Schedule,
        seconds: Sequence[float],
        *,
        bandwidth: Bandwidth | None = None,
        known: Schedule | None = None,
    ) -> None:
        self._graph, self._start, self._can_spill = graph, start, bandwidth is not None
        self._means = "recomputation and spilling" if self._can_spill else "recomputation"
        program = self._program = program_of(graph)
        sizes = np.repeat(program.sizes, np.diff(program.maker_start)).astype(np.float64)
        of_byte = np.inf if bandwidth is None else 1 / bandwidth.write + 1 / bandwidth.read
        self._seconds = np.maximum(np.concatenate([seconds, np.maximum(sizes, 1) * of_byte]), _SMALLEST_SECONDS)
        self._once = float(self._seconds[: program.loads].sum())
        orders = {start.order: None, tuple(range(len(graph.ops))): None}
        self._floor, self._pinned = least_bytes(graph)
        self._orders = [as_sequence(program, order) for order in orders]
        self._known = [] if known is None else [with_loads(program, known.order, known.spills)]
        self._moments = Moments(program, self._seconds)
        self._found: list[Found] = []
        _compile()

    def within(
        self, budget_bytes: int, *, improve: bool = True, time_limit: float = 30.0, patience: float = 0.0
    ) -> Schedule:
        """See :func:`fitted`. Of what was found for other budgets, the cheapest that fits counts, too."""
        started = time.perf_counter()
        deadline, patience = started + time_limit, max(time_limit, patience)
        if self._start.peak_bytes <= budget_bytes:
            return self._start
        if budget_bytes >= self._floor:
            moment = self._dearest(budget_bytes)
            for fits in self._attempts(budget_bytes, moment):
                is_over = time.perf_counter() > started + _STARTING * (time_limit if fits else patience)
                if is_over or (fits and not improve) or self._is_settled(budget_bytes, moment.seconds):
                    break
        if all(found.peak > budget_bytes for found in self._found):
            self._require(budget_bytes, _NAMING * patience)
        bound = self._search(budget_bytes, moment, improve, deadline)
        extra, peak, sequence = self._cheapest(budget_bytes)
        order, spills = spilled(self._program, completed(self._program, sequence)[0])
        exact = peak_bytes(self._graph, order, spills)
        assert exact <= peak
        return Schedule(
            order,
            exact,
            min(exact, self._floor),
            self._means,
            time.perf_counter() - started,
            spills,
            extra,
            min(extra, bound),
        )

    def _dearest(self, budget_bytes: int) -> Kept:
        """What to keep at the moment that costs most: one of those with most in memory, if nothing is dropped."""
        order = self._orders[0]
        whole, owner = completed(self._program, order)
        live = np.zeros(len(order), np.int64)
        np.maximum.at(live, owner, simulated(self._program, whole)[1])
        fullest = np.argsort(np.where(self._moments.turns[order], -live, 0), kind="stable")[:_MOMENTS]
        return self._moments.dearest(order[fullest], budget_bytes)

    def _attempts(self, budget_bytes: int, moment: Kept) -> Iterator[bool]:
        """Repair one start after the other, in one way after the other, and say whether something fits by now."""
        fits = False
        for sequence in self._starts(budget_bytes, moment):
            for power in _POWERS:
                fits |= self._repair(sequence, budget_bytes, power) <= budget_bytes
                yield fits
        for sequence in () if fits else self._orders:
            for power in _POWERS:
                yield self._repair(sequence, budget_bytes, power) <= budget_bytes

    def _starts(self, budget_bytes: int, moment: Kept) -> Iterator[Integers]:
        """What is known, and orders that make again what is not worth keeping at the dearest moment."""
        yield from self._known
        for share in _TIGHTER:
            kept = self._moments.at(moment.op, int(share * budget_bytes)) if share < 1 else moment
            if kept.seconds == np.inf:
                break
            for order in self._orders:
                op, before = np.array([moment.op]), self._moments.before
                sequence = self._moments.unrolled(order, op, kept.contents[None], kept.loaded[None], before)
                if len(sequence):
                    yield sequence
        if self._can_spill and (spills := belady(self._graph, self._start.order, budget_bytes)):
            yield with_loads(self._program, self._start.order, spills)

    def _search(self, budget_bytes: int, moment: Kept, improve: bool, deadline: float) -> float:
        """Improve the cheapest sequence and raise the bound in turn, until they meet, nearly; returns the bound."""
        cases = Cases(self._moments, self._orders, budget_bytes, moment)

        def is_open(deadline: float = deadline) -> bool:
            is_far = self._cheapest(budget_bytes).extra > cases.bound + _OPEN * self._once
            return is_far and time.perf_counter() < deadline

        if improve:
            self._improve(self._cheapest_orders(budget_bytes), budget_bytes, cases.bound, _TRIALS, deadline)
        starts = list[Integers]()
        if self._program.loads <= _MANY:
            middle = deadline - improve * _WALKING * (deadline - time.perf_counter())
            while is_open(middle) and cases.refine():
                starts += cases.sequences()
        if improve and is_open():
            trials = min(_MORE_TRIALS, _TRIALS_PER_OP * self._program.loads)
            found = [self._cheapest(budget_bytes), *self._elsewhere(starts, budget_bytes, deadline)]
            self._improve(found, budget_bytes, cases.bound, trials, deadline)
        return cases.bound

    def _elsewhere(self, sequences: Sequence[Integers], budget_bytes: int, deadline: float) -> list[Found]:
        """What fits of the sequences, repaired, the cheapest first, unless a walk has no chance from there."""
        draw, found = np.random.default_rng(0), list[Found]()
        for sequence in sequences:
            sequence = cleared(self._program, sequence, budget_bytes, draw)
            for power in _POWERS if time.perf_counter() < deadline else ():
                found.append(self._repaired(sequence, budget_bytes, power))
        most = _WORTH * self._cheapest(budget_bytes).extra
        return sorted((one for one in found if one.peak <= budget_bytes and one.extra <= most), key=_cost)

    def _improve(self, starts: Sequence[Found], budget_bytes: int, bound: float, trials: int, deadline: float) -> None:
        """Walk from the first of ``starts`` at the same time, or several times from one, and keep what is found."""
        limit, seconds = bound + _SETTLED * self._once, max(1e-9, deadline - time.perf_counter())

        def walk(seed: int, start: Found, is_stopped: Callable[[], bool]) -> Found:
            """Change the sequence, and repair it, again and again; returns the best."""
            draw, best, at = np.random.default_rng([seed, trials]), start, start
            for trial in range(trials):
                left = min(1 - trial / trials, (deadline - time.perf_counter()) / seconds)
                if best.extra <= limit or left < 0 or is_stopped():
                    break
                most = (1 + _WASTE) * self._once + at.extra
                found = self._neighbour(at.sequence, budget_bytes, draw, most)
                heat = _HEAT * self._once * left
                if found.peak <= budget_bytes:
                    best = min(best, found, key=_cost)
                    at = found if found.extra < at.extra + heat * draw.exponential() else at
            return best

        self._found += _side_by_side(walk, starts)

    def _require(self, budget_bytes: int, seconds: float) -> None:
        """Find something that fits by walks to lower and lower peaks, or raise :class:`InfeasibleError`.

        The walks do not depend on the budget, so who asks for the smallest one that an error names gets it. That there
        is time for that, too, what is found at the very end is not named.
        """
        started, enough, asked = time.perf_counter(), max(budget_bytes, self._floor), self._found

        def spent() -> float:
            return (time.perf_counter() - started) / max(1e-9, seconds)

        starts = [self._as_found(sequence) for sequence in (*self._known, self._orders[0])]
        self._found = starts.copy()
        for is_enough in self._attempts(self._floor, self._dearest(self._floor)):
            if is_enough or spent() > _STARTING:
                break
        starts.insert(len(self._known), self._smallest)
        named = [found.peak for found in starts]

        def walk(seed: int, at: Found, is_stopped: Callable[[], bool]) -> Found:
            """Lower the peak, again and again."""
            draw, best, idle = np.random.default_rng(seed), at, 0
            while best.peak > enough and idle < _TRIALS and spent() < 1 and not is_stopped():
                goal = best.peak * (1 - np.exp(draw.uniform(*np.log(_LOWER))))
                found = self._neighbour(at.sequence, int(goal), draw)
                at = found if found.peak <= best.peak * (1 + _HIGHER * draw.exponential()) else at
                idle += 1
                if found.peak < best.peak:
                    best, idle = found, 0
                    if spent() < _NAMED:
                        named.append(found.peak)
            return best

        self._found += [*asked, *_side_by_side(walk, starts)]
        if budget_bytes < self._smallest.peak:
            raise InfeasibleError(
                f"{self._means} reaches {min(named):,} bytes, not {budget_bytes:,} ({self._pinned} needs "
                f"{self._floor:,}{'; time was over, more may find less' if spent() > 1 else ''})",
                lower_bound_bytes=self._floor,
                best_bytes=min(named),
            )
        self._repair(self._smallest.sequence, budget_bytes, _POWERS[0])

    @property
    def _smallest(self) -> Found:
        return min(self._found, key=_peak)

    def _cheapest(self, budget_bytes: int) -> Found:
        return min((found for found in self._found if found.peak <= budget_bytes), key=_cost)

    def _cheapest_orders(self, budget_bytes: int) -> list[Found]:
        """What fits, the cheapest first: one for each order in which ops run for the first time."""
        orders: dict[bytes, Found] = {}
        for found in sorted((found for found in self._found if found.peak <= budget_bytes), key=_cost):
            ops, first = np.unique(found.sequence, return_index=True)
            orders.setdefault(ops[np.argsort(first)].tobytes(), found)
        return list(orders.values())

    def _is_settled(self, budget_bytes: int, bound: float) -> bool:
        """Whether something fits that is as good as the bound."""
        limit = bound + _SETTLED * self._once
        return any(found.extra <= limit and found.peak <= budget_bytes for found in self._found)

    def _repair(self, sequence: Integers, budget_bytes: int, power: float) -> int:
        """Keep the sequence, repaired, among what was found; returns its peak."""
        self._found.append(self._repaired(sequence, budget_bytes, power))
        return self._found[-1].peak

    def _neighbour(
        self, sequence: Integers, budget_bytes: int, draw: np.random.Generator, limit: float = np.inf
    ) -> Found:
        """The sequence, changed at random, and repaired."""
        other = changed(self._program, sequence, self._seconds, draw)
        other = cleared(self._program, other, budget_bytes, draw)
        return self._repaired(other, budget_bytes, float(draw.choice(_POWERS)), limit)

    def _repaired(self, sequence: Integers, budget_bytes: int, power: float, limit: float = np.inf) -> Found:
        return self._as_found(repaired(self._program, sequence, self._seconds, budget_bytes, power, limit))

    def _as_found(self, sequence: Integers) -> Found:
        once = np.unique(sequence[sequence < self._program.loads])
        extra = float(self._seconds[sequence].sum() - self._seconds[once].sum())
        return Found(max(0.0, extra), peak_of(self._program, sequence), sequence)


def _side_by_side(walk: Callable[[int, Found, Callable[[], bool]], Found], starts: Sequence[Found]) -> list[Found]:
    """What walks find that begin at the first of ``starts``; they are numbered, and told when to stop."""
    stopped = threading.Event()
    with ThreadPoolExecutor(_WALKS) as walkers:
        try:
            return [*walkers.map(walk, range(_WALKS), cycle(starts), repeat(stopped.is_set))]
        except BaseException:
            stopped.set()
            raise


@cache
def _compile() -> None:
    """Have all compiled code ready before time counts; the first time ever, that takes a minute."""
    program = program_of(Graph((Op("a", (0,)),), (Storage("", 1),)))
    order, kept = as_sequence(program, [0]), np.ones((1, 1), np.bool_)
    unrolled(program, order, order, kept, kept)
    repaired(program, order, np.ones(2), 1, 1.0, np.inf)
    draw = np.random.default_rng(0)
    cleared(program, changed(program, order, np.ones(2), draw), 1, draw)


def _peak(found: Found) -> int:
    return found.peak


def _cost(found: Found) -> tuple[float, int]:
    return found.extra, found.peak

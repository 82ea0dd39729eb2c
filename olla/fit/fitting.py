"""Which ops to run again, and what to spill, so that a step fits into fewer bytes at little extra time.

The dearest moment of the step says what is best kept in memory (``moment.py``): from there on, what is not kept is made
again right before it is needed. Such sequences, for that and for smaller budgets, and plain orders, are repaired
greedily (``repair.py``) for several weights of time against bytes. The cheapest one is improved, by leaving out some of
its repeats, or putting in others, and repairing it again, until it is as good as the bound. Where it is not, moments at
which such a sequence needs too much are looked at together with the dearest one (``joint.py``), which gives more starts
and a higher bound, and the cheapest one is improved once more.

The problem is that of Checkmate (Jain et al., arXiv 1910.02653); the integer program in ``olla/ilp`` solves it exactly
for small graphs.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from itertools import product

import numpy as np

from olla.errors import InfeasibleError
from olla.fit.joint import jointly
from olla.fit.moment import Kept, Moments
from olla.fit.program import as_sequence, completed, program_of, simulated, spilled, with_loads
from olla.fit.repair import DEPTHS, chain_of, peak_of, repaired, state, unrolled, waiting
from olla.fit.spill import Bandwidth, belady
from olla.graph.graph import Graph
from olla.graph.lifetimes import least_bytes, peak_bytes
from olla.graph.plan import Schedule
from olla.order.problem import Integers

__all__ = ["Fitting", "fitted"]

_POWERS = (1.0, 0.5, 0.25)  # of seconds, in the score of a chain
_TIGHTER = (1.0, 0.95, 0.9, 0.85, 0.8)  # budgets that starts are made for
_MOMENTS = 24  # that are looked at
_TOGETHER = 4  # that are looked at together
_OPEN = 5e-3  # of all seconds, between what is found and the bound: worth to look at several moments
_MANY = 1_500  # ops, for programs of several moments to stay small
_CLOSE = 0.01  # of a budget: what is not worth another search for the smallest one
_SETTLED = 1e-3  # of all seconds: as good as the bound
_TRIALS = 150  # to improve a sequence
_HEAT = 3e-3  # of all seconds: what a trial may lose in the beginning
_NEARBY = 40  # ops, in program order
_SMALLEST_SECONDS = 1e-7  # no chain is for nothing


def fitted(
    graph: Graph,
    start: Schedule,
    seconds: Sequence[float],
    budget_bytes: int,
    *,
    bandwidth: Bandwidth | None = None,
    time_limit: float = 30.0,
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
    time_limit
        Seconds after which the best sequence so far is returned.

    Returns
    -------
    Schedule
        With the ops that run again, its spills, ``extra_seconds`` and a bound of these.

    Raises
    ------
    InfeasibleError
        If nothing was found that fits; ``best_bytes`` is about the smallest peak that can be reached.
    """
    return Fitting(graph, start, seconds, bandwidth=bandwidth).within(budget_bytes, time_limit=time_limit)


class Fitting:
    """What is known of a graph, and found so far; budgets asked one after the other share it."""

    def __init__(
        self, graph: Graph, start: Schedule, seconds: Sequence[float], *, bandwidth: Bandwidth | None = None
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
        self._moments = Moments(program, self._seconds)
        self._found: list[tuple[float, int, Integers]] = []  # extra seconds, peak, sequence without late ops

    def within(self, budget_bytes: int, *, time_limit: float = 30.0) -> Schedule:
        """See :func:`fitted`. Of what was found for other budgets, the cheapest that fits counts, too."""
        started = time.perf_counter()
        deadline = started + time_limit
        if self._start.peak_bytes <= budget_bytes:
            return self._start
        if budget_bytes >= self._floor:
            moment = self._dearest(budget_bytes)
            for _ in self._attempts(budget_bytes, moment):
                if self._is_settled(budget_bytes, moment.seconds) or time.perf_counter() > deadline:
                    break
        if budget_bytes < self._least and budget_bytes < (least := self._smallest(deadline)):
            raise InfeasibleError(
                f"{self._means} reaches {least:,} bytes, not {budget_bytes:,} ({self._pinned} needs {self._floor:,})",
                lower_bound_bytes=self._floor,
                best_bytes=least,
            )
        bound, draw = moment.seconds, np.random.default_rng(0)
        self._improve(budget_bytes, bound, deadline, draw)
        if self._cheapest(budget_bytes)[0] > bound + _OPEN * self._once and self._program.loads <= _MANY:
            bound = self._several(budget_bytes, moment, deadline)
            self._improve(budget_bytes, bound, deadline, draw)
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
        """Orders that make again what is not worth keeping at the dearest moment."""
        for share in _TIGHTER:
            kept = self._moments.at(moment.op, int(share * budget_bytes)) if share < 1 else moment
            if kept.seconds == np.inf:
                break
            for order in self._orders:
                place = int(np.flatnonzero(order == moment.op)[0])
                sequence = unrolled(self._program, order, np.array([place]), kept.contents[None], kept.loaded[None])
                if len(sequence):
                    yield sequence
        if self._can_spill and (spills := belady(self._graph, self._start.order, budget_bytes)):
            yield with_loads(self._program, self._start.order, spills)

    def _several(self, budget_bytes: int, moment: Kept, deadline: float) -> float:
        """Repair what is best at several moments, in any order and in each of the known ones; returns the bound.

        They are the dearest one and those that exceed the budget most in what the ones before lead to.
        """
        program, bound = self._program, moment.seconds
        for order, is_free in product(self._orders, (True, False)):
            place = np.argsort(np.concatenate([order, np.setdiff1d(np.arange(program.loads), order)]))
            given = None if is_free else completed(program, order)[0]
            ops, contents, loaded = np.array([moment.op]), moment.contents[None], moment.loaded[None]
            while not self._is_settled(budget_bytes, bound) and time.perf_counter() < deadline:
                sequence = unrolled(program, order, place[ops], contents, loaded)
                if len(sequence) == 0:
                    break
                if len(ops) > 1:
                    for power in _POWERS:
                        self._repair(sequence, budget_bytes, power)
                more = self._fullest(sequence, ops, budget_bytes, is_free=is_free)
                if more is None or len(ops) == _TOGETHER:
                    break
                ops = np.append(ops, more)
                ops = ops[np.argsort(place[ops])]
                _, seconds, contents, loaded = jointly(self._moments, ops, budget_bytes, given)
                if is_free:
                    bound = max(bound, seconds)
                if len(contents) == 0:
                    break
        return bound

    def _fullest(self, sequence: Integers, ops: Integers, budget_bytes: int, *, is_free: bool) -> int | None:
        """The op, none of ``ops``, whose first run exceeds the budget most; None: none does.

        If it ``is_free`` when ops run, it must come before or after each of them in every order.
        """
        whole, _ = completed(self._program, sequence)
        first, position = np.unique(whole, return_index=True)
        excess = simulated(self._program, whole)[1][position] - budget_bytes
        excess[(first >= self._program.loads) | np.isin(first, [*ops, *self._program.late])] = 0
        if is_free:
            before = self._moments.before
            ordered = self._moments.turns & np.all(before[ops] | before[:, ops].T, axis=0)
            excess[~np.isin(first, np.flatnonzero(ordered))] = 0
        most = int(np.argmax(excess))
        return int(first[most]) if excess[most] > 0 else None

    def _improve(self, budget_bytes: int, bound: float, deadline: float, draw: np.random.Generator) -> None:
        """Leave out some repeats of the cheapest sequence, or put in others, and repair it again and again."""
        cost, _, sequence = self._cheapest(budget_bytes)
        for trial in range(_TRIALS):
            if self._is_settled(budget_bytes, bound) or time.perf_counter() > deadline:
                break
            changed = self._with_another(sequence, draw) if draw.random() < 1 / 3 else self._with_less(sequence, draw)
            self._repair(changed, budget_bytes, float(draw.choice(_POWERS)))
            extra, peak, other = self._found[-1]
            heat = _HEAT * self._once * (1 - trial / _TRIALS)
            if peak <= budget_bytes and extra < cost + heat * draw.exponential():
                cost, sequence = extra, other

    def _with_less(self, sequence: Integers, draw: np.random.Generator) -> Integers:
        """The sequence without some repeats and loads of ops that are near one another."""
        again = sequence >= self._program.loads
        again |= ~np.isin(np.arange(len(sequence)), np.unique(sequence, return_index=True)[1])
        if not again.any():
            return sequence
        middle = draw.choice(np.flatnonzero(again))
        where = np.arange(len(sequence)) if draw.random() < 1 / 2 else sequence
        is_near = np.abs(where - where[middle]) <= draw.integers(1, _NEARBY)
        return np.delete(sequence, np.flatnonzero(again & is_near))

    def _with_another(self, sequence: Integers, draw: np.random.Generator) -> Integers:
        """The sequence with one more chain: something that waits somewhere is dropped."""
        _, places, storages = waiting(self._program, sequence, int(draw.integers(len(sequence))))
        if len(places) == 0:
            return sequence
        chosen = draw.integers(len(places))
        place, depth = places[chosen], draw.choice(DEPTHS)
        version, waits = state(self._program, sequence, place)
        chain = chain_of(self._program, version, waits, sequence[place], storages[chosen], depth)
        if not np.isfinite(self._seconds[chain].sum()):
            return sequence
        return np.concatenate([sequence[:place], chain, sequence[place:]])

    def _smallest(self, deadline: float) -> int:
        """About the smallest budget that can be reached, by bisection, which is the same whatever was asked before."""
        low, high = self._floor - 1, self._start.peak_bytes  # what is too small, and what is not
        middle = self._floor if self._can_spill else (low + high) // 2
        while high - low > max(1, _CLOSE * high) and time.perf_counter() < deadline:
            if any(self._attempts(middle, self._dearest(middle))):
                high = middle
            else:
                low = middle
            middle = (low + high) // 2
        return self._least

    @property
    def _least(self) -> int:
        return min([self._start.peak_bytes, *(peak for _, peak, _ in self._found)])

    def _cheapest(self, budget_bytes: int) -> tuple[float, int, Integers]:
        return min((found for found in self._found if found[1] <= budget_bytes), key=lambda found: found[:2])

    def _is_settled(self, budget_bytes: int, bound: float) -> bool:
        """Whether something fits that is as good as the bound."""
        limit = bound + _SETTLED * self._once
        return any(extra <= limit and peak <= budget_bytes for extra, peak, _ in self._found)

    def _repair(self, sequence: Integers, budget_bytes: int, power: float) -> int:
        """Keep the sequence, repaired, among what was found; returns its peak."""
        sequence = repaired(self._program, sequence, self._seconds, budget_bytes, power)
        peak = peak_of(self._program, sequence)
        once = np.unique(sequence[sequence < self._program.loads])
        extra = float(self._seconds[sequence].sum() - self._seconds[once].sum())
        self._found.append((max(0.0, extra), peak, sequence))
        return peak

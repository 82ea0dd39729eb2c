"""Graph to schedule: reduce, try many cheap orders, bound, and search between the best order and the bound."""

from __future__ import annotations

import time
from contextlib import suppress
from functools import cache

import numpy as np

from olla.graph.graph import Graph, Op, Storage
from olla.graph.plan import Schedule
from olla.order.bounds import CutBound, alike, must_live, set_cut
from olla.order.improve import improved
from olla.order.portfolio import flattened, list_schedules, peak, profile, settled
from olla.order.precedence import Precedence
from olla.order.problem import Integers, Problem
from olla.order.reduce import Reduced
from olla.order.search import search
from olla.order.segments import segments, window, with_window

__all__ = ["program_order", "schedule"]

_PROGRAM_ORDER = "program order"
_CUTS = 40  # ops whose cut bound is looked at, of the highest memory and of the highest must-live each
_SETS = 8  # and those whose set cut is
_PATIENCE = 3  # targets in a row that are neither refuted nor reached
_SEARCHED_OPS = 6_000  # above, propagation would take too long
_IMPROVED = 3  # list schedules that are improved
_CLOSE = 1e-6  # a gap that is not worth a search
_WORK = 2e8  # nodes searched for one target, at first, times the square of the number of ops


def schedule(graph: Graph, *, time_limit: float = 60.0) -> Schedule:
    """Find an order of the ops of ``graph`` whose peak is low, and prove how low it could be.

    The result depends on the graph alone, unless time runs out: nothing is drawn at random. The peak is that of
    OLLA (arXiv 2210.12924); docs/how_it_works.md explains the bounds and the search.

    Parameters
    ----------
    graph
        What to order.
    time_limit
        Seconds after which the best order so far is returned, with the bound so far. Ctrl-C returns
        them at once. What takes time once, because the search has never been compiled on this machine,
        is not counted.

    Returns
    -------
    Schedule
        The best order found. Its peak is never above that of program order; and where memory is
        not scarce, ops run in program order.
    """
    _compile()
    started = time.perf_counter()
    problem = Problem.of(graph)
    found = _Search(problem, started + time_limit)
    with suppress(KeyboardInterrupt):  # the user wants what there is
        found.run()
    program = np.arange(problem.op_count)
    if peak(problem, program) <= found.peak:
        return _schedule(problem, program, found.bound, _PROGRAM_ORDER, started)
    order = settled(problem, flattened(problem, found.order))
    return _schedule(problem, order, found.bound, found.method, started)


def program_order(graph: Graph) -> Schedule:
    """The ops as they stand: what running ``graph`` without planning needs."""
    started = time.perf_counter()
    problem = Problem.of(graph)
    bound = int(must_live(problem).max())
    return _schedule(problem, np.arange(problem.op_count), bound, _PROGRAM_ORDER, started)


def _schedule(problem: Problem, order: Integers, bound: int, method: str, started: float) -> Schedule:
    return Schedule(
        order=tuple(order[:-1].tolist()),  # without the added last op
        peak_bytes=peak(problem, order),
        lower_bound_bytes=bound,
        method=method,
        seconds=time.perf_counter() - started,
    )


@cache
def _compile() -> None:
    """Have all compiled code ready before time counts; the first time ever, that takes half a minute."""
    ops = (Op("a", (0,)), Op("b", (1,), (0,)), Op("c", (2,), (0,)), Op("d", (), (1, 2)))
    problem = Problem.of(Graph(ops, tuple(Storage("", 1) for _ in range(3))))
    Reduced.of(problem).merged()
    must_live(problem)
    orders = [settled(problem, flattened(problem, order)) for _, order in list_schedules(problem)]
    precedence = Precedence(problem)
    precedence.propagate(3, np.inf)
    precedence.dearest_pair(1, orders[0])
    precedence.require(1, 2)
    precedence.precedes(1, 2)


class _Search:
    """The best order and the best bound so far; each stage narrows the gap, until it is closed."""

    def __init__(self, problem: Problem, deadline: float, bound: int = 0) -> None:
        self._deadline = deadline
        self.bound = bound  # a peak below it is of no use
        self.method = _PROGRAM_ORDER
        self._start_from(Reduced.of(problem))

    def _start_from(self, reduced: Reduced) -> None:
        problem, order = reduced.problem, np.argsort(reduced.problem.priority)
        height = peak(problem, order)
        # All at once: an interruption finds either the old state or the new one.
        self._reduced, self._problem, self._order, self.peak = reduced, problem, order, height

    @property
    def order(self) -> Integers:
        """The best order, of the ops of the problem as it was given."""
        return self._reduced.expanded(self._order)

    def run(self) -> None:
        """Search, until the gap is closed or time is over."""
        self._start_from(self._reduced.merged(self._deadline))
        self._must_live = must_live(self._problem)
        self.bound = max(self.bound, int(self._must_live.max()))
        starts = [(self.method, self._order)]
        schedules = list_schedules(self._problem)
        while not self._ended and (found := next(schedules, None)):
            method, order = found
            starts.append(found)
            self._keep(order, method)
        if self._ended:
            return
        self._cut()
        parts = segments(self._problem)
        if len(parts) > 1:
            self._order_parts(parts)
        else:
            starts.sort(key=lambda start: peak(self._problem, start[1]))
            self._improve(starts[:_IMPROVED])
            self._search()

    def _order_parts(self, parts: list[tuple[int, int]]) -> None:
        """Order each part on its own, the one with the highest peak first, as long as it exceeds the bound."""
        memory = profile(self._problem, self._order)
        parts.sort(key=lambda part: -int(memory[part[0] : part[1]].max()))
        for start, end in parts:
            if self._ended or memory[start:end].max() <= self.bound:
                return
            part = _Search(window(self._problem, self._order, start, end), self._deadline, self.bound)
            try:
                part.run()
            finally:
                self.bound = max(self.bound, part.bound)
                self._order = with_window(self._order, start, end, part.order)
                self.peak = peak(self._problem, self._order)
                if part.method != _PROGRAM_ORDER:
                    self.method = f"{part.method}, in parts"

    def _search(self) -> None:
        if self._problem.op_count > _SEARCHED_OPS:
            return
        nodes = 1 + int(_WORK / self._problem.op_count**2)
        while not self._is_close:
            self._narrow(nodes)
            self._improve([(self.method, self._order)])
            nodes *= 4

    @property
    def _ended(self) -> bool:
        return self.peak <= self.bound or time.perf_counter() > self._deadline

    @property
    def _is_close(self) -> bool:
        return self._ended or self.peak - self.bound <= self.bound * _CLOSE

    def _keep(self, order: Integers, method: str) -> None:
        found = peak(self._problem, order)
        if found < self.peak:
            self._order, self.peak, self.method = order, found, method

    def _improve(self, starts: list[tuple[str, Integers]]) -> None:
        for method, order in starts:
            if self._is_close:
                return
            self._keep(improved(self._problem, order, self._deadline), f"{method}, improved")

    def _cut(self) -> None:
        """Raise the bound by cuts, of single ops and of sets of ops that are alike."""
        cuts = CutBound(self._problem)
        for op in self._dearest(_CUTS):
            if self._ended:
                return
            self.bound = max(self.bound, cuts.at(op))
        for op in self._dearest(_SETS):
            if self._ended:
                return
            self.bound = max(self.bound, set_cut(self._problem, alike(self._problem, op), self.bound))

    def _dearest(self, count: int) -> list[int]:
        """The ops with the highest memory in the best order, and those where most is certain."""
        memory = profile(self._problem, self._order)
        found = self._order[np.argsort(-memory, kind="stable")[:count]]
        certain = np.argsort(-self._must_live, kind="stable")[:count]
        return list(dict.fromkeys([*found.tolist(), *certain.tolist()]))

    def _narrow(self, nodes: int) -> None:
        """Take targets between bound and peak: refute them, or find an order within them."""
        ceiling = self.peak - 1  # below the lowest target that was neither refuted nor reached
        patience = _PATIENCE
        while patience and self.bound <= ceiling and not self._is_close:
            target = (self.bound + ceiling) // 2
            answer = search(self._problem, target, nodes=nodes, deadline=self._deadline)
            if answer.order is not None:
                self._keep(answer.order, f"{answer.method}, within a target")
            self.bound = max(self.bound, min(answer.bound, self.peak))
            if self.bound > target:
                patience = _PATIENCE
            elif self.peak > target:
                ceiling = target - 1
                patience -= 1
            ceiling = min(ceiling, self.peak - 1)

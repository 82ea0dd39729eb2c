"""Graph to schedule: many cheap orders, judged by one estimator; then bounds, and a search between the two.

Program order is the first candidate, so a plan is never worse than what it replaces.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator

import numpy as np

from olla.graph.graph import Graph
from olla.graph.plan import Schedule
from olla.order import kernels
from olla.order.bounds import CutBound, must_live
from olla.order.precedence import Precedence, TooLateError
from olla.order.problem import Integers, Problem

__all__ = ["program_order", "schedule"]

_PROGRAM_ORDER = "program order"
_RULES = {
    "free first": kernels.FREE_FIRST,
    "least peak": kernels.LEAST_PEAK,  # LPMF of PyTorch Inductor, torch/_inductor/memory.py
    "least net": kernels.LEAST_NET,
    "depth first": kernels.DEPTH,
    "breadth first": kernels.BREADTH,
}
_WORK = 4e8  # steps simulated at most for the moves of one graph: none are tried on very large ones
_ROUNDS = 6
_IMPROVED_STARTS = 3
_CUTS = 40  # ops whose cut bound is looked at, of the highest memory and of the highest must-live each
_CLOSE = 1e-5  # a gap that is not worth narrowing
_PATIENCE = 3  # targets in a row that are neither refuted nor reached
_MATRIX_OPS = 3000  # above, the matrices of Precedence would need gigabytes


def schedule(graph: Graph, *, time_limit: float = 60.0) -> Schedule:
    """Find an order of the ops of ``graph`` whose peak is low, and prove how low it could be.

    Parameters
    ----------
    graph
        What to order.
    time_limit
        Seconds after which the best order so far is returned, with the bound so far. One candidate
        order is always made, however long it takes.

    Returns
    -------
    Schedule
        The best order found; among equal peaks, the one found first, program order before all.
    """
    search = _Search(Problem.of(graph), time.perf_counter() + time_limit)
    search.run()
    return search.result()


def program_order(graph: Graph) -> Schedule:
    """The ops as they stand: what running ``graph`` without planning needs."""
    search = _Search(Problem.of(graph), deadline=0.0)
    search.run()
    return search.result()


class _Search:
    """The best order and the best bound so far; each stage narrows the gap, until it is closed."""

    def __init__(self, problem: Problem, deadline: float) -> None:
        self._problem = problem
        self._started = time.perf_counter()
        self._deadline = deadline
        self._must_live = must_live(problem)
        self._bound = int(self._must_live.max())
        self._order = np.arange(problem.op_count)
        self._peak = _peak(problem, self._order)
        self._method = _PROGRAM_ORDER

    def run(self) -> None:
        self._try(_portfolio(self._problem, self._bound))
        self._cut(CutBound(self._problem), self._must_live)
        if self._problem.op_count <= _MATRIX_OPS:
            self._bisect()

    def result(self) -> Schedule:
        return Schedule(
            order=tuple(self._order[:-1].tolist()),  # without the added last op
            peak_bytes=self._peak,
            lower_bound_bytes=self._bound,
            method=self._method,
            seconds=time.perf_counter() - self._started,
        )

    @property
    def _ended(self) -> bool:
        return self._peak - self._bound <= self._bound * _CLOSE or time.perf_counter() > self._deadline

    def _try(self, candidates: Iterable[tuple[str, Integers]], note: str = "") -> None:
        """Keep the best of the candidates."""
        if self._ended:
            return
        for method, order in candidates:
            peak = _peak(self._problem, order)
            if peak < self._peak:
                self._peak, self._order, self._method = peak, order, method + note
            if self._ended:
                return

    def _cut(self, cuts: CutBound, estimate: Integers) -> None:
        """Raise the bound by cuts at the ops where most is in memory, found or estimated."""
        for op in self._dearest(estimate):
            if self._ended:
                return
            self._bound = max(self._bound, cuts.at(op))

    def _dearest(self, estimate: Integers) -> list[int]:
        memory = _profile(self._problem, self._order)
        found = self._order[np.argsort(-memory, kind="stable")[:_CUTS]]
        estimated = np.argsort(-estimate, kind="stable")[:_CUTS]
        return list(dict.fromkeys([*found.tolist(), *estimated.tolist()]))

    def _bisect(self) -> None:
        """Take targets between bound and peak: refute them, or find an order within them."""
        if self._ended:
            return
        everything = Precedence.of(self._problem)
        undecided = self._peak  # the lowest target that was neither refuted nor reached
        patience = _PATIENCE
        while patience and not self._ended:
            ceiling = min(self._peak, undecided) - 1
            if ceiling < self._bound or (undecided < self._peak and ceiling - self._bound < self._bound * _CLOSE):
                return
            target = (self._bound + ceiling) // 2
            try:
                precedence = everything.within(target, self._deadline)
            except TooLateError:
                return
            restricted = None if precedence is None else precedence.restricted()
            if restricted is None or self._is_cut(restricted, target):
                self._bound = target + 1
                patience = _PATIENCE
                continue
            self._try(_portfolio(restricted, self._bound), ", within a target")
            if self._peak > target:
                undecided = target
                patience -= 1

    def _is_cut(self, restricted: Problem, target: int) -> bool:
        """Whether some op's cut exceeds ``target`` under the precedences that follow from it."""
        cuts = CutBound(restricted)
        for op in self._dearest(must_live(restricted)):
            if time.perf_counter() > self._deadline:
                return False
            if cuts.at(op) > target:
                return True
        return False


def _portfolio(problem: Problem, bound: int) -> Iterator[tuple[str, Integers]]:
    """Orders and how they were found: every rule both ways, then the best and program order improved."""
    found = [(_PROGRAM_ORDER, np.argsort(problem.priority))]
    backwards = problem.reversed()
    for name, rule in _RULES.items():
        for method, order in (
            (name, _list_schedule(problem, rule)),
            (f"{name}, backwards", _list_schedule(backwards, rule)[::-1].copy()),
        ):
            found.append((method, order))
            yield method, order
    found.sort(key=lambda member: _peak(problem, member[1]))  # stable: ties keep their rank
    rounds = int(min(_ROUNDS, _WORK / (_IMPROVED_STARTS * 2.0 * problem.op_count**2)))
    for method, order in found[:_IMPROVED_STARTS]:
        yield f"{method}, improved", _improve(problem, order, bound, rounds)


def _peak(problem: Problem, order: Integers) -> int:
    return int(_profile(problem, order).max())


def _profile(problem: Problem, order: Integers) -> Integers:
    memory: Integers = kernels.profile(order, *_memory_arrays(problem))
    return memory


def _list_schedule(problem: Problem, rule: int) -> Integers:
    order: Integers = kernels.list_schedule(
        rule,
        problem.predecessors.start,
        problem.successors.start,
        problem.successors.items,
        problem.touches.start,
        problem.touches.items,
        problem.sizes,
        problem.workspace,
        problem.priority,
    )
    return order


def _improve(problem: Problem, order: Integers, bound: int, rounds: int) -> Integers:
    improved: Integers = kernels.improve(
        order,
        bound,
        rounds,
        problem.predecessors.start,
        problem.predecessors.items,
        problem.successors.start,
        problem.successors.items,
        *_memory_arrays(problem),
    )
    return improved


def _memory_arrays(problem: Problem) -> tuple[Integers, ...]:
    """What the kernels need to know to compute a memory profile."""
    creates, touches = problem.creates, problem.touches
    return creates.start, creates.items, touches.start, touches.items, problem.sizes, problem.workspace

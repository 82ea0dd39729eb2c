"""Graph to schedule: a portfolio of list schedules, every member judged by one estimator.

No single rule wins on all graphs, and all of them together cost milliseconds. Program order is a
member, so a plan is never worse than what it replaces.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np

from olla.graph.graph import Graph
from olla.graph.plan import Schedule
from olla.order import kernels
from olla.order.bounds import must_live_bytes
from olla.order.problem import Integers, Problem

__all__ = ["program_order", "schedule"]

_RULES = {
    "free first": kernels.FREE_FIRST,
    "least peak": kernels.LEAST_PEAK,  # LPMF of PyTorch Inductor, torch/_inductor/memory.py
    "least net": kernels.LEAST_NET,
    "depth first": kernels.DEPTH,
    "breadth first": kernels.BREADTH,
}
_PROGRAM_ORDER = "program order"
_WORK = 4e8  # about two seconds of compiled work for all moves of one graph
_ROUNDS = 6
_IMPROVED_STARTS = 3


def schedule(graph: Graph, *, time_limit: float = 60.0) -> Schedule:
    """Find an order of the ops of ``graph`` whose peak is low, and say how low it could be.

    Parameters
    ----------
    graph
        What to order.
    time_limit
        Seconds after which no further member of the portfolio is tried.

    Returns
    -------
    Schedule
        The best order found; among equal peaks, the one found first, program order before all.
        Its bound is :func:`olla.order.bounds.must_live_bytes`.
    """
    started = time.perf_counter()
    problem = Problem.of(graph)
    bound = must_live_bytes(problem)
    best_peak, best_order, best_method = -1, np.arange(0), ""
    for method, order in _portfolio(problem, bound):
        peak = _peak(problem, order)
        if best_peak < 0 or peak < best_peak:
            best_peak, best_order, best_method = peak, order, method
        if best_peak == bound or time.perf_counter() - started > time_limit:
            break
    return Schedule(
        order=tuple(best_order[:-1].tolist()),  # without the added last op
        peak_bytes=best_peak,
        lower_bound_bytes=bound,
        method=best_method,
        seconds=time.perf_counter() - started,
    )


def program_order(graph: Graph) -> Schedule:
    """The ops as they stand: what running ``graph`` without planning needs."""
    started = time.perf_counter()
    problem = Problem.of(graph)
    return Schedule(
        order=tuple(range(len(graph.ops))),
        peak_bytes=_peak(problem, np.arange(problem.op_count)),
        lower_bound_bytes=must_live_bytes(problem),
        method=_PROGRAM_ORDER,
        seconds=time.perf_counter() - started,
    )


def _portfolio(problem: Problem, bound: int) -> Iterator[tuple[str, Integers]]:
    """Orders and how they were found: program order, every rule both ways, then the best improved."""
    found = [(_PROGRAM_ORDER, np.arange(problem.op_count))]
    yield found[0]
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
    memory = kernels.profile(
        order,
        problem.creates.start,
        problem.creates.items,
        problem.touches.start,
        problem.touches.items,
        problem.sizes,
        problem.workspace,
    )
    return int(memory.max())


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
        problem.creates.start,
        problem.creates.items,
        problem.touches.start,
        problem.touches.items,
        problem.sizes,
        problem.workspace,
    )
    return improved

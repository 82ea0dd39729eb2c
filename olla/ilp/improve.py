"""What a solver adds to what the planners found: each form starts from it, and only where something is left to gain.

A form that would be too large is not tried: the numbers of steps, and of pairs, are squared. If it is too large for
the licence of the solver, there is a warning, and what the planners found stays.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

from olla.errors import SolverUnavailableError
from olla.graph.graph import Graph
from olla.graph.plan import Placement, Plan, Schedule
from olla.ilp.address_form import address
from olla.ilp.joint_form import joint
from olla.ilp.order_form import order
from olla.order.problem import Problem
from olla.order.reduce import Reduced
from olla.place.place import Interval, padded, unpadded

__all__ = ["improved_order", "improved_placement", "improved_plan"]

log = logging.getLogger(__name__)
T = TypeVar("T")

_STEPS = 150  # of the order form
_BUFFERS = 400  # of the address form
_OPS = 100  # of the joint form


def improved_order(graph: Graph, found: Schedule, *, solver: str, time_limit: float) -> Schedule:
    """``found``, or a better order, or at least a better bound."""
    if found.peak_bytes == found.lower_bound_bytes or Reduced.of(Problem.of(graph)).merged().problem.op_count > _STEPS:
        return found
    return _or(found, lambda: order(graph, start=found, solver=solver, time_limit=time_limit))


def improved_placement(
    intervals: Sequence[Interval], found: Placement, *, alignment: int, solver: str, time_limit: float
) -> Placement:
    """``found``, for (start, end, bytes), or a lower placement."""
    if found.arena_bytes == found.lower_bound_bytes or len(intervals) > _BUFFERS:
        return found
    buffers = padded(intervals, alignment)
    start = Placement(found.offsets, max(at + b.size for at, b in zip(found.offsets, buffers, strict=True)))
    lowered = _or(start, lambda: address(buffers, start=start, solver=solver, time_limit=time_limit))
    return min(found, unpadded(intervals, lowered), key=lambda placement: placement.arena_bytes)


def improved_plan(graph: Graph, found: Plan, *, alignment: int, solver: str, time_limit: float) -> Plan:
    """``found``, a plan with addresses, or one with a smaller arena, in any order."""
    if found.arena_bytes == found.arena_lower_bound_bytes or len(graph.ops) > _OPS:
        return found
    better = _or(found, lambda: joint(graph, start=found, alignment=alignment, solver=solver, time_limit=time_limit))
    return min(found, better, key=lambda plan: plan.arena_bytes or 0)


def _or(found: T, improve: Callable[[], T]) -> T:
    try:
        return improve()
    except SolverUnavailableError as error:
        log.warning("the plan stays as the planners made it: %s", error)
        return found

"""What a solver adds to what the planners found: each form starts from it, and only where something is left to gain.

A form that would be too large is not tried: the numbers of steps, and of pairs, are squared.
"""

from __future__ import annotations

from collections.abc import Sequence

from olla.graph.graph import Graph
from olla.graph.plan import Placement, Plan, Schedule
from olla.ilp.address_form import address
from olla.ilp.joint_form import joint
from olla.ilp.order_form import order
from olla.order.problem import Problem
from olla.order.reduce import Reduced
from olla.place.place import Interval, padded, unpadded

__all__ = ["improved_order", "improved_placement", "improved_plan"]

_STEPS = 150  # of the order form
_BUFFERS = 400  # of the address form
_OPS = 100  # of the joint form


def improved_order(graph: Graph, found: Schedule, *, solver: str, time_limit: float) -> Schedule:
    """``found``, or a better order, or at least a better bound."""
    if found.peak_bytes == found.lower_bound_bytes or Reduced.of(Problem.of(graph)).merged().problem.op_count > _STEPS:
        return found
    return order(graph, start=found, solver=solver, time_limit=time_limit)


def improved_placement(
    intervals: Sequence[Interval], found: Placement, *, alignment: int, solver: str, time_limit: float
) -> Placement:
    """``found``, for (start, end, bytes), or a lower placement."""
    if found.arena_bytes == found.lower_bound_bytes or len(intervals) > _BUFFERS:
        return found
    buffers = padded(intervals, alignment)
    start = Placement(found.offsets, max(at + b.size for at, b in zip(found.offsets, buffers, strict=True)))
    better = unpadded(intervals, address(buffers, start=start, solver=solver, time_limit=time_limit))
    return better if better.arena_bytes < found.arena_bytes else found


def improved_plan(graph: Graph, found: Plan, *, alignment: int, solver: str, time_limit: float) -> Plan:
    """``found``, a plan with addresses, or one with a smaller arena, in any order."""
    if found.arena_bytes == found.arena_lower_bound_bytes or len(graph.ops) > _OPS:
        return found
    better = joint(graph, start=found, alignment=alignment, solver=solver, time_limit=time_limit)
    return min(found, better, key=lambda plan: plan.arena_bytes or 0)

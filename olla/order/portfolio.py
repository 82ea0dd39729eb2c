"""Many cheap orders of one problem: list schedules by several rules, forwards and backwards in time."""

from __future__ import annotations

from collections.abc import Iterator

from olla.order import kernels
from olla.order.problem import Integers, Problem

__all__ = ["flattened", "list_schedules", "peak", "profile", "settled"]

_RULES = {
    "free first": kernels.FREE_FIRST,
    "least peak": kernels.LEAST_PEAK,  # LPMF of PyTorch Inductor, torch/_inductor/memory.py
    "least net": kernels.LEAST_NET,
    "depth first": kernels.DEPTH,
    "breadth first": kernels.BREADTH,
}
_NOT_SCARCE = 7 / 8  # of the peak
_SWAPS = 10_000_000  # of neighbours, at most: about a second


def list_schedules(problem: Problem) -> Iterator[tuple[str, Integers]]:
    """Orders, and how they were found: by every rule, both ways."""
    backwards = problem.reversed()
    for name, rule in _RULES.items():
        yield name, _list_schedule(problem, rule)
        yield f"{name}, backwards", _list_schedule(backwards, rule)[::-1].copy()


def peak(problem: Problem, order: Integers) -> int:
    """Bytes at the worst step of ``order``."""
    return int(profile(problem, order).max())


def profile(problem: Problem, order: Integers) -> Integers:
    """Bytes in memory at each step of ``order``."""
    creates, touches = problem.creates, problem.touches
    memory: Integers = kernels.profile(
        order, creates.start, creates.items, touches.start, touches.items, problem.sizes, problem.workspace
    )
    return memory


def flattened(problem: Problem, order: Integers) -> Integers:
    """``order``, with less in memory where that is near the peak: the fewer ops are, the easier are addresses found."""
    memory = profile(problem, order)
    result: Integers = kernels.flatten(order, memory, _scarce(memory), _SWAPS, *_described(problem))
    return result


def settled(problem: Problem, order: Integers) -> Integers:
    """``order``, closer to program order where memory is not scarce: the peak stays, and all that is near it."""
    memory = profile(problem, order)
    result: Integers = kernels.settle(order, memory, _scarce(memory), _SWAPS, problem.priority, *_described(problem))
    return result


def _scarce(memory: Integers) -> int:
    """Bytes above which memory is scarce."""
    return int(memory.max() * _NOT_SCARCE)


def _described(problem: Problem) -> tuple[Integers, ...]:
    """What the kernels that swap neighbours need to know."""
    touches, predecessors = problem.touches, problem.predecessors
    return predecessors.start, predecessors.items, touches.start, touches.items, problem.sizes, problem.workspace


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

"""Is there an order within a target? Branch and bound on precedences.

Precedences that follow from the target are propagated. If no list schedule that respects them is
within the target, the op at the peak of the best one tells what to decide next: of the pairs around
it that are not ordered, the one of which one order costs most. The cheaper order is tried first; the
other one soon contradicts itself, in most cases.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace

import numpy as np

from olla.order.portfolio import list_schedules, peak, profile
from olla.order.precedence import Precedence, TooLateError
from olla.order.problem import Adjacency, Integers, Problem

__all__ = ["Answer", "search"]


@dataclass(frozen=True, slots=True)
class Answer:
    """What a search for an order within a target found."""

    order: Integers | None  # the best order met
    peak: int
    method: str
    bound: int  # if it was proven that no order is within the target: bytes that every order needs; else 0


def search(problem: Problem, target: int, *, nodes: int, deadline: float) -> Answer:
    """Look for an order with a peak of at most ``target``, or prove that there is none.

    Gives up after that many ``nodes`` of the tree, or at ``deadline``.
    """
    touchers = problem.touchers
    best = Answer(None, sys.maxsize, "", 0)
    evidence = sys.maxsize
    open_nodes = [Precedence(problem)]
    for _ in range(nodes):
        if not open_nodes:
            return replace(best, bound=evidence)
        node = open_nodes.pop()
        try:
            contradicted = not node.propagate(target, deadline)
        except TooLateError:
            return best
        evidence = min(evidence, node.evidence)
        if contradicted:
            continue
        method, order = min(list_schedules(node.restricted()), key=lambda found: peak(problem, found[1]))
        if peak(problem, order) < best.peak:
            best = Answer(order, peak(problem, order), method, 0)
        if best.peak <= target:
            return best
        first, second = _next_pair(node, order, touchers, target)
        other = node.copy()
        other.require(second, first)
        node.require(first, second)
        open_nodes += [other, node]
    return best


def _next_pair(node: Precedence, order: Integers, touchers: Adjacency, target: int) -> tuple[int, int]:
    """Two ops that are not ordered, in the order to try first, on which what exceeds the target depends."""
    memory = profile(node.problem, order)
    place = np.argsort(order)
    steps = np.argsort(-memory, kind="stable")
    for step in steps[: np.count_nonzero(memory > target)].tolist():
        pair = node.dearest_pair(int(order[step]), place)
        if pair is not None:
            return pair
    # What exceeds the target is in memory only because two pairs are ordered as they are.
    step = int(steps[0])
    op = int(order[step])
    for storage in np.argsort(-node.problem.sizes, kind="stable").tolist():
        ops = touchers.row(storage)
        first, last = ops[np.argmin(place[ops])], ops[np.argmax(place[ops])]
        if place[first] <= step <= place[last] and not node.is_certain(storage, op):
            return (int(last), op) if node.precedes(first, op) else (op, int(first))
    raise AssertionError("more is in memory than is certain, but no decision is to blame")

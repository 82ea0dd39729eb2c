"""Large-neighbourhood search: the ops around the peak of an order are ordered anew, by the search for targets."""

from __future__ import annotations

import time

import numpy as np

from olla.order.portfolio import profile
from olla.order.problem import Integers, Problem
from olla.order.search import search
from olla.order.segments import window, with_window

__all__ = ["improved"]

_WIDTHS = (16, 32, 64)  # steps in a window; most searches among so few ops end in milliseconds
_NODES = 500


def improved(problem: Problem, order: Integers, deadline: float) -> Integers:
    """``order``, or one with a lower peak, found by ordering windows of consecutive steps around the peak anew."""
    while time.perf_counter() < deadline:
        memory = profile(problem, order)
        found = _lowered(problem, order, memory, int(np.argmax(memory)), deadline)
        if found is None:
            return order
        order = found
    return order


def _lowered(problem: Problem, order: Integers, memory: Integers, step: int, deadline: float) -> Integers | None:
    """The order with less in memory at most around ``step`` than now."""
    for width in _WIDTHS:
        for before in (width // 2, width // 4, 3 * width // 4):  # steps of the window before the highest one
            start = max(0, step - before)
            end = min(len(order), start + width)
            target = int(memory[start:end].max()) - 1
            answer = search(window(problem, order, start, end), target, nodes=_NODES, deadline=deadline)
            if answer.order is not None and answer.peak <= target:
                return with_window(order, start, end, answer.order)
    return None

"""What no order can avoid: lower bounds on the peak."""

from __future__ import annotations

import numpy as np

from olla.order.problem import Integers, Problem

__all__ = ["must_live", "must_live_bytes"]


def must_live_bytes(problem: Problem) -> int:
    """The largest :func:`must_live` of any op: no order has a lower peak."""
    return int(must_live(problem).max(initial=0))


def must_live(problem: Problem) -> Integers:
    """For each op, bytes that are in memory when it runs, whatever the order.

    A storage is alive from the first to the last op that touches it. If one of them is op ``v``
    or an ancestor of it, and one is ``v`` or a descendant, then the storage is alive while ``v``
    runs. So ``must_live(v) = workspace(v) + sum of sizes of these storages`` bounds every order's
    peak from below.
    """
    before = _reached(problem)
    after = _reached(problem.reversed())
    size_in_bytes = (len(problem.sizes) + 7) // 8
    padded = np.zeros(size_in_bytes * 8, np.int64)
    padded[: len(problem.sizes)] = problem.sizes
    result = problem.workspace.copy()
    for op in range(problem.op_count):
        packed = (before[op] & after[op]).to_bytes(size_in_bytes, "little")
        bits = np.unpackbits(np.frombuffer(packed, np.uint8), bitorder="little")
        result[op] += int(padded[bits.view(bool)].sum())
    return result


def _reached(problem: Problem) -> list[int]:
    """For each op, as a set of bits, the storages that it or an ancestor touches.

    Python integers as bit sets: one ``|`` per dependency, at memory speed.
    """
    touched = [0] * problem.op_count
    by_priority = np.argsort(problem.priority)
    pred, touch = problem.predecessors, problem.touches
    for op in by_priority.tolist():
        bits = 0
        for storage in touch.items[touch.start[op] : touch.start[op + 1]].tolist():
            bits |= 1 << storage
        for other in pred.items[pred.start[op] : pred.start[op + 1]].tolist():
            bits |= touched[other]
        touched[op] = bits
    return touched

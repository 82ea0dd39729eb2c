"""First fit: one buffer after another, each at the lowest offset that is free for its whole life."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numba import njit

from olla.place.problem import Integers, Problem

__all__ = ["first_fits"]


def first_fits(problem: Problem) -> Iterator[tuple[str, Integers]]:
    """Offsets, and how they were found: first fit in several orders, what is fixed first."""
    lifetime = problem.last - problem.first + 1
    keys = {
        "size": (problem.sizes, lifetime),
        "area": (problem.sizes * lifetime.astype(np.float64), problem.sizes),
        "lifetime": (lifetime, problem.sizes),
        "load": (problem.largest(problem.load), problem.sizes),
        "begin": (-problem.first, problem.sizes),
    }
    for name, (key, then) in keys.items():
        order = np.lexsort((-then, -key, problem.fixed < 0))
        chosen = problem.ordered(order)
        offsets = np.empty(len(order), np.int64)
        offsets[order] = _first_fit(chosen.first, chosen.last, chosen.sizes, chosen.alignment, chosen.fixed)
        yield f"first fit by {name}", offsets


@njit(cache=True)
def _first_fit(first: Integers, last: Integers, sizes: Integers, alignment: Integers, fixed: Integers) -> Integers:
    count = len(sizes)
    offsets = np.zeros(count, np.int64)
    by_offset = np.zeros(count, np.int64)  # the placed buffers, lowest first
    for b in range(count):
        at = 0
        if fixed[b] >= 0:
            at = fixed[b]
        else:
            for k in range(b):
                other = by_offset[k]
                if first[other] <= last[b] and first[b] <= last[other]:
                    if offsets[other] >= at + sizes[b]:
                        break
                    top = offsets[other] + sizes[other]
                    if top > at:
                        at = -(-top // alignment[b]) * alignment[b]
        offsets[b] = at
        k = b
        while k > 0 and offsets[by_offset[k - 1]] > at:
            by_offset[k] = by_offset[k - 1]
            k -= 1
        by_offset[k] = b
    return offsets

"""What is best kept in memory at several moments, and what must then run again between them.

One moment (``moment.py``) does not know that what it makes again must fit at later ones, too. So time is divided at the
first runs of some ops, which precede one another, and each content is made, kept or loaded in each interval:

- what runs in an interval needs contents that were there at its beginning, or are made or loaded in it;
- what is there at its end was there at its beginning, or was made or loaded in it;
- at each moment, what is there fits beside the op.

An op that must first run in one interval, because of the ops it depends on and those that depend on it, runs there;
others run in one that may be chosen. So the bound holds for every order, as that of one moment does. Where an op could
run in several intervals, each may be looked at by itself: in more and more cases, whose bounds are higher.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from olla.fit.moment import Moments
from olla.fit.program import Booleans, Floats
from olla.order.problem import Integers

__all__ = ["Joint", "jointly"]

_SMALL = 1e-3  # of a budget: what is kept for nothing
# The root of the tree is enough: a gap that need not be proven, of all that is not certain to run.
_OPTIONS = {"time_limit": 1.0, "mip_rel_gap": 1e-3, "node_limit": 1}
_INFEASIBLE = 2  # as milp says


class Joint(NamedTuple):
    """The best choice at several moments; a row for each, with contents counted as in ``program.maker``."""

    ops: Integers  # in the order in which they run
    seconds: float  # that are added, at least; inf: nothing fits
    contents: Booleans  # those in memory right after each op has run; no rows: none were found in time
    loaded: Booleans  # those that come back between this op and the next one


def jointly(moments: Moments, ops: Integers, budget: int, before: Booleans, *, integer: bool = True) -> Joint:
    """The best choice at the first runs of ``ops``, each of which must precede the next one.

    The bound holds for every order in which what is ``before`` an op, in the row of that, comes before it. Without
    ``integer`` it is lower, found sooner, and the choice is that of a linear program, rounded.
    """
    program, of_op = moments.program, moments.of_op
    number, makers, contents, count = len(ops), len(of_op), len(moments.storage), len(ops) + 1
    sizes = np.where(program.sizes <= _SMALL * budget, 0, program.sizes)[moments.storage]
    first, last = _windows(before, ops)
    spans = [(begin, end) for begin in range(1, count) for end in range(begin, count)]  # of intervals

    # Columns: what runs in each interval, is kept at each moment, is loaded; and what runs or is loaded in each span.
    long = [span for span in spans if span[0] < span[1]]
    shape = [count * makers, number * contents, number * contents, len(long) * makers, len(long) * contents]
    parts = np.split(np.arange(sum(shape)), np.cumsum(shape)[:-1])
    runs, kept = parts[0].reshape(count, makers), parts[1].reshape(number, contents)
    loads = parts[2].reshape(number, contents)
    runs_in = {span: runs[span[0]] for span in spans if span[0] == span[1]}
    runs_in |= dict(zip(long, parts[3].reshape(len(long), makers), strict=True))
    loads_in = {span: loads[span[0] - 1] for span in spans if span[0] == span[1]}
    loads_in |= dict(zip(long, parts[4].reshape(len(long), contents), strict=True))

    lowest, highest, cost = np.zeros(sum(shape)), np.ones(sum(shape)), np.zeros(sum(shape))
    cost[runs] = of_op
    can_load = np.isfinite(moments.of_load)
    cost[loads] = np.where(can_load, moments.of_load, 0.0)
    for columns in loads_in.values():
        highest[columns[~can_load]] = 0
    rows = _Rows()
    interval = np.arange(count)[:, None]
    highest[runs[(interval < first) | (moments.program.runs_once & (interval > last))]] = 0
    is_fixed = first == last
    lowest[runs[first[is_fixed], np.flatnonzero(is_fixed)]] = 1
    cost[runs[first[is_fixed], np.flatnonzero(is_fixed)]] = 0
    for op in np.flatnonzero(~is_fixed):
        rows.add(1, 1 if moments.program.runs_once[op] else np.inf, (runs[first[op] : last[op] + 1, op][None], 1))
    free = float(of_op[~is_fixed].sum())  # of first runs

    needed, made = moments.needed, program.maker[moments.needed]
    rows.add(0, np.inf, (runs[0][made], 1), (runs[0][moments.reader], -1))
    outputs = moments.outputs
    for begin, end in spans:
        running, loading, there = runs_in[begin, end], loads_in[begin, end], kept[begin - 1]
        if begin < end:
            lowest[running[(first >= begin) & (last <= end)]] = 1
            rows.add(0, np.inf, (runs[begin : end + 1].T, 1), (running, -1))
            rows.add(0, np.inf, (loads[begin - 1 : end].T, 1), (loading, -1))
        rows.add(0, np.inf, (running[made], 1), (there[needed], 1), (loading[needed], 1), (running[moments.reader], -1))
        if end == number:
            rows.add(1, np.inf, (running[program.maker[outputs]], 1), (there[outputs], 1), (loading[outputs], 1))

    left = np.zeros((number, contents), np.bool_)
    for j, op in enumerate(ops):
        left[j], is_touched = moments.left_behind(int(op))
        is_beside = ~is_touched[moments.storage]
        highest[kept[j]] = (is_beside | left[j]) & ~before[program.maker, op]
        previous = [] if j == 0 else [(kept[j - 1], 1), (loads[j - 1], 1)]
        rows.add(0, np.inf, (runs[j][program.maker], 1), *previous, (kept[j], -1))
        room = budget - int(program.workspace[op] + program.sizes[is_touched].sum())
        rows.add(-np.inf, room / max(1, budget), (kept[j][None], np.where(is_beside, sizes, 0) / max(1, budget)))
        if room < 0:
            return Joint(ops, np.inf, left[:0], left[:0])
        several = np.flatnonzero(np.diff(program.maker_start) > 1)
        for storage in several:  # one of its contents at a time
            rows.add(-np.inf, 1, (kept[j][program.maker_start[storage] : program.maker_start[storage + 1]][None], 1))
    unit = float(of_op.sum())
    found = milp(
        cost / unit,
        integrality=np.full(len(cost), int(integer)),
        bounds=Bounds(lowest, highest),
        constraints=rows.constraint(len(cost)),
        options=_OPTIONS.copy(),  # milp takes some out
    )
    if found.status == _INFEASIBLE:
        return Joint(ops, np.inf, left[:0], left[:0])
    bound = found.mip_dual_bound if integer else found.fun
    seconds = 0.0 if bound is None or not np.isfinite(bound) else max(0.0, bound * unit - free)
    if found.x is None:
        return Joint(ops, seconds, left[:0], left[:0])
    chosen = found.x > 1 / 2
    return Joint(ops, seconds, chosen[kept] | left, chosen[loads])


def _windows(before: Booleans, ops: Integers) -> tuple[Integers, Integers]:
    """The first and the last interval in which each op may run for the first time."""
    is_after = before[:, ops]
    must_precede = before[ops].T
    must_precede[ops, np.arange(len(ops))] = True
    return is_after.sum(axis=1), len(ops) - must_precede.sum(axis=1)


class _Rows:
    """Rows of a program, added by families."""

    def __init__(self) -> None:
        self._entries: list[tuple[Integers, Integers, Floats]] = []
        self._low: list[Floats] = []
        self._high: list[Floats] = []
        self._count = 0

    def add(self, low: float, high: float, *terms: tuple[Integers, npt.ArrayLike]) -> None:
        """Rows ``low <= sum <= high``; terms have a column for each row, or an array of them, and values."""
        length = len(terms[0][0])
        if length == 0:
            return
        for columns, values in terms:
            wide = columns.reshape(length, -1)
            row = np.repeat(np.arange(length) + self._count, wide.shape[1])
            self._entries.append((row, wide.ravel(), np.broadcast_to(values, wide.shape).ravel().astype(float)))
        self._low.append(np.full(length, float(low)))
        self._high.append(np.full(length, float(high)))
        self._count += length

    def constraint(self, columns: int) -> LinearConstraint:
        """All of them."""
        row, column, value = (np.concatenate(part) for part in zip(*self._entries, strict=True))
        matrix = csr_array((value, (row, column)), (self._count, columns))
        return LinearConstraint(matrix, np.concatenate(self._low), np.concatenate(self._high))

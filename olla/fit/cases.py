"""Cases, by where moments come among one another: their bounds are higher than one that holds for every order.

Much of what an order may do is not fixed by what depends on what: the gradient of a large weight may be computed at
once, or late. If neither fits beside what is best kept otherwise, a bound for both tells it only once they are told
apart. So the case with the lowest bound is divided: of its moments, and one more, at which what is kept by then needs
too much, all orders are looked at (``joint.py``), each for itself. The lowest bound of all cases holds for every order.
That moment is one at which most is in memory, or one that raises the bound at once: which ones do is not seen from the
bytes, but quickly tried out by linear programs, as in the *strong branching* of integer programming. Of the cases that
come of it, the one whose bound is the lowest is then solved in integers, which tells more, but takes longer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count, pairwise
from typing import NamedTuple

import numpy as np

from olla.fit.joint import Joint, jointly
from olla.fit.moment import Kept, Moments
from olla.fit.program import Booleans, completed, simulated
from olla.order.problem import Integers

__all__ = ["Cases"]

_AT_A_TIME = 2  # programs
_LOOKED_AT = 12  # linear ones
_HINT = 4e-4  # of all seconds: what another moment than the fullest one must raise these by


class _Case(NamedTuple):
    """Sequences that run some ops in one order, and what is best kept in these."""

    bound: float  # seconds that any of them adds, at least
    number: int  # to tell cases with equal bounds apart
    joint: Joint
    before: Booleans  # what comes before each op, a row for each
    is_relaxed: bool


class Cases:
    """All sequences within a budget, at first together; ``moment`` is the dearest one, ``orders`` what was found."""

    def __init__(self, moments: Moments, orders: Sequence[Integers], budget_bytes: int, moment: Kept) -> None:
        self._moments, self._orders, self._budget = moments, orders, budget_bytes
        joint = Joint(np.array([moment.op]), moment.seconds, moment.contents[None], moment.loaded[None])
        self._cases = [_Case(joint.seconds, 0, joint, moments.before, is_relaxed=False)]
        self._numbers = count(1)

    @property
    def bound(self) -> float:
        """Seconds that every sequence adds, at least."""
        return self._lowest.bound

    @property
    def _lowest(self) -> _Case:
        return min(self._cases)

    def refine(self) -> bool:
        """Look closer at the case with the lowest bound; False: what it keeps, if it was found, fits."""
        if self._lowest.is_relaxed:
            self._tighten()
            return True
        ops = self._exceeding()
        if ops:
            self._divide(ops)
        return bool(ops)

    def _tighten(self) -> None:
        """Have the relaxed cases with the lowest bounds solved in integers."""
        relaxed = sorted(case for case in self._cases if case.is_relaxed)[:_AT_A_TIME]
        joints = self._joints([(case.joint.ops, case.before) for case in relaxed])
        for case, joint in zip(relaxed, joints, strict=True):
            known = joint if len(joint.contents) else case.joint
            self._cases.remove(case)
            self._cases.append(_Case(max(case.bound, joint.seconds), case.number, known, case.before, is_relaxed=False))

    def _divide(self, ops: list[int]) -> None:
        """Divide the case with the lowest bound by one more moment, the first run of one of ``ops``."""
        case = self._lowest
        programs = np.cumsum([len(range(*_places(op, case.joint.ops, case.before))) for op in ops])
        looked_at = ops[: max(1, int(np.searchsorted(programs, _LOOKED_AT, side="right")))]
        parts = [(op, *part) for op in looked_at for part in _inserted(op, case.joint.ops, case.before)]
        found = {op: list[_Case]() for op in looked_at}
        for (op, _, before), joint in zip(
            parts, self._joints([part[1:] for part in parts], integer=False), strict=True
        ):
            found[op].append(_Case(max(case.bound, joint.seconds), next(self._numbers), joint, before, is_relaxed=True))
        bounds = {op: min(part.joint.seconds for part in division) for op, division in found.items()}
        promising = max(looked_at, key=bounds.__getitem__)
        is_hint = bounds[promising] - min(bounds.values()) > _HINT * float(self._moments.of_op.sum())
        self._cases.remove(case)
        self._cases += found[promising if is_hint else ops[0]]

    def _joints(self, parts: Sequence[tuple[Integers, Booleans]], *, integer: bool = True) -> Iterator[Joint]:
        """What is best kept at some ops, for each relation of what is before what."""
        with ThreadPoolExecutor(_AT_A_TIME) as solvers:
            yield from solvers.map(lambda p: jointly(self._moments, p[0], self._budget, p[1], integer=integer), parts)

    def sequences(self, *, spare: bool = True) -> Iterator[Integers]:
        """The orders, in the case with the lowest bound, in which what it does not keep is made again; none if relaxed.

        With ``spare``, not what it leaves open: see :meth:`Moments.unrolled`.
        """
        _, _, joint, before, is_relaxed = self._lowest
        for order in self._orders if len(joint.contents) and not is_relaxed else ():
            sequence = self._moments.unrolled(
                _obeying(order, before), joint.ops, joint.contents, joint.loaded, before if spare else None
            )
            if len(sequence):
                yield sequence

    def _exceeding(self) -> list[int]:
        """Ops whose first runs exceed the budget, and those right before and after, in these sequences; most first."""
        program, excess = self._moments.program, np.zeros(self._moments.program.loads, np.int64)
        for sequence in self.sequences(spare=False):  # since that is what exceeds it
            whole, _ = completed(program, sequence)
            first = np.sort(np.unique(whole, return_index=True)[1])
            first = first[whole[first] < program.loads]
            live = simulated(program, whole)[1][first]
            is_peak = (live >= np.append(live[1:], 0)) & (live > np.append(0, live[:-1]))
            np.maximum.at(excess, whole[first], np.where(is_peak, live - self._budget, 0))
        excess[[*self._lowest.joint.ops, *program.late]] = 0
        return [int(op) for op in np.argsort(-excess, kind="stable") if excess[op] > 0]


def _inserted(op: int, ops: Integers, before: Booleans) -> Iterator[tuple[Integers, Booleans]]:
    """Wherever ``op`` may come among ``ops``: all of them in order, and what is before each op then."""
    for place in range(*_places(op, ops, before)):
        chain, relation = np.insert(ops, place, op), before.copy()
        for one, other in pairwise(chain[max(0, place - 1) : place + 2]):
            earlier = np.append(np.flatnonzero(relation[one]), one)
            later = np.append(np.flatnonzero(relation[:, other]), other)
            relation[np.ix_(later, earlier)] = True
        yield chain, relation


def _places(op: int, ops: Integers, before: Booleans) -> tuple[int, int]:
    """Where ``op`` may come among ``ops``: the first place, and that after the last one."""
    return int(before[op, ops].sum()), len(ops) - int(before[ops, op].sum()) + 1


def _obeying(order: Integers, before: Booleans) -> Integers:
    """The order in which each op waits for all that are ``before`` it."""
    place = np.full(len(before), -1)
    place[order] = np.arange(len(order))
    latest = np.max(np.where(before[order], place, -1), axis=1)
    return order[np.lexsort((before[order].sum(axis=1), np.maximum(latest, place[order])))]

"""What an order within a target must look like: precedences that follow from the target itself.

If running ``u`` before ``v`` would keep more than the target in memory at ``u`` or at ``v``, then
``v`` comes first in every order within the target. Such pairs make others follow, and so on. Either
this contradicts itself, and no order is within the target: a lower bound. Or it ends with fewer
orders to choose among, and a list schedule that respects them is more likely to be within it.

A thousand ops take a few hundred kilobytes, so that a copy is cheap; and what a new pair cannot have
changed is not looked at again.
"""

from __future__ import annotations

import time
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit

from olla.order.bits import Bits, ancestors, has, padded, touched, weight, weights
from olla.order.problem import Integers, Problem

__all__ = ["Precedence", "TooLateError"]

Flags = npt.NDArray[np.bool_]

_SOME = 256  # ops looked at between two looks at the clock
_NEVER = 2**62
_SETTLED, _UNFINISHED, _CONTRADICTED = range(3)


class TooLateError(Exception):
    """The deadline passed before propagation had ended."""


class _Relation(NamedTuple):
    """The arrays that the compiled loops work on; one row per op."""

    before: Bits  # ops that are this op or run before it
    after: Bits  # ops that are this op or run after it
    made: Bits  # storages that an op in `before` touches
    wanted: Bits  # storages that an op in `after` touches: alive while this op runs if also made
    alive: Integers  # bytes of the storages that are both, and workspace: what is certain to be in memory
    changed: Flags  # ops to look at (again)
    newly_made: Bits  # and what changed for them
    newly_wanted: Bits
    sizes: Integers  # bytes of each storage, padded to whole words


class Precedence:
    """A partial order of the ops of ``problem``, which grows.

    Attributes
    ----------
    pairs
        The precedences ``(u, v)``, ``u`` before ``v``, that were added to those of the problem;
        not those that follow by transitivity.
    evidence
        The smallest number of bytes that a conclusion rests on: with any target below it,
        :meth:`propagate` concludes the same.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.pairs: list[tuple[int, int]] = []
        self.evidence = _NEVER
        backwards = problem.reversed()
        made, wanted, sizes = touched(problem), touched(backwards), padded(problem.sizes)
        self._relation = _Relation(
            before=ancestors(problem),
            after=ancestors(backwards),
            made=made,
            wanted=wanted,
            alive=weights(made & wanted, sizes) + problem.workspace,
            changed=np.ones(problem.op_count, np.bool_),
            newly_made=made.copy(),
            newly_wanted=wanted.copy(),
            sizes=sizes,
        )

    def copy(self) -> Precedence:
        """An independent copy."""
        twin = object.__new__(Precedence)
        twin.problem, twin.pairs, twin.evidence = self.problem, self.pairs.copy(), self.evidence
        arrays = self._relation
        twin._relation = arrays._replace(**{n: a.copy() for n, a in arrays._asdict().items() if n != "sizes"})
        return twin

    @property
    def alive(self) -> Integers:
        """For each op, bytes that are in memory while it runs, in every order that respects the pairs."""
        return self._relation.alive

    def precedes(self, u: int, v: int) -> bool:
        """Whether ``u`` is ``v`` or runs before it."""
        return bool(has(self._relation.before, v, u))

    def is_certain(self, storage: int, op: int) -> bool:
        """Whether ``storage`` is in memory while ``op`` runs, in every order that respects the pairs."""
        return bool(has(self._relation.made, op, storage) and has(self._relation.wanted, op, storage))

    def require(self, u: int, v: int) -> bool:
        """Add ``u`` before ``v`` and what follows by transitivity; False if ``v`` is ``u`` or before it."""
        self.pairs.append((u, v))
        return bool(_require(self._relation, u, v))

    def propagate(self, target: int, deadline: float) -> bool:
        """Add all pairs that follow from a peak of at most ``target`` bytes; False if no order has it.

        Raises
        ------
        TooLateError
            At ``deadline``, a time of ``time.perf_counter()``.
        """
        while True:
            if time.perf_counter() > deadline:
                raise TooLateError
            state, evidence, pairs = _propagate(self._relation, target, _SOME)
            self.evidence = min(self.evidence, evidence)
            self.pairs.extend(pairs)
            if state != _UNFINISHED:
                return bool(state == _SETTLED)

    def dearest_pair(self, op: int, place: Integers) -> tuple[int, int] | None:
        """The pair around ``op``, not yet ordered, of which one order costs most: the other order of it.

        Only pairs are looked at whose order in an actual schedule, given by the ``place`` of each
        op, adds to what is in memory while ``op`` runs. None if there is no such pair.
        """
        first, second = _dearest_pair(self._relation, op, place)
        return None if first < 0 else (first, second)

    def restricted(self) -> Problem:
        """The problem of ordering the ops within these precedences."""
        return self.problem.with_pairs(self.pairs)


@njit(cache=True, nogil=True)
def _require(relation: _Relation, u: int, v: int) -> bool:
    before, after, made, wanted = relation.before, relation.after, relation.made, relation.wanted
    if has(before, u, v):
        return False
    if has(before, v, u):
        return True
    for op in range(len(before)):
        if has(after, v, op) and not has(before, op, u):
            for word in range(before.shape[1]):
                before[op, word] |= before[u, word]
            for word in range(made.shape[1]):
                new = made[u, word] & ~made[op, word]
                if new:
                    made[op, word] |= new
                    relation.newly_made[op, word] |= new
                    relation.alive[op] += weight(new & wanted[op, word], word, relation.sizes)
                    relation.changed[op] = True
    for op in range(len(before)):
        if has(before, u, op) and not has(after, op, v):
            for word in range(after.shape[1]):
                after[op, word] |= after[v, word]
            for word in range(wanted.shape[1]):
                new = wanted[v, word] & ~wanted[op, word]
                if new:
                    wanted[op, word] |= new
                    relation.newly_wanted[op, word] |= new
                    relation.alive[op] += weight(new & made[op, word], word, relation.sizes)
                    relation.changed[op] = True
    return True


@njit(cache=True, nogil=True)
def _cost(relation: _Relation, u: int, v: int) -> int:
    """Bytes in memory at ``u`` or at ``v``, whichever is more, if ``u`` runs before ``v``.

    Beside what is alive anyway, alive at ``v`` is then what is made at ``u`` and wanted at ``v``;
    and the same at ``u``.
    """
    return max(_with_earlier(relation, u, v), _with_later(relation, u, v))


@njit(cache=True, nogil=True)
def _with_earlier(relation: _Relation, u: int, v: int) -> int:
    """Bytes in memory at ``v`` if ``u`` runs before it."""
    made, wanted = relation.made, relation.wanted
    total: int = relation.alive[v]
    for word in range(made.shape[1]):
        new = made[u, word] & wanted[v, word] & ~made[v, word]
        if new:
            total += weight(new, word, relation.sizes)
    return total


@njit(cache=True, nogil=True)
def _with_later(relation: _Relation, u: int, v: int) -> int:
    """Bytes in memory at ``u`` if it runs before ``v``."""
    made, wanted = relation.made, relation.wanted
    total: int = relation.alive[u]
    for word in range(made.shape[1]):
        new = made[u, word] & wanted[v, word] & ~wanted[u, word]
        if new:
            total += weight(new, word, relation.sizes)
    return total


@njit(cache=True, nogil=True)
def _propagate(relation: _Relation, target: int, steps: int) -> tuple[int, int, list[tuple[int, int]]]:
    """Look at up to ``steps`` changed ops: the state then, the evidence, and the pairs that followed."""
    before, after, made, wanted = relation.before, relation.after, relation.made, relation.wanted
    ops, words = made.shape
    evidence = _NEVER
    pairs = [(0, 0) for _ in range(0)]
    v = -1
    for _ in range(steps):
        for _ in range(ops):
            v = (v + 1) % ops
            if relation.changed[v]:
                break
        if not relation.changed[v]:
            return _SETTLED, evidence, pairs
        if relation.alive[v] > target:
            return _CONTRADICTED, min(evidence, relation.alive[v]), pairs
        newly_made, newly_wanted = relation.newly_made[v].copy(), relation.newly_wanted[v].copy()
        relation.newly_made[v] = 0
        relation.newly_wanted[v] = 0
        relation.changed[v] = False
        more_alive = False
        for word in range(words):
            if newly_made[word] & wanted[v, word] or newly_wanted[word] & made[v, word]:
                more_alive = True
                break
        for u in range(ops):
            if has(before, v, u) or has(after, v, u):
                continue
            affected = more_alive
            if not affected:
                for word in range(words):
                    if newly_made[word] & wanted[u, word] or newly_wanted[word] & made[u, word]:
                        affected = True
                        break
            if not affected:
                continue
            u_first, v_first = _cost(relation, u, v), _cost(relation, v, u)
            if u_first <= target and v_first <= target:
                continue
            if u_first > target and v_first > target:
                return _CONTRADICTED, min(evidence, min(u_first, v_first)), pairs
            evidence = min(evidence, max(u_first, v_first))
            first, second = (v, u) if u_first > target else (u, v)
            pairs.append((first, second))
            _require(relation, first, second)  # they are not ordered, so this is no contradiction
    return _UNFINISHED, evidence, pairs


@njit(cache=True, nogil=True)
def _dearest_pair(relation: _Relation, op: int, place: Integers) -> tuple[int, int]:
    dearest, first, second = -1, -1, -1
    for other in range(len(place)):
        if has(relation.before, op, other) or has(relation.after, op, other):
            continue
        now = _with_earlier(relation, other, op) if place[other] < place[op] else _with_later(relation, op, other)
        if now <= relation.alive[op]:
            continue
        other_first, op_first = _cost(relation, other, op), _cost(relation, op, other)
        if max(other_first, op_first) > dearest:
            dearest = max(other_first, op_first)
            first, second = (op, other) if other_first > op_first else (other, op)
    return first, second

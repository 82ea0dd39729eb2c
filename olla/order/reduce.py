"""A smaller problem with the same optimum: ops that some best order runs without a break become one.

An op may follow its only direct predecessor at once if that never costs anything: it frees at least
what it allocates, and its own peak is covered by that of the predecessor. The same holds with time
reversed. Activations, views of gradients and updates go this way; as a rule, a third of the ops or less is left.

The argument, for ``b`` after ``a``. Let every op that must run before ``b`` be ``a`` or run before
``a``. Take any order, and move ``b`` from where it is to right behind ``a``. At the ops that it
passes, what ``b`` allocates is there longer and what it frees is there no more: not more in all. At
``b`` itself there is at most what was there with ``a``, less what ``a`` frees, plus what ``b``
allocates. At ``a`` nothing changes. So the peak does not rise.
"""

from __future__ import annotations

import heapq
import time
from dataclasses import dataclass

import numpy as np
from numba import njit

from olla.order.bits import Bits, ancestors, has
from olla.order.problem import Adjacency, Integers, Problem

__all__ = ["Reduced"]

_LARGEST = 60_000  # ops; above, the sets of ancestors would need gigabytes


@dataclass(frozen=True, slots=True)
class Reduced:
    """A problem whose ops are runs of ops of another problem."""

    problem: Problem
    runs: Adjacency  # op -> ops of the other problem, in the order in which they run

    @classmethod
    def of(cls, problem: Problem) -> Reduced:
        """Every op a run of its own."""
        return cls(problem, Adjacency.of([op] for op in range(problem.op_count)))

    def merged(self, deadline: float = float("inf")) -> Reduced:
        """Merge runs, forwards and backwards in turn, as long as some can be merged and time is left."""
        reduced, unchanged, backwards = self, 0, False
        while self.problem.op_count <= _LARGEST and unchanged < 2 and time.perf_counter() < deadline:
            smaller = reduced._merged(backwards=backwards)
            unchanged = unchanged + 1 if smaller.problem.op_count == reduced.problem.op_count else 0
            reduced, backwards = smaller, not backwards
        return reduced

    def expanded(self, order: Integers) -> Integers:
        """The ops of the other problem, as they run if the runs have this order."""
        return np.concatenate([self.runs.row(op) for op in order.tolist()])

    def _merged(self, *, backwards: bool) -> Reduced:
        problem = self.problem.reversed() if backwards else self.problem
        leader, allocated = _leaders(
            problem.predecessors.start,
            problem.predecessors.items,
            problem.touches.start,
            problem.touches.items,
            problem.touchers.start,
            problem.touchers.items,
            problem.sizes,
            problem.workspace,
            ancestors(problem),
        )
        head = np.arange(problem.op_count)
        workspace = problem.workspace.copy()
        for op in np.argsort(problem.priority).tolist():
            if leader[op] >= 0:
                head[op] = head[leader[op]]
                # The run will touch all that its ops touch, but this is not yet there at its peak.
                workspace[head[op]] -= allocated[op]
        return self._contracted(head, workspace)

    def _contracted(self, head: Integers, workspace: Integers) -> Reduced:
        """One op for all ops with the same head, with the head's workspace."""
        old = self.problem
        heads, run = np.unique(head, return_inverse=True)
        workspace = workspace[heads]
        pairs = np.unique(np.stack([run[old.predecessors.items], run[old.predecessors.owners]]), axis=1)
        earlier, later = pairs[:, pairs[0] != pairs[1]]
        sizes: dict[tuple[int, ...], int] = {}  # by the ops that touch a storage: alike ones become one
        creator: dict[tuple[int, ...], int] = {}
        run_of_creator = Adjacency.grouped(old.creates.items, run[old.creates.owners], len(old.sizes)).items
        touchers = old.touchers
        for storage, size in enumerate(old.sizes.tolist()):
            key = tuple(sorted(set(run[touchers.row(storage)].tolist())))
            if len(key) == 1:
                workspace[key[0]] += size
            elif size:
                sizes[key] = sizes.get(key, 0) + size
                creator[key] = run_of_creator[storage]
        predecessors = Adjacency.grouped(later, earlier, len(heads))
        successors = Adjacency.grouped(earlier, later, len(heads))
        problem = Problem(
            predecessors=predecessors,
            successors=successors,
            creates=Adjacency.grouped(np.array([*creator.values()], np.int64), np.arange(len(sizes)), len(heads)),
            touches=Adjacency.of(sizes).transpose(len(heads)),
            sizes=np.array([*sizes.values()], np.int64),
            workspace=workspace,
            priority=_legal_places(predecessors, successors, old.priority[heads]),
        )
        members = Adjacency.grouped(run[np.argsort(old.priority)], np.argsort(old.priority), len(heads))
        runs = Adjacency.of(
            [op for member in members.row(i).tolist() for op in self.runs.row(member).tolist()]
            for i in range(len(heads))
        )
        return Reduced(problem, runs)


def _legal_places(predecessors: Adjacency, successors: Adjacency, preferred: Integers) -> Integers:
    """The place of each op in the legal order that is closest to the preferred one."""
    waiting = np.diff(predecessors.start)
    ready = [(preferred[op], op) for op in np.nonzero(waiting == 0)[0].tolist()]
    heapq.heapify(ready)
    place = np.zeros(len(waiting), np.int64)
    for step in range(len(waiting)):
        _, op = heapq.heappop(ready)
        place[op] = step
        for other in successors.row(op).tolist():
            waiting[other] -= 1
            if not waiting[other]:
                heapq.heappush(ready, (preferred[other], other))
    return place


@njit(cache=True, nogil=True)
def _leaders(
    pred_start: Integers,
    pred: Integers,
    touch_start: Integers,
    touch: Integers,
    toucher_start: Integers,
    toucher: Integers,
    sizes: Integers,
    workspace: Integers,
    before: Bits,
) -> tuple[Integers, Integers]:
    """The op that each op can follow at once, or -1; and the bytes that each op allocates."""
    count = len(workspace)
    allocated = np.zeros(count, np.int64)  # of storages that no other op before it can touch
    freed = np.zeros(count, np.int64)  # of storages that no other op after it can touch
    only = np.zeros(count, np.int64)  # of both: they live with this op alone
    sure = np.ones(count, np.bool_)  # whether all other storages are there before the op, whatever the order
    for op in range(count):
        for k in range(touch_start[op], touch_start[op + 1]):
            storage = touch[k]
            is_first, is_last, is_there = True, True, False
            for j in range(toucher_start[storage], toucher_start[storage + 1]):
                other = toucher[j]
                is_first &= has(before, other, op)
                is_last &= has(before, op, other)
                is_there |= other != op and has(before, op, other)
            allocated[op] += sizes[storage] if is_first else 0
            freed[op] += sizes[storage] if is_last else 0
            only[op] += sizes[storage] if is_first and is_last else 0
            sure[op] &= is_first or is_there
    leader = np.full(count, -1, np.int64)
    for op in range(count):
        if not sure[op] or allocated[op] - only[op] > freed[op] - only[op]:
            continue
        for k in range(pred_start[op], pred_start[op + 1]):
            last = pred[k]
            if allocated[op] + workspace[op] > workspace[last] + freed[last]:
                continue
            is_only = True
            for j in range(pred_start[op], pred_start[op + 1]):
                is_only &= has(before, last, pred[j])
            if is_only:
                leader[op] = last
                break
    return leader, allocated

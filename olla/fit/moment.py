"""What is best kept in memory when an op runs, and what must then run again, whatever the rest of the order is.

When an op runs for the first time, all that it depends on has run, and nothing that depends on it has. So what those
need that come later, and is older, must be in memory at that moment, or be made again afterwards, from what is in
memory, or come back from where it was spilled to. What to keep is a small integer program: contents with their bytes
must fit beside the op, and what runs again is to take the least time. Its bound holds for every sequence within the
budget, in whatever order, and its solution is where the planner starts from.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from olla.fit.program import CREATES, LOADS, READS, Booleans, Floats, Program
from olla.fit.repair import unrolled
from olla.order.problem import Integers

__all__ = ["Kept", "Moments"]

# A gap in seconds that need not be proven, of all that are added.
_OPTIONS = {"time_limit": 5.0, "mip_rel_gap": 1e-3}
_INFEASIBLE = 2  # as milp says


class Kept(NamedTuple):
    """The best choice at one moment; contents are counted as in ``program.maker``."""

    op: int
    seconds: float  # that are added, at least; inf: nothing fits
    contents: Booleans  # those in memory right after the op has run
    loaded: Booleans  # those that come back from where they were spilled to


class Moments:
    """The moments of a program whose ops, and then its loads, take ``seconds``; a load may take infinitely long."""

    def __init__(self, program: Program, seconds: Floats) -> None:
        self.program, self._count = program, program.loads
        self.of_op, self.of_load = seconds[: self._count], seconds[self._count :]
        self.storage = np.repeat(np.arange(len(program.sizes)), np.diff(program.maker_start))  # of each content
        owner = np.repeat(np.arange(len(program.start) - 1), np.diff(program.start))
        is_made = np.diff(program.maker_start)[program.storage] > 0
        needs = is_made & (program.kind != CREATES) & (program.kind != LOADS)
        self.reader = owner[needs]
        self.needed = (program.maker_start[program.storage] + program.version - 1)[needs]  # a content, by its reader
        first, end = program.maker_start[program.outputs], program.maker_start[program.outputs + 1]
        self.outputs = end[first < end] - 1  # contents that the caller wants
        self.before = self._precedence()
        early = np.setdiff1d(np.arange(self._count), program.late)
        self.turns: Booleans = np.any(self.before[early], axis=0)  # of each op: whether early ops depend on it

    def dearest(self, ops: Integers, budget: int) -> Kept:
        """The best choice at that one of ``ops`` whose moment costs most, as linear programs judge."""
        seconds = [self._solved(int(op), budget, integer=False).seconds for op in ops]
        return self.at(int(ops[np.argmax(seconds)]), budget)

    def at(self, op: int, budget: int) -> Kept:
        """The best choice when ``op`` runs."""
        return self._solved(op, budget, integer=True)

    def _solved(self, op: int, budget: int, *, integer: bool) -> Kept:
        """Three variables for each content: its maker runs again, it is kept, it is loaded."""
        program, count = self.program, len(self.storage)
        before, after = self.before[op], self.before[:, op]
        there, is_touched = self.left_behind(op)
        room = budget - int(program.workspace[op] + program.sizes[is_touched].sum())

        again = ~after & ~(before & program.runs_once)
        again[op] = False
        upper = np.concatenate([again, ~is_touched[self.storage], np.isfinite(self.of_load)]).astype(float)
        cost = np.concatenate([np.where(before, self.of_op, 0.0), np.zeros(count), self.of_load])
        cost[~np.isfinite(cost)] = 0.0
        unit = float(self.of_op.sum())

        # What is wanted after the op, or by what runs again, is made, kept or loaded.
        wanted = np.flatnonzero(self._wanted(after) & ~there)
        may_want = ~there[self.needed] & ~after[self.reader] & (self.reader != op)
        contents = np.concatenate([wanted, self.needed[may_want]])
        rows = np.arange(len(contents))
        kept, loaded = self._count + np.arange(count), self._count + count + np.arange(count)
        # A storage keeps one of its contents; all together fit beside the op.
        entries: list[tuple[Integers, Integers, npt.ArrayLike]] = [
            (rows, program.maker[contents], 1.0),
            (rows, kept[contents], 1.0),
            (rows, loaded[contents], 1.0),
            (rows[len(wanted) :], self.reader[may_want], -1.0),
            (len(rows) + self.storage, kept, 1.0),
            (np.full(count, len(rows) + len(program.sizes)), kept, program.sizes[self.storage] / max(1, budget)),
        ]
        row = np.concatenate([entry[0] for entry in entries])
        column = np.concatenate([entry[1] for entry in entries])
        value = np.concatenate([np.broadcast_to(entry[2], len(entry[0])) for entry in entries])
        free = np.full(len(program.sizes) + 1, -np.inf)
        lowest = np.concatenate([rows < len(wanted), free])
        highest = np.concatenate([np.full(len(rows), np.inf), np.ones(len(program.sizes)), [room / max(1, budget)]])
        found = milp(
            cost / unit,
            integrality=np.full(len(cost), int(integer)),
            bounds=Bounds(0.0, upper),
            constraints=LinearConstraint(csr_array((value, (row, column)), (len(lowest), len(cost))), lowest, highest),
            options=_OPTIONS,
        )
        if room < 0 or found.status == _INFEASIBLE:
            return Kept(op, np.inf, there, there)
        bound = found.mip_dual_bound if integer else found.fun
        seconds = 0.0 if bound is None or not np.isfinite(bound) else max(0.0, bound * unit)
        if found.x is None:
            return Kept(op, seconds, there, np.zeros(count, np.bool_))
        chosen = found.x > 1 / 2
        return Kept(op, seconds, there | chosen[kept], chosen[loaded])

    def left_behind(self, op: int) -> tuple[Booleans, Booleans]:
        """Contents that are in memory once the op has run, of the storages that it touches; and these."""
        program = self.program
        there, is_touched = np.zeros(len(self.storage), np.bool_), np.zeros(len(program.sizes), np.bool_)
        for k in range(program.start[op], program.start[op + 1]):
            storage = program.storage[k]
            is_touched[storage] = True
            if program.maker_start[storage] < program.maker_start[storage + 1]:
                there[program.maker_start[storage] + program.version[k] - (program.kind[k] == READS)] = True
        return there, is_touched

    def unrolled(
        self, order: Integers, ops: Integers, contents: Booleans, loaded: Booleans, before: Booleans | None = None
    ) -> Integers:
        """The order in which what is not among the ``contents`` at each of ``ops`` is made again when it is needed.

        What is best kept leaves out what is needed by ops that may have run already, if they need not come later. Given
        what comes ``before`` each op, that is kept for those of them that come later in this order. Empty: what to keep
        cannot be kept together.
        """
        place = np.full(self._count, len(order))
        place[order] = np.arange(len(order))
        kept = contents.copy()
        if before is not None:
            waits = (place[:, None] > place[ops]) & ~before[:, ops]
            for row, is_waiting in zip(kept, waits.T, strict=True):
                row[self.needed[is_waiting[self.reader]]] = True
        return unrolled(self.program, order, place[ops], kept, loaded)

    def _wanted(self, after: Booleans) -> Booleans:
        """Contents that ops in ``after`` or the caller need, and others make."""
        program = self.program
        wanted = np.zeros(len(self.storage), np.bool_)
        wanted[self.needed[after[self.reader]]] = True
        wanted[self.outputs] = True
        return wanted & ~after[program.maker]

    def _precedence(self) -> Booleans:
        """For each op, those that must have run before its first run."""
        program, found = self.program, np.zeros((self._count, self._count), np.bool_)
        writer = np.full(len(program.sizes), -1)  # of persistent storages, and who reads what it wrote
        readers: dict[int, list[int]] = {}
        for op in range(self._count):
            direct = set()
            for k in range(program.start[op], program.start[op + 1]):
                storage, kind = int(program.storage[k]), program.kind[k]
                if program.maker_start[storage] < program.maker_start[storage + 1]:
                    if kind != CREATES:
                        direct.add(int(program.maker[program.maker_start[storage] + program.version[k] - 1]))
                    continue
                direct.add(int(writer[storage]))
                if kind == READS:
                    readers.setdefault(storage, []).append(op)
                else:
                    direct.update(readers.pop(storage, ()))
                    writer[storage] = op
            for other in direct - {-1, op}:
                found[op] |= found[other]
                found[op, other] = True
        return found

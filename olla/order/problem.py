"""A graph as flat arrays, the form that the compiled planners work on.

Two simplifications make every planner simple. Persistent storages are left out: they are there
whatever the order. And a last op is added that touches all outputs, so that "lives until the end"
needs no rule of its own: a storage is alive from the first to the last op that touches it. That
definition does not change when time runs backwards, so any scheduler also works on the reversed
problem, and often finds a better order there.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from olla.graph.graph import Graph

__all__ = ["Adjacency", "Integers", "Problem"]

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Adjacency:
    """Lists of integers, one per row, end to end: row ``i`` is ``items[start[i]:start[i + 1]]``."""

    start: Integers
    items: Integers

    @classmethod
    def of(cls, rows: Iterable[Sequence[int]]) -> Adjacency:
        """Pack ``rows``."""
        lists = list(rows)
        start = np.zeros(len(lists) + 1, np.int64)
        np.cumsum([len(row) for row in lists], out=start[1:])
        items = np.fromiter((item for row in lists for item in row), np.int64, count=int(start[-1]))
        return cls(start, items)

    @classmethod
    def grouped(cls, rows: Integers, items: Integers, count: int) -> Adjacency:
        """Put each item into its row, of ``count`` rows; within a row, items keep their order."""
        start = np.zeros(count + 1, np.int64)
        np.cumsum(np.bincount(rows, minlength=count), out=start[1:])
        return cls(start, items[np.argsort(rows, kind="stable")])

    @property
    def owners(self) -> Integers:
        """The row of each item."""
        return np.repeat(np.arange(len(self.start) - 1), np.diff(self.start))

    def row(self, index: int) -> Integers:
        """The items of one row."""
        return self.items[self.start[index] : self.start[index + 1]]

    def transpose(self, rows: int) -> Adjacency:
        """The reverse relation: which rows hold item ``i``, for ``i < rows``; each in rising order."""
        return Adjacency.grouped(self.items, self.owners, rows)


@dataclass(frozen=True, slots=True)
class Problem:
    """Ops ``0 .. n-1`` of a graph and the added last op ``n``; storages that are not persistent."""

    predecessors: Adjacency
    successors: Adjacency
    creates: Adjacency  # op -> storages whose life it starts
    touches: Adjacency  # op -> all storages that must be in memory with it
    sizes: Integers  # bytes of each storage
    workspace: Integers  # bytes of each op
    priority: Integers  # position in program order, for ties: smaller first

    @classmethod
    def of(cls, graph: Graph) -> Problem:
        """The problem of ordering ``graph``."""
        sizes = [storage.size for storage in graph.storages if not storage.persistent]
        ids = [i for i, storage in enumerate(graph.storages) if not storage.persistent]
        compact = {storage: position for position, storage in enumerate(ids)}

        def kept(storages: Sequence[int]) -> list[int]:
            return [compact[s] for s in storages if s in compact]

        ends = [op for op, after in enumerate(graph.successors) if not after]
        predecessors = Adjacency.of([*graph.predecessors, ends])
        return cls(
            predecessors=predecessors,
            successors=predecessors.transpose(len(graph.ops) + 1),
            creates=Adjacency.of([*(kept(op.creates) for op in graph.ops), []]),
            touches=Adjacency.of([*(kept(op.touches) for op in graph.ops), kept(sorted(set(graph.outputs)))]),
            sizes=np.array(sizes, np.int64),
            workspace=np.array([*(op.workspace for op in graph.ops), 0], np.int64),
            priority=np.arange(len(graph.ops) + 1),
        )

    @property
    def op_count(self) -> int:
        """Number of ops, the added last one included."""
        return len(self.workspace)

    @property
    def touchers(self) -> Adjacency:
        """Storage -> ops that touch it, in rising order."""
        return self.touches.transpose(len(self.sizes))

    def with_pairs(self, pairs: Sequence[tuple[int, int]]) -> Problem:
        """The same problem with more precedences: in each pair, the first op runs before the second."""
        added = np.array(pairs, np.int64).reshape(-1, 2)
        earlier = np.concatenate([self.predecessors.items, added[:, 0]])
        later = np.concatenate([self.predecessors.owners, added[:, 1]])
        successors = Adjacency.grouped(earlier, later, self.op_count)
        return replace(self, predecessors=Adjacency.grouped(later, earlier, self.op_count), successors=successors)

    def reversed(self) -> Problem:
        """The same problem with time running backwards: reverse its orders to get ours."""
        return replace(
            self,
            predecessors=self.successors,
            successors=self.predecessors,
            priority=self.op_count - 1 - self.priority,
        )

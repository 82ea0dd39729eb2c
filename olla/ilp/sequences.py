"""The program of all sequences: ops may run again, and storages may leave the device in between."""

from __future__ import annotations

import numpy as np

from olla.graph.graph import Graph
from olla.graph.lifetimes import Spill
from olla.ilp.program import Program
from olla.order.problem import Adjacency

__all__ = ["SequenceProgram"]


class SequenceProgram(Program):
    """The variables of a sequence of the ops of ``graph`` and a last one that touches the outputs.

    There are as many steps as ops, and ``repeats`` more. Ops that change persistent state (which draws of random
    numbers do) run once, and so does what makes nothing.
    """

    def __init__(self, graph: Graph, *, repeats: int, spilling: bool) -> None:
        makers = {
            index: [op for op, it in enumerate(graph.ops) if index in it.creates + it.writes]
            for index, storage in enumerate(graph.storages)
            if not storage.persistent
        }
        ids = self.storages = [index for index, of in makers.items() if of]  # of the graph, those that are ever made
        compact = {storage: position for position, storage in enumerate(ids)}
        start = np.cumsum([0, *(len(makers[index]) for index in ids)]).tolist()  # of each storage, its first content

        def used(op: int, storages: tuple[int, ...]) -> list[int]:
            """The contents that are there when ``op`` runs in program order."""
            known = [storage for storage in sorted(set(storages)) if storage in compact]
            return [start[compact[s]] + sum(maker < op for maker in makers[s]) - 1 for s in known]

        count = len(graph.ops)
        super().__init__(
            steps=count + 1 + repeats,
            maker=np.array([op for index in ids for op in makers[index]], np.int64),
            storage=np.array([compact[index] for index in ids for _ in makers[index]], np.int64),
            uses=Adjacency.of(
                [*(used(op, it.reads + it.writes) for op, it in enumerate(graph.ops)), used(count, graph.outputs)]
            ),
            sizes=np.array([graph.storages[storage].size for storage in ids], np.int64),
            workspace=np.array([*(op.workspace for op in graph.ops), 0], np.int64),
        )
        changing = [any(graph.storages[storage].persistent for storage in op.writes) for op in graph.ops]
        makes = np.bincount(self.maker, minlength=count + 1) > 0
        self.once = np.array([*changing, True]) | ~makes
        self.overwrites = [
            (content, op) for op, it in enumerate(graph.ops) for content in used(op, it.writes)
        ]  # content, and the op that writes over it
        self.turns = [(a, b) for b in range(count) for a in graph.predecessors[b] if _share_state(graph, a, b)]
        # What is written in place may be made anew for those who read it before: they need not run first.
        direct = [*self.turns, *zip(self.maker[self.uses.items].tolist(), self.uses.owners.tolist(), strict=True)]
        before: list[set[int]] = []
        for op in range(count):
            others = {earlier for earlier, later in direct if later == op}
            before.append(others.union(*(before[other] for other in others)))
        self.first = np.array([*map(len, before), self.steps[-1]])
        after = [sum(op in of for of in before) for op in range(count)]
        self.last = self.steps[-1] - np.array([*after, -1]) - 1
        self.spilling = spilling
        self._add_variables()

    def shifted(self, spill: Spill, steps: int) -> Spill:
        """A spill of the graph as one of the program, ``steps`` later."""
        return Spill(self.storages.index(spill.storage), spill.start + steps, spill.end + steps)

    def _add_variables(self) -> None:
        users = self.uses.transpose(len(self.maker))
        last_run, last_use = self.last.copy(), np.zeros(len(self.maker), np.int64)
        for op in range(len(self.run) - 1, -1, -1):  # users come later in program order
            for content in np.flatnonzero(self.maker == op):
                last_use[content] = last_run[users.row(int(content))].max(initial=0)
                if not self.once[op]:
                    last_run[op] = max(last_run[op], last_use[content] - 1)
        self.run = self.variables("create", self.first, last_run)
        self.keep = self.variables("preserve", self.first[self.maker] + 1, last_use)
        if self.spilling:
            self.fetch = self.variables("fetch", self.first[self.maker] + 2, last_use)


def _share_state(graph: Graph, earlier: int, later: int) -> bool:
    """Whether one of them changes persistent state that the other uses, too."""
    one, other = graph.ops[earlier], graph.ops[later]
    shared = {*one.writes} & {*other.touches} | {*one.touches} & {*other.writes}
    return any(graph.storages[storage].persistent for storage in shared)

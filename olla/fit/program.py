"""A graph as flat arrays, and what a sequence of its ops needs: the compiled twin of checker and memory profile.

In a sequence ops may run again. It leaves out the *late* ops, which only change persistent state, as updates of
parameters do: each follows the last op that touches anything it touches, so that a parameter is changed when nobody,
recomputed or not, will read it any more. (Late ops that read the same do not wait for one another.)

A storage that is spilled comes back by a *load*, an op of its own: it needs nothing in memory and makes a content that
was there before. In between, from its last use on, the storage is elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit

from olla.graph.graph import Graph
from olla.graph.lifetimes import Spill
from olla.order.problem import Adjacency, Integers

__all__ = [
    "CREATES",
    "LOADS",
    "READS",
    "WRITES",
    "WRITES_ONCE",
    "Booleans",
    "Floats",
    "Program",
    "as_sequence",
    "completed",
    "program_of",
    "simulated",
    "spilled",
    "with_loads",
]

Booleans = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]

CREATES, READS, WRITES, WRITES_ONCE, LOADS = range(5)


class Program(NamedTuple):
    """What compiled code knows of a graph; lists are end to end, that of op ``i`` from ``start[i]`` on."""

    start: Integers  # of the next three
    storage: Integers  # that an op touches
    kind: Integers  # how
    version: Integers  # of the contents that it expects
    sizes: Integers  # bytes; 0 for persistent storages
    workspace: Integers
    outputs: Integers
    final: Integers  # version of each storage when all is over
    maker_start: Integers  # of the next
    maker: Integers  # ops that create and then write each storage that is not persistent, in program order
    runs_once: Booleans  # of each op: whether it changes what lives across steps, and not only when it first runs
    late: Integers  # ops that are not in sequences, in program order
    loads: int  # the index of the first load; they come after the ops, one for each of ``maker``


def program_of(graph: Graph) -> Program:
    """Flatten ``graph``; in its sequences, storages may be spilled."""
    version = [0] * len(graph.storages)
    rows: list[list[tuple[int, int, int]]] = []
    makers: list[list[int]] = [[] for _ in graph.storages]
    for index, op in enumerate(graph.ops):
        rows.append([(s, READS, version[s]) for s in op.reads])
        rows[-1] += [(s, WRITES_ONCE if s in op.writes_once else WRITES, version[s]) for s in op.writes]
        rows[-1] += [(s, CREATES, 0) for s in op.creates]
        for storage in op.creates + op.writes:
            version[storage] += 1
            if not graph.storages[storage].persistent:
                makers[storage].append(index)
    rows += [[(s, LOADS, number + 1)] for s, found in enumerate(makers) for number in range(len(found))]
    touches = np.array([touch for row in rows for touch in row], np.int64).reshape(-1, 3)
    packed = Adjacency.of(makers)
    persistent = [storage.persistent for storage in graph.storages]
    return Program(
        start=np.cumsum([0, *map(len, rows)]),
        storage=touches[:, 0].copy(),
        kind=touches[:, 1].copy(),
        version=touches[:, 2].copy(),
        sizes=np.array([0 if storage.persistent else storage.size for storage in graph.storages], np.int64),
        workspace=np.array([*(op.workspace for op in graph.ops), *[0] * sum(map(len, makers))], np.int64),
        outputs=np.array(sorted(set(graph.outputs)), np.int64),
        final=np.array(version, np.int64),
        maker_start=packed.start,
        maker=packed.items,
        runs_once=np.array(
            [any(persistent[s] for s in {*op.writes} - {*op.writes_once}) for op in graph.ops], np.bool_
        ),
        late=np.array(_late_ops(graph), np.int64),
        loads=len(graph.ops),
    )


def _late_ops(graph: Graph) -> list[int]:
    """Ops that make nothing, of which nobody but others of these reads what they change."""
    late: set[int] = set()
    for index in range(len(graph.ops) - 1, -1, -1):
        op = graph.ops[index]
        changed = [graph.storages[storage].persistent for storage in op.writes]
        if not op.creates and any(changed) and late.issuperset(graph.successors[index]):
            late.add(index)
    return sorted(late)


@njit(cache=True, nogil=True)
def completed(program: Program, sequence: Integers) -> tuple[Integers, Integers]:
    """The sequence with its late ops, and the position in the sequence that each belongs to."""
    last = np.full(len(program.sizes), -1, np.int64)
    for position in range(len(sequence)):
        for k in range(program.start[sequence[position]], program.start[sequence[position] + 1]):
            last[program.storage[k]] = position
    after = np.zeros(len(program.late), np.int64)
    changed = last.copy()  # where late ops that read a storage may begin: they need not wait for one another
    for i in range(len(program.late)):
        op = program.late[i]
        for k in range(program.start[op], program.start[op + 1]):
            storage = program.storage[k]
            after[i] = max(after[i], changed[storage] if program.kind[k] == READS else last[storage])
        for k in range(program.start[op], program.start[op + 1]):
            storage = program.storage[k]
            last[storage] = max(last[storage], after[i])
            if program.kind[k] != READS:
                changed[storage] = after[i]
    before = np.zeros(len(sequence) + 1, np.int64)  # late ops before each op of the sequence
    for place in after:
        before[place + 1] += 1
    before = np.cumsum(before)
    whole = np.empty(len(sequence) + len(after), np.int64)
    owner = np.empty(len(whole), np.int64)
    for position in range(len(sequence)):
        at = position + before[position]
        whole[at] = sequence[position]
        owner[at : position + 1 + before[position + 1]] = position
    for i in range(len(after)):
        whole[after[i] + 1 + before[after[i]]] = program.late[i]
        before[after[i]] += 1
    return whole, owner


@njit(cache=True, nogil=True)
def simulated(program: Program, whole: Integers) -> tuple[bool, Integers]:
    """Whether every op finds the contents that it expects, and the live bytes at each step."""
    count = len(program.sizes)
    version = np.zeros(count, np.int64)
    begin, last = np.full(count, -1, np.int64), np.zeros(count, np.int64)
    seen = np.zeros(len(program.workspace), np.bool_)
    change = np.zeros(len(whole) + 1, np.int64)
    for step in range(len(whole)):
        op = whole[step]
        for k in range(program.start[op], program.start[op + 1]):
            storage, kind = program.storage[k], program.kind[k]
            if kind == LOADS and (begin[storage] < 0 or version[storage] != program.version[k]):
                return False, change[: len(whole)]
            if kind in (CREATES, LOADS):
                if begin[storage] >= 0:
                    change[begin[storage]] += program.sizes[storage]
                    change[last[storage] + 1] -= program.sizes[storage]
                begin[storage] = step
                version[storage] = program.version[k] if kind == LOADS else 1
            elif kind != WRITES_ONCE or not seen[op]:
                if version[storage] != program.version[k]:
                    return False, change[: len(whole)]
                if kind != READS:
                    version[storage] += 1
            last[storage] = step
        seen[op] = True
    for storage in program.outputs:
        last[storage] = len(whole) - 1
        if version[storage] != program.final[storage]:
            return False, change[: len(whole)]
    for storage in range(count):
        if begin[storage] >= 0:
            change[begin[storage]] += program.sizes[storage]
            change[last[storage] + 1] -= program.sizes[storage]
    live = 0
    for step in range(len(whole)):
        live += change[step]
        change[step] = live + program.workspace[whole[step]]
    return True, change[: len(whole)]


def with_loads(program: Program, order: Sequence[int], spills: Sequence[Spill]) -> Integers:
    """An order as a sequence in which what is spilled comes back by loads; :func:`spilled` is the way back."""
    back: dict[int, list[int]] = {}
    for spill in spills:
        back.setdefault(spill.end, []).append(spill.storage)
    version = np.zeros(len(program.sizes), np.int64)
    sequence = []
    for position, op in enumerate([*order, -1]):
        for storage in back.get(position, ()):
            sequence.append(program.loads + int(program.maker_start[storage] + version[storage]) - 1)
        if op < 0:
            break
        touches = slice(program.start[op], program.start[op + 1])
        for storage, kind in zip(program.storage[touches], program.kind[touches], strict=True):
            version[storage] = 1 if kind == CREATES else version[storage] + (kind != READS)
        sequence.append(op)
    return as_sequence(program, sequence)


def spilled(program: Program, whole: Integers) -> tuple[tuple[int, ...], tuple[Spill, ...]]:
    """A whole sequence as an order without loads, and what is spilled in it."""
    order: list[int] = []
    last = np.zeros(len(program.sizes), np.int64)
    spills = []
    for op in whole.tolist():
        touched = program.storage[program.start[op] : program.start[op + 1]]
        if op < program.loads:
            last[touched] = len(order)
            order.append(op)
        elif last[touched[0]] + 1 < len(order):
            spills.append(Spill(int(touched[0]), int(last[touched[0]]) + 1, len(order)))
    return tuple(order), tuple(sorted(spills))


def as_sequence(program: Program, order: Sequence[int]) -> Integers:
    """An order without its late ops."""
    ops = np.array(order, np.int64)
    return ops[~np.isin(ops, program.late)]

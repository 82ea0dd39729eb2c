"""Hypothesis strategies for graphs and orders, and brute force to hold planners against."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Sequence

from hypothesis import settings
from hypothesis import strategies as st

from olla import Graph, Op, Storage

settings.register_profile("compiled", deadline=None)  # the first example of a test may wait for a compiler
settings.load_profile("compiled")


@st.composite
def graphs(draw: st.DrawFn, max_ops: int = 8) -> Graph:
    """Random programs: several outputs per op, in-place writes, persistent storages, workspaces."""
    storages: list[Storage] = []
    ops: list[Op] = []
    for index in range(draw(st.integers(0, 2))):
        storages.append(Storage(f"parameter {index}", draw(st.integers(0, 5)), persistent=True))
    for index in range(draw(st.integers(1, max_ops))):
        known = range(len(storages))
        used = draw(st.lists(st.sampled_from(known), unique=True, max_size=3)) if storages else []
        written = draw(st.lists(st.sampled_from(used), unique=True, max_size=1)) if used else []
        created = []
        for _ in range(draw(st.integers(0, 2))):
            created.append(len(storages))
            storages.append(Storage(f"tensor {len(storages)}", draw(st.integers(0, 9))))
        reads = tuple(storage for storage in used if storage not in written)
        ops.append(Op(f"op {index}", tuple(created), reads, tuple(written), draw(st.integers(0, 4))))
    outputs = draw(st.lists(st.sampled_from(range(len(storages))), unique=True, max_size=2)) if storages else []
    return Graph(tuple(ops), tuple(storages), tuple(outputs))


def legal_orders(graph: Graph) -> Iterator[tuple[int, ...]]:
    """Every order that respects the dependencies."""
    yield from _extended(graph, ())


def _extended(graph: Graph, begun: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    if len(begun) == len(graph.ops):
        yield begun
        return
    for op in range(len(graph.ops)):
        if op not in begun and all(before in begun for before in graph.predecessors[op]):
            yield from _extended(graph, (*begun, op))


def optimum(graph: Graph) -> int:
    """The lowest peak of all legal orders: dynamic programming over the sets of ops that have run."""
    touchers = [{op for op, it in enumerate(graph.ops) if s in it.touches} for s in range(len(graph.storages))]
    kept = [i for i, storage in enumerate(graph.storages) if not storage.persistent and touchers[i]]
    peaks = {frozenset[int](): 0}
    for _ in graph.ops:
        following: dict[frozenset[int], int] = {}
        for done, peak in peaks.items():
            for op in set(range(len(graph.ops))) - done:
                if not done.issuperset(graph.predecessors[op]):
                    continue
                now = done | {op}
                memory = graph.ops[op].workspace
                for storage in kept:
                    begun, needed = touchers[storage] & now, touchers[storage] - done or storage in graph.outputs
                    memory += graph.storages[storage].size if begun and needed else 0
                following[now] = min(following.get(now, sys.maxsize), max(peak, memory))
        peaks = following
    return peaks[frozenset(range(len(graph.ops)))]


def is_legal(graph: Graph, order: Sequence[int]) -> bool:
    """Whether every op runs once, after everything it depends on."""
    place = {op: step for step, op in enumerate(order)}
    return sorted(order) == list(range(len(graph.ops))) and all(
        place[before] < place[op] for op in range(len(graph.ops)) for before in graph.predecessors[op]
    )


def tangled(ops: int, seed: int) -> Graph:
    """A random program without any structure, in which list schedules are far from the optimum."""
    draw = random.Random(seed)
    storages: list[Storage] = []
    program = []
    for index in range(ops):
        reads = draw.sample(range(len(storages)), min(len(storages), draw.randint(0, 3)))
        creates = tuple(range(len(storages), len(storages) + draw.randint(1, 2)))
        storages += [Storage(f"tensor {i}", draw.randint(0, 20)) for i in creates]
        program.append(Op(f"op {index}", creates, tuple(reads)))
    return Graph(tuple(program), tuple(storages))


def diamond() -> Graph:
    """A small program with a choice: op 1 and op 2 may run in either order, and one is cheaper."""
    storages = (
        Storage("weight", 100, persistent=True),
        Storage("start", 4),
        Storage("wide", 10),
        Storage("narrow", 1),
        Storage("small", 1),
        Storage("end", 2),
    )
    ops = (
        Op("begin", creates=(1,), reads=(0,)),
        Op("widen", creates=(2,), reads=(1,)),
        Op("narrow", creates=(3,), reads=(1,)),
        Op("shrink", creates=(4,), reads=(2,)),
        Op("join", creates=(5,), reads=(3, 4)),
        Op("update", reads=(5,), writes=(0,)),
    )
    return Graph(ops, storages, outputs=(5,))

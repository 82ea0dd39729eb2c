"""Kernels of PyTorch Inductor as a graph, and the order in which they need the fewest bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set

from olla.graph.check import verify
from olla.graph.graph import Graph, Op, Storage
from olla.graph.lifetimes import peak_bytes
from olla.graph.plan import Plan
from olla.order.schedule import schedule
from olla.torch_private import Kernel

__all__ = ["Saved", "graph_of", "ordered", "peak_of"]

Saved = Mapping[str, tuple[int, int]]  # name of what forward has saved -> key of its storage, bytes


def ordered(
    kernels: Sequence[Kernel], theirs: Sequence[int], saved: Saved, outputs: Set[str], *, time_limit: float
) -> tuple[int, ...]:
    """The order ``theirs`` of the kernels, unless there is one that needs fewer bytes.

    Both are judged by :func:`peak_of`, whatever the search has assumed.
    """
    graph = graph_of(kernels, saved, outputs)
    found = schedule(graph, time_limit=time_limit)
    verify(graph, Plan.of(graph, found))
    ours = tuple(op - 1 for op in found.order if op)
    return min(tuple(theirs), ours, key=lambda order: peak_of([kernels[index] for index in order], saved, outputs))


def peak_of(kernels: Sequence[Kernel], saved: Saved, outputs: Set[str]) -> int:
    """The most bytes that are in memory at once, what is saved among them, if the kernels run as they stand."""
    graph = graph_of(kernels, saved, outputs)
    return peak_bytes(graph, range(len(graph.ops)))


def graph_of(kernels: Sequence[Kernel], saved: Saved, outputs: Set[str]) -> Graph:
    """The kernels as ops, after an op that makes what of ``saved`` they need.

    Each buffer is a storage of size 0, read by every kernel that must run later, and bytes: its own, those of the
    buffer or input that it changes or views, or those of the buffer that it is a part of, which may be finished later.
    They are created with the first of the buffers that are in them.
    """
    storages: list[Storage] = []
    creates: list[list[int]] = [[] for _ in range(len(kernels) + 1)]
    reads: list[set[int]] = [set() for _ in creates]

    def create(op: int, name: str, size: int) -> int:
        storages.append(Storage(name, size))
        creates[op].append(len(storages) - 1)
        return len(storages) - 1

    owners = _owners(kernels)
    sizes = {buffer.name: buffer.freed for kernel in kernels for buffer in kernel.buffers}
    begun = create(0, "begun", 0)
    used = {owner for kernel in kernels for name in kernel.needs for owner in owners.get(name, (name,))}
    needed = {name: found for name, found in saved.items() if name in used}
    of_key = {key: create(0, f"saved {key}", size) for key, size in dict(needed.values()).items()}
    holds = {name: of_key[key] for name, (key, _) in needed.items()}  # owner -> its bytes
    made: dict[str, int] = {}  # name of a buffer -> what says that its kernel has run
    for index, kernel in enumerate(kernels, 1):
        for buffer in kernel.buffers:
            made[buffer.name] = create(index, f"{buffer.name} is made", 0)
            for owner in owners[buffer.name]:
                if owner not in holds and sizes.get(owner):
                    holds[owner] = create(index, owner, sizes[owner])
                if owner in holds:
                    reads[index].add(holds[owner])
    for kernel, read in zip(kernels, reads[1:], strict=True):
        read.add(begun)
        read.update(holds[o] for name in kernel.needs for o in owners.get(name, (name,)) if o in holds)
        read.update(made[name] for name in (*kernel.needs, *kernel.follows) if name in made)
    names = ["what is saved", *(kernel.name for kernel in kernels)]
    ops = [
        Op(name, creates=tuple(created), reads=tuple(sorted(read - {*created})))
        for name, created, read in zip(names, creates, reads, strict=True)
    ]
    returned = {holds[owner] for name in outputs for owner in owners.get(name, (name,)) if owner in holds}
    return Graph(tuple(ops), tuple(storages), tuple(sorted(returned)))


def _owners(kernels: Sequence[Kernel]) -> dict[str, set[str]]:
    """For each buffer, the buffers and inputs whose bytes it has: mostly itself, of a tuple its parts."""
    buffers = {buffer.name: buffer for kernel in kernels for buffer in kernel.buffers}
    parts: dict[str, list[str]] = {}
    for buffer in buffers.values():
        if buffer.is_part:
            for whole in buffer.of:
                parts.setdefault(whole, []).append(buffer.name)

    def owners(name: str) -> set[str]:
        buffer = buffers.get(name)
        others = parts.get(name, () if buffer is None or buffer.is_part else buffer.of)
        return {owner for other in others for owner in owners(other)} or {name}

    return {name: owners(name) for name in buffers}

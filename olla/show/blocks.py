"""What is in memory when, what it is, and where in the model it comes from: the common ground of all pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from itertools import accumulate
from operator import add
from pathlib import PurePath

from olla.errors import OllaError
from olla.graph.graph import Graph, Op
from olla.graph.lifetimes import Spill, live_intervals
from olla.graph.plan import Plan

__all__ = ["Block", "Kind", "Memory", "blocks_of", "eager_memory", "origin", "placed_blocks", "planned_memory", "total"]

Memory = Mapping["Kind", tuple[int, ...]]  # bytes of each kind, step by step


class Kind(Enum):
    """What a block is, by the op that makes it; what is written over it later does not count."""

    ACTIVATION = "activation"  # the result of an op that is not in a backward pass
    GRADIENT = "gradient"  # the result of an op of a backward pass
    WORKSPACE = "workspace"  # no result: held only while an op runs


@dataclass(frozen=True, slots=True)
class Block:
    """Bytes that a plan has in memory at the steps ``start <= step < end``."""

    storage: int | None  # None: a workspace
    name: str
    kind: Kind
    op: int  # that makes it, or works in it
    start: int
    end: int
    size: int
    offset: int | None  # from the start of the arena; None: the allocator decides
    outside: bool = False  # it outlives the step: it is at ``offset`` only in pictures, above the arena


def blocks_of(graph: Graph, plan: Plan) -> tuple[Block, ...]:
    """The lives of all storages in ``plan``, as ``live_intervals`` has them, and then its workspaces.

    What has no bytes is left out. With addresses, workspaces are those that the plan places.
    """
    maker = {storage: index for index, op in enumerate(graph.ops) for storage in op.creates}
    lives = live_intervals(graph, plan.order, plan.spills)
    placed = plan.offsets is not None
    top = plan.arena_bytes or 0
    found = []
    for (storage, start, end), offset in zip(lives, plan.offsets or [None] * len(lives), strict=True):
        name, size = graph.storages[storage].name, graph.storages[storage].size
        at, outside = offset, placed and offset is None
        if outside:
            at, top = top, top + size
        if size:
            op = maker[storage]
            found.append(Block(storage, name, _kind(graph.ops[op]), op, start, end, size, at, outside))
    workspaces: list[tuple[int, int | None, int]] = list(plan.workspaces)
    if not placed:
        workspaces = [(step, None, graph.ops[index].workspace) for step, index in enumerate(plan.order)]
    for step, offset, size in workspaces:
        op = plan.order[step]
        if size:
            found.append(Block(None, "workspace", Kind.WORKSPACE, op, step, step + 1, size, offset))
    return tuple(found)


def placed_blocks(graph: Graph, plan: Plan) -> tuple[Block, ...]:
    """:func:`blocks_of` a plan with addresses.

    Raises
    ------
    OllaError
        If the plan has none.
    """
    if plan.arena_bytes is None:
        raise OllaError(
            "this plan has no addresses to show: olla plan --place makes them, and a step after its first runs"
        )
    return blocks_of(graph, plan)


def planned_memory(graph: Graph, plan: Plan) -> Memory:
    """Bytes at each step of ``plan``; the kinds add up to :func:`~olla.graph.lifetimes.memory_profile`."""
    return _memory(graph, plan.order, plan.spills)


def eager_memory(graph: Graph) -> Memory:
    """Bytes while each op runs in eager PyTorch: program order, and all that an op does without."""
    storages = tuple(replace(storage, size=storage.eager_size) for storage in graph.storages)
    memory = _memory(replace(graph, storages=storages), range(len(graph.ops)))
    for kind in (Kind.ACTIVATION, Kind.GRADIENT):
        reused = [op.reused if _kind(op) is kind else 0 for op in graph.ops]
        memory[kind] = tuple(map(add, memory[kind], reused))
    return memory


def total(memory: Memory) -> tuple[int, ...]:
    """Bytes of all kinds together, step by step."""
    return tuple(map(sum, zip(*memory.values(), strict=True)))


def origin(op: Op) -> str:
    """``folder/file.py:line`` of the model that ``op`` comes from, and whether it is its backward; empty if unknown."""
    line = "/".join(PurePath(op.source).parts[-2:])
    return f"backward of {line}" if line and op.backward else line


def _memory(graph: Graph, order: Sequence[int], spills: Sequence[Spill] = ()) -> dict[Kind, tuple[int, ...]]:
    change = {kind: [0] * (len(order) + 1) for kind in Kind}
    kinds = {storage: _kind(op) for op in graph.ops for storage in op.creates}
    for storage, start, end in live_intervals(graph, order, spills):
        change[kinds[storage]][start] += graph.storages[storage].size
        change[kinds[storage]][end] -= graph.storages[storage].size
    for step, index in enumerate(order):
        change[Kind.WORKSPACE][step] += graph.ops[index].workspace
        change[Kind.WORKSPACE][step + 1] -= graph.ops[index].workspace
    return {kind: tuple(accumulate(change[kind][:-1])) for kind in Kind}


def _kind(op: Op) -> Kind:
    return Kind.GRADIENT if op.backward else Kind.ACTIVATION

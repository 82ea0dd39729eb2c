"""A plan as a memory snapshot of PyTorch's: what the recorder of CUDA memory would write if it ran on a GPU."""

from __future__ import annotations

import pickle
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from olla.graph.graph import Graph, Op
from olla.graph.plan import Plan
from olla.show.blocks import Block, placed_blocks

__all__ = ["write_snapshot"]

_ARENA = 2**40  # where the arena is said to begin
_PROTOCOL = 4  # the visualizer reads no later one

Event = dict[str, Any]

_ARENA_FRAMES: list[Event] = [{"name": "the arena of the plan", "filename": "olla", "line": 0}]


def write_snapshot(graph: Graph, plan: Plan, path: Path) -> None:
    """Write the step of ``plan`` for https://pytorch.org/memory_viz and ``torch/cuda/_memory_viz.py``.

    The arena is one segment, and each block of what outlives the step one more. Frames name the op that makes a block,
    and its line. The time of an event is its step.

    Raises
    ------
    OllaError
        If the plan has no addresses.
    """
    blocks = placed_blocks(graph, plan)
    outside = [block for block in blocks if block.outside]
    segments = [_segment(_ARENA, plan.arena_bytes, "inactive", _ARENA_FRAMES)] if plan.arena_bytes else []
    segments += [_segment(_address(b), b.size, "active_allocated", _frames(graph.ops[b.op])) for b in outside]
    created = [_event("segment_alloc", s["address"], s["total_size"], 0, s["frames"]) for s in segments]
    data = {
        "segments": segments,
        "device_traces": [[*created, *_events(graph, plan, blocks)]],
        "allocator_settings": {},
        "external_annotations": [],
    }
    path.write_bytes(pickle.dumps(data, _PROTOCOL))


def _events(graph: Graph, plan: Plan, blocks: tuple[Block, ...]) -> Iterator[Event]:
    results, workspaces = defaultdict[int, list[Block]](list), defaultdict[int, list[Block]](list)
    ending = defaultdict[int, list[Block]](list)
    for block in blocks:
        if block.storage is None:
            workspaces[block.start].append(block)
            continue
        results[block.start].append(block)
        if not block.outside:
            ending[block.end].append(block)
    for step in range(len(plan.order) + 1):
        yield from (event for block in ending[step] for event in _free(graph, block, step))
        # A workspace may be where a result of the same op comes when it has been given back.
        early = [block for block in workspaces[step] if any(_overlap(block, result) for result in results[step])]
        yield from _in_turn(graph, early, step)
        yield from (_allocate(graph, block) for block in results[step])
        yield from _in_turn(graph, [block for block in workspaces[step] if block not in early], step)


def _in_turn(graph: Graph, workspaces: list[Block], step: int) -> Iterator[Event]:
    """Workspaces of one op, together as far as they have room beside one another."""
    held: list[Block] = []
    for block in workspaces:
        for other in [other for other in held if _overlap(block, other)]:
            held.remove(other)
            yield from _free(graph, other, step)
        held.append(block)
        yield _allocate(graph, block)
    for block in held:
        yield from _free(graph, block, step)


def _overlap(one: Block, other: Block) -> bool:
    return _address(one) < _address(other) + other.size and _address(other) < _address(one) + one.size


def _address(block: Block) -> int:
    assert block.offset is not None
    return _ARENA + block.offset


def _allocate(graph: Graph, block: Block) -> Event:
    return _event("alloc", _address(block), block.size, block.start, _frames(graph.ops[block.op]))


def _free(graph: Graph, block: Block, step: int) -> Iterator[Event]:
    for action in ("free_requested", "free_completed"):
        yield _event(action, _address(block), block.size, step, _frames(graph.ops[block.op]))


def _event(action: str, address: int, size: int, step: int, frames: list[Event]) -> Event:
    return {"action": action, "addr": address, "size": size, "stream": 0, "time_us": step, "frames": frames}


def _segment(address: int, size: int, state: str, frames: list[Event]) -> Event:
    used = size if state == "active_allocated" else 0
    block = {"address": address, "size": size, "requested_size": used, "state": state, "frames": frames}
    return {
        "device": 0, "address": address, "total_size": size, "allocated_size": used, "active_size": used,
        "requested_size": used, "stream": 0, "segment_type": "large", "segment_pool_id": (0, 0),
        "is_expandable": False, "frames": frames, "blocks": [block],
    }  # fmt: skip


def _frames(op: Op) -> list[Event]:
    file, _, line = op.source.rpartition(":")
    return [{"name": op.name, "filename": file or "unknown", "line": int(line) if line.isdigit() else 0}]

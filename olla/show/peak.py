"""What is in memory when a plan needs most: the op that runs, and the blocks it runs beside."""

from __future__ import annotations

from dataclasses import dataclass

from olla.graph.graph import Graph, Op
from olla.graph.plan import Plan
from olla.show.blocks import Block, blocks_of, planned_memory, total

__all__ = ["Peak"]


@dataclass(frozen=True, slots=True)
class Peak:
    """The first step at which a plan's peak is reached."""

    step: int | None  # None: after the last one, by the outputs alone
    op: Op | None  # that runs at the step
    blocks: tuple[Block, ...]  # that are in memory there, the largest first; together they are the peak

    @classmethod
    def of(cls, graph: Graph, plan: Plan) -> Peak:
        """The peak of ``plan``, with the workspace that ``graph`` gives to the op."""
        blocks = sorted(blocks_of(graph, plan.at(None)), key=lambda block: -block.size)
        sizes = total(planned_memory(graph, plan))
        if plan.peak_bytes not in sizes:
            latest = {block.storage: block for block in sorted(blocks, key=lambda block: block.start)}
            outputs = {latest[storage] for storage in graph.outputs if storage in latest}
            return cls(None, None, tuple(block for block in blocks if block in outputs))
        step = sizes.index(plan.peak_bytes)
        alive = tuple(block for block in blocks if block.start <= step < block.end)
        return cls(step, graph.ops[plan.order[step]], alive)

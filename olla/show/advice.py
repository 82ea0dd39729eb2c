"""What keeps a plan from needing less, and what would help."""

from __future__ import annotations

from olla.graph.graph import Graph
from olla.graph.lifetimes import least_bytes
from olla.graph.plan import Plan
from olla.show.size import format_bytes

__all__ = ["advice"]

_FRAGMENTATION = 1e-3  # of the arena: below, there is nothing to gain
_ALONE = 0.95  # of the peak: an op that needs so much leaves nothing to gain beside it


def advice(graph: Graph, plan: Plan) -> tuple[str, ...]:
    """A sentence for each thing that limits ``plan``; options are those of :func:`olla.optimize`."""
    return (_on_the_peak(graph, plan), *_on_the_arena(plan), *_on_what_persists(plan))


def _on_the_peak(graph: Graph, plan: Plan) -> str:
    least, needing = least_bytes(graph)
    floor = format_bytes(least)
    if least >= _ALONE * plan.peak_bytes:
        share = least / plan.peak_bytes if plan.peak_bytes else 1.0
        return f"{needing} alone is {share:.1%} of the peak: only another operator or a smaller batch needs less"
    if plan.recomputed or plan.spills:
        without = "" if plan.spills else ", spill_dir= perhaps less of it"
        return f"a smaller memory_budget= takes more time{without}; {needing} needs {floor} in any case"
    if plan.peak_bytes > plan.lower_bound_bytes:
        return f"another order may need up to {1 - 1 / (1 + plan.gap):.2%} less: reorder=, time_limit=, solver="
    return f"no order needs less: memory_budget= trades time for bytes; {needing} needs {floor} in any case"


def _on_the_arena(plan: Plan) -> tuple[str, ...]:
    if plan.fragmentation is None or plan.fragmentation <= _FRAGMENTATION:
        return ()
    return (f"{plan.fragmentation:.2%} of the arena is fragmentation: a larger time_limit= looks for less",)


def _on_what_persists(plan: Plan) -> tuple[str, ...]:
    if plan.persistent_bytes <= plan.peak_bytes:
        return ()
    share = plan.persistent_bytes / (plan.persistent_bytes + plan.peak_bytes)
    return (f"{share:.0%} of all bytes live across steps: an optimizer with less state, or smaller dtypes, need less",)

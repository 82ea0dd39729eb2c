"""Pictures, for what people would rather look at than read. Need matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from olla.errors import OllaError
from olla.graph.graph import Graph
from olla.graph.plan import Placement, Plan
from olla.place.buffers import Buffer
from olla.show.blocks import Kind, Memory, eager_memory, placed_blocks, planned_memory, total

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from olla.fit.frontier import Frontier

__all__ = ["draw_addresses", "draw_frontier", "draw_memory", "draw_placement"]

_COLOURS = {Kind.ACTIVATION: "#4c78a8", Kind.GRADIENT: "#f58518", Kind.WORKSPACE: "#9d9d9d"}


def draw_memory(graph: Graph, plan: Plan, path: Path) -> None:
    """Draw memory over time, of eager PyTorch and below it of the plan, on one scale: what is in memory, and the peak.

    What lives across steps is not in it.

    Raises
    ------
    OllaError
        If matplotlib is not there, or ``path`` does not end as a picture does.
    """
    figure = _figure(10, 6)
    above, below = figure.subplots(2, sharex=True, sharey=True)
    name, unit = _unit(plan.baseline_peak_bytes)
    _draw_memory(above, eager_memory(graph), f"eager, {name}", unit)
    _draw_memory(below, planned_memory(graph, plan), f"planned, {name}", unit)
    below.set(xlabel="step", ylim=(0, above.get_ylim()[1] * 1.05), xlim=(0, max(1, len(plan.order))))
    below.axhline(plan.lower_bound_bytes / unit, color="black", linestyle=":", linewidth=1, label="lower bound")
    handles, labels = below.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=len(labels), frameon=False)
    _save(figure, path)


def _draw_memory(axes: Axes, memory: Memory, name: str, unit: int) -> None:
    sizes = total(memory)
    if any(sizes):
        shown = {kind: of_kind for kind, of_kind in memory.items() if any(of_kind)}
        axes.stackplot(
            range(len(sizes) + 1),
            *[[size / unit for size in (*of_kind, of_kind[-1])] for of_kind in shown.values()],
            labels=[kind.value for kind in shown],
            colors=[_COLOURS[kind] for kind in shown],
            step="post",
            linewidth=0,
        )
        peak, step = max(sizes), sizes.index(max(sizes))
        at, side = (step + 0.5, peak / unit), ("left", 6) if step < len(sizes) / 2 else ("right", -6)
        axes.plot(*at, "v", color="black", markersize=5)
        text = f"peak {peak / unit:,.2f} at step {step}"
        axes.annotate(text, at, (side[1], 4), textcoords="offset points", ha=side[0], fontsize=9)
    axes.set(ylabel=name)
    axes.spines[["top", "right"]].set_visible(False)


def draw_addresses(graph: Graph, plan: Plan, path: Path) -> None:
    """Draw the arena of a plan: steps to the right, addresses upwards; above it, what outlives the step.

    Raises
    ------
    OllaError
        If the plan has no addresses, matplotlib is not there, or ``path`` does not end as a picture does.
    """
    blocks, arena = placed_blocks(graph, plan), plan.arena_bytes or 0
    figure = _figure(10, 6)
    axes = figure.subplots()
    name, unit = _unit(arena)
    for kind, colour in _COLOURS.items():
        shown = [block for block in blocks if block.kind is kind]
        _draw_rectangles(axes, [(b.start, b.end, b.offset or 0, b.size) for b in shown], colour, unit, kind.value)
    axes.axhline(arena / unit, color="black", linewidth=1, label="arena; above it, what outlives the step")
    axes.set(xlabel="step", ylabel=f"address, {name}", ylim=0, xlim=(0, max(1, len(plan.order))))
    title = f"{len(blocks):,} blocks in {arena:,} bytes, {plan.fragmentation:.2%} of it fragmentation"
    axes.set_title(title, loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower right", ncols=4, frameon=False)
    _save(figure, path)


def draw_placement(buffers: Sequence[Buffer], placement: Placement, path: Path) -> None:
    """Draw each buffer as a rectangle: time to the right, addresses upwards.

    Raises
    ------
    OllaError
        If matplotlib is not there, or ``path`` does not end as a picture does.
    """
    figure = _figure(10, 6)
    axes = figure.subplots()
    name, unit = _unit(placement.arena_bytes)
    placed = zip(buffers, placement.offsets, strict=True)
    rectangles = [(buffer.lower, buffer.upper, offset, buffer.size) for buffer, offset in placed]
    _draw_rectangles(axes, rectangles, [f"C{index % 10}" for index in range(len(buffers))], unit)
    axes.axhline(placement.lower_bound_bytes / unit, color="black", linestyle=":", linewidth=1, label="lower bound")
    axes.set(xlabel="time", ylabel=f"address, {name}", ylim=0)
    axes.set_title(f"{len(buffers):,} buffers in {placement.arena_bytes:,} bytes", loc="left", fontsize=10)
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def _draw_rectangles(
    axes: Axes, rectangles: Sequence[tuple[int, int, int, int]], colour: str | list[str], unit: int, label: str = ""
) -> None:
    """Draw (start, end, offset, bytes)."""
    axes.bar(
        [start for start, _, _, _ in rectangles],
        [size / unit for _, _, _, size in rectangles],
        [end - start for start, end, _, _ in rectangles],
        [offset / unit for _, _, offset, _ in rectangles],
        align="edge",
        color=colour,
        edgecolor="white",
        linewidth=0.3,
        label=label,
    )


def draw_frontier(frontier: Frontier, path: str | Path) -> None:
    """Draw what smaller and smaller peaks cost: time to the right, bytes upwards.

    Raises
    ------
    OllaError
        If matplotlib is not there, or ``path`` does not end as a picture does.
    """
    figure = _figure(7, 4.5)
    axes = figure.subplots()
    peaks = [found.peak_bytes / 2**20 for found in frontier.schedules]
    total = frontier.seconds or 1.0
    extra = [found.extra_seconds / total * 100 for found in frontier.schedules]
    least = [found.extra_seconds_lower_bound / total * 100 for found in frontier.schedules]
    axes.plot(extra, peaks, marker="o", label="planned")
    axes.plot(least, peaks, color="0.6", linestyle="dotted", label="lower bound of the time")
    axes.axhline(frontier.baseline_peak_bytes / 2**20, color="C1", linewidth=1, label="eager")
    axes.set(xlabel="more time, % of a step", ylabel="peak, MiB", ylim=0)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def _unit(size: int) -> tuple[str, int]:
    return ("MiB", 2**20) if size >= 2**20 else ("bytes", 1)


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise OllaError("drawing needs matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Figure, path: str | Path) -> None:
    try:
        figure.savefig(path, dpi=110)
    except ValueError as error:
        raise OllaError(f"{path}: {error}") from error

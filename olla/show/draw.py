"""Pictures, for what people would rather look at than read. Need matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from olla.errors import OllaError
from olla.graph.plan import Placement
from olla.place.buffers import Buffer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from olla.fit.frontier import Frontier

__all__ = ["draw_frontier", "draw_placement"]


def draw_placement(buffers: Sequence[Buffer], placement: Placement, path: Path) -> None:
    """Draw each buffer as a rectangle: time to the right, addresses upwards.

    Raises
    ------
    OllaError
        If matplotlib is not there, or ``path`` does not end as a picture does.
    """
    figure = _figure(10, 6)
    axes = figure.subplots()
    name, unit = ("MiB", 2**20) if placement.arena_bytes >= 2**20 else ("bytes", 1)
    axes.bar(
        [buffer.lower for buffer in buffers],
        [buffer.size / unit for buffer in buffers],
        [buffer.upper - buffer.lower for buffer in buffers],
        [offset / unit for offset in placement.offsets],
        align="edge",
        color=[f"C{index % 10}" for index in range(len(buffers))],
        edgecolor="white",
        linewidth=0.3,
    )
    axes.axhline(placement.lower_bound_bytes / unit, color="black", linestyle=":", linewidth=1, label="lower bound")
    axes.set(xlabel="time", ylabel=f"address, {name}", ylim=0)
    axes.set_title(f"{len(buffers):,} buffers in {placement.arena_bytes:,} bytes", loc="left", fontsize=10)
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


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

"""Pictures, for what people would rather look at than read. Need matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from olla.errors import OllaError
from olla.graph.plan import Placement
from olla.place.buffers import Buffer

__all__ = ["draw_placement"]


def draw_placement(buffers: Sequence[Buffer], placement: Placement, path: Path) -> None:
    """Draw each buffer as a rectangle: time to the right, addresses upwards.

    Raises
    ------
    OllaError
        If matplotlib is not there, or ``path`` does not end as a picture does.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise OllaError("drawing needs matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=(10, 6), layout="constrained")
    FigureCanvasAgg(figure)
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
    try:
        figure.savefig(path, dpi=110)
    except ValueError as error:
        raise OllaError(f"{path}: {error}") from error

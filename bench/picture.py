"""Pictures: peaks of eager PyTorch and of OLLA side by side, and peaks of contenders against their times."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.contest import Result
from bench.peers import EAGER, OLLA
from bench.row import Row
from bench.soak import Moment
from bench.summary import panels, saved

# Of the peers, by the first words of their names.
_COLORS = {EAGER: "#222222", "optimizer": "#55a868", "checkpoint": "#4c72b0", "torch.compile": "#dd8452"}
_OLLA_COLOR = "#c44e52"
_MARKERS = "os^DvP"  # in turn, within a color


def draw_peaks(rows: Sequence[Row], path: Path) -> None:
    """Write a PNG with a panel for each mode and batch size: two bars for each model, and the saving.

    Peaks of a panel are measured, if all of them are, else simulated. What failed is not in it.
    """
    from matplotlib import pyplot

    found = panels(row for row in rows if not row.error)
    columns = min(len(found), 2)
    height = 0.5 + (1.0 + 0.34 * max(map(len, found))) * -(-len(found) // columns)  # inches
    figure, grid = pyplot.subplots(-(-len(found) // columns), columns, figsize=(7 * columns, height), squeeze=False)
    figure.set_layout_engine("constrained")
    for axes in grid.flat[len(found) :]:
        axes.set_visible(False)
    for of_panel, axes in zip(found, grid.flat, strict=False):
        source = "simulated" if any(row.measured_planned_bytes is None for row in of_panel) else "measured"
        for at, row in enumerate(of_panel):
            eager, planned = (getattr(row, f"{source}_{order}_bytes") or 0 for order in ("eager", "planned"))
            axes.barh(at - 0.18, eager / 2**20, 0.36, color=_COLORS[EAGER], label=EAGER if at == 0 else None)
            axes.barh(at + 0.18, planned / 2**20, 0.36, color=_OLLA_COLOR, label=OLLA if at == 0 else None)
            text = {"textcoords": "offset points", "va": "center", "fontsize": 8}
            axes.annotate(f"{saved(planned, eager):.0%} saved", (eager / 2**20, at), (4, 0), **text)
        axes.set_yticks(range(len(of_panel)), [row.model for row in of_panel], fontsize=8)
        axes.set(ylim=(len(of_panel) - 0.4, -0.6), xlabel=f"{source} peak above what lives across steps, MiB")
        mode = "training" if of_panel[0].mode == "train" else "inference"
        axes.set_title(f"{mode}, batch {of_panel[0].batch_size}", loc="left", fontsize=10)
        axes.margins(x=0.12)
        _plain(axes)
        axes.grid(visible=False, axis="y")
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside upper right", ncols=2, frameon=False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def draw_contests(results: Sequence[Result], path: Path) -> None:
    """Write a PNG with a panel for each model; the lower left is the best place. What failed is not in it."""
    from matplotlib import pyplot

    models = list(dict.fromkeys(result.model for result in results))
    width = 3.6 * (len(models) + 1)  # inches; the last column is the legend's
    figure, columns = pyplot.subplots(1, len(models), figsize=(width, 3.8), squeeze=False, layout="constrained")
    styles = _styles(list(dict.fromkeys(result.contender for result in results)))
    known: dict[str, Any] = {}  # what the legend explains
    for model, axes in zip(models, columns[0], strict=True):
        shown = [result for result in results if result.model == model and result.time_ratio is not None]
        for result in shown:
            if result.contender in styles:
                [known[result.contender]] = axes.plot(*_point(result), **styles[result.contender])
        ours = sorted((_point(result) for result in shown if result.contender not in styles), key=lambda at: -at[1])
        if ours:
            line = {"marker": "o", "color": _OLLA_COLOR, "linewidth": 1.6, "markersize": 7, "zorder": 3}
            [known[f"{OLLA}, without a budget and within some"]] = axes.plot(*zip(*ours, strict=True), **line)
        axes.set_title(model, loc="left", fontsize=10)
        axes.set(xlabel="step time, eager PyTorch = 1", ylim=0)
        _plain(axes)
    columns[0][0].set_ylabel("peak above what lives across steps, MiB")
    figure.legend(known.values(), known.keys(), loc="outside right center", frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def draw_soak(moments: Sequence[Moment], path: Path) -> None:
    """Write a PNG of what the process holds, from step to step."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 2.6), layout="constrained")
    resident = [moment.resident_bytes / 2**20 for moment in moments]
    axes.plot([moment.steps for moment in moments], resident, color=_OLLA_COLOR, linewidth=1.6)
    axes.set(xlabel="steps", ylabel="resident memory, MiB", xlim=0, ylim=(0, 1.15 * max(resident)))
    _plain(axes)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _plain(axes: Any) -> None:
    axes.grid(color="#eeeeee")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _point(result: Result) -> tuple[float, float]:
    return result.time_ratio, result.peak_bytes / 2**20


def _styles(contenders: Sequence[str]) -> dict[str, dict[str, Any]]:
    """How each peer is marked: a color for each kind, a marker for each in it."""
    styles: dict[str, dict[str, Any]] = {}
    for kind, color in _COLORS.items():
        names = [name for name in contenders if name.startswith(kind)]
        for index, name in enumerate(names):
            marker = _MARKERS[index % len(_MARKERS)]
            styles[name] = {"marker": marker, "color": color, "linestyle": "", "markersize": 6.5, "alpha": 0.9}
    return styles

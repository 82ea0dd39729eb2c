"""A picture of contests: what each contender needs in bytes, against what it costs in time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.contest import Result
from bench.peers import EAGER, OLLA

# Of the peers, by the first words of their names.
_COLORS = {EAGER: "#222222", "optimizer": "#55a868", "checkpoint": "#4c72b0", "torch.compile": "#dd8452"}
_OLLA_COLOR = "#c44e52"
_MARKERS = "os^DvP"  # in turn, within a color


def draw(results: Sequence[Result], path: Path) -> None:
    """Write a PNG with a panel for each model; the lower left is the best place. What failed is not in it."""
    from matplotlib import pyplot

    models = list(dict.fromkeys(result.model for result in results))
    width = 3.6 * (len(models) + 1)  # inches; the last column is the legend's
    figure, panels = pyplot.subplots(1, len(models), figsize=(width, 3.8), squeeze=False, layout="constrained")
    styles = _styles(list(dict.fromkeys(result.contender for result in results)))
    known: dict[str, Any] = {}  # what the legend explains
    for model, axes in zip(models, panels[0], strict=True):
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
        axes.grid(color="#eeeeee")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel("peak above what lives across steps, MiB")
    figure.legend(known.values(), known.keys(), loc="outside right center", frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


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

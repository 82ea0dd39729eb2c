"""What the log holds as Markdown: the page of results, and the tables of other pages."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from bench import cells
from bench.backends import COMPILED
from bench.contest import Result
from bench.models import MODELS, QUICK
from bench.picture import draw_peaks, draw_soak
from bench.row import Row
from bench.soak import Moment
from bench.summary import PAPER, SUMMARY_COLUMNS, panels, saved, summaries
from bench.table import Columns, markdown
from olla.errors import OllaError

_END = "<!-- end of table -->"
_PACKAGES = re.compile(r"\S*site-packages/")  # where they are on the machine is nobody's business
_INTRODUCTION = """\
Bytes are in MiB, and those above what lives across steps (parameters, buffers, optimizer state, inputs). Weights are
random; training is with SGD and momentum."""
_LEGEND = """\
Means over the models. An order is *proven* if it is within 0.01 % of the best possible one. What an order *loses* is
the share of what PyTorch's CUDA caching allocator would reserve for it that is not in use at the peak, by the model
of it in `olla/measure/caching_allocator.py`; small steps lose much, because it reserves 2 or 20 MiB at least. *Saved in
all* is what it would reserve for the arena, and for the results outside of it, against what it would for eager
PyTorch. *Better orders* are those of PyTorch Inductor, or of the program, that beat the planned one.

*Half* is a budget of half of eager PyTorch's peak: the time that recomputing takes then, as a share of the step's, by
estimated times of operators; *at least* is what any schedule within it must take. Where half cannot be reached,
*smallest* is about what can be."""
_MEASURED = """\
Eager and planned steps in turn, in one process. Peaks are the allocator's, step times against eager PyTorch."""
_COMPILED = """\
One training step with `torch.compile`, by its backend, at batch {} to {}: the measured peak, in MiB. The loss and the
optimizer are outside of what is compiled. A budget is a share of what the step holds in eager PyTorch, parameters
included."""
_ORDERS: Columns[Row] = {
    "model": lambda row: row.model,
    "ops": lambda row: cells.number(row.ops),
    "eager": lambda row: cells.mebibytes(row.simulated_eager_bytes),
    "planned": lambda row: cells.mebibytes(row.simulated_planned_bytes),
    "bound": lambda row: cells.mebibytes(row.lower_bound_bytes),
    "gap": lambda row: cells.share(row.gap, 4),
    "saved by the order": lambda row: cells.share(saved(row.simulated_planned_bytes, row.simulated_eager_bytes)),
    "eager, reserved": lambda row: cells.mebibytes(row.reserved_eager_bytes),
    "planned, reserved": lambda row: cells.mebibytes(row.reserved_planned_bytes),
    "arena": lambda row: cells.mebibytes(row.simulated_arena_bytes),
    "arena loses": lambda row: cells.share(row.simulated_fragmentation, 2),
    "arena, reserved": lambda row: cells.mebibytes(row.reserved_arena_bytes),
    "saved in all": lambda row: cells.share(saved(row.reserved_arena_bytes, row.reserved_eager_bytes)),
    "half: more time": lambda row: cells.share(row.half_extra),
    "at least": lambda row: cells.share(row.half_least_extra),
    "smallest": lambda row: cells.mebibytes(row.smallest_bytes),
    "half: planning s": lambda row: cells.seconds(row.half_seconds),
    "planning s": lambda row: cells.seconds(row.planning_seconds),
    "placing s": lambda row: cells.seconds(row.placing_seconds),
}
_RUNS: Columns[Row] = {
    "model": lambda row: row.model,
    "mode": lambda row: row.mode,
    "batch": lambda row: str(row.batch_size),
    "eager": lambda row: cells.mebibytes(row.measured_eager_bytes),
    "planned": lambda row: cells.mebibytes(row.measured_planned_bytes),
    "saved": lambda row: cells.share(row.measured_saving),
    "to the byte": lambda row: cells.truth(row.exact),
    "fragmentation": lambda row: cells.share(row.fragmentation, 3),
    "eager step s": lambda row: f"{row.eager_step_seconds:.4f}",
    "step time": lambda row: cells.factor(row.time_ratio),
}


def write_document(
    rows: Sequence[Row], moments: Sequence[Moment], compiled: Sequence[Result], root: Path
) -> list[Path]:
    """Write docs/results.md and its pictures, and the tables between the markers of README.md; returns the paths.

    ``moments`` are those of a long run, ``compiled`` the results of the backends of ``torch.compile``; without any, the
    page has no such section.

    Raises
    ------
    OllaError
        If the rows do not have what belongs there, or the README lacks the markers; then nothing is written.
    """
    readme, page, picture = root / "README.md", root / "docs" / "results.md", root / "docs" / "results.png"
    filled = fill(readme, "quick", _quick(rows))
    long_run = root / "docs" / "soak.png"
    text = _page(rows, picture.name) + (_backends(compiled) if compiled else "")
    text += _soak(moments, long_run.name) if moments else ""
    draw_peaks(_simulated(rows), picture)
    if moments:
        draw_soak(moments, long_run)
    page.write_text(text, encoding="utf-8")
    readme.write_text(filled, encoding="utf-8")
    return [readme, page, picture, *([long_run] if moments else [])]


def fill(path: Path, name: str, table: str) -> str:
    """The text of the file, with the table in place of what is between its markers.

    Raises
    ------
    OllaError
        If the markers are not there, once.
    """
    begin, text = f"<!-- table: {name} -->", path.read_text(encoding="utf-8")
    before, found, rest = text.partition(begin)
    _, ended, after = rest.partition(_END)
    if not (found and ended) or begin in rest:
        raise OllaError(f"{path}: {begin} and, below it, {_END} must stand there once, around the table to be written")
    return f"{before}{begin}\n{table}\n{_END}{after}"


def _quick(rows: Sequence[Row]) -> str:
    """Training at batch 1, with the time against a malloc that is not tuned, and against one that is."""
    tuned = {row.model: row for row in _measured(rows, tuned=True) if (row.batch_size, row.mode) == (1, "train")}
    shown = [row for row in _measured(rows) if row.model in QUICK and (row.batch_size, row.mode) == (1, "train")]
    if not shown:
        raise OllaError(
            "the log has no measured row of a model in training at batch 1: run benchmarks.py --quick first"
        )
    columns: Columns[Row] = {
        "model": _RUNS["model"],
        "eager": lambda row: f"{cells.mebibytes(row.measured_eager_bytes)} MiB",
        "OLLA": lambda row: f"{cells.mebibytes(row.measured_planned_bytes)} MiB",
        "saved": lambda row: cells.share(row.measured_saving, 0),
        "step time": lambda row: cells.factor(row.time_ratio),
        "against a tuned malloc": lambda row: cells.factor(tuned[row.model].time_ratio if row.model in tuned else None),
    }
    used = [*shown, *(tuned[row.model] for row in shown if row.model in tuned)]
    exact, lost = sum(bool(row.exact) for row in used), max(row.fragmentation or 0.0 for row in used)
    return f"""\
{markdown(columns, shown)}

({_origin(used)} {exact} of {len(used)} measured peaks were the planned ones to the byte, and at most
{cells.share(lost, 2)} of an arena was fragmentation. All models: [docs/results.md](docs/results.md).)"""


def _page(rows: Sequence[Row], picture: str) -> str:
    simulated, measured = _simulated(rows), _measured(rows)
    if not simulated:
        raise OllaError("the log has no simulated row: run benchmarks.py first, for the paper's whole evaluation")
    failed = [row for row in rows if row.error and row.wanted_saving is None and not row.form]
    parts = [
        "# Results",
        f"Written by `python benchmarks.py --write`, from a log. {_origin([*simulated, *measured])}",
        _INTRODUCTION,
        "## In the mean",
        _LEGEND,
        markdown(SUMMARY_COLUMNS, summaries(simulated)),
        PAPER,
        f"![Peaks of eager PyTorch and of OLLA, and the saving]({picture})",
    ]
    for of_panel in panels(simulated):
        mode = "Training" if of_panel[0].mode == "train" else "Inference"
        parts += [f"## {mode}, batch {of_panel[0].batch_size}, simulated", markdown(_ORDERS, of_panel)]
    if measured:
        parts += ["## Measured", _MEASURED, markdown(_RUNS, measured)]
    if failed:
        parts += [
            "## Failed",
            *(f"- {row.model}, {row.mode}, batch {row.batch_size}: {_PACKAGES.sub('', row.error)}" for row in failed),
        ]
    return "\n\n".join(parts) + "\n"


def _backends(results: Sequence[Result]) -> str:
    """The section of ``torch.compile``: a row for each model, a column for each backend."""
    peaks = {(result.model, result.contender): result.peak_bytes for result in results}
    columns: Columns[str] = {"model": str}
    for contender in _distinct(result.contender for result in results):
        columns[contender] = lambda model, contender=contender: cells.mebibytes(peaks.get((model, contender)))
    batches = [subject.batch_size for subject in COMPILED.values()]
    what = _COMPILED.format(min(batches), max(batches))
    planned = [result for result in results if result.contender.startswith("olla")]
    same = sum(bool(result.same_numbers) for result in planned)
    return f"""
## torch.compile, by backend

{what} {same} of {len(planned)} trainings compiled with OLLA had the losses and parameters of eager
PyTorch, bit for bit. {_origin(results)}

{markdown(columns, _distinct(result.model for result in results))}
"""


def _soak(moments: Sequence[Moment], picture: str) -> str:
    """The section of a long run. It begins where caches are filled, a tenth of the way."""
    last = moments[-1]
    warm = [moment for moment in moments if moment.steps >= last.steps / 10]
    low, high = (cells.mebibytes(found(moment.resident_bytes for moment in warm)) for found in (min, max))
    return f"""
## Over {last.steps:,} steps

One step, a network of four linear layers with dropouts and Adam, again and again, on new batches: what the process
holds, PyTorch included. From step {warm[0].steps:,} on it was between {low} and {high} MiB, and
{last.missed:,} allocations of all steps missed their planned addresses. {_origin(moments)}

![Resident memory over {last.steps:,} steps]({picture})
"""


def _origin(rows: Sequence[Row | Moment | Result]) -> str:
    """Where, when and how the rows were made."""
    machines, dates = _distinct(row.machine for row in rows), sorted({row.date for row in rows})
    commands = ", ".join(f"`{command}`" for command in _distinct(row.command for row in rows))
    days = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    return f"{'; '.join(machines)}; {days}; made by {commands}."


def _distinct(texts: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(texts))


def _simulated(rows: Iterable[Row]) -> list[Row]:
    # With --quick, nobody asks what half costs: of two rows of one case, the one that knows counts.
    rows = sorted(rows, key=lambda row: row.half_extra is not None or row.smallest_bytes is not None)
    return _latest(rows, lambda row: row.reserved_arena_bytes is not None and "--skip-node-ordering" not in row.options)


def _measured(rows: Iterable[Row], *, tuned: bool = False) -> list[Row]:
    """Rows that ran in the planned order, without a budget, and with a tuned malloc or without."""
    return _latest(
        rows,
        lambda row: (
            row.time_ratio is not None
            and row.wanted_saving is None
            and "--skip-node-ordering" not in row.options
            and ("--tuned-malloc" in row.options) is tuned
        ),
    )


def _latest(rows: Iterable[Row], belongs: Callable[[Row], bool]) -> list[Row]:
    """Of those that belong, the last one of each model, batch size and mode; in the order of the models."""
    found = {(row.model, row.batch_size, row.mode): row for row in rows if belongs(row)}
    places = {name: place for place, name in enumerate(MODELS)}
    return sorted(found.values(), key=lambda row: (places.get(row.model, -1), row.mode != "train", row.batch_size))

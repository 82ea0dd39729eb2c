"""The parts of docs/results.md, each from what a log of its own holds."""

from __future__ import annotations

import re
from collections.abc import Sequence

from bench import cells
from bench.backends import BUDGET, COMPILED, WITHIN
from bench.contest import Result
from bench.evidence import Evidence, distinct, origin
from bench.peers import EAGER
from bench.row import Row
from bench.soak import Moment
from bench.summary import PAPER, SUMMARY_COLUMNS, panels, saved, summaries
from bench.table import Columns, markdown
from bench.training import SUBJECTS

__all__ = ["backends", "contests", "long_run", "orders"]

_PACKAGES = re.compile(r"\S*site-packages/")  # where they are on the machine is nobody's business
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
Eager and planned steps in turn, in one process for each row. Peaks are the allocator's, step times against eager
PyTorch."""
_COMPILED = """\
One training step, and one inference, with `torch.compile`, by its backend, at batch {} to {}: the measured peak, in
MiB, above what lives across steps. The loss of models for images, and the optimizer, are outside of what is compiled,
unless OLLA updates parameters in backward. A budget of {} is a share of what forward and backward hold as
`aot_eager` divides them, or in the model's own order if that is less, parameters and the optimizer's state included.
So these are in the last column, which is a share of what eager PyTorch was measured to hold. Where the smallest budget
that is found is larger, that one is kept."""
_PEERS = """\
Training, all contenders in turn in one process: peaks above what lives across steps, and times relative to the step
of eager PyTorch in the same round, with a malloc that keeps its memory. *Planned extra* is the time that OLLA's plan
adds for its budget, as a share of eager PyTorch's step, by the measured times of operators; *at least* is what any
schedule within it must add."""
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
_CONTENDERS: Columns[Result] = {
    "contender": lambda result: result.contender,
    "peak": lambda result: cells.mebibytes(result.peak_bytes),
    "saved": lambda result: cells.share(result.saving),
    "step s": lambda result: cells.seconds(result.step_seconds),
    "step time": lambda result: cells.factor(result.time_ratio),
    "same numbers": lambda result: cells.truth(result.same_numbers),
    "same running statistics": lambda result: cells.truth(result.same_buffers),
    "planned extra": lambda result: cells.share(result.extra),
    "at least": lambda result: cells.share(result.least_extra),
    "planning s": lambda result: cells.seconds(result.planning_seconds),
    "error": lambda result: result.error,
}


def orders(evidence: Evidence, picture: str) -> str:
    """What was simulated, with a picture of this name beside the page, and measured."""
    simulated, measured = evidence.simulated, evidence.measured()
    parts = [
        "## In the mean",
        f"{_LEGEND} {origin([*simulated, *measured])}",
        markdown(SUMMARY_COLUMNS, summaries(simulated)),
        PAPER,
        f"![Peaks of eager PyTorch and of OLLA, and the saving]({picture})",
    ]
    for of_panel in panels(simulated):
        mode = "Training" if of_panel[0].mode == "train" else "Inference"
        parts += [f"## {mode}, batch {of_panel[0].batch_size}, simulated", markdown(_ORDERS, of_panel)]
    if measured:
        parts += ["## Measured", _MEASURED, markdown(_RUNS, measured)]
    if failed := evidence.failed:
        lines = (f"- {row.model}, {row.mode}, batch {row.batch_size}: {_PACKAGES.sub('', row.error)}" for row in failed)
        parts += ["## Failed", "\n".join(lines)]
    return "\n\n".join(parts)


def contests(results: Sequence[Result], picture: str) -> str:
    """What else saves memory, with a picture of this name beside the page."""
    parts = ["## Beside what else saves memory", f"{_PEERS} {origin(results)}", f"![Peaks against times]({picture})"]
    for model in distinct(result.model for result in results):
        of_model = [result for result in results if result.model == model]
        parts += [f"### {model}, batch {SUBJECTS[model].batch_size}", markdown(_CONTENDERS, of_model)]
    return "\n\n".join(parts)


def backends(results: Sequence[Result]) -> str:
    """``torch.compile``: for each mode, a row for each model, a column for each backend."""
    batches = [subject.batch_size for subject in COMPILED.values()]
    theirs = {(result.model, result.mode): result for result in results if result.contender == "aot_eager"}
    planned = [result for result in results if result.contender.startswith("olla")]
    others = [result for result in planned if not result.same_numbers]
    excused = sum(not theirs[result.model, result.mode].same_numbers for result in others)
    parts = ["## torch.compile, by backend", _COMPILED.format(min(batches), max(batches), BUDGET)]
    same = f"{len(planned) - len(others)} had the numbers of eager PyTorch, bit for bit"
    why = f"{excused} are of models whose numbers `aot_eager` changes, too"
    parts += [f"Of {len(planned)} runs compiled with OLLA, {same}, and {why}. {origin(results)}"]
    for mode, title in (("train", "Training"), ("eval", "Inference")):
        if of_mode := [result for result in results if result.mode == mode]:
            found = {(result.model, result.contender): result for result in of_mode}
            columns: Columns[str] = {"model": str}
            for name in distinct(result.contender for result in of_mode):
                columns[name] = lambda model, found=found, name=name: _peak(found.get((model, name)))
            if mode == "train":
                columns["held then, of eager's"] = lambda model, found=found: _held(
                    found.get((model, WITHIN)), found.get((model, EAGER))
                )
            parts += [f"### {title}", markdown(columns, distinct(result.model for result in of_mode))]
    return "\n\n".join(parts)


def _peak(result: Result | None) -> str:
    return "-" if result is None else cells.mebibytes(result.peak_bytes)


def _held(result: Result | None, eager: Result | None) -> str:
    """All bytes at the peak, parameters included, as a share of eager PyTorch's."""
    held = [(one.peak_bytes or 0) + (one.persistent_bytes or 0) for one in (result, eager) if one and not one.error]
    return f"{held[0] / held[1]:.2f}" if len(held) == 2 else "-"


def long_run(moments: Sequence[Moment], picture: str) -> str:
    """A long run, from where caches are filled, a tenth of the way; a picture of this name is beside the page."""
    last = moments[-1]
    warm = [moment for moment in moments if moment.steps >= last.steps / 10]
    low, high = (cells.mebibytes(found(moment.resident_bytes for moment in warm)) for found in (min, max))
    return f"""\
## Over {last.steps:,} steps

One step, a network of four linear layers with dropouts and Adam, again and again, on new batches: what the process
holds, PyTorch included. From step {warm[0].steps:,} on it was between {low} and {high} MiB, and
{last.missed:,} allocations of all steps missed their planned addresses. {origin(moments)}

![Resident memory over {last.steps:,} steps]({picture})"""

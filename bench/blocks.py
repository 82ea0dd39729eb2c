"""What the README and docs/cuda.md quote from the logs, between markers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import zip_longest
from statistics import mean, median

from bench import cells
from bench.comparison import SAVINGS
from bench.contest import Result
from bench.evidence import Evidence, distinct, origin
from bench.models import QUICK
from bench.peers import EAGER, OLLA
from bench.row import PLACING_SECONDS, Row
from bench.summary import saved
from bench.table import Columns, markdown
from olla.errors import OllaError
from olla.order.baselines import INDUCTOR

__all__ = ["gpu", "gpu_in_short", "orders", "peers", "quick"]

_COMPILING = "torch.compile"
_SHOWN = (  # of the peers; the others are on the page of results
    EAGER,
    "optimizer in backward",
    "checkpoint every block, optimizer in backward",
    "torch.compile",
    "torch.compile, budget 0.5",
    "torch.compile, checkpoint every block",
)
_ON_GPU: Columns[Row] = {
    "model": lambda row: row.model,
    "batch": lambda row: str(row.batch_size),
    "mode": lambda row: row.mode,
    "to be saved": lambda row: SAVINGS[row.wanted_saving] if row.wanted_saving else "-",
    "eager": lambda row: f"{cells.mebibytes(row.measured_eager_bytes)} MiB",
    "OLLA": lambda row: f"{cells.mebibytes(row.measured_planned_bytes)} MiB",
    "saved": lambda row: cells.share(row.measured_saving),
    "to the byte": lambda row: cells.truth(row.exact),
    "step time": lambda row: cells.factor(row.time_ratio),
}
_WITHIN: Columns[Row] = {
    **{name: text for name, text in _ON_GPU.items() if name != "step time"},
    "may spill": lambda row: cells.truth("--spilling" in row.options),
    "operators again": lambda row: cells.number(row.recomputed),
    "spilled": lambda row: f"{cells.mebibytes(row.spilled_bytes)} MiB" if row.spilled_bytes else "-",
    "step time": _ON_GPU["step time"],
}
_RESERVED: Columns[Row] = {
    "model": lambda row: row.model,
    "batch": lambda row: str(row.batch_size),
    "eager": lambda row: f"{cells.mebibytes(row.reserved_eager_bytes)} MiB",
    "planned order, without an arena": lambda row: f"{cells.mebibytes(row.reserved_planned_bytes)} MiB",
    "arena": lambda row: f"{cells.mebibytes(row.arena_bytes)} MiB",
}
_PLACED = 1e-3  # of an arena that may be lost
_ORDERS = """\
How close to the best possible order? Over the {graphs} graphs of `benchmarks.py` ({models} models, batch {batches},
training and inference; {failed} more fail) the proven gap is at most {gap:.4%}, and zero on {closed}. Planning takes
{planning:.2f} s in the median for training, once the planners are compiled, and at most {slowest:.1f} s
({slowest_case}). The orders of PyTorch Inductor (least peak memory first, breadth first, depth first) are better on
{beaten} of the graphs; in training at batch {small} its best one needs up to {inductor:.1f} times as much.

An order alone is worth little to an allocator that keeps what it once got. A model of PyTorch's CUDA caching
allocator, held against the real one, says what it would reserve for the {smalls} graphs of training at batch {small}:
for the planned order {reserved:.2f} of what eager PyTorch makes it reserve (median), while the live bytes fall to
{live:.2f}. The arena needs {arena:.2f}, with {placed} of all {graphs} graphs placed within 0.1 % of the live bytes in
{limit} s, {placing:.3f} s in the median. In the mean, arenas reserve {saved_small:.0%} less than eager PyTorch in
training at batch {small}, and {saved_large:.0%} less at batch {large}. Half of eager PyTorch's peak costs {half} more
time in training at batch {large}, in the mean of the {halves} of {larges} models that reach it, by estimated times of
operators. All of it is in [docs/results.md](docs/results.md)."""
_PEERS = """\
Of the points of these three models that other means reach with the kernels of eager PyTorch, {eager_kernels} need at
least the bytes *and* the time of one of OLLA's; of those of `torch.compile`, whose kernels give other bits,
{compiled}. Every plan says how much time any schedule within its budget must add at least, by the measured times of
the operators: these plans add {slack:.1%} of a step more than that in the median, and at most {loosest:.1%}
({where}). Planning took {fastest:.0f} to {slowest:.0f} seconds."""


def quick(evidence: Evidence) -> str:
    """Training at batch 1, with the time against a malloc that is not tuned, and against one that is.

    Raises
    ------
    OllaError
        If nothing of it was measured.
    """
    tuned = {row.model: row for row in evidence.measured(tuned=True) if (row.batch_size, row.mode) == (1, "train")}
    shown = [row for row in evidence.measured() if row.model in QUICK and (row.batch_size, row.mode) == (1, "train")]
    if not shown:
        raise OllaError(
            "the log has no measured row of a model in training at batch 1: run benchmarks.py --quick first"
        )
    columns: Columns[Row] = {
        "model": lambda row: row.model,
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

({origin(used)} {exact} of {len(used)} measured peaks were the planned ones to the byte, and at most
{cells.share(lost, 2)} of an arena was fragmentation. All models: [docs/results.md](docs/results.md).)"""


def orders(evidence: Evidence) -> str:
    """How good orders and addresses are, and what half of the bytes costs.

    Raises
    ------
    OllaError
        If no training was simulated.
    """
    rows = evidence.simulated
    training = [row for row in rows if row.mode == "train"]
    if not training:
        raise OllaError("the log has no simulated row in training: run benchmarks.py first")
    batches = sorted({row.batch_size for row in training})
    small, large = ([row for row in training if row.batch_size == batch] for batch in (batches[0], batches[-1]))
    slowest = max(training, key=lambda row: row.planning_seconds or 0.0)
    halves = [row.half_extra for row in large if row.half_extra is not None]
    return _ORDERS.format(
        graphs=len(rows),
        models=len({row.model for row in rows}),
        batches=" and ".join(map(str, batches)),
        failed=len(evidence.failed),
        gap=max(row.gap or 0.0 for row in rows),
        closed=sum(not row.gap for row in rows),
        planning=median(row.planning_seconds or 0.0 for row in training),
        slowest=slowest.planning_seconds or 0.0,
        slowest_case=f"{slowest.model} at batch {slowest.batch_size}",
        beaten=sum(_best_of_inductor(row) < (row.simulated_planned_bytes or 0) for row in rows),
        inductor=max(_best_of_inductor(row) / (row.simulated_planned_bytes or 1) for row in small),
        small=batches[0],
        smalls=len(small),
        large=batches[-1],
        larges=len(large),
        reserved=median((row.reserved_planned_bytes or 0) / (row.reserved_eager_bytes or 1) for row in small),
        live=median((row.simulated_planned_bytes or 0) / (row.simulated_eager_bytes or 1) for row in small),
        arena=median((row.simulated_arena_bytes or 0) / (row.reserved_eager_bytes or 1) for row in small),
        placed=sum((row.simulated_fragmentation or 0.0) <= _PLACED for row in rows),
        limit=PLACING_SECONDS,
        placing=median(row.placing_seconds or 0.0 for row in rows),
        saved_small=mean(saved(row.reserved_arena_bytes, row.reserved_eager_bytes) for row in small),
        saved_large=mean(saved(row.reserved_arena_bytes, row.reserved_eager_bytes) for row in large),
        halves=len(halves),
        half=cells.share(mean(halves) if halves else None),
    )


def _best_of_inductor(row: Row) -> int:
    return min(getattr(row, f"inductor_{name}_bytes") or 0 for name in INDUCTOR)


def peers(results: Sequence[Result]) -> str:
    """What else saves memory, in short, and how many of its points OLLA beats in bytes and in time.

    Raises
    ------
    OllaError
        If OLLA took part in none of the budgets.
    """
    by_model = {model: [one for one in results if one.model == model] for model in distinct(r.model for r in results)}
    lines = [(name, [_named(name, of_model) for of_model in by_model.values()]) for name in _SHOWN]
    ours = [[one for one in of_model if one.contender.startswith(OLLA)] for of_model in by_model.values()]
    for at, points in enumerate(zip_longest(*ours)):
        lines.append((f"**{OLLA}**, {'within a budget' if at else 'order alone'}", list(points)))
    columns: dict[str, Callable[[tuple[str, list[Result | None]]], str]] = {"contender": lambda line: line[0]}
    for at, model in enumerate(by_model):
        columns[model] = lambda line, at=at: _point(line[1][at])
    planned = [result for result in results if result.extra]
    if not planned:
        raise OllaError("the log of peers has no plan within a budget: run benchmarks.py --peers first")
    loosest = max(planned, key=_slack)
    seconds = [result.planning_seconds or 0.0 for result in planned]
    return f"""\
{markdown(columns, lines)}

{
        _PEERS.format(
            eager_kernels=_beaten(results, compiled=False),
            compiled=_beaten(results, compiled=True),
            slack=median(map(_slack, planned)),
            loosest=_slack(loosest),
            where=f"{loosest.model}, {loosest.contender}",
            fastest=min(seconds),
            slowest=max(seconds),
        )
    } ({origin(results)})"""


def _named(name: str, results: Sequence[Result]) -> Result | None:
    return next((result for result in results if result.contender == name), None)


def _point(result: Result | None) -> str:
    if result is None or result.peak_bytes is None:
        return "-"
    return f"{cells.mebibytes(result.peak_bytes)} MiB, {cells.factor(result.time_ratio)}"


def _slack(result: Result) -> float:
    """What a plan may add too much, as a share of eager PyTorch's step."""
    return (result.extra or 0.0) - (result.least_extra or 0.0)


def _beaten(results: Sequence[Result], *, compiled: bool) -> str:
    """Of the peers, those that OLLA needs no more bytes and no more time than."""
    ran = [result for result in results if result.peak_bytes is not None and result.time_ratio is not None]
    ours = [result for result in ran if result.contender.startswith(OLLA)]
    theirs = [result for result in ran if result not in ours and result.contender.startswith(_COMPILING) is compiled]
    beaten = [
        peer
        for peer in theirs
        if any(
            one.model == peer.model and one.peak_bytes <= peer.peak_bytes and one.time_ratio <= peer.time_ratio
            for one in ours
        )
    ]
    return f"{len(beaten)} of {len(theirs)}"


def gpu_in_short(evidence: Evidence) -> str:
    """Peaks on a GPU, without budgets and within some."""
    rows = [*evidence.measured("cuda"), *(row for row in evidence.within_budgets if "--spilling" not in row.options)]
    return f"{markdown(_ON_GPU, rows)}\n\n({origin(rows)})"


def gpu(evidence: Evidence) -> str:
    """Peaks, times and what the caching allocator reserves on a GPU."""
    measured, within, profiled = evidence.measured("cuda"), evidence.within_budgets, evidence.profiled
    parts = [markdown(_ON_GPU, measured), "Within budgets:", markdown(_WITHIN, within)]
    parts += ["What the caching allocator reserves:", markdown(_RESERVED, profiled)]
    return "\n\n".join([*parts, f"({origin([*measured, *within, *profiled])})"])

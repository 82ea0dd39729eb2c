"""The table on the console, which grows while the rows are run."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

from bench.cells import factor, mebibytes, milliseconds, number, seconds, share, truth
from bench.comparison import SAVINGS
from bench.row import Row

_TEXT = ("model", "mode", "form", "solver", "status", "error")
_COLUMNS: dict[str, Callable[[Row], str]] = {
    "model": lambda row: row.model,
    "batch": lambda row: str(row.batch_size),
    "mode": lambda row: row.mode,
    "device": lambda row: row.device or "-",
    "wanted": lambda row: "-" if row.wanted_saving is None else SAVINGS[row.wanted_saving],
    "form": lambda row: row.form or "-",
    "solver": lambda row: row.solver or "-",
    "ops": lambda row: number(row.ops),
    "variables": lambda row: number(row.variables),
    "rows": lambda row: number(row.constraints),
    "build s": lambda row: seconds(row.build_seconds),
    "solve s": lambda row: seconds(row.solve_seconds),
    "objective": lambda row: _objective(row, row.objective),
    "bound": lambda row: _objective(row, row.bound),
    "eager MiB": lambda row: mebibytes(row.simulated_eager_bytes),
    "planned": lambda row: mebibytes(row.simulated_planned_bytes),
    "eager reserved": lambda row: mebibytes(row.reserved_eager_bytes),
    "planned reserved": lambda row: mebibytes(row.reserved_planned_bytes),
    "gap": lambda row: share(row.gap, 2),
    "status": lambda row: row.status or "-",
    "capture s": lambda row: seconds(row.capture_seconds),
    "plan s": lambda row: seconds(row.planning_seconds),
    "arena": lambda row: mebibytes(row.arena_bytes),
    "fragmentation": lambda row: share(row.fragmentation, 3),
    "place s": lambda row: seconds(row.placing_seconds),
    "LPMF": lambda row: mebibytes(row.inductor_lpmf_bytes),
    "BFS": lambda row: mebibytes(row.inductor_bfs_bytes),
    "DFS": lambda row: mebibytes(row.inductor_dfs_bytes),
    "eager MiB, measured": lambda row: mebibytes(row.measured_eager_bytes),
    "planned, measured": lambda row: mebibytes(row.measured_planned_bytes),
    "saved": lambda row: share(row.measured_saving),
    "exact": lambda row: truth(row.exact),
    "missed": lambda row: number(row.missed),
    "ops again": lambda row: number(row.recomputed),
    "spilled": lambda row: mebibytes(row.spilled_bytes or None),
    "took s": lambda row: seconds(row.spill_seconds),
    "more s": lambda row: seconds(row.extra_seconds),
    "at least": lambda row: seconds(row.least_extra_seconds),
    "time": lambda row: factor(row.time_ratio),
    "allocations": lambda row: milliseconds(row.allocation_seconds),
    "in the arena": lambda row: milliseconds(row.arena_allocation_seconds),
    "error": lambda row: row.error[:60],
}


def _objective(row: Row, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value * 1e3:,.3f} ms" if row.form in ("recompute", "spill") else f"{value / 2**20:,.3f} MiB"


def show(cases: list[Row], run: Callable[[Row], None]) -> Iterator[Row]:
    """Run the cases, with a table and a progress bar that grow while they run."""
    from rich.console import Console, Group
    from rich.live import Live
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(width=None if sys.stdout.isatty() else 200)
    rows: list[Row] = []
    progress = Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    task = progress.add_task("", total=len(cases))
    with Live(Group(_table(rows), progress), console=console, transient=True) as live:
        for case in cases:
            progress.update(task, description=f"{case.model}, batch {case.batch_size}, {case.form or case.mode}")
            run(case)
            rows.append(case)
            progress.advance(task)
            live.update(Group(_table(rows), progress), refresh=True)
            yield case
    console.print(_table(rows))


def _table(rows: list[Row]) -> Any:
    from rich.table import Table

    integer_program = any(row.form for row in rows)
    table = Table(
        title="The integer program, and what solvers make of it"
        if integer_program
        else "Peak above what lives across steps: eager PyTorch and OLLA"
    )
    empty = ("", "-")
    shown = {name: text for name, text in _COLUMNS.items() if any(text(row) not in empty for row in rows)}
    for name in shown:
        table.add_column(name, justify="left" if name in _TEXT else "right")
    for row in rows:
        table.add_row(*(text(row) for text in shown.values()))
    return table

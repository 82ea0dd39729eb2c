"""The table on the console, which grows while the rows are run."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from bench.cells import factor, mebibytes, milliseconds, number, seconds, share, truth
from bench.comparison import SAVINGS
from bench.row import Row

T = TypeVar("T")
Columns = Mapping[str, Callable[[T], str]]  # the text of each cell, by the name of its column

_TEXT = ("model", "mode", "form", "solver", "status", "contender", "error")
_EMPTY = ("", "-")
_COLUMNS: Columns[Row] = {
    "model": lambda row: row.model,
    "batch": lambda row: str(row.batch_size),
    "mode": lambda row: row.mode,
    "device": lambda row: "-" if row.device in (None, "cpu") else row.device,
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
    "status": lambda row: row.status if row.form and row.status else "-",
    "arena reserved": lambda row: mebibytes(row.reserved_arena_bytes),
    "arena": lambda row: mebibytes(_arena(row)[0]),
    "arena lost": lambda row: share(_arena(row)[1], 2),
    "half: more time": lambda row: share(row.half_extra),
    "plan s": lambda row: seconds(row.planning_seconds),
    "place s": lambda row: seconds(row.placing_seconds),
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


def _arena(row: Row) -> tuple[int | None, float | None]:
    """Its bytes and its fragmentation, as simulated, or else as it was run."""
    if row.simulated_arena_bytes is None:
        return row.arena_bytes, row.fragmentation
    return row.simulated_arena_bytes, row.simulated_fragmentation


def show(cases: list[Row], run: Callable[[Row], None]) -> None:
    """Run the cases, with a table and a progress bar that grow while they run; the table stays, even if one fails."""
    from rich.console import Group
    from rich.live import Live
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = _console()
    rows: list[Row] = []
    progress = Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    task = progress.add_task("", total=len(cases))
    try:
        with Live(Group(_row_table(rows), progress), console=console, transient=True) as live:
            for case in cases:
                progress.update(task, description=f"{case.model}, batch {case.batch_size}, {case.form or case.mode}")
                run(case)
                rows.append(case)
                progress.advance(task)
                live.update(Group(_row_table(rows), progress), refresh=True)
    finally:
        console.print(_row_table(rows))


def show_table(title: str, columns: Columns[T], rows: Sequence[T]) -> None:
    """Print the rows."""
    _console().print(_table(title, columns, rows))


def markdown(columns: Columns[T], rows: Sequence[T]) -> str:
    """The rows as a table of Markdown, without the columns that are empty."""
    columns = _filled(columns, rows)
    lines = [list(columns), ["---" if name in _TEXT else "---:" for name in columns]]
    lines += [[text(row).replace("|", "\\|") for text in columns.values()] for row in rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _row_table(rows: Sequence[Row]) -> Any:
    if any(row.form for row in rows):
        return _table("The integer program, and what solvers make of it", _COLUMNS, rows)
    return _table("Peak above what lives across steps: eager PyTorch and OLLA", _COLUMNS, rows)


def _table(title: str, columns: Columns[T], rows: Sequence[T]) -> Any:
    from rich.table import Table

    columns = _filled(columns, rows)
    table = Table(title=title)
    for name in columns:
        table.add_column(name, justify="left" if name in _TEXT else "right")
    for row in rows:
        table.add_row(*(text(row) for text in columns.values()))
    return table


def _filled(columns: Columns[T], rows: Sequence[T]) -> Columns[T]:
    return {name: text for name, text in columns.items() if any(text(row) not in _EMPTY for row in rows)}


def _console() -> Any:
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 200)

"""Rows as CSV."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from bench.row import Row


def write_log(rows: list[Row], path: Path, *, append: bool) -> None:
    """Write the rows as CSV; with ``append``, below those that are there."""
    import pandas

    frame = pandas.DataFrame([asdict(row) for row in rows])
    if append and path.exists():
        frame = pandas.concat([pandas.read_csv(path), frame])
    frame.to_csv(path, index=False)

"""Rows and results as CSV."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any


def write_log(rows: Sequence[Any], path: Path, *, append: bool) -> None:
    """Write rows, which are dataclasses, as CSV; with ``append``, below those that are there."""
    import pandas

    frame = pandas.DataFrame([asdict(row) for row in rows])
    if append and path.exists():
        frame = pandas.concat([pandas.read_csv(path), frame])
    frame.to_csv(path, index=False)

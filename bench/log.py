"""Rows and results as CSV."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar, get_args, get_type_hints

from olla.errors import OllaError

T = TypeVar("T")

_READ = {bool: {"True": True, "False": False}.__getitem__, int: int, float: float, str: str}


def write_log(rows: Sequence[Any], path: Path) -> None:
    """Write rows, which are dataclasses of one kind, as CSV; whenever this is stopped, the file is a whole one."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(rows[0])], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    part = path.with_name(f"{path.name}.part")
    try:
        part.write_text(text.getvalue())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def set_aside(path: Path) -> Path:
    """Make room for a new log: one that is there, as hours of measuring may be, gets the name that is returned."""
    before = path.with_suffix(f".before{path.suffix}")
    if path.exists():
        os.replace(path, before)
    return before


def read_log(path: Path, kind: type[T]) -> list[T]:
    """The rows of a log, which has a column for each field of ``kind``, and no other.

    Raises
    ------
    OllaError
        If the file cannot be read, or is not such a log; the message names the columns, or the line.
    """
    names = kind.__annotations__.keys()
    try:
        with path.open(newline="") as file:
            reader = csv.DictReader(file, strict=True)
            if wrong := sorted(names ^ set(reader.fieldnames or ())):
                raise OllaError(
                    f"{path}: not a log of this version and of these rows: it lacks, or has besides, {len(wrong)} of "
                    f"its columns: {', '.join(wrong[:3])}; name another file with --log-path"
                )
            return [_row(line, kind, f"{path}, line {reader.line_num}") for line in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise OllaError(f"{path}: cannot be read as a log: {error}; name another file with --log-path") from error


def _row(line: dict[str, str | None], kind: type[T], where: str) -> T:
    remedy = "mend or remove the line, or name another file with --log-path"
    if None in line:
        raise OllaError(f"{where}: more values than columns; {remedy}")
    values = {}
    for name, expected in get_type_hints(kind).items():
        try:
            values[name] = _value(line[name], get_args(expected) or (expected,))
        except (KeyError, ValueError):
            found = "missing" if line[name] is None else f"{line[name]!r}, not {kind.__annotations__[name]}"
            raise OllaError(f"{where}: {name} is {found}; {remedy}") from None
    return kind(**values)


def _value(text: str | None, kinds: tuple[type, ...]) -> Any:
    """What the text says; no text is None, where that may be."""
    if text is None:
        raise ValueError
    return None if text == "" and NoneType in kinds else _READ[kinds[0]](text)

"""Rows and results as CSV."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from olla.errors import OllaError

T = TypeVar("T")


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


def read_log(path: Path, kind: type[T]) -> list[T]:
    """The rows of a log, which has a column for each field of ``kind``, and no other.

    Raises
    ------
    OllaError
        If the file cannot be read, or is not such a log; the message names the column and the line.
    """
    types = get_type_hints(kind)
    try:
        with path.open(newline="") as file:
            reader = csv.DictReader(file, strict=True)
            wrong = sorted(types.keys() ^ set(reader.fieldnames or ()))
            if wrong:
                raise OllaError(
                    f"{path}: not a log of this version and of these rows: it lacks, or has besides, {len(wrong)} of "
                    f"its columns: {', '.join(wrong[:3])}; name another file with --log-path"
                )
            return [kind(**_values(line, types, f"{path}, line {reader.line_num}")) for line in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise OllaError(f"{path}: cannot be read as a log: {error}") from error


def _values(line: dict[str, str], types: dict[str, Any], where: str) -> dict[str, Any]:
    values = {}
    for name, expected in types.items():
        try:
            values[name] = _value(line[name], expected)
        except (TypeError, ValueError, KeyError):
            text = "nothing" if line[name] is None else repr(line[name])
            raise OllaError(
                f"{where}: {name} is {text}, not {expected}; mend or remove the line, or name another file with "
                "--log-path"
            ) from None
    if None in line:
        raise OllaError(f"{where}: more values than columns; mend or remove the line")
    return values


def _value(text: str, expected: Any) -> Any:
    """What stands for a value of this type; nothing stands for None, where that is one."""
    if text is None:
        raise ValueError
    if expected is str:
        return text
    if text == "" and expected == expected | None:
        return None
    for kind, read in ((bool, {"True": True, "False": False}.__getitem__), (int, int), (float, float), (str, str)):
        if kind is expected or expected == kind | None:
            return read(text)
    raise TypeError

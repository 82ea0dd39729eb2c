"""Buffers to place, and the CSV files that hold them."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from olla.errors import InvalidBuffersError

__all__ = ["Buffer", "read_csv", "write_csv"]

_COLUMNS = ("id", "lower", "upper", "size", "alignment", "offset")
_REQUIRED = ("lower", "upper", "size")
_LARGEST = 2**53  # bytes, and units of time


@dataclass(frozen=True, slots=True)
class Buffer:
    """Some bytes that are needed for some time: at all times ``t`` with ``lower <= t < upper``.

    Raises
    ------
    InvalidBuffersError
        For an empty or negative lifetime, a negative or huge size, an alignment below 1, or an
        offset that is negative or not a multiple of the alignment.
    """

    lower: int  # the first time
    upper: int  # the first time after it
    size: int  # bytes
    alignment: int = 1  # the offset is a multiple of it
    offset: int | None = None  # the only offset that it may have; None: any
    name: str = ""  # for messages, files and pictures

    def __post_init__(self) -> None:
        who = f"buffer {self.name!r}" if self.name else "a buffer"
        numbers = (self.lower, self.upper, self.size, self.alignment, 0 if self.offset is None else self.offset)
        if any(type(number) is not int for number in numbers):
            raise InvalidBuffersError(f"{who} holds something that is not an integer: {numbers}")
        if self.upper <= self.lower:
            raise InvalidBuffersError(f"{who} lives from {self.lower} to {self.upper}: upper must be above lower")
        if max(abs(number) for number in numbers) > _LARGEST:
            raise InvalidBuffersError(f"{who} holds a number above 2**53: {numbers}")
        if self.size < 0:
            raise InvalidBuffersError(f"{who} has the negative size {self.size}")
        if self.alignment < 1:
            raise InvalidBuffersError(f"{who} has the alignment {self.alignment}: it must be at least 1")
        if self.offset is not None and (self.offset < 0 or self.offset % self.alignment):
            raise InvalidBuffersError(
                f"{who} has the fixed offset {self.offset}: it must be a multiple of {self.alignment}, not negative"
            )


def read_csv(path: str | Path) -> list[Buffer]:
    """Read buffers in MiniMalloc's format: ``id,lower,upper,size``, and perhaps ``alignment`` and ``offset``.

    Raises
    ------
    InvalidBuffersError
        For anything that is not of that form, an ``id`` that occurs twice, or a buffer that cannot
        be; the message names the line.
    """
    try:
        rows = list(csv.reader(Path(path).read_text().splitlines()))
    except UnicodeDecodeError as error:
        raise InvalidBuffersError(f"{path} is not a text file: {error}") from error
    header = [name.strip() for name in rows[0]] if rows else []
    if not set(_REQUIRED) <= set(header) <= set(_COLUMNS) or len(set(header)) != len(header):
        raise InvalidBuffersError(f"{path}, line 1: the columns must be id,lower,upper,size[,alignment][,offset]")
    buffers: dict[str, Buffer] = {}
    for line, row in enumerate(rows[1:], start=2):
        if not row:
            continue
        try:
            if len(row) != len(header):
                raise InvalidBuffersError(f"{len(row)} values for {len(header)} columns")
            values = dict(zip(header, (value.strip() for value in row), strict=True))
            name = values.pop("id", str(line - 2))
            if name in buffers:
                raise InvalidBuffersError(f"the id {name!r} occurs twice")
            buffers[name] = Buffer(name=name, **{key: _integer(text) for key, text in values.items() if text})
        except (InvalidBuffersError, TypeError) as error:
            raise InvalidBuffersError(f"{path}, line {line}: {error}") from error
    return list(buffers.values())


def write_csv(path: str | Path, buffers: Sequence[Buffer], offsets: Sequence[int]) -> None:
    """Write buffers and where they are, in MiniMalloc's format."""
    with Path(path).open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(_COLUMNS)
        for index, (buffer, offset) in enumerate(zip(buffers, offsets, strict=True)):
            name = buffer.name or str(index)
            writer.writerow([name, buffer.lower, buffer.upper, buffer.size, buffer.alignment, offset])


def _integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise InvalidBuffersError(f"{text!r} is not an integer") from None

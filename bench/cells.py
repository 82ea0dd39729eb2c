"""Figures as the text of a table; a figure that is not there is a dash."""

from __future__ import annotations


def number(value: int | None) -> str:
    """With commas."""
    return "-" if value is None else f"{value:,}"


def mebibytes(value: int | None) -> str:
    """Of bytes."""
    return "-" if value is None else f"{value / 2**20:,.1f}"


def seconds(value: float | None) -> str:
    """To a hundredth."""
    return "-" if value is None else f"{value:.2f}"


def milliseconds(value: float | None) -> str:
    """Of seconds, with the unit."""
    return "-" if value is None else f"{value * 1e3:.2f} ms"


def share(value: float | None, digits: int = 1) -> str:
    """In percent."""
    return "-" if value is None else f"{value:.{digits}%}"


def factor(value: float | None) -> str:
    """How many times as much."""
    return "-" if value is None else f"{value:.2f} x"


def truth(value: bool | None) -> str:
    """Yes or no."""
    return "-" if value is None else "yes" if value else "no"

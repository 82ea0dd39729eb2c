"""Bytes for people."""

from __future__ import annotations

__all__ = ["format_bytes"]


def format_bytes(size: int) -> str:
    """``size`` in MiB; in GiB from 10 GiB up, in KiB below 0.1 MiB, and in bytes below 1 KiB."""
    if size >= 10 * 2**30:
        return f"{size / 2**30:,.2f} GiB"
    if size < 2**10:
        return f"{size:,} bytes"
    if size < 0.1 * 2**20:
        return f"{size / 2**10:,.2f} KiB"
    return f"{size / 2**20:,.2f} MiB"

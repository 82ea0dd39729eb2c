"""One line that says what takes so long: on a terminal, and nowhere else."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["stage"]

log = logging.getLogger(__name__)


@contextmanager
def stage(what: str, wanted: bool | None) -> Iterator[None]:
    """Show ``what`` with a spinner while the block runs; None: only if standard error is a terminal."""
    started = time.perf_counter()
    if sys.stderr.isatty() if wanted is None else wanted:
        from rich.console import Console

        with Console(stderr=True).status(f"OLLA: {what}"):
            yield
    else:
        yield
    log.info("%s: %.2f s", what, time.perf_counter() - started)

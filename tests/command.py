"""The command line, run in this process."""

from __future__ import annotations

import contextlib
import io

from olla.cli import main

__all__ = ["run_main"]


def run_main(*arguments: object) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of ``olla`` with these arguments."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main([str(argument) for argument in arguments])
    return status, out.getvalue(), err.getvalue()

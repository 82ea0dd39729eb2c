"""A process of its own for what is timed: nothing before it has changed its malloc, its caches or its threads."""

from __future__ import annotations

import signal
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

__all__ = ["apart"]


def apart(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """What ``function`` returns in a new process, which Ctrl-C ends. It must not raise.

    Raises
    ------
    RuntimeError
        If the process ends before, as when the system has no memory left.
    """
    context = get_context("spawn")  # a forked one would have threads that do not run
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, function, args, kwargs), daemon=True)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # it leaves Ctrl-C to this one
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    sender.close()
    try:
        result: T = receiver.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"its process has ended with exit code {process.exitcode}") from None
    finally:
        process.kill()
        process.join()
    return result


def _send(sender: Connection, function: Callable[P, T], args: P.args, kwargs: P.kwargs) -> None:
    sender.send(function(*args, **kwargs))

"""Ctrl-C in tests."""

from __future__ import annotations

import signal
import unittest


def heed_interrupts(test: unittest.TestCase) -> None:
    """Let Ctrl-C raise KeyboardInterrupt, also if the tests were started to ignore it (``nohup``, ``&``)."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    test.addCleanup(signal.signal, signal.SIGINT, before)

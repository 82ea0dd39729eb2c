"""Brings the tests that need a GPU, in ``cuda/``, into the run of all tests; elsewhere they are skipped."""

from __future__ import annotations

import unittest
from pathlib import Path


def load_tests(loader: unittest.TestLoader, tests: unittest.TestSuite, pattern: str | None) -> unittest.TestSuite:
    """See the ``load_tests`` protocol of unittest."""
    return unittest.TestLoader().discover(str(Path(__file__).parent / "cuda"), pattern="*_test.py")

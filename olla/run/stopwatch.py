"""How long the ops of a step take, from one run of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch

__all__ = ["Stopwatch"]


class Stopwatch:
    """Told by the emitted code which op begins, as a clock is, and passes it on to one.

    What runs between the end of an op and the beginning of the next one belongs to none.
    """

    def __init__(self, tell: Callable[[int], None], device: torch.device) -> None:
        self._tell = tell
        self._is_cuda = device.type == "cuda"
        self._marks: list[tuple[int, float]] = []  # position and time; -1: no op

    def tell(self, position: int) -> None:
        """The op at ``position`` begins; the one before has ended. Told again, it begins only now."""
        self._mark(position)
        self._tell(position)

    def stop(self) -> None:
        """The op that ran has ended."""
        self._mark(-1)

    def seconds(self, order: Sequence[int], op_count: int) -> tuple[float, ...]:
        """Seconds of each op; of one that ran again, its fastest run."""
        took = {position: end - start for (position, start), (_, end) in pairwise(self._marks)}
        found = [float("inf")] * op_count
        for position, op in enumerate(order):
            found[op] = min(found[op], took[position])
        return tuple(found)

    def _mark(self, position: int) -> None:
        if self._is_cuda:
            torch.cuda.synchronize()
        self._marks.append((position, time.perf_counter()))

"""How long the ops of a step take, from one run of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

__all__ = ["Stopwatch"]


class Stopwatch:
    """Told by the emitted code which op begins, as a clock is, and passes it on to one."""

    def __init__(self, tell: Callable[[int], None], device: torch.device) -> None:
        self._tell = tell
        self._is_cuda = device.type == "cuda"
        self._times: list[float] = []

    def tell(self, position: int) -> None:
        """The op at ``position`` begins; the one before has ended."""
        self.stop()
        self._tell(position)

    def stop(self) -> None:
        """The last op has ended."""
        if self._is_cuda:
            torch.cuda.synchronize()
        self._times.append(time.perf_counter())

    def seconds(self, order: Sequence[int], op_count: int) -> tuple[float, ...]:
        """Seconds of each op; of one that ran again, its fastest run."""
        found = [float("inf")] * op_count
        for op, start, end in zip(order, self._times, self._times[1:], strict=False):
            found[op] = min(found[op], end - start)
        return tuple(found)

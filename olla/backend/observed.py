"""What forward and backward of a compiled graph hold at once, as the allocator says, beside a budget."""

from __future__ import annotations

import logging
import threading
from typing import Any

import torch

from olla.compiling import NativeUnavailableError
from olla.run import native
from olla.run.arena import Clock, Recorder
from olla.run.recording import Recording
from olla.torch_private import Boxed, marked_as_boxed

__all__ = ["Observed"]

log = logging.getLogger(__name__)


class Observed:
    """Records the second step of a graph whose kernels are not OLLA's, and warns if it exceeds the budget.

    The first step may allocate what later ones find cached. A step is recorded only while no other waits for its
    backward. Without a C++ compiler nothing is recorded.

    Parameters
    ----------
    budget, persistent
        Bytes that forward and backward may hold at once, and those of parameters and inputs among them.
    """

    def __init__(self, budget: int, persistent: int, device: torch.device) -> None:
        self._budget = budget
        self._persistent = persistent
        self._device = device.type
        self._is_warm = False
        self._waiting = 0  # forwards whose backward has not run
        self._recorder: Recorder | None = None
        self._is_over = False
        self._one_at_a_time = threading.Lock()

    def part(self, run: Boxed, is_backward: bool) -> Boxed:
        """What runs forward or backward: ``run``, and a look at it."""

        def observed(inputs: list[Any]) -> Any:
            if self._is_over:
                return run(inputs)
            if not self._one_at_a_time.acquire(blocking=False):
                self._is_over = True  # several threads at once: whose bytes are whose?
                return run(inputs)
            try:
                return self._backward(run, inputs) if is_backward else self._forward(run, inputs)
            finally:
                self._one_at_a_time.release()

        return marked_as_boxed(observed)

    def _forward(self, run: Boxed, inputs: list[Any]) -> Any:
        if self._recorder is not None:  # its backward did not come
            self._recorder.abandon()
            self._recorder = None
        is_alone, self._waiting = self._waiting == 0, self._waiting + 1
        if not (self._is_warm and is_alone):
            return run(inputs)
        try:
            recorder = Recorder(native.load(self._device), Clock(), parts=2)
        except NativeUnavailableError:
            self._is_over = True
            return run(inputs)
        with recorder:
            result = run(inputs)
        self._recorder = recorder
        return result

    def _backward(self, run: Boxed, inputs: list[Any]) -> Any:
        self._is_warm = True
        self._waiting = max(0, self._waiting - 1)  # with retain_graph, there are more backwards than forwards
        recorder, self._recorder = self._recorder, None
        if recorder is None:
            return run(inputs)
        with recorder:
            result = run(inputs)
        self._is_over = True
        needed = self._persistent + Recording.of(recorder.events, {}).peak_bytes
        if needed > self._budget:
            log.warning(
                "a step with Inductor's kernels held %s bytes, more than the budget of %s",
                f"{needed:,}",
                f"{self._budget:,}",
            )
        return result

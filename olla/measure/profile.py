"""Memory operator by operator, for any call: an eager step as well as a planned one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from olla.graph.events import Allocate, Event, Release
from olla.run.arena import Clock, Recorder
from olla.run.native import load
from olla.torch_private import OpOverload, TorchDispatchMode

__all__ = ["MemoryProfile", "OpMemory", "profile"]


@dataclass(frozen=True, slots=True)
class OpMemory:
    """Bytes above those at the start of the call."""

    op: str
    allocated_bytes: int  # the most that was allocated while it ran
    reserved_bytes: int | None  # what CUDA's caching allocator held after it; None on CPU, where nothing is kept


@dataclass(frozen=True, slots=True)
class MemoryProfile:
    """The operators of one call in the order in which they ran, and what was asked of the allocator."""

    ops: tuple[OpMemory, ...]
    events: tuple[Event, ...]  # of the calling thread, for olla.measure.caching_allocator

    @property
    def peak_allocated_bytes(self) -> int:
        """The most that was allocated at once."""
        return max((op.allocated_bytes for op in self.ops), default=0)

    @property
    def peak_reserved_bytes(self) -> int | None:
        """The most that was reserved; None on CPU."""
        return max((op.reserved_bytes for op in self.ops if op.reserved_bytes is not None), default=None)


def profile(call: Callable[[], Any], device: torch.device) -> MemoryProfile:
    """Run ``call`` and say what each of its operators made of the memory of ``device``.

    On CPU, the figures are what the calling thread has asked of the allocator. On CUDA, they are
    those of ``torch.cuda.memory_stats``, whose peaks are reset.

    Raises
    ------
    NativeUnavailableError
        If allocations cannot be recorded here; see :func:`olla.run.native.load`.
    """
    clock = Clock()
    recorder = Recorder(load(device.type), clock)
    watcher = _CudaWatcher(clock, device) if device.type == "cuda" else _Watcher(clock)
    with recorder, watcher:
        call()
    figures = watcher.figures or [(size, None) for size in _most_allocated(recorder.events, len(watcher.names))]
    ops = (OpMemory(name, *bytes_) for name, bytes_ in zip(watcher.names, figures, strict=True))
    return MemoryProfile(tuple(ops), tuple(_as_asked(recorder.events)))


class _Watcher(TorchDispatchMode):
    """Notes every operator, and tells the recorder which one runs."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's own has no types
        self.names: list[str] = []
        self.figures: list[tuple[int, int | None]] = []
        self._clock = clock

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        self._clock.tell(len(self.names))
        self.names.append(str(func))
        self._begin()
        result = func(*args, **(kwargs or {}))
        self._end()
        return result

    def _begin(self) -> None:
        """What is to be done before an operator."""

    def _end(self) -> None:
        """What is to be done after it."""


class _CudaWatcher(_Watcher):
    """Asks the caching allocator after every operator."""

    def __init__(self, clock: Clock, device: torch.device) -> None:
        super().__init__(clock)
        self._device = device
        self._before = (torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device))

    def _begin(self) -> None:
        torch.cuda.reset_peak_memory_stats(self._device)

    def _end(self) -> None:
        allocated, reserved = self._before
        peak = torch.cuda.max_memory_allocated(self._device) - allocated
        self.figures.append((peak, torch.cuda.memory_reserved(self._device) - reserved))


def _most_allocated(events: Sequence[tuple[int, int, int, int]], ops: int) -> list[int]:
    """For each op, the most bytes that were allocated from when it began until the next one began."""
    sizes: dict[int, int] = {}
    most, alive, began = [0] * ops, 0, 0
    for index, position, size, _ in events:
        while began <= min(position, ops - 1):
            most[began] = alive
            began += 1
        sizes.setdefault(index, size)
        alive += size if size >= 0 else -sizes[index]
        if position >= 0:
            most[position] = max(most[position], alive)
    most[began:] = [alive] * (ops - began)
    return most


def _as_asked(events: Sequence[tuple[int, int, int, int]]) -> Iterator[Event]:
    for index, _, size, _ in events:
        yield Allocate(index, size) if size >= 0 else Release(index)

"""What the allocator says happened: peaks and seconds of the planned and the eager step."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

from olla.run.arena import Counts, Replay
from olla.run.spill import Spiller
from olla.torch_private import cpu_allocations

__all__ = ["Measurement", "measure", "peak_of"]

Call = Callable[[], Any]

_PAIRS = 9  # of steps, that are timed
_FEWEST_PAIRS = 5  # if they take long
_LONG = 10.0  # seconds


@dataclass(frozen=True, slots=True)
class Measurement:
    """The planned step beside the eager one, run in turn in one process. Bytes and seconds."""

    device: str
    planned_bytes: int  # what the plan says
    peak_bytes: int  # what the planned step needed above what was allocated when it began
    baseline_peak_bytes: int  # the same of the eager step
    reserved_bytes: int | None  # held by the arena and outside of it, or by CUDA's caching allocator; else None
    fragmentation: float | None  # share of the reserved bytes not in use at the peak
    step_seconds: float  # median
    baseline_step_seconds: float  # median
    time_ratio: float  # median over pairs of steps, planned / eager
    spilled_bytes: int = 0  # that one step sends away, and fetches again
    spill_seconds: float = 0.0  # that these copies take, both ways; median
    arena: Counts | None = None  # how the allocations of the last planned step were answered; None: without an arena

    @property
    def saving(self) -> float:
        """The share of the eager peak that the planned step saves."""
        return 1 - self.peak_bytes / self.baseline_peak_bytes if self.baseline_peak_bytes else 0.0

    @property
    def exact(self) -> bool:
        """Whether the measured peak is the planned one, to the byte."""
        return self.peak_bytes == self.planned_bytes


def measure(
    planned: Call,
    eager: Call,
    *,
    device: torch.device,
    planned_bytes: int,
    replay: Replay | None = None,
    spiller: Spiller | None = None,
    outside_bytes: int = 0,
) -> Measurement:
    """Run both steps, first for memory, then in turn for time.

    ``planned`` and ``eager`` run one step each; the caller keeps whatever state they change. If
    ``planned`` is a ``replay`` in an arena, it allocates ``outside_bytes`` beside it. Its ``spiller`` is asked, too.
    Nine pairs of steps are timed, or at least five if they take long.
    """
    for call in (eager, planned):
        call()  # warm up: optimizer state, caches of the kernels
    baseline_peak, _ = peak_of(eager, device)
    peak, reserved = peak_of(planned, device)
    if replay is not None:
        if device.type == "cuda":  # the arena is one block of the caching allocator, and was there before
            peak += replay.arena.arena_bytes
        reserved = replay.arena.arena_bytes + outside_bytes
    ratios: list[float] = []
    planned_seconds, eager_seconds, spill_seconds = [], [], []
    started = time.perf_counter()
    while (pairs := len(ratios)) < _FEWEST_PAIRS or (pairs < _PAIRS and time.perf_counter() - started < _LONG):
        eager_seconds.append(_seconds(eager, device))
        planned_seconds.append(_seconds(planned, device))
        spill_seconds.append(spiller.seconds if spiller else 0.0)
        ratios.append(planned_seconds[-1] / eager_seconds[-1])
    return Measurement(
        device=str(device),
        planned_bytes=planned_bytes,
        peak_bytes=peak,
        baseline_peak_bytes=baseline_peak,
        reserved_bytes=reserved,
        fragmentation=1 - peak / reserved if reserved else None,
        step_seconds=statistics.median(planned_seconds),
        baseline_step_seconds=statistics.median(eager_seconds),
        time_ratio=statistics.median(ratios),
        spilled_bytes=spiller.spilled_bytes if spiller else 0,
        spill_seconds=statistics.median(spill_seconds),
        arena=replay.counts if replay else None,
    )


def peak_of(call: Call, device: torch.device) -> tuple[int, int | None]:
    """The most bytes allocated, and on CUDA reserved, at once while ``call`` runs, above those at its start.

    On CPU the running sum of all that the allocator gave and took, exact to the byte; on CUDA from the
    statistics of the caching allocator.
    """
    gc.collect()
    if device.type != "cuda":
        return max(accumulate(cpu_allocations(call)), default=0), None
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before, reserved_before = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    call()
    torch.cuda.synchronize(device)
    peak, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    return peak - before, reserved - reserved_before


def _seconds(call: Call, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started

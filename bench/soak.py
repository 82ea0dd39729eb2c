"""A long run: what the process holds while one small step runs again and again."""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import olla

__all__ = ["EVERY", "STEPS", "Moment", "soak"]

STEPS = 10_000
EVERY = 100
_BATCH = 64


@dataclass
class Moment:
    """What was measured after so many steps."""

    steps: int
    resident_bytes: int  # of the whole process, as the kernel counts them
    missed: int  # allocations since the first replay that were not where they were planned
    machine: str = ""
    date: str = ""
    command: str = ""  # that made it


def soak(steps: int, made: Callable[[int, int, int], Moment] = Moment) -> Iterator[Moment]:
    """Train a small network, on new batches all the time; a moment every :data:`EVERY` steps, and one at the start."""
    torch.manual_seed(0)
    layers = [layer for _ in range(3) for layer in (nn.Linear(256, 256), nn.ReLU(), nn.Dropout(0.1))]
    model = nn.Sequential(*layers, nn.Linear(256, 10))
    optimizer = torch.optim.Adam(model.parameters())
    draw = partial(torch.randn, _BATCH, 256), partial(torch.randint, 0, 10, (_BATCH,))
    inputs, targets = (make() for make in draw)
    arguments = {"loss_fn": F.cross_entropy, "targets": targets, "optimizer": optimizer, "progress": False}
    missed = 0
    with olla.optimize(model, inputs, **arguments) as step:
        for number in range(steps + 1):
            if number % EVERY == 0:
                yield made(number, _resident_bytes(), missed)
            inputs, targets = (make() for make in draw)
            step(inputs, targets=targets)
            counts = step.report().counts
            missed += counts.missed if counts else 0


def _resident_bytes() -> int:
    """After what nobody needs was given back: the cycles of Python's objects, and what malloc keeps."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

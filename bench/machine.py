"""The machine that a row was run on, in words."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch


def machine(device: str) -> str:
    """Processor, cores, memory, GPU if rows run on it, and PyTorch with its threads: what figures depend on."""
    gibibytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    cores, threads = len(os.sched_getaffinity(0)), torch.get_num_threads()
    parts = [_processor(), f"{cores} core{'s' * (cores > 1)}", f"{gibibytes:.0f} GiB"]
    if device == "cuda":
        parts.append(torch.cuda.get_device_name())
    return ", ".join([*parts, f"torch {torch.__version__} on {threads} thread{'s' * (threads > 1)}"])


def _processor() -> str:
    """The model that the kernel names, which some virtual machines hide."""
    info = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in _lines(info) if line.startswith("model name")]
    return " ".join(names[0].split()) if names else platform.machine()


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []

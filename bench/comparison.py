"""Rows that are run: the planned and the eager step side by side, within a budget or without."""

from __future__ import annotations

import argparse
import os
from tempfile import TemporaryDirectory
from typing import Any

import torch

import olla
from bench.models import Workload
from bench.row import Row, workload_of
from bench.simulation import simulate

SAVINGS = {0.1: "10 %", 0.25: "25 %", 0.5: "50 %", 0.75: "75 %", 1.0: "all"}  # of the peak, within budgets


def compare(row: Row, options: argparse.Namespace) -> None:
    """Simulate one case, and run and measure it where it fits into memory, or as told; spill beside the log."""
    if row.wanted_saving is None and not options.skip_simulation:
        simulate(row, options)
    with torch.device(row.device):
        workload, training = workload_of(row)
    if not options.spilling:
        return _compare(row, options, workload, training)
    if row.device == "cuda":
        return _compare(row, options, workload, training | {"spill_dir": "host"})
    with TemporaryDirectory(dir=options.log_path.parent) as folder:
        return _compare(row, options, workload, training | {"spill_dir": folder})


def _compare(row: Row, options: argparse.Namespace, workload: Workload, training: dict[str, Any]) -> None:
    reorder = not options.skip_node_ordering
    if row.wanted_saving is not None:
        training["memory_budget"] = _budget(row.wanted_saving, workload, training)
    step = olla.optimize(workload.model, workload.inputs, **training, reorder=reorder, progress=False)
    plan = step.plan
    if row.wanted_saving is not None:
        row.note_simulated(plan)
    if row.ops is None:
        row.note(plan)
        row.capture_seconds = step.capture_seconds
    # Measuring keeps a copy of what lives across steps; half as much again for workspaces.
    needed = plan.persistent_bytes * 2 + plan.baseline_peak_bytes * 3 // 2
    if not options.execute and needed > _available_bytes(row.device):
        return
    measured = workload.call(step.measure, train=row.mode == "train")
    row.measured_eager_bytes, row.measured_planned_bytes = measured.baseline_peak_bytes, measured.peak_bytes
    row.measured_saving, row.time_ratio = measured.saving, measured.time_ratio
    row.eager_step_seconds, row.planned_step_seconds = measured.baseline_step_seconds, measured.step_seconds
    row.exact, row.arena_bytes, row.fragmentation = measured.exact, step.plan.arena_bytes, step.plan.fragmentation
    row.missed = measured.arena.missed if measured.arena else None
    if row.wanted_saving is not None:
        row.recomputed, row.spilled_bytes = len(step.plan.recomputed), measured.spilled_bytes
        row.spill_seconds = measured.spill_seconds if step.plan.spills else None
        row.extra_seconds, row.least_extra_seconds = step.plan.extra_seconds, step.plan.extra_seconds_lower_bound
        row.lower_bound_bytes, row.gap, row.status = step.plan.lower_bound_bytes, step.plan.gap, step.plan.status


def _budget(saving: float, workload: Workload, training: dict[str, Any]) -> int:
    """The bytes that are left when this share of the eager peak is saved."""
    plan = olla.plan(workload.model, workload.inputs, **training, place=False, progress=False)
    budget = plan.persistent_bytes + int(plan.baseline_peak_bytes * (1 - saving))
    if saving < 1:
        return budget
    try:
        olla.plan(workload.model, workload.inputs, **training, memory_budget=budget + 1, place=False, progress=False)
    except olla.InfeasibleError as error:
        return error.best_bytes
    return budget + 1


def _available_bytes(device: str) -> int:
    if device == "cuda":
        torch.cuda.empty_cache()  # what simulating left there
        return torch.cuda.mem_get_info()[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")

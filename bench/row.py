"""One line of the table and of the log."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch

import olla
from bench.models import MODELS, Workload
from olla.api import arguments_of, program_of
from olla.capture.costs import estimated_seconds
from olla.planning import Options, capture

PLACING_SECONDS = 10  # for addresses, wherever a row has some
FITTING_SECONDS = 15  # for half of the bytes


@dataclass
class Row:
    """One case and its figures; bytes are those above what lives across steps."""

    model: str
    batch_size: int
    mode: str
    options: str = ""  # those that decide what a row holds, as they are given
    device: str | None = None  # that it runs on; None: it is planned only
    machine: str = ""
    date: str = ""
    command: str = ""  # that made it
    ops: int | None = None
    persistent_bytes: int | None = None
    simulated_eager_bytes: int | None = None
    simulated_planned_bytes: int | None = None
    reserved_eager_bytes: int | None = None
    reserved_planned_bytes: int | None = None
    reserved_arena_bytes: int | None = None  # with the results, which are outside of it
    simulated_arena_bytes: int | None = None
    simulated_fragmentation: float | None = None  # of that arena
    placing_seconds: float | None = None
    half_extra: float | None = None  # time that half of eager PyTorch's peak costs, as a share of the step's, estimated
    half_least_extra: float | None = None  # as proven
    half_seconds: float | None = None  # of planning for it
    smallest_bytes: int | None = None  # the peak that recomputing reaches instead
    lower_bound_bytes: int | None = None
    gap: float | None = None
    status: str | None = None
    capture_seconds: float | None = None
    planning_seconds: float | None = None
    inductor_lpmf_bytes: int | None = None
    inductor_bfs_bytes: int | None = None
    inductor_dfs_bytes: int | None = None
    measured_eager_bytes: int | None = None
    measured_planned_bytes: int | None = None
    measured_saving: float | None = None
    arena_bytes: int | None = None
    fragmentation: float | None = None  # of the arena
    missed: int | None = None  # allocations of one step that are not where they were planned
    exact: bool | None = None  # whether the measured peak is the planned one, to the byte
    eager_step_seconds: float | None = None
    planned_step_seconds: float | None = None
    time_ratio: float | None = None
    allocation_seconds: float | None = None  # for all allocations and releases of a step, by PyTorch's allocator
    arena_allocation_seconds: float | None = None
    wanted_saving: float | None = None  # 1: as much as possible
    recomputed: int | None = None  # ops that run again
    spilled_bytes: int | None = None  # away, and back
    spill_seconds: float | None = None  # that it took
    extra_seconds: float | None = None  # for both, as planned
    least_extra_seconds: float | None = None  # as proven
    form: str | None = None  # of the integer program
    solver: str | None = None
    variables: int | None = None
    constraints: int | None = None
    build_seconds: float | None = None
    solve_seconds: float | None = None
    objective: float | None = None  # bytes; of the forms "recompute" and "spill" seconds
    bound: float | None = None
    error: str = ""

    @property
    def case(self) -> tuple[Any, ...]:
        """What is asked, and of which machine: rows of one case say the same, but for times."""
        what = (self.model, self.batch_size, self.mode, self.wanted_saving, self.form, self.solver)
        return (*what, self.options, self.device, self.machine)

    def note(self, plan: olla.Plan) -> None:
        """Take over what every plan says."""
        self.ops, self.persistent_bytes, self.planning_seconds = len(plan.order), plan.persistent_bytes, plan.seconds

    def note_simulated(self, plan: olla.Plan) -> None:
        """Take over the peaks of a plan, and how far they are proven."""
        self.simulated_eager_bytes, self.simulated_planned_bytes = plan.baseline_peak_bytes, plan.peak_bytes
        self.lower_bound_bytes, self.gap, self.status = plan.lower_bound_bytes, plan.gap, plan.status


def workload_of(row: Row) -> tuple[Workload, dict[str, Any]]:
    """The model of a case, and what else olla.optimize is to be told about it."""
    torch.manual_seed(0)
    workload = MODELS[row.model](row.batch_size)
    workload.model.train(row.mode == "train")
    if row.mode == "train":
        optimizer = torch.optim.SGD(workload.model.parameters(), lr=1e-3, momentum=0.9)
        return workload, {"loss_fn": workload.loss_fn, "targets": workload.targets, "optimizer": optimizer}
    if isinstance(workload.inputs, dict):
        workload.inputs.pop("labels")
    return workload, {}


def captured(row: Row) -> tuple[olla.Graph, tuple[float, ...]]:
    """The graph of a case, of which nothing is run, and the seconds that its ops take, estimated.

    The model is on the meta device, where it is planned as on a CPU; or on the GPU.
    """
    with torch.device("cuda" if row.device == "cuda" else "meta"):
        workload, training = workload_of(row)
    started = time.perf_counter()
    program = program_of(workload.model, *(training.get(name) for name in ("loss_fn", "targets", "optimizer")))
    args, kwargs = arguments_of(workload.inputs, training.get("targets"))
    _, lowered = capture(program, args, kwargs, Options(progress=False))
    row.capture_seconds = time.perf_counter() - started
    return lowered.graph, estimated_seconds(lowered)

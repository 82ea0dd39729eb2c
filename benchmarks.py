"""The paper's table, executed: what OLLA does to the peak memory of real models.

    python benchmarks.py --quick                      five models, a minute or two
    python benchmarks.py -m resnet18 -b 1 --mode train
    python benchmarks.py                              all models x batch 1 and 32 x train and eval
    python benchmarks.py --simulate                   the same, planned only: nothing is allocated
    python benchmarks.py --gpu-profile                what the CUDA caching allocator loses, on a GPU if there is one
    python benchmarks.py --rematerialization          smaller and smaller byte budgets, kept by recomputing
    python benchmarks.py --ilp                        the paper's integer program, with every solver that is installed

Every row plans one step of a model; where the step fits into memory, the planned and the eager step
are run side by side and the allocator is asked for both peaks. The planned step runs in an arena, at
planned addresses. Weights are random: no download.
With --simulate, models are on the meta device, and the plan is compared with the orders that PyTorch
Inductor chooses among (least peak memory first, breadth first, depth first). "Reserved" is what the
CUDA caching allocator would take from the driver for two such steps, by the model of it in
olla/measure/caching_allocator.py. With --gpu-profile, both steps run op by op; on a GPU, "reserved" is
measured, without one, what was recorded is replayed through that model.
With --rematerialization, each step is planned and run within budgets that save 10, 25, 50 and 75 % of what eager
PyTorch needs above what lives across steps, and within the smallest budget that is found.
With --ilp, each form of the integer program is stated for each graph and given to each solver, starting from what the
planners found: the order, the addresses for it, both jointly, and, within a byte limit halfway between the planned peak
and what some op needs for itself, what to recompute and what to spill (at most 3 repeats; times of ops are estimated).
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import olla
from olla.graph.check import verify
from olla.graph.events import Allocate, Event, eager_events_of, events_of, lifetimes_of
from olla.graph.lifetimes import least_bytes, peak_bytes
from olla.ilp import AddressForm, FitForm, JointForm, OrderForm
from olla.ilp.fit_form import warm_start
from olla.measure import caching_allocator
from olla.measure.profile import MemoryProfile
from olla.order.baselines import INDUCTOR
from olla.place.place import Interval, addresses, intervals, pack, padded, place
from olla.run.arena import Arena, Clock, Replay
from olla.solve import available, solve

_PLACING_SECONDS = 10
_SECONDS_PER_OP = 1e-5  # an estimate, with the bytes that it touches
_BYTES_PER_SECOND = 1e10


@dataclass
class Workload:
    """A model with example inputs, and its loss for training."""

    model: nn.Module
    inputs: tuple[Any, ...] | dict[str, Any]
    loss_fn: Callable[..., Tensor] | None = None
    targets: Tensor | None = None

    def call(self, function: Callable[..., Any], *, train: bool) -> Any:
        """Call a step (or the model) on the inputs, and on the targets if there are some."""
        named = {"targets": self.targets} if train and self.targets is not None else {}
        if isinstance(self.inputs, dict):
            return function(**self.inputs, **named)
        return function(*self.inputs, **named)


# ---------------------------------------------------------------------------------- the models


def _classifier(name: str, *, shape: tuple[int, ...] = (3, 224, 224), **options: Any) -> Callable[[int], Workload]:
    def build(batch: int) -> Workload:
        import torchvision

        builders = {**vars(torchvision.models), **vars(torchvision.models.video)}
        model = builders[name](weights=None, **options)
        return Workload(model, (torch.randn(batch, *shape),), _classification_loss, torch.randint(0, 400, (batch,)))

    return build


def _classification_loss(output: Any, target: Tensor) -> Tensor:
    """Cross entropy; googlenet and inception_v3 add their auxiliary heads, weighted as in their papers."""
    if isinstance(output, Tensor):
        return F.cross_entropy(output, target)
    main, *others = (head for head in output if head is not None)
    weight = 0.3 if len(others) == 2 else 0.4
    return F.cross_entropy(main, target) + weight * sum(F.cross_entropy(head, target) for head in others)


def _segmentation(batch: int) -> Workload:
    import torchvision

    model = torchvision.models.segmentation.deeplabv3_resnet50(weights=None, weights_backbone=None, aux_loss=True)
    target = torch.randint(0, 21, (batch, 224, 224))
    return Workload(model, (torch.randn(batch, 3, 224, 224),), _segmentation_loss, target)


def _segmentation_loss(output: dict[str, Tensor], target: Tensor) -> Tensor:
    return F.cross_entropy(output["out"], target) + 0.5 * F.cross_entropy(output["aux"], target)


def _optical_flow(batch: int) -> Workload:
    import torchvision

    model = torchvision.models.optical_flow.raft_small(weights=None)
    frames = (torch.rand(batch, 3, 128, 128) * 2 - 1, torch.rand(batch, 3, 128, 128) * 2 - 1)
    return Workload(model, frames, _flow_loss, torch.randn(batch, 2, 128, 128))


def _flow_loss(flows: list[Tensor], target: Tensor) -> Tensor:
    weights = [0.8 ** (len(flows) - 1 - i) for i in range(len(flows))]
    return torch.stack([w * (flow - target).abs().mean() for w, flow in zip(weights, flows, strict=True)]).sum()


def _transformer(**options: int) -> Callable[[int], Workload]:
    def build(batch: int) -> Workload:
        return Workload(nn.Transformer(**options), (torch.rand(10, batch, 512), torch.rand(20, batch, 512)))

    return build


def _language(model_class: str, config_class: str, *, length: int = 128, **config: Any) -> Callable[[int], Workload]:
    def build(batch: int) -> Workload:
        import transformers

        transformers.logging.set_verbosity_error()
        settings = getattr(transformers, config_class)(use_cache=False, **config)
        model = getattr(transformers, model_class)(settings)
        ids = torch.randint(5, settings.vocab_size, (batch, length))
        return Workload(model, {"input_ids": ids, "labels": ids.clone()})

    return build


MODELS: dict[str, Callable[[int], Workload]] = {
    "alexnet": _classifier("alexnet"),
    "bert": _language("RobertaForMaskedLM", "RobertaConfig", vocab_size=50265, max_position_embeddings=514),
    "deeplabv3_resnet50": _segmentation,
    "efficientnet_b0": _classifier("efficientnet_b0"),
    "googlenet": _classifier("googlenet", init_weights=False),
    "gpt2": _language("GPT2LMHeadModel", "GPT2Config"),
    "inception_v3": _classifier("inception_v3", shape=(3, 299, 299), init_weights=False),
    "llama": _language(
        "LlamaForCausalLM",
        "LlamaConfig",
        vocab_size=32000,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=14,
        num_attention_heads=12,
    ),
    "mnasnet0_5": _classifier("mnasnet0_5"),
    "mobilenet_v2": _classifier("mobilenet_v2"),
    "r3d_18": _classifier("r3d_18", shape=(3, 16, 112, 112)),
    "raft_small": _optical_flow,
    "resnet18": _classifier("resnet18"),
    "resnet50": _classifier("resnet50"),
    "squeezenet1_0": _classifier("squeezenet1_0"),
    "swin_t": _classifier("swin_t"),
    "transformer": _transformer(nhead=1, num_encoder_layers=1, num_decoder_layers=1),
    "transformer_dflt": _transformer(),
    "vgg11": _classifier("vgg11"),
    "vgg16": _classifier("vgg16"),
    "vgg19": _classifier("vgg19"),
    "vit_b_16": _classifier("vit_b_16"),
    "xlmr": _language("XLMRobertaForMaskedLM", "XLMRobertaConfig", vocab_size=250002, max_position_embeddings=514),
}
ILP = ("alexnet", "vgg16", "squeezenet1_0", "resnet18")
_SAVINGS = {0.1: "10 %", 0.25: "25 %", 0.5: "50 %", 0.75: "75 %", 1.0: "all"}
FORMS = ("order", "address", "joint", "recompute", "spill")
QUICK = ("resnet18", "googlenet", "vit_b_16", "gpt2", "transformer_dflt")


# ---------------------------------------------------------------------------------- one row


@dataclass
class Row:
    """One case and its figures; bytes are those above what lives across steps."""

    model: str
    batch_size: int
    mode: str
    ops: int | None = None
    persistent_bytes: int | None = None
    simulated_eager_bytes: int | None = None
    simulated_planned_bytes: int | None = None
    reserved_eager_bytes: int | None = None
    reserved_planned_bytes: int | None = None
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
    placing_seconds: float | None = None
    missed: int | None = None  # allocations of one step that are not where they were planned
    exact: bool | None = None  # whether the measured peak is the planned one, to the byte
    eager_step_seconds: float | None = None
    planned_step_seconds: float | None = None
    time_ratio: float | None = None
    allocation_seconds: float | None = None  # for all allocations and releases of a step, by PyTorch's allocator
    arena_allocation_seconds: float | None = None
    wanted_saving: float | None = None  # 1: as much as possible
    recomputed: int | None = None  # ops that run again
    extra_seconds: float | None = None  # as planned
    form: str | None = None  # of the integer program
    solver: str | None = None
    variables: int | None = None
    constraints: int | None = None
    build_seconds: float | None = None
    solve_seconds: float | None = None
    objective: float | None = None  # bytes; of the forms "recompute" and "spill" seconds
    bound: float | None = None
    error: str = field(default="")


def run_case(row: Row, options: argparse.Namespace) -> Row:
    """Plan one case and, where it fits, run and measure it. Errors become part of the row."""
    case = _profile if options.gpu_profile else _simulate if options.simulate else _solve if row.form else _fill
    try:
        case(row, options)
    except Exception as error:  # one failing model must not end the run
        row.error = f"{type(error).__name__}: {error}".replace("\n", " ")
    gc.collect()
    return row


def _workload(row: Row) -> tuple[Workload, dict[str, Any]]:
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


def _note(row: Row, plan: olla.Plan) -> None:
    row.ops = len(plan.order)
    row.persistent_bytes = plan.persistent_bytes
    row.planning_seconds = plan.seconds


def _note_simulated(row: Row, plan: olla.Plan) -> None:
    row.simulated_eager_bytes, row.simulated_planned_bytes = plan.baseline_peak_bytes, plan.peak_bytes
    row.lower_bound_bytes, row.gap, row.status = plan.lower_bound_bytes, plan.gap, plan.status


def _captured(row: Row) -> olla.Graph:
    with torch.device("meta"):
        workload, training = _workload(row)
    started = time.perf_counter()
    graph = olla.to_graph(workload.model, workload.inputs, **training)
    row.capture_seconds = time.perf_counter() - started
    return graph


def _simulate(row: Row, options: argparse.Namespace) -> None:
    graph = _captured(row)
    plan = olla.Plan.of(graph, olla.schedule(graph))
    _note(row, plan)
    _note_simulated(row, plan)
    row.reserved_eager_bytes = caching_allocator.replay(eager_events_of(graph)).peak_reserved_bytes
    row.reserved_planned_bytes = caching_allocator.replay(events_of(graph, plan.order)).peak_reserved_bytes
    for name, rule in INDUCTOR.items():
        setattr(row, f"inductor_{name}_bytes", peak_bytes(graph, rule(graph)))
    if options.generate_addresses:
        started = time.perf_counter()
        plan = plan.at(place(graph, plan.order, time_limit=_PLACING_SECONDS))
        row.placing_seconds = time.perf_counter() - started
        verify(graph, plan)
        row.arena_bytes, row.fragmentation = plan.arena_bytes, plan.fragmentation


def _fill(row: Row, options: argparse.Namespace) -> None:
    workload, training = _workload(row)
    reorder = not options.skip_node_ordering
    if row.wanted_saving is not None:
        training["memory_budget"] = _budget(row.wanted_saving, workload, training)
    step = olla.optimize(workload.model, workload.inputs, **training, reorder=reorder, progress=False)
    plan = step.plan
    _note(row, plan)
    if not options.skip_simulation:
        _note_simulated(row, plan)
    row.capture_seconds = step.capture_seconds
    # Measuring keeps a copy of what lives across steps; half as much again for workspaces.
    needed = plan.persistent_bytes * 2 + plan.baseline_peak_bytes * 3 // 2
    if options.execute is False or (options.execute is None and needed > _available_bytes()):
        return
    measured = workload.call(step.measure, train=row.mode == "train")
    row.measured_eager_bytes, row.measured_planned_bytes = measured.baseline_peak_bytes, measured.peak_bytes
    row.measured_saving, row.time_ratio = measured.saving, measured.time_ratio
    row.eager_step_seconds, row.planned_step_seconds = measured.baseline_step_seconds, measured.step_seconds
    row.exact, row.arena_bytes, row.fragmentation = measured.exact, step.plan.arena_bytes, step.plan.fragmentation
    row.missed = measured.arena.missed if measured.arena else None
    if row.wanted_saving is not None:
        row.recomputed, row.extra_seconds = len(step.plan.recomputed), step.plan.extra_seconds
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


def _solve(row: Row, options: argparse.Namespace) -> None:
    """State one form of the integer program, and let one solver improve what the planners found."""
    graph = _captured(row)
    known = olla.schedule(graph)
    row.ops, row.planning_seconds = len(graph.ops), known.seconds
    lives = intervals(graph, known.order)
    started = time.perf_counter()
    form = _form(row.form, graph, known, lives)
    problem = form.model.problem()
    row.build_seconds = time.perf_counter() - started
    row.constraints, row.variables = problem.matrix.shape
    result = solve(form.model, row.solver, time_limit=options.solve_seconds)
    row.solve_seconds, row.status = result.seconds, result.status.value
    if isinstance(form, AddressForm):
        placement = form.placement(result)
        row.objective, row.bound = placement.arena_bytes, placement.lower_bound_bytes
        verify(graph, olla.Plan.of(graph, known, addresses(graph, known.order, placement)))
    elif isinstance(form, JointForm):
        plan = form.plan(result)
        row.objective, row.bound = plan.arena_bytes, plan.arena_lower_bound_bytes
        verify(graph, plan)
    else:
        found = form.schedule(result)
        is_order = isinstance(form, OrderForm)
        row.objective = found.peak_bytes if is_order else found.extra_seconds
        row.bound = found.lower_bound_bytes if is_order else found.extra_seconds_lower_bound
        verify(graph, olla.Plan.of(graph, found))


def _form(name: str, graph: olla.Graph, known: olla.Schedule, lives: list[Interval]) -> Any:
    if name == "order":
        return OrderForm(graph, known)
    placement = pack(lives, alignment=1, time_limit=_PLACING_SECONDS)
    if name == "address":
        return AddressForm(padded(lives, 1), placement)
    if name == "joint":
        return JointForm(graph, olla.Plan.of(graph, known, addresses(graph, known.order, placement)))
    sizes = [sum(graph.storages[storage].size for storage in op.touches) for op in graph.ops]
    seconds = [_SECONDS_PER_OP + size / _BYTES_PER_SECOND for size in sizes]
    budget = (least_bytes(graph)[0] + known.peak_bytes) // 2
    repeats, bandwidth = (3, None) if name == "recompute" else (0, _BYTES_PER_SECOND)
    start = warm_start(graph, known, budget, seconds, repeats, bandwidth, time_limit=_PLACING_SECONDS)
    return FitForm(graph, budget, seconds, start=start, repeats=repeats, bytes_per_second=bandwidth)


def _profile(row: Row, options: argparse.Namespace) -> None:
    """Both steps op by op: what is allocated, and what the caching allocator reserves for it."""
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        workload, training = _workload(row)
    step = olla.optimize(workload.model, workload.inputs, **training, progress=False)
    _note(row, step.plan)
    eager, planned = workload.call(step.profile, train=row.mode == "train")
    row.measured_eager_bytes, row.measured_planned_bytes = eager.peak_allocated_bytes, planned.peak_allocated_bytes
    row.reserved_eager_bytes, row.reserved_planned_bytes = _reserved(eager), _reserved(planned)
    lives = lifetimes_of(planned.events)
    packed = pack(lives, alignment=512, time_limit=_PLACING_SECONDS)
    row.arena_bytes = packed.arena_bytes
    row.fragmentation = 1 - packed.lower_bound_bytes / packed.arena_bytes if packed.arena_bytes else 0.0
    if options.profile_alloc_time:
        row.allocation_seconds, row.arena_allocation_seconds = time_allocations(planned.events, lives, packed.offsets)
    _write_ops(row, {"eager": eager, "planned": planned}, options.log_path.with_suffix(".ops.csv"))


def _reserved(profile: MemoryProfile) -> int:
    """Measured on a GPU; without one, what was recorded on the CPU is replayed through the model."""
    return profile.peak_reserved_bytes or caching_allocator.replay(profile.events).peak_reserved_bytes


def time_allocations(
    events: Sequence[Event], lives: Sequence[tuple[int, int, int]], offsets: Sequence[int], rounds: int = 20
) -> tuple[float, float]:
    """Seconds for all allocations and releases of a step, by PyTorch's CPU allocator and in an arena; medians."""
    clock = Clock()
    sizes = [size for _, _, size in lives]
    top = max((offset + size for offset, size in zip(offsets, sizes, strict=True)), default=0)
    arena = Arena(torch.device("cpu"))
    replay = Replay(arena, clock, positions=[0] * len(sizes), sizes=sizes, offsets=offsets, arena_bytes=top)
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for in_arena in (False, True) * rounds:
        blocks: dict[int, Tensor] = {}
        with replay if in_arena else nullcontext():
            clock.tell(0)
            started = time.perf_counter()
            for event in events:
                if isinstance(event, Allocate):
                    blocks[event.name] = torch.empty(event.size, dtype=torch.uint8)
                else:
                    del blocks[event.name]
            seconds[in_arena].append(time.perf_counter() - started)
            blocks.clear()
    arena.close()
    return statistics.median(seconds[False]), statistics.median(seconds[True])


def _write_ops(row: Row, profiles: dict[str, MemoryProfile], path: Path) -> None:
    """Add the ops of a case to the second file."""
    import pandas

    case = {"model": row.model, "batch_size": row.batch_size, "mode": row.mode}
    lines = [
        {**case, "order": order, "position": position, **asdict(op)}
        for order, profile in profiles.items()
        for position, op in enumerate(profile.ops)
    ]
    pandas.DataFrame(lines).to_csv(path, mode="a", header=not path.exists(), index=False)


def _tune_malloc() -> None:
    """As MALLOC_MMAP_MAX_=0 and a huge MALLOC_TRIM_THRESHOLD_ do: memory never goes back to the system."""
    libc = ctypes.CDLL(None)
    trim_threshold, mmap_max = -1, -4  # malloc.h
    if not (hasattr(libc, "mallopt") and libc.mallopt(mmap_max, 0) and libc.mallopt(trim_threshold, 2**31 - 1)):
        raise SystemExit("--tuned-malloc needs the malloc of glibc")


def _available_bytes() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


# ---------------------------------------------------------------------------------- the table

_TEXT = ("model", "mode", "form", "solver", "status", "error")
_COLUMNS: dict[str, Callable[[Row], str]] = {
    "model": lambda row: row.model,
    "batch": lambda row: str(row.batch_size),
    "mode": lambda row: row.mode,
    "wanted": lambda row: "-" if row.wanted_saving is None else _SAVINGS[row.wanted_saving],
    "form": lambda row: row.form or "-",
    "solver": lambda row: row.solver or "-",
    "ops": lambda row: _number(row.ops),
    "variables": lambda row: _number(row.variables),
    "rows": lambda row: _number(row.constraints),
    "build s": lambda row: _seconds(row.build_seconds),
    "solve s": lambda row: _seconds(row.solve_seconds),
    "objective": lambda row: _objective(row, row.objective),
    "bound": lambda row: _objective(row, row.bound),
    "eager MiB": lambda row: _mebibytes(row.simulated_eager_bytes),
    "planned": lambda row: _mebibytes(row.simulated_planned_bytes),
    "eager reserved": lambda row: _mebibytes(row.reserved_eager_bytes),
    "planned reserved": lambda row: _mebibytes(row.reserved_planned_bytes),
    "gap": lambda row: "-" if row.gap is None else f"{row.gap:.2%}",
    "status": lambda row: row.status or "-",
    "capture s": lambda row: _seconds(row.capture_seconds),
    "plan s": lambda row: _seconds(row.planning_seconds),
    "arena": lambda row: _mebibytes(row.arena_bytes),
    "fragmentation": lambda row: "-" if row.fragmentation is None else f"{row.fragmentation:.3%}",
    "place s": lambda row: _seconds(row.placing_seconds),
    "LPMF": lambda row: _mebibytes(row.inductor_lpmf_bytes),
    "BFS": lambda row: _mebibytes(row.inductor_bfs_bytes),
    "DFS": lambda row: _mebibytes(row.inductor_dfs_bytes),
    "eager MiB, measured": lambda row: _mebibytes(row.measured_eager_bytes),
    "planned, measured": lambda row: _mebibytes(row.measured_planned_bytes),
    "saved": lambda row: "-" if row.measured_saving is None else f"{row.measured_saving:.1%}",
    "exact": lambda row: "-" if row.exact is None else "yes" if row.exact else "no",
    "missed": lambda row: _number(row.missed),
    "ops again": lambda row: _number(row.recomputed),
    "time": lambda row: "-" if row.time_ratio is None else f"{row.time_ratio:.2f} x",
    "allocations": lambda row: _milliseconds(row.allocation_seconds),
    "in the arena": lambda row: _milliseconds(row.arena_allocation_seconds),
    "error": lambda row: row.error[:60],
}


def _number(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def _mebibytes(value: int | None) -> str:
    return "-" if value is None else f"{value / 2**20:,.1f}"


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _objective(row: Row, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value * 1e3:,.3f} ms" if row.form in ("recompute", "spill") else f"{value / 2**20:,.3f} MiB"


def _milliseconds(value: float | None) -> str:
    return "-" if value is None else f"{value * 1e3:.2f} ms"


def show(cases: list[Row], options: argparse.Namespace) -> Iterator[Row]:
    """Run the cases, with a table and a progress bar that grow while they run."""
    from rich.console import Console, Group
    from rich.live import Live
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(width=None if sys.stdout.isatty() else 200)
    rows: list[Row] = []
    progress = Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    task = progress.add_task("", total=len(cases))
    with Live(Group(_table(rows), progress), console=console, transient=True) as live:
        for case in cases:
            progress.update(task, description=f"{case.model}, batch {case.batch_size}, {case.form or case.mode}")
            rows.append(run_case(case, options))
            progress.advance(task)
            live.update(Group(_table(rows), progress), refresh=True)
            yield rows[-1]
    console.print(_table(rows))


def _table(rows: list[Row]) -> Any:
    from rich.table import Table

    title = "Peak above what lives across steps: eager PyTorch and OLLA"
    table = Table(
        title=title if not any(row.form for row in rows) else "The integer program, and what solvers make of it"
    )
    empty = ("", "-")
    shown = {name: text for name, text in _COLUMNS.items() if any(text(row) not in empty for row in rows)}
    for name in shown:
        table.add_column(
            name, justify="left" if name in ("model", "mode", "form", "solver", "status", "error") else "right"
        )
    for row in rows:
        table.add_row(*(text(row) for text in shown.values()))
    return table


def summary(rows: list[Row]) -> str:
    """What the simulated rows say together."""
    lines = []
    for mode in ("train", "eval"):
        done = [row for row in rows if row.mode == mode and row.gap is not None]
        if not done:
            continue
        gaps, seconds = [row.gap or 0.0 for row in done], [row.planning_seconds or 0.0 for row in done]
        others = [(row, getattr(row, f"inductor_{name}_bytes")) for row in done for name in INDUCTOR]
        others += [(row, row.simulated_eager_bytes) for row in done]
        beaten = sum(other < row.simulated_planned_bytes for row, other in others)
        lines.append(
            f"{mode}: {len(done)} graphs, gap at most 0.01 % on {sum(gap <= 1e-4 for gap in gaps)}, worst "
            f"{max(gaps):.4%}; planned in {statistics.median(seconds):.2f} s (median), {max(seconds):.2f} s (worst); "
            f"worse than Inductor's orders or program order in {beaten} of {len(others)} comparisons"
        )
    lost = {order: _fragmentation(rows, order) for order in ("eager", "planned")}
    if all(lost.values()):
        shares = (f"{name} {statistics.median(of):.1%} (median), {max(of):.1%} (worst)" for name, of in lost.items())
        lines.append(f"CUDA's caching allocator would lose to fragmentation: {'; '.join(shares)}")
    return "\n".join(lines)


def _fragmentation(rows: list[Row], order: str) -> list[float]:
    """What share of the bytes that the caching allocator reserves is above the simulated peak, row by row."""
    peaks = [(getattr(row, f"simulated_{order}_bytes"), getattr(row, f"reserved_{order}_bytes")) for row in rows]
    return [1 - peak / reserved for peak, reserved in peaks if reserved]


def write_log(rows: list[Row], path: Path, *, append: bool) -> None:
    """Write the rows as CSV; with ``append``, below those that are there."""
    import pandas

    frame = pandas.DataFrame([asdict(row) for row in rows])
    if append and path.exists():
        frame = pandas.concat([pandas.read_csv(path), frame])
    frame.to_csv(path, index=False)


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmarks; returns the exit status: 0 if at least one case ran without an error."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("-b", "--batch-size", type=int, action="append", help="may be repeated; default 1 and 32")
    parser.add_argument(
        "-m", "--model", choices=sorted(MODELS), action="append", metavar="NAME", help="may be repeated; default all"
    )
    parser.add_argument("--mode", choices=("eval", "train"), action="append", help="may be repeated; default both")
    parser.add_argument("--log-path", type=Path, default=Path("benchmarks.csv"), help="default %(default)s")
    parser.add_argument("--append-log", action="store_true", help="keep the rows that the log holds already")
    parser.add_argument("--skip-simulation", action="store_true", help="only measure: leave simulated peaks out")
    parser.add_argument("--skip-node-ordering", action="store_true", help="run the ops in program order")
    parser.add_argument(
        "--execute",
        action=argparse.BooleanOptionalAction,
        help="run both sides and measure, or never; default: if the step fits into memory",
    )
    parser.add_argument(
        "--quick", action="store_true", help=f"{', '.join(QUICK)} at batch 1 in training mode, unless said otherwise"
    )
    parser.add_argument(
        "--simulate", action="store_true", help="plan only, on the meta device, and compare with PyTorch Inductor"
    )
    parser.add_argument("--generate-addresses", action="store_true", help="with --simulate: plan addresses, too")
    parser.add_argument(
        "--gpu-profile",
        action="store_true",
        help="what is allocated and reserved, op by op (in a second file); reserved by a model, if there is no GPU",
    )
    parser.add_argument(
        "--profile-alloc-time",
        action="store_true",
        help="with --gpu-profile: time the step's allocations and releases, by PyTorch's CPU allocator and in an arena",
    )
    parser.add_argument(
        "--tuned-malloc",
        action="store_true",
        help="let glibc keep the memory it got, as a fast eager PyTorch does: the other half of an honest ratio",
    )
    parser.add_argument(
        "--ilp", action="store_true", help=f"solve the paper's integer program; {', '.join(ILP)}, unless said otherwise"
    )
    parser.add_argument(
        "--rematerialization",
        action="store_true",
        help="save 10, 25, 50, 75 %% of the peak, and all that can be",
    )
    parser.add_argument("--form", choices=FORMS, action="append", help="with --ilp: may be repeated; default all")
    parser.add_argument("--solver", choices=("cpsat", "gurobi", "highs"), action="append", help="as --form")
    parser.add_argument(
        "--solve-seconds", type=float, default=60.0, help="with --ilp: the limit of each solver; default %(default)s"
    )
    parser.add_argument("--list", action="store_true", help="print the names of the models and stop")
    options = parser.parse_args(arguments)
    if options.list:
        print("\n".join(MODELS))
        return 0
    names = options.model or list(QUICK if options.quick else ILP if options.ilp else MODELS)
    batches = options.batch_size or ([1] if options.quick else [1, 32])
    modes = options.mode or (
        ["train"] if options.quick or options.ilp or options.rematerialization else ["train", "eval"]
    )
    if min(batches) < 1:
        parser.error("--batch-size must be positive")
    measuring = options.execute or options.skip_simulation or options.skip_node_ordering or options.tuned_malloc
    others = [options.simulate, options.gpu_profile, options.ilp, options.rematerialization]
    if sum(others) + bool(measuring) > 1 and any(others):
        parser.error("--simulate, --gpu-profile, --rematerialization and --ilp exclude each other, and how to measure")
    if (options.generate_addresses and not options.simulate) or (
        options.profile_alloc_time and not options.gpu_profile
    ):
        parser.error("--generate-addresses needs --simulate, --profile-alloc-time needs --gpu-profile")
    if options.tuned_malloc:
        _tune_malloc()
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
    ops_path = options.log_path.with_suffix(".ops.csv")
    if options.gpu_profile and not options.append_log:
        ops_path.unlink(missing_ok=True)
    cases = [Row(*case) for case in product(names, batches, modes)]
    if options.ilp:
        tasks = list(product(options.form or FORMS, options.solver or available()))
        cases = [replace(case, form=form, solver=solver) for case in cases for form, solver in tasks]
    if options.rematerialization:
        cases = [replace(case, wanted_saving=saving) for case in cases for saving in _SAVINGS]
    rows = []
    for row in show(cases, options):
        rows.append(row)
        write_log([row], options.log_path, append=options.append_log or len(rows) > 1)
    if options.simulate:
        print(summary(rows))
    if options.ilp:
        print(
            "For comparison, a claim of the authors of MODeL, with Gurobi on a larger machine, not measured here:\n"
            "order and addresses of their models in less than 7 seconds (median)."
        )
    also = f", those of each operator in {ops_path}" if options.gpu_profile else ""
    print(f"The figures are in {options.log_path}{also}.")
    return 0 if any(not row.error for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())

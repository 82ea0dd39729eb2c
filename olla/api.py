"""The front door: what the user gives becomes a program, and a program becomes a planned step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from olla.cache import Cache, CacheDir
from olla.capture.average import average_gradients
from olla.capture.program import Program
from olla.capture.updates import needs_closure
from olla.errors import CaptureError, InvalidOptionError
from olla.fit.budget import Budget, bytes_of
from olla.fit.frontier import Frontier
from olla.graph.graph import Graph
from olla.graph.plan import Plan
from olla.planning import Draft, Options
from olla.run.spill import SpillDir
from olla.solve import require
from olla.step import Step
from olla.torch_private import ProcessGroup

__all__ = ["draft", "frontier", "optimize", "optimize_step", "plan", "to_graph"]

Inputs = Tensor | Sequence[Any] | Mapping[str, Any]


def optimize(
    model: nn.Module,
    inputs: Inputs,
    *,
    loss_fn: Callable[..., Tensor] | None = None,
    targets: Tensor | Sequence[Tensor] | None = None,
    optimizer: Optimizer | None = None,
    process_group: ProcessGroup | None = None,
    reorder: bool = True,
    place: bool = True,
    memory_budget: Budget | None = None,
    spill_dir: SpillDir | None = None,
    solver: str | None = None,
    time_limit: float = 60.0,
    cache_dir: CacheDir | None = None,
    background: bool = False,
    progress: bool | None = None,
) -> Step:
    """Plan one step of ``model`` that needs less memory and computes the same numbers.

    With a loss, a target, an optimizer or a model in training mode it is a training step: it stands
    for ``zero_grad(set_to_none=True)``, forward, loss, ``backward()`` and ``optimizer.step()``.
    Without an optimizer, gradients are added to ``.grad`` as ``backward()`` does. Otherwise it is
    an inference under ``torch.no_grad()``.

    Parameters
    ----------
    model
        A live module; its parameters and buffers are updated in place.
    inputs
        An example of what the model takes: a tensor, a tuple or list (positional arguments), or a
        dict (keyword arguments). Values do not matter, shapes and dtypes do.
    loss_fn, targets
        The loss is ``loss_fn(output, *targets)``. Without ``loss_fn``: the output if it is a
        scalar, else ``output.loss``, else ``output.sum()``.
    optimizer
        A live optimizer. Its hyper-parameters are read whenever the step runs, so schedulers work.
    process_group
        Processes (of ``torch.distributed``) that train one model, each on batches of its own, all of the same shapes.
        Gradients are averaged over them before the update, as by ``DistributedDataParallel``, whose place this takes;
        and as there, all begin with the parameters and buffers of rank 0, and buffers are those of rank 0 at the
        beginning of each step. All ranks follow the plan of rank 0, and call this function and the step together.
    reorder
        Whether to search for a better order than program order.
    place
        Whether to run at planned addresses, in one arena (on Linux, with a C++ compiler; else the
        report says why not). False: PyTorch's allocator decides.
    memory_budget
        All that the step may hold at once, parameters, buffers, optimizer state and inputs included: bytes, a text
        like ``"6GiB"``, or a share of what the step holds in eager PyTorch, ``0.5`` or ``"50%"``. Where the order alone
        needs more, operators are run again (and tensors spilled, with ``spill_dir``), with the same results, at the
        least extra time that is found. What
        operators allocate for themselves is known when they have run, so the first steps may exceed it a little
        (and all of them with ``place=False``).
    spill_dir
        A directory for a file to which tensors may go while nobody needs them, if the budget asks for that. The file
        has no name, is as large as what is away at once, and is gone with the step. ``"host"``: the same for steps
        on CUDA, in pinned memory of the host, because GPUs do not write to directories. How fast it is gets measured,
        with 32 MiB, when a budget asks for it. None: nothing is spilled.
    solver
        A solver of integer programs (``"gurobi"``, ``"cpsat"``, ``"highs"``, ``"auto"``: what is there), to improve
        what the planners leave open: orders not proven to be best, and fragmentation, where the graph is small enough.
        They leave little, so None is fine.
    time_limit
        Seconds for planning, and for each program that a solver is given; the best plan so far is used.
    cache_dir
        A directory in which plans are kept, as JSON, and found again when the same is planned the next time; it is
        made if it is not there. The same are: the graph (ops, sizes and workspaces, not names and values), the order
        that was recorded, ``reorder``, the budget in bytes, ``spill_dir``, ``solver``, and the versions of OLLA and of
        its files. With a longer ``time_limit`` it is planned again, unless the plan is known to be the best. How long
        operators take is not compared: on another machine, name another directory. Every plan is checked before it is
        used; a file that is damaged, or is of no use, is replaced, with a warning. None: nothing is kept.
    background
        Capture the step, and plan it on another thread while it runs already, in the order of its program and
        wherever PyTorch's allocator puts it. Results are the same from the first step on; bytes are those of the plan
        once there is one, so it does not go with ``memory_budget``.
    progress
        Show a progress line; by default on a terminal only.

    Returns
    -------
    Step
        Call it as ``step(*inputs, targets=targets)`` (``step(**inputs, ...)`` for a dict); it
        returns the loss, detached, or the output of the inference. Another shape, dtype or mode
        is planned when it first occurs.

    Raises
    ------
    CacheError
        If ``cache_dir`` cannot be made, or not be written; nothing was changed.
    CaptureError
        If the step cannot be captured; nothing was changed.
    ExecutionError
        If another rank failed, or has another step.
    InfeasibleError
        If the step cannot be run within the budget; the message names the smallest one.
    InvalidBudgetError
        If the budget cannot be read, or is not positive.
    InvalidOptionError
        If ``background`` is asked for with ``memory_budget`` or ``process_group``.
    SolverUnavailableError
        If the solver is not installed.
    SpillError
        If ``spill_dir`` is not a directory, not writable, or has no room for what is spilled; nothing was changed.
    """
    options = _options(reorder, place, memory_budget, spill_dir, solver, time_limit, cache_dir, progress, background)
    program = program_of(model, loss_fn, targets, optimizer, process_group)
    _require_shareable(program, options)
    args, kwargs = arguments_of(inputs, targets)
    step = Step(
        program,
        options=options,
        closure_of=optimizer if optimizer is not None and needs_closure(optimizer) else None,
    )
    step.prepare(*args, **kwargs)
    return step


def optimize_step(
    function: Callable[..., Any],
    example_args: Sequence[Any] | Mapping[str, Any],
    *,
    model: nn.Module | Sequence[nn.Module],
    optimizer: Optimizer | Sequence[Optimizer] = (),
    process_group: ProcessGroup | None = None,
    reorder: bool = True,
    place: bool = True,
    memory_budget: Budget | None = None,
    spill_dir: SpillDir | None = None,
    solver: str | None = None,
    time_limit: float = 60.0,
    cache_dir: CacheDir | None = None,
    background: bool = False,
    progress: bool | None = None,
) -> Step:
    """Plan a step function of your own: autocast, clipping, accumulation, several losses.

    Parameters
    ----------
    function
        Runs one step on ``model`` through ``optimizer``, as it does today. It must do all its work
        in tensor operations: Python code runs once, while planning. Step schedulers outside of it.
    example_args
        An example of its arguments: a tuple or list, or a dict of keyword arguments.
    model, optimizer
        All modules whose parameters or buffers it touches, and all optimizers that it steps.
    process_group
        As for :func:`optimize`, but the function averages gradients itself, by
        :func:`olla.average_gradients`.
    reorder, place, memory_budget, spill_dir, solver, time_limit, cache_dir, background, progress
        As for :func:`optimize`.

    Returns
    -------
    Step
        Call it as you call ``function``. Gradients that an optimizer has used up are dropped
        (``.grad`` is None afterwards) if the function starts by clearing them.

    Raises
    ------
    CaptureError
        If the step cannot be captured; nothing was changed.
    ExecutionError
        If another rank failed, or has another step.
    InfeasibleError, InvalidBudgetError, InvalidOptionError, SolverUnavailableError, SpillError
        As from :func:`optimize`.
    """
    if isinstance(example_args, Tensor):
        raise CaptureError("example_args is a tensor: pass a tuple of arguments, such as (inputs, targets)")
    options = _options(reorder, place, memory_budget, spill_dir, solver, time_limit, cache_dir, progress, background)
    models = [model] if isinstance(model, nn.Module) else list(model)
    optimizers = (optimizer,) if isinstance(optimizer, Optimizer) else tuple(optimizer)
    modules = {"model" if len(models) == 1 else f"model{i}": module for i, module in enumerate(models)}
    program = Program(function, modules, optimizers, process_group=process_group)
    _require_shareable(program, options)
    step = Step(program, options=options)
    args, kwargs = arguments_of(example_args, None)
    step.prepare(*args, **kwargs)
    return step


def plan(
    model: nn.Module,
    inputs: Inputs,
    *,
    loss_fn: Callable[..., Tensor] | None = None,
    targets: Tensor | Sequence[Tensor] | None = None,
    optimizer: Optimizer | None = None,
    reorder: bool = True,
    place: bool = True,
    memory_budget: Budget | None = None,
    spill_dir: SpillDir | None = None,
    solver: str | None = None,
    time_limit: float = 60.0,
    cache_dir: CacheDir | None = None,
    progress: bool | None = None,
) -> Plan:
    """Plan as :func:`optimize` does, and only plan: nothing is allocated and nothing will run.

    The addresses hold for the workspaces that are expected; a step that runs finds out the real ones.

    Model and inputs may be on the meta device or fake; they are planned as if on the CPU. Parameters are those
    of :func:`optimize`.

    Raises
    ------
    CaptureError
        If the step cannot be captured.
    InfeasibleError, InvalidBudgetError, SolverUnavailableError, SpillError
        As from :func:`optimize`.
    """
    options = _options(reorder, place, memory_budget, spill_dir, solver, time_limit, cache_dir, progress)
    return draft(model, inputs, loss_fn=loss_fn, targets=targets, optimizer=optimizer, options=options).plan


def draft(
    model: nn.Module,
    inputs: Inputs,
    *,
    loss_fn: Callable[..., Tensor] | None = None,
    targets: Tensor | Sequence[Tensor] | None = None,
    optimizer: Optimizer | None = None,
    options: Options,
) -> Draft:
    """What :func:`plan` makes, with the graph that the plan is for."""
    step = Step(program_of(model, loss_fn, targets, optimizer), options=options)
    args, kwargs = arguments_of(inputs, targets)
    return step.draft_for(*args, **kwargs)


def frontier(
    model: nn.Module,
    inputs: Inputs,
    *,
    loss_fn: Callable[..., Tensor] | None = None,
    targets: Tensor | Sequence[Tensor] | None = None,
    optimizer: Optimizer | None = None,
    spill_dir: SpillDir | None = None,
    points: int = 12,
    time_limit: float = 60.0,
    cache_dir: CacheDir | None = None,
    progress: bool | None = None,
) -> Frontier:
    """What smaller and smaller memory budgets cost in time, from the best order to the smallest peak reached.

    Like :func:`plan` it allocates nothing, and times of operators are estimated. With ``spill_dir`` (as for
    :func:`optimize`) a schedule may spill instead of running operators again. Print the result, or draw it
    with :func:`olla.show.draw.draw_frontier`. Peaks, in bytes, are those above what lives across steps; ``points`` says
    how many budgets are looked at, and ``time_limit``, in seconds, for how long in all. With ``cache_dir`` (as for
    :func:`optimize`) the curve is kept, and found again for the same graph, ``points`` and ``spill_dir``.

    Raises
    ------
    CacheError
        If ``cache_dir`` cannot be made, or not be written.
    CaptureError
        If the step cannot be captured.
    InvalidBudgetError
        If ``points`` is below 2.
    SpillError
        If ``spill_dir`` is not a directory, or not writable.
    """
    options = _options(True, True, None, spill_dir, None, time_limit, cache_dir, progress)
    step = Step(program_of(model, loss_fn, targets, optimizer), options=options)
    args, kwargs = arguments_of(inputs, targets)
    return step.frontier_for(points, *args, **kwargs)


def to_graph(
    model: nn.Module,
    inputs: Inputs,
    *,
    loss_fn: Callable[..., Tensor] | None = None,
    targets: Tensor | Sequence[Tensor] | None = None,
    optimizer: Optimizer | None = None,
) -> Graph:
    """Capture the step that :func:`optimize` would plan, as a graph to save or to plan in another way.

    Like :func:`plan` it allocates nothing and takes models and inputs on the meta device or fake.

    Raises
    ------
    CaptureError
        If the step cannot be captured.
    """
    step = Step(program_of(model, loss_fn, targets, optimizer), options=Options(progress=False))
    args, kwargs = arguments_of(inputs, targets)
    return step.graph_for(*args, **kwargs)


def _options(
    reorder: bool,
    place: bool,
    memory_budget: Budget | None,
    spill_dir: SpillDir | None,
    solver: str | None,
    time_limit: float,
    cache_dir: CacheDir | None,
    progress: bool | None,
    background: bool = False,
) -> Options:
    if memory_budget is not None:
        bytes_of(memory_budget, 1)  # so that it is known to be one before anything is captured
        if background:
            raise InvalidOptionError(
                "background=True with memory_budget: until it is planned, the step needs what eager PyTorch does; "
                "leave one of them out"
            )
    if solver is not None:
        require(solver)
    cache = None if cache_dir is None else Cache(cache_dir)
    return Options(reorder, place, memory_budget, spill_dir, solver, time_limit, progress, cache, background)


def _require_shareable(program: Program, options: Options) -> None:
    """Raise an :class:`OllaError` for what several processes cannot do together."""
    if program.process_group is None:
        return
    if options.background:
        raise InvalidOptionError(
            "background=True with process_group: all ranks must change to the plan in the same step; leave it out"
        )
    if options.spill_dir is not None:
        raise CaptureError(
            "spill_dir with process_group: a step of several processes cannot spill; pass a memory_budget alone"
        )
    if any(needs_closure(optimizer) for optimizer in program.optimizers):
        raise CaptureError(
            "the optimizer calls the step back as often as its rank finds necessary, and other ranks would wait: "
            "use one that does not, with process_group"
        )


def arguments_of(inputs: Inputs, targets: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of the program, by position and by name."""
    named = {} if targets is None else {"targets": targets}
    if isinstance(inputs, Tensor):
        return (inputs,), named
    if isinstance(inputs, Mapping):
        return (), {**inputs, **named}
    if isinstance(inputs, Sequence) and not isinstance(inputs, str):
        return tuple(inputs), named
    raise CaptureError(
        f"inputs is a {type(inputs).__name__}: pass a tensor, a tuple of positional or a dict of keyword arguments"
    )


def program_of(
    model: nn.Module,
    loss_fn: Any,
    targets: Any,
    optimizer: Optimizer | None,
    process_group: ProcessGroup | None = None,
) -> Program:
    """What runs once: the model, and what trains it, if it is trained."""
    if targets is not None and loss_fn is None:
        raise CaptureError("targets without a loss_fn: pass the function that compares them with the output")
    if not isinstance(model, nn.Module):
        raise CaptureError(f"the model is a {type(model).__name__}, not a torch.nn.Module")
    if process_group is not None and optimizer is None:
        raise CaptureError("process_group without an optimizer: gradients are averaged for its update, so pass it too")
    training = model.training or loss_fn is not None or optimizer is not None
    modules = {"model": model}
    if isinstance(loss_fn, nn.Module) and any(True for _ in loss_fn.modules()):
        modules["loss_fn"] = loss_fn

    def infer(*args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return model(*args, **kwargs)

    def train(*args: Any, targets: Any = None, **kwargs: Any) -> Tensor:
        if optimizer is not None:
            optimizer.zero_grad(set_to_none=True)
        loss = _loss(model(*args, **kwargs), loss_fn, targets)
        loss.backward()
        if process_group is not None:
            average_gradients((p for module in modules.values() for p in module.parameters()), process_group)
        if optimizer is not None and not needs_closure(optimizer):
            optimizer.step()
        return loss

    optimizers = () if optimizer is None else (optimizer,)
    return Program(
        train if training else infer, modules, optimizers, inference=not training, process_group=process_group
    )


def _loss(output: Any, loss_fn: Callable[..., Any] | None, targets: Any) -> Tensor:
    if loss_fn is not None:
        expected = () if targets is None else tuple(targets) if isinstance(targets, (tuple, list)) else (targets,)
        loss = loss_fn(output, *expected)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            what = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise CaptureError(f"loss_fn returns {what}: it must return one number, as a tensor")
        return loss
    own = getattr(output, "loss", None)
    if isinstance(own, Tensor):
        return own
    if isinstance(output, Tensor):
        return output if output.numel() == 1 else output.sum()
    raise CaptureError(f"the model returns a {type(output).__name__} without a .loss: pass a loss_fn")

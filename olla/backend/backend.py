"""The backend of ``torch.compile`` that is called ``olla``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import SymInt, fx
from torch.nn import Parameter
from torch.optim import Optimizer

from olla.backend.compiled import CompiledGraph
from olla.backend.inductor import compiled_by_inductor
from olla.backend.joint import Joint, bytes_without_olla, joint_of, require_fixed_sizes, schedule_of
from olla.backend.optimizer import BackwardOptimizer
from olla.backend.split import split
from olla.backend.updates import insert_updates
from olla.backend.workspaces import with_measured_workspaces
from olla.capture.costs import estimated_seconds
from olla.capture.lower import lower_module
from olla.capture.reuse import reuse
from olla.capture.rewrite.batch_norm import allocate_gradients_of_batch_norms_once
from olla.capture.rewrite.max_pool import keep_bytes_for_max_pools
from olla.errors import InvalidOptionError
from olla.fit.budget import bytes_of
from olla.graph.check import verify
from olla.graph.plan import Plan, Schedule
from olla.order.schedule import schedule
from olla.planning import ORDERING, Options, closest
from olla.run.emit import emit
from olla.run.products import choose_products
from olla.torch_private import Boxed, aot_backend, min_cut

__all__ = ["olla"]

_KNOWN = ("memory_budget", "time_limit", "place", "optimizer", "codegen")
_CODEGENS = ("eager", "inductor")
_CLOSE = 0.01  # of a peak: workspaces are estimates, so what saves less may save nothing


def olla(module: fx.GraphModule, inputs: Sequence[Any], *, options: dict[str, Any] | None = None) -> Callable[..., Any]:
    """Compile one graph of a model: its forward and backward in an order, and within a budget, of OLLA's.

    Parameters
    ----------
    module, inputs
        What ``torch.compile`` gives.
    options
        ``memory_budget``: what forward and backward may hold at once, parameters and inputs included, in bytes
        (``"6GiB"``), or as a share (``0.5``) of what they hold as PyTorch divides them, or in the model's own order if
        that is less; what is not kept is computed again in backward. ``time_limit``: seconds for planning. ``place``:
        whether to run at planned addresses, from the third step on, where that is possible (else a warning says why
        not). ``optimizer``: updates each parameter inside backward, as soon as its gradient exists and nobody needs
        the parameter, from the second step on; ``optimizer.step()`` stays in the loop, and updates the others.
        ``codegen``: ``"eager"``, for the operators and the bits of eager PyTorch (the default), or ``"inductor"``, for
        the kernels of PyTorch Inductor.

    Raises
    ------
    InvalidOptionError
        For an option, or a ``codegen``, that is not known, an ``optimizer`` that is none, or one beside Inductor's
        kernels.
    InvalidBudgetError
        If the budget cannot be read, or is not positive.
    CaptureError
        If sizes depend on values of tensors (those that are merely not fixed are: ``torch.compile`` compiles again),
        or the ``optimizer`` couples parameters, or holds none of those that a graph has gradients of.
    """
    for value in inputs:
        if isinstance(value, SymInt):
            int(value)  # which guards that it stays so
    given = dict(options or {})
    optimizer, codegen = given.pop("optimizer", None), given.pop("codegen", "eager")
    known = _options(given)
    if optimizer is not None:
        BackwardOptimizer.of(optimizer)
    if codegen not in _CODEGENS:
        raise InvalidOptionError(f"the backend has no codegen {codegen!r}: it knows {', '.join(_CODEGENS)}")
    if codegen == "inductor":
        if beside := [name for name in ("optimizer", "place") if name in (options or {})]:
            raise InvalidOptionError(f"{beside[0]!r} does not go with Inductor's kernels: leave it or 'codegen' out")
        return compiled_by_inductor(module, inputs, known)
    planner = _Planner(known, optimizer, inputs)
    backend = aot_backend(planner.partition, partial(planner.part, 0), partial(planner.part, 1), planner.infer)
    compiled: Callable[..., Any] = backend(module, inputs)
    return compiled


def _options(options: dict[str, Any]) -> Options:
    unknown = [name for name in options if name not in _KNOWN]
    if unknown:
        raise InvalidOptionError(f"the backend has no option {unknown[0]!r}: it knows {', '.join(_KNOWN)}")
    return Options(**options)


class _Planner:
    """What AOTAutograd calls with the graphs that it has traced."""

    def __init__(self, options: Options, optimizer: Optimizer | None, inputs: Sequence[Any]) -> None:
        self._options = options
        self._optimizer = optimizer
        self._live = {position: value for position, value in enumerate(inputs) if isinstance(value, Parameter)}
        self._compiled: CompiledGraph | None = None

    def partition(
        self, module: fx.GraphModule, inputs: Any, *, num_fwd_outputs: int, **_: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        """Forward and backward of a joint graph, in planned order."""
        require_fixed_sizes(module)
        keep_bytes_for_max_pools(module.graph)
        parts = min_cut(module, inputs, num_fwd_outputs)
        if self._optimizer is not None:
            insert_updates(module, num_fwd_outputs, self._optimizer, self._live)
        allocate_gradients_of_batch_norms_once(module.graph)
        joint = joint_of(module, num_fwd_outputs)
        choose_products(joint.lowered.nodes)
        joint = replace(joint, lowered=with_measured_workspaces(joint.lowered))
        theirs = schedule_of(joint, parts)
        options = self._options
        if options.memory_budget is not None:
            budget = bytes_of(options.memory_budget, bytes_without_olla(joint, theirs))
            options = replace(options, memory_budget=budget)
        found = _planned(joint, theirs, options)
        plan = Plan.of(joint.lowered.graph, found)
        verify(joint.lowered.graph, plan)

        def emitted(**told: Any) -> tuple[fx.GraphModule, fx.GraphModule]:
            return split(emit(module, joint.lowered, found.order, **told), num_fwd_outputs)

        self._compiled = CompiledGraph(joint.lowered, plan, emitted, num_fwd_outputs, options)
        return emitted()

    def part(self, number: int, module: fx.GraphModule, _inputs: Sequence[Any]) -> Boxed:
        """What runs forward (0) and backward (1); ``module`` is that of :meth:`partition`."""
        assert self._compiled is not None
        return self._compiled.part(number, module)

    def infer(self, module: fx.GraphModule, _inputs: Sequence[Any]) -> Boxed:
        """What runs a graph without a backward."""
        require_fixed_sizes(module)
        keep_bytes_for_max_pools(module.graph)
        lowered = lower_module(module)
        lowered = lower_module(module, reuse(lowered))
        found = schedule(lowered.graph, time_limit=self._options.time_limit)
        choose_products(lowered.nodes)
        plan = Plan.of(lowered.graph, found)
        verify(lowered.graph, plan)

        def emitted(**told: Any) -> tuple[fx.GraphModule]:
            return (emit(module, lowered, found.order, **told),)

        return CompiledGraph(lowered, plan, emitted, 0, self._options).part(0, *emitted())


def _planned(joint: Joint, theirs: Schedule, options: Options) -> Schedule:
    """Within the budget; without one, as PyTorch divides it, which computes again, too, unless there is better."""
    graph = joint.lowered.graph
    if options.memory_budget is not None:
        return closest(graph, estimated_seconds(joint.lowered), options)
    found = schedule(graph, time_limit=options.time_limit * ORDERING)
    return found if found.peak_bytes < (1 - _CLOSE) * theirs.peak_bytes else theirs

"""The backend of ``torch.compile`` that is called ``olla``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import SymInt, Tensor, fx

from olla.backend.compiled import CompiledGraph
from olla.backend.joint import Joint, joint_of
from olla.backend.split import split
from olla.capture.costs import estimated_seconds
from olla.capture.lower import lower_module
from olla.capture.reuse import reuse
from olla.errors import CaptureError, InvalidOptionError
from olla.graph.check import verify
from olla.graph.lifetimes import peak_bytes
from olla.graph.plan import Plan, Schedule
from olla.order.schedule import schedule
from olla.planning import Options, closest
from olla.run.emit import emit
from olla.torch_private import Boxed, aot_backend, flatten, min_cut

__all__ = ["olla"]

_KNOWN = ("memory_budget", "time_limit", "place")
_CLOSE = 0.01  # of a peak: workspaces are estimates, so what saves less may save nothing


def olla(module: fx.GraphModule, inputs: Sequence[Any], *, options: dict[str, Any] | None = None) -> Callable[..., Any]:
    """Compile one graph of a model: its forward and backward in an order, and within a budget, of OLLA's.

    Parameters
    ----------
    module, inputs
        What ``torch.compile`` gives.
    options
        ``memory_budget``: what forward and backward may hold at once, parameters and inputs included, in bytes
        (``"6GiB"``), or as a share of what they hold in eager PyTorch (``0.5``); what is not kept is computed again
        in backward. ``time_limit``: seconds for planning. ``place``: whether to run at planned addresses, from the
        third step on, where that is possible (else a warning says why not).

    Raises
    ------
    InvalidOptionError
        For an option that is not known.
    InvalidBudgetError
        If the budget cannot be read, or is not positive.
    CaptureError
        If sizes depend on values of tensors. Those that are merely not fixed are: ``torch.compile`` compiles again.
    """
    for value in inputs:
        if isinstance(value, SymInt):
            int(value)  # which guards that it stays so
    planner = _Planner(_options(options or {}))
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

    def __init__(self, options: Options) -> None:
        self._options = options
        self._compiled: CompiledGraph | None = None

    def partition(
        self, module: fx.GraphModule, inputs: Any, *, num_fwd_outputs: int, **_: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        """Forward and backward of a joint graph, in planned order."""
        _require_fixed_sizes(module)
        parts = min_cut(module, inputs, num_fwd_outputs)
        joint = joint_of(module, num_fwd_outputs)
        found = self._planned(joint, parts)
        plan = Plan.of(joint.lowered.graph, found)
        verify(joint.lowered.graph, plan)

        def emitted(**told: Any) -> tuple[fx.GraphModule, fx.GraphModule]:
            return split(emit(module, joint.lowered, found.order, **told), num_fwd_outputs)

        self._compiled = CompiledGraph(joint.lowered, plan, emitted, num_fwd_outputs, self._options)
        return emitted()

    def part(self, number: int, module: fx.GraphModule, _inputs: Sequence[Any]) -> Boxed:
        """What runs forward (0) and backward (1); ``module`` is that of :meth:`partition`."""
        assert self._compiled is not None
        return self._compiled.part(number, module)

    def infer(self, module: fx.GraphModule, _inputs: Sequence[Any]) -> Boxed:
        """What runs a graph without a backward."""
        _require_fixed_sizes(module)
        lowered = lower_module(module)
        lowered = lower_module(module, reuse(lowered))
        found = schedule(lowered.graph, time_limit=self._options.time_limit)
        plan = Plan.of(lowered.graph, found)
        verify(lowered.graph, plan)

        def emitted(**told: Any) -> tuple[fx.GraphModule]:
            return (emit(module, lowered, found.order, **told),)

        return CompiledGraph(lowered, plan, emitted, 0, self._options).part(0, *emitted())

    def _planned(self, joint: Joint, parts: Sequence[fx.GraphModule]) -> Schedule:
        """Within the budget; without one, as PyTorch divides it, which computes again, too, unless there is better."""
        graph, seconds = joint.lowered.graph, estimated_seconds(joint.lowered)
        found = closest(graph, seconds, self._options)
        if self._options.memory_budget is not None:
            return found
        theirs = _schedule_of(joint, parts)
        return found if found.peak_bytes < (1 - _CLOSE) * theirs.peak_bytes else theirs


def _require_fixed_sizes(module: fx.GraphModule) -> None:
    for node in module.graph.nodes:
        leaves, _ = flatten(node.meta.get("val"))
        sizes = [size for leaf in leaves if isinstance(leaf, Tensor) for size in leaf.shape]
        if node.op == "call_function":
            sizes += leaves
        if any(isinstance(size, SymInt) for size in sizes):
            raise CaptureError(
                f"the size of {node.name!r} depends on values of tensors, and a plan is for fixed sizes: let "
                "torch.compile break the graph there, as it does by default"
            )


def _schedule_of(joint: Joint, parts: Sequence[fx.GraphModule]) -> Schedule:
    """The order in which forward and backward run as PyTorch has divided them."""
    index = {node.name: op for op, node in enumerate(joint.lowered.nodes)}
    # What forward saves stands in backward under its name, too, as a placeholder.
    calls = ([node.name for node in part.graph.nodes if node.op == "call_function"] for part in parts)
    forward, backward = ([index[name] for name in names if name in index] for names in calls)
    order = (*forward, joint.boundary, *backward)
    peak = peak_bytes(joint.lowered.graph, order)
    return Schedule(order, peak, 0, "min-cut partition", 0.0)

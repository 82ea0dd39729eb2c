"""PyTorch Inductor's kernels, divided by OLLA within a budget, and run in OLLA's order where that needs fewer bytes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx

from olla.backend.joint import bytes_without_olla, device_of, joint_of, require_fixed_sizes, schedule_of
from olla.backend.kernels import ordered, peak_of
from olla.backend.observed import Observed
from olla.backend.split import split
from olla.capture.costs import estimated_seconds
from olla.errors import InfeasibleError
from olla.fit.budget import bytes_of
from olla.fit.fitting import fitted
from olla.graph.check import verify
from olla.graph.plan import Plan
from olla.order.schedule import schedule
from olla.planning import ORDERING, Options
from olla.run.emit import emit
from olla.torch_private import Boxed, Kernel, aot_backend, inductor_planned, is_tangent, min_cut, storage_key

__all__ = ["compiled_by_inductor"]

log = logging.getLogger(__name__)

Parts = tuple[fx.GraphModule, fx.GraphModule]  # forward and backward


def compiled_by_inductor(module: fx.GraphModule, inputs: Sequence[Any], options: Options) -> Callable[..., Any]:
    """One graph of ``torch.compile`` with Inductor's kernels.

    Without a budget, Inductor decides what forward saves. With one, its decision stands if it is within the budget
    even before anything is fused; if not, OLLA decides what is saved and what runs again. The order of kernels is
    OLLA's where its peak is lower than that of Inductor's. A budget is estimated when the graph is compiled, and
    held against what the second step allocates.
    """
    budget, persistent = _budget(module, inputs, options)
    planner = _Planner(options, budget, persistent)
    watch = Observed(budget, persistent, device_of(inputs)).part if budget is not None else _as_it_is
    return inductor_planned(module, inputs, planner.partition, planner.reorder, watch)


def _as_it_is(run: Boxed, _: bool) -> Boxed:
    return run


class _TracedError(Exception):
    """A graph was traced, and need not be compiled."""


def _budget(module: fx.GraphModule, inputs: Sequence[Any], options: Options) -> tuple[int | None, int]:
    """The budget in bytes, and what of it are parameters and inputs: None without one, or if there is no backward.

    A share is one of what the operators of the model hold; Inductor's, taken apart, would hold more.
    """
    if options.memory_budget is None:
        return None, 0

    def partition(module: fx.GraphModule, inputs: Any, *, num_fwd_outputs: int, **_: Any) -> Any:
        require_fixed_sizes(module)
        parts = min_cut(module, inputs, num_fwd_outputs)
        joint = joint_of(module, num_fwd_outputs)
        raise _TracedError(joint.lowered.graph.persistent_bytes, bytes_without_olla(joint, schedule_of(joint, parts)))

    def infer(*_: Any) -> Any:
        raise _TracedError

    try:
        aot_backend(partition, infer, infer, infer)(module, inputs)
    except _TracedError as seen:
        if not seen.args:
            bytes_of(options.memory_budget, 1)  # which raises if it cannot be read
            return None, 0
        persistent, held = seen.args
    return bytes_of(options.memory_budget, held), persistent


@dataclass
class _Planner:
    """What Inductor calls with what it has traced and fused."""

    options: Options
    budget: int | None  # bytes that forward and backward may hold at once
    persistent: int  # bytes of parameters and inputs among them
    saved: dict[str, tuple[int, int]] = field(default_factory=dict)  # name in backward -> key of its storage, bytes
    alive: list[Tensor] = field(default_factory=list)  # so that keys stay true

    def partition(self, joint: fx.GraphModule, inputs: Any, *, num_fwd_outputs: int, **options: Any) -> Parts:
        """Forward and backward of a joint graph of Inductor's own operators."""
        require_fixed_sizes(joint)
        given = {storage_key(tensor) for tensor in _placeholders(joint).values()}
        parts = min_cut(joint, inputs, num_fwd_outputs, **options)
        if self.budget is not None:
            parts = self._within(self.budget, joint, parts, num_fwd_outputs)
        found = _placeholders(parts[1])
        self.alive = [*found.values()]
        self.saved = {
            name: (storage_key(tensor), int(tensor.untyped_storage().nbytes()))
            for name, tensor in found.items()
            if storage_key(tensor) not in given  # parameters and inputs, and views of them, stay
        }
        return parts

    def _within(self, budget: int, module: fx.GraphModule, parts: Parts, forward_outputs: int) -> Parts:
        """Inductor's parts, if they are within the budget though nothing is fused yet, or what comes closest to it."""
        joint = joint_of(module, forward_outputs, reusing=False)
        graph, limit = joint.lowered.graph, self.options.time_limit
        room = max(0, budget - self.persistent)
        if schedule_of(joint, parts).peak_bytes <= room:
            return parts
        start, seconds = schedule(graph, time_limit=limit * ORDERING), estimated_seconds(joint.lowered)
        try:
            found = fitted(graph, start, seconds, room, time_limit=limit)
        except InfeasibleError as error:  # fused, it may fit all the same
            found = fitted(graph, start, seconds, error.best_bytes, time_limit=limit)
        verify(graph, Plan.of(graph, found))
        return split(emit(module, joint.lowered, found.order, methods=False), forward_outputs)

    def reorder(self, kernels: Sequence[Kernel], theirs: Sequence[int], outputs: Set[str]) -> Sequence[int]:
        """Inductor's order of the kernels of one part, or one that needs fewer bytes."""
        order = ordered(kernels, theirs, self.saved, outputs, time_limit=self.options.time_limit)
        needed = self.persistent + peak_of([kernels[index] for index in order], self.saved, outputs)
        if self.budget is not None and needed > self.budget:
            log.warning(
                "Inductor's kernels need %s bytes, more than the budget of %s", f"{needed:,}", f"{self.budget:,}"
            )
        return order


def _placeholders(module: fx.GraphModule) -> dict[str, Tensor]:
    """Name and value of each input that is a tensor, but for tangents: those belong to the caller."""
    nodes = [node for node in module.graph.find_nodes(op="placeholder") if not is_tangent(node)]
    return {node.name: node.meta["val"] for node in nodes if isinstance(node.meta.get("val"), Tensor)}

"""What convolutions, batch norms and matrix products hold while they run, found out by running them once."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from olla.capture.lower import Lowered
from olla.capture.rewrite.batch_norm import BATCH_NORM_BACKWARD, BATCH_NORM_BACKWARD_OUT
from olla.compiling import NativeUnavailableError
from olla.run import native
from olla.run.arena import Clock, Recorder
from olla.run.products import BY_ONEDNN
from olla.run.recording import Recording
from olla.torch_private import flatten, real_tensors

__all__ = ["with_measured_workspaces"]

_MEASURED = (
    torch.ops.aten.convolution.default,
    torch.ops.aten.convolution_backward.default,
    torch.ops.aten.native_batch_norm_backward.default,
    BATCH_NORM_BACKWARD,
    BATCH_NORM_BACKWARD_OUT,
    *BY_ONEDNN.values(),
)


def with_measured_workspaces(lowered: Lowered) -> Lowered:
    """The graph, with what each of these calls has allocated besides its results, on tensors like those of the step.

    Each kind of call runs once. Without a C++ compiler, the estimates stay.
    """
    found: dict[Hashable, int] = {}
    ops = list(lowered.graph.ops)
    for index, node in enumerate(lowered.nodes):
        if node.target in _MEASURED:
            key = (node.target, *map(_kind, _arguments(node)))
            if key not in found:
                try:
                    found[key] = _workspace_bytes(node)
                except NativeUnavailableError:
                    return lowered
            ops[index] = replace(ops[index], workspace=found[key])
    return replace(lowered, graph=replace(lowered.graph, ops=tuple(ops)))


def _arguments(node: fx.Node) -> list[Any]:
    """Of a call, with the values that were traced in place of nodes."""
    leaves, _ = flatten(fx.map_arg((node.args, node.kwargs), lambda argument: argument.meta["val"]))
    return leaves


def _kind(argument: Any) -> Hashable:
    if isinstance(argument, Tensor):
        return argument.shape, argument.stride(), argument.dtype, argument.device
    return str(argument)


def _workspace_bytes(node: fx.Node) -> int:
    """Of one call, on tensors of its own, though a fake tensor mode may be on, as in AOTAutograd's partitioner."""
    device = next(argument.device for argument in _arguments(node) if isinstance(argument, Tensor))
    recorder = Recorder(native.load(device.type), Clock())
    assert callable(node.target)
    with real_tensors(), torch.no_grad():
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda argument: _like(argument.meta["val"]))
        with recorder:
            results = node.target(*args, **kwargs)
        leaves, _ = flatten(results)
        made = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf is not kwargs.get("out")]
        kept = sum(leaf.untyped_storage().nbytes() for leaf in made)
    return max(0, Recording.of(recorder.events, {}).peak_bytes - kept)


def _like(value: Any) -> Any:
    """A tensor of zeros for a traced one."""
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device).zero_()

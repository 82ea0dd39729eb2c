"""How long operators take, before any has run: what limits them is computing or moving bytes (the roofline model).

A guess that only has to rank what may be recomputed; once a step has run, its times are measured.
"""

from __future__ import annotations

from torch import Tensor, fx
from torch.utils.flop_counter import flop_registry

from olla.capture.lower import Lowered
from olla.torch_private import OpOverload

__all__ = ["estimated_seconds"]

# Round numbers for two cores of a server; only their ratios matter.
_SECONDS_PER_CALL = 5e-6
_FLOPS_PER_SECOND = 1e11
_BYTES_PER_SECOND = 1e10


def estimated_seconds(lowered: Lowered) -> tuple[float, ...]:
    """Seconds of each op."""
    graph = lowered.graph
    moved = [sum(graph.storages[storage].size for storage in op.touches) for op in graph.ops]
    return tuple(
        _SECONDS_PER_CALL + max(size / _BYTES_PER_SECOND, _flops(node) / _FLOPS_PER_SECOND)
        for size, node in zip(moved, lowered.nodes, strict=True)
    )


def _flops(node: fx.Node) -> int:
    """Of matrix products, convolutions and attention, by PyTorch's own formulas."""
    if not isinstance(node.target, OpOverload) or node.target.overloadpacket not in flop_registry:
        return 0
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda argument: argument.meta["val"])
    return int(flop_registry[node.target.overloadpacket](*args, **kwargs, out_val=_value(node)))


def _value(node: fx.Node) -> object:
    value = node.meta.get("val")
    return value if isinstance(value, Tensor) else tuple(value) if isinstance(value, (list, tuple)) else value

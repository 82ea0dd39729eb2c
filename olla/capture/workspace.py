"""Bytes that operators hold only while they run: estimates for those whose kernels are known to need much."""

from __future__ import annotations

from torch import Tensor, fx, ops

from olla.capture.rewrite import weight_gradient

__all__ = ["workspace_bytes"]


def workspace_bytes(node: fx.Node) -> int:
    """The workspace of one call.

    On the CPU, oneDNN convolutions copy the weight, or compute its gradient, in a blocked layout.
    """
    if node.target is ops.aten.convolution.default:
        return _on_cpu(node.args[1])
    if node.target is ops.aten.convolution_backward.default:
        return _on_cpu(node.args[2])
    if node.target is weight_gradient:
        slices = node.args[6]
        assert isinstance(slices, int)
        # The slice, and its blocked copy; the whole is the result itself.
        return (2 if slices > 1 else 1) * _on_cpu(node.args[2]) // slices
    return 0


def _on_cpu(argument: object) -> int:
    assert isinstance(argument, fx.Node)
    tensor = argument.meta["val"]
    assert isinstance(tensor, Tensor)
    return tensor.nbytes if tensor.device.type == "cpu" else 0

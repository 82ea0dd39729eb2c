"""The gradient of a cross-entropy loss, some rows at a time.

Eager PyTorch fills a tensor of the logits' size with the gradient of the log-probabilities, one number a row and zeros,
and computes the gradient of the logits from it. Rows do not depend on one another, so both kernels can run on a few of
them at a time, and the result may be written over the log-probabilities.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, ops

from olla.capture.rewrite.calls import changes_between, erase_unused, only_user, value_of

__all__ = ["CROSS_ENTROPY_BACKWARD", "CROSS_ENTROPY_BACKWARD_OUT", "bytes_of_rows", "compute_loss_gradients_by_rows"]

aten = ops.aten

_ROWS = 2**22  # bytes of the rows that are computed at once: few enough for caches, enough to start threads for
_NONE = 0  # the reduction that leaves one loss a row
_FILLS: Mapping[Any, int] = {aten.nll_loss_backward.default: 2, aten.nll_loss2d_backward.default: 4}  # and dimensions

_ARGUMENTS = (
    "Tensor gradient, Tensor log_probabilities, Tensor target, Tensor? weight, int reduction, int ignore_index, "
    "Tensor total_weight, Tensor? smoothing"
)
_LIBRARY = torch.library.Library("olla", "FRAGMENT")
_LIBRARY.define(f"cross_entropy_backward({_ARGUMENTS}) -> Tensor")
_LIBRARY.define(f"cross_entropy_backward.out({_ARGUMENTS}, *, Tensor(a!) out) -> Tensor(a!)")
CROSS_ENTROPY_BACKWARD = ops.olla.cross_entropy_backward.default
CROSS_ENTROPY_BACKWARD_OUT = ops.olla.cross_entropy_backward.out


def compute_loss_gradients_by_rows(graph: fx.Graph) -> None:
    """Replace the two backward calls of each cross-entropy loss on the CPU by one, if its logits are large.

    Label smoothing adds to the gradient between the two.
    """
    for node in graph.find_nodes(op="call_function", target=aten._log_softmax_backward_data.default):
        filled, smoothing = _gradient(node)
        if filled is None or not _is_worth_it(node) or changes_between(filled, node):
            continue
        gradient, _, *others = filled.args
        with graph.inserting_before(node):
            whole = graph.call_function(CROSS_ENTROPY_BACKWARD, (gradient, node.args[1], *others, smoothing))
        whole.meta = dict(node.meta)
        node.replace_all_uses_with(whole)
        erase_unused(node)


def _gradient(node: fx.Node) -> tuple[fx.Node | None, fx.Node | None]:
    """The call that fills the gradient for ``node`` alone, if it is of a loss, and what is added to it."""
    filled, smoothing, user = node.all_input_nodes[0], None, node
    if filled.target is aten.add.Tensor and only_user(filled) is node and len(filled.all_input_nodes) == 2:
        user, (smoothing, filled) = filled, filled.all_input_nodes
        if filled.kwargs or user.kwargs or value_of(smoothing).shape != value_of(filled).shape:
            return None, None
    is_loss = _FILLS.get(filled.target) == value_of(node).dim() and only_user(filled) is user
    return (filled, smoothing) if is_loss else (None, None)


def _is_worth_it(node: fx.Node) -> bool:
    """Whether there are several rows, laid out in memory as the kernels take them."""
    dim, made, known = node.args[2], value_of(node), value_of(node.args[1])
    is_by_rows = dim in (1, 1 - known.dim()) and known.is_contiguous() and made.is_contiguous()
    return is_by_rows and known.device.type == "cpu" and known.nbytes > _ROWS


def bytes_of_rows(log_probabilities: Tensor) -> int:
    """The workspace: the rows whose gradient of the log-probabilities is there at once."""
    return _rows(log_probabilities) * log_probabilities[0].nbytes


def _rows(log_probabilities: Tensor) -> int:
    return max(1, min(len(log_probabilities), _ROWS // log_probabilities[0].nbytes))


def _by_rows(
    gradient: Tensor,
    log_probabilities: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: int,
    ignore_index: int,
    total_weight: Tensor,
    smoothing: Tensor | None,
    *,
    out: Tensor,
) -> Tensor:
    fill: Any = aten.nll_loss_backward if log_probabilities.dim() == 2 else aten.nll_loss2d_backward
    step = _rows(log_probabilities)
    workspace = torch.empty_like(log_probabilities[:step])
    for first in range(0, len(log_probabilities), step):
        rows = slice(first, first + step)
        known, filled = log_probabilities[rows], workspace[: len(log_probabilities) - first]
        given = gradient[rows] if reduction == _NONE else gradient
        fill.grad_input(given, known, target[rows], weight, reduction, ignore_index, total_weight, grad_input=filled)
        if smoothing is not None:
            torch.add(smoothing[rows], filled, out=filled)
        aten._log_softmax_backward_data.out(filled, known, 1, known.dtype, out=out[rows])
    return out


def _elsewhere(gradient: Tensor, log_probabilities: Tensor, *others: Any) -> Tensor:
    return _by_rows(gradient, log_probabilities, *others, out=torch.empty_like(log_probabilities))


_LIBRARY.impl("cross_entropy_backward", _elsewhere, "CompositeExplicitAutograd")
_LIBRARY.impl("cross_entropy_backward.out", _by_rows, "CompositeExplicitAutograd")

"""Updates of parameters as calls of a joint graph: each uses gradients up where they would be returned."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from torch import Tensor, fx
from torch.optim import Optimizer

from olla.backend.optimizer import BackwardOptimizer
from olla.capture.lower import tensors_of
from olla.capture.trial import footprint
from olla.capture.updates import chunks
from olla.errors import CaptureError
from olla.graph.graph import Op, Storage
from olla.torch_private import changed_inputs, gradient_inputs, input_position, storage_key

__all__ = ["insert_updates", "is_update", "op_of_update"]

_UPDATES = "updates"  # in the meta of a call: the optimizer, and the live parameters


def insert_updates(
    module: fx.GraphModule, forward_outputs: int, optimizer: Optimizer, live: Mapping[int, Tensor]
) -> None:
    """Let ``module``, a joint graph, update what it can, at its end; ``live`` holds the parameters among its inputs.

    What it returns as a gradient is then what an update leaves of it. Gradients stay as they are that the caller
    copies anyway: on a storage of something else, or in another layout than the parameter's.

    Raises
    ------
    CaptureError
        If there are gradients of parameters, but of none that the optimizer has.
    """
    groups = {id(p): number for number, group in enumerate(optimizer.param_groups) for p in group["params"]}
    output = module.graph.output_node()
    results = list(cast("Sequence[Any]", output.args[0]))
    found = [(at, live[n]) for at, n in gradient_inputs(module, forward_outputs).items() if n in live]
    if found and not any(id(parameter) in groups for _, parameter in found):
        raise CaptureError(
            f"the optimizer ({type(optimizer).__name__}) holds none of the {len(found)} parameters of which a graph "
            "has gradients: build it from the parameters of the model that is compiled"
        )
    placeholders = {input_position(node): node for node in module.graph.find_nodes(op="placeholder")}
    inputs = {id(parameter): placeholders[n] for n, parameter in live.items() if n in placeholders}
    shared = _shared_storages(module, results)
    changed = {id(live[n]) for n in changed_inputs(module, forward_outputs) if n in live}
    pairs: dict[int, list[tuple[Tensor, int]]] = {}
    for at, parameter in found:
        value = results[at].meta["val"]
        own = not value.is_sparse and storage_key(value) not in shared and _layout(value) == _layout(parameter)
        if own and id(parameter) in groups and id(parameter) not in changed:
            pairs.setdefault(groups[id(parameter)], []).append((parameter, at))
    size = sum(parameter.nbytes for group in pairs.values() for parameter, _ in group)
    call = _call_of(BackwardOptimizer.of(optimizer))
    with module.graph.inserting_before(output):
        for chunk in (chunk for group in pairs.values() for chunk in chunks(group, size)):
            parameters = tuple(inputs[id(parameter)] for parameter, _ in chunk)
            update = module.graph.call_function(call, (parameters, tuple(results[at] for _, at in chunk)))
            update.meta = {"val": None, "backward": True, _UPDATES: (optimizer, [parameter for parameter, _ in chunk])}
            for position, (_, at) in enumerate(chunk):
                left = module.graph.call_function(operator.getitem, (update, position))
                left.meta = {"val": results[at].meta["val"]}  # if it is not None
                results[at] = left
    output.args = (tuple(results),)


def is_update(node: fx.Node) -> bool:
    """Whether a call is one that :func:`insert_updates` has put there."""
    return _UPDATES in node.meta


def op_of_update(op: Op, node: fx.Node, state: int, after: Sequence[int]) -> tuple[Op, Storage]:
    """An update, lowered as if it read everything, as it is, and the optimizer's state, the storage numbered ``state``.

    It reads ``after``, too.
    """
    optimizer, parameters = node.meta[_UPDATES]
    needs = [footprint(optimizer, parameter) for parameter in parameters]
    eager = max(need.workspace for need in needs)
    workspace = BackwardOptimizer.of(optimizer).updating(optimizer, parameters).workspace(eager)
    names = " and ".join(argument.name for argument in cast("Sequence[fx.Node]", node.args[0]))
    update = Op(
        f"update {names}",
        reads=tuple(after),
        writes=(*op.reads, state),
        workspace=workspace,
        backward=True,
        reused=eager - workspace,
    )
    return update, Storage(f"optimizer state of {names}", sum(need.state for need in needs), persistent=True)


def _call_of(optimizer: BackwardOptimizer) -> Callable[..., list[Tensor | None]]:
    def update(parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> list[Tensor | None]:
        return optimizer.update(parameters, gradients)

    return update  # a function has a name, which emitted code needs


def _shared_storages(module: fx.GraphModule, results: Sequence[Any]) -> set[int]:
    """Storages of inputs, and those that more than one result is on."""
    inputs = [node for node in module.graph.nodes if node.op in ("placeholder", "get_attr")]
    seen = {storage_key(tensor) for node in inputs for tensor in tensors_of(node.meta.get("val"))}
    shared = set(seen)
    for node in results:
        if isinstance(node, fx.Node):
            keys = {storage_key(tensor) for tensor in tensors_of(node.meta.get("val"))}
            shared |= keys & seen
            seen |= keys
    return shared


def _layout(tensor: Tensor) -> tuple[object, ...]:
    strides = [stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]
    return tensor.shape, strides, tensor.dtype, tensor.device, tensor.layout

"""Forward and backward as one graph, divided by the moment at which the caller has the outputs and computes the loss.

That moment is a call like others, the *boundary*: it takes what forward returns and makes the gradients of that, the
tangents. So an order of the ops says by itself what runs in forward and what in backward, and what is alive across the
boundary is what forward saves. What runs again after it is not saved.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import SymInt, Tensor, fx

from olla.backend.updates import is_update, op_of_update
from olla.capture.lower import Lowered, is_random, lower_module, tensors_of, writes_of
from olla.capture.reuse import reuse
from olla.errors import CaptureError
from olla.graph.graph import Graph, Storage
from olla.graph.lifetimes import eager_peak_bytes, peak_bytes
from olla.graph.plan import Schedule
from olla.torch_private import flatten, is_tangent, storage_key

__all__ = ["Joint", "boundary", "bytes_without_olla", "device_of", "joint_of", "require_fixed_sizes", "schedule_of"]


@dataclass(frozen=True)
class Joint:
    """A lowered joint graph, and its boundary."""

    lowered: Lowered
    boundary: int  # the op


def boundary(*_outputs: object) -> tuple[object, ...]:
    """What the caller does between forward and backward; it is planned around, and never called."""
    raise NotImplementedError


def joint_of(module: fx.GraphModule, forward_outputs: int, *, reusing: bool = True) -> Joint:
    """Put the boundary into ``module``, a joint graph that begins its outputs with ``forward_outputs`` of forward.

    Program order is forward as far as its outputs need it, the boundary, and the rest. Results are written over
    inputs that die in backward alone: what forward saves belongs to autograd, and what runs again needs its inputs.
    Without ``reusing``, the calls stay as they are.
    """
    node = _with_boundary(module, forward_outputs)
    joint = _lowered(module, node, {})
    if not reusing:
        return joint
    graph, after = joint.lowered.graph, _descendants(joint.lowered.graph, joint.boundary)
    spoken_for = (s for op, found in zip(graph.ops, after, strict=True) if not found for s in op.creates)
    kept = replace(graph, outputs=tuple({*graph.outputs, *spoken_for}))
    return _lowered(module, node, reuse(replace(joint.lowered, graph=kept)))


def _lowered(module: fx.GraphModule, node: fx.Node, reused: Mapping[fx.Node, fx.Node]) -> Joint:
    lowered = lower_module(module, reused)
    graph, index = lowered.graph, lowered.nodes.index(node)
    storages, found = list(graph.storages), []
    handed_out = {*graph.ops[index].reads}
    used_up: set[int] = set()
    before = {s for op in graph.ops[:index] for s in op.writes if storages[s].persistent}
    boundary_state = -1
    for position, op in enumerate(graph.ops):
        once: tuple[int, ...] = ()
        if is_update(lowered.nodes[position]):
            used_up.update(s for s in op.reads if not storages[s].persistent)
            op, state = op_of_update(op, lowered.nodes[position], len(storages), (boundary_state,))
            storages.append(state)
        if position == index or handed_out.intersection(op.creates):  # it has happened: state that no repeat may change
            once = (len(storages),)
            storages.append(Storage(f"{op.name} has run", 0, persistent=True))
        if position == index:
            boundary_state = once[0]
            # The caller draws random numbers, and sees inputs and buffers as forward has left them.
            op = replace(op, reads=tuple(s for s in op.reads if s not in before), writes=tuple(sorted(before)))
        op = replace(op, writes=op.writes + once, writes_once=())  # generators cannot be replayed across the boundary
        found.append(op)
    graph = Graph(tuple(found), tuple(storages), tuple(s for s in graph.outputs if s not in used_up))
    return Joint(replace(lowered, graph=graph), index)


def _with_boundary(module: fx.GraphModule, forward_outputs: int) -> fx.Node:
    """Put the boundary after all that forward must do, and in place of the tangents."""
    graph, output = module.graph, module.graph.output_node()
    outputs = cast("Sequence[Any]", output.args[0])[:forward_outputs]
    tangents = [node for node in graph.find_nodes(op="placeholder") if is_tangent(node)]
    forward = _forward_of(graph, outputs, tangents)
    after = next((node for node in graph.nodes if node.op == "call_function" and node not in forward), output)
    for node in list(graph.nodes):
        if node in forward and after is not output:
            after.prepend(node)
    with graph.inserting_before(after):
        found = graph.call_function(boundary, tuple(outputs))
        found.meta["val"] = tuple(tangent.meta["val"] for tangent in tangents)
        for position, tangent in enumerate(tangents):
            part = graph.call_function(operator.getitem, (found, position))
            part.meta = dict(tangent.meta)
            tangent.replace_all_uses_with(part)
            graph.erase_node(tangent)
    return found


def _forward_of(graph: fx.Graph, outputs: Sequence[object], tangents: Sequence[fx.Node]) -> set[fx.Node]:
    """Of the calls that need no tangent, those that outputs need, with effects, or on what is changed in place."""
    late = set(tangents)
    needed = {output for output in outputs if isinstance(output, fx.Node)}
    changed: set[fx.Node] = set()
    for node in graph.nodes:
        if late.intersection(node.all_input_nodes):
            late.add(node)
        elif node.op == "call_function" and (is_random(node) or writes_of(node)):
            needed.add(node)
            changed.update(writes_of(node))
    for node in changed:
        needed.update(_readers(node) - late)
    pending = list(needed)
    while pending:
        missing = [node for node in pending.pop().all_input_nodes if node not in needed]
        needed.update(missing)
        pending.extend(missing)
    return {node for node in needed if node.op in ("call_function", "get_attr")}


def _readers(node: fx.Node) -> set[fx.Node]:
    """The users of a tensor and of its views."""
    readers, keys = set(node.users), {storage_key(tensor) for tensor in tensors_of(node.meta["val"])}
    for user in node.users:
        if keys & {storage_key(tensor) for tensor in tensors_of(user.meta.get("val"))}:
            readers |= _readers(user)
    return readers


def _descendants(graph: Graph, op: int) -> list[bool]:
    """For each op, whether ``op`` must run before it."""
    found = [False] * len(graph.ops)
    for index, before in enumerate(graph.predecessors):
        found[index] = op in before or any(found[other] for other in before)
    return found


def device_of(values: Iterable[object]) -> torch.device:
    """Where the tensors among ``values`` are; where that is the CPU and another device, the other one."""
    devices = {value.device for value in values if isinstance(value, Tensor)}
    return next((device for device in devices if device.type != "cpu"), torch.device("cpu"))


def require_fixed_sizes(module: fx.GraphModule) -> None:
    """Raise :class:`CaptureError` if a size is not known when the graph is compiled."""
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


def schedule_of(joint: Joint, parts: Sequence[fx.GraphModule]) -> Schedule:
    """The order in which forward and backward run as PyTorch has divided them."""
    index = {node.name: op for op, node in enumerate(joint.lowered.nodes)}
    # What forward saves stands in backward under its name, too, as a placeholder.
    calls = ([node.name for node in part.graph.nodes if node.op == "call_function"] for part in parts)
    forward, backward = ([index[name] for name in names if name in index] for names in calls)
    order = _with_updates(joint.lowered, [*forward, joint.boundary, *backward])
    peak = peak_bytes(joint.lowered.graph, order)
    return Schedule(order, peak, 0, "min-cut partition", 0.0)


def bytes_without_olla(joint: Joint, theirs: Schedule) -> int:
    """What forward and backward hold, parameters and inputs included, before there is a budget.

    That is the model's own order, or PyTorch's division of it, ``theirs``, if that needs less, because it runs some
    operators again.
    """
    graph = joint.lowered.graph
    return graph.persistent_bytes + min(eager_peak_bytes(graph), theirs.peak_bytes)


def _with_updates(lowered: Lowered, order: list[int]) -> tuple[int, ...]:
    """Each update right after the last op that touches what it touches."""
    ops = lowered.graph.ops
    for index, node in enumerate(lowered.nodes):
        if is_update(node):
            touched = set(ops[index].touches)
            last = max(at for at, other in enumerate(order) if touched.intersection(ops[other].touches))
            order.insert(last + 1, index)
    return tuple(order)

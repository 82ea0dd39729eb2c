"""A planned order as Python code: one line per call, every name dropped at its last use."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import fx

from olla.capture.lower import Lowered, is_random, statistics_of, tensors_of
from olla.capture.rewrite.weight_gradient import slices_that_keep_the_bits, weight_gradient
from olla.capture.updates import UPDATE, Update
from olla.graph.plan import extra_runs
from olla.run.random import random_state, replay
from olla.run.spill import Spiller
from olla.torch_private import forget_source_with, reshapes_in_place

__all__ = ["Tell", "Watch", "emit", "runnable"]


Tell = Callable[[int], None]
Watch = Callable[[int, object], None]

aten = torch.ops.aten

# Views that tensors have methods for, which take half of the time of a call by name. Transformers take many.
_METHODS = {
    aten.detach.default: "detach",
    aten.expand.default: "expand",
    aten.permute.default: "permute",
    aten.select.int: "select",
    aten.squeeze.dim: "squeeze",
    aten.t.default: "t",
    aten.transpose.int: "transpose",
    aten.unsqueeze.default: "unsqueeze",
    aten.view.default: "view",
}

_OWN_CHUNK = 2_048  # entries of CPython's stack, which grows in chunks of so many, or more for a larger frame


def emit(
    module: fx.GraphModule,
    lowered: Lowered,
    order: Sequence[int],
    *,
    updates: Sequence[Update] = (),
    spiller: Spiller | None = None,
    tell: Tell | None = None,
    watch: Watch | None = None,
    methods: bool = True,
) -> fx.GraphModule:
    """The calls of ``module``, its ops in ``order``; ``.code`` of the result is what runs.

    An op that stands in ``order`` again runs again: readers take the latest result, running statistics are left
    alone, and the same random numbers are drawn.
    Views are taken right before they are needed. The parts of a result are taken right after the
    call, so that the tuple does not keep them all alive. ``updates`` are what the slots of update ops stand for.
    ``spiller`` is told when storages leave and come back.
    ``tell`` is called with the position in the order before each op, and once more if storages have moved there
    in between; ``watch`` after it, with the position and what the op returned.
    Without ``methods``, views are calls of operators, too.
    """
    return _Emitter(module, lowered, updates, spiller, tell, watch, methods).emit(order)


class _Emitter:
    def __init__(
        self,
        module: fx.GraphModule,
        lowered: Lowered,
        updates: Sequence[Update],
        spiller: Spiller | None,
        tell: Tell | None,
        watch: Watch | None,
        methods: bool,
    ) -> None:
        self._module = module
        self._lowered = lowered
        self._slots = updates
        self._methods = _METHODS if methods else {}
        self._moves: dict[tuple[str, int], list[int]] = {}  # hook and position -> what moves there
        self._hooks: dict[str, object] = {name: hook for name, hook in (("op", tell), ("look", watch)) if hook}
        self._transfers = spiller.transfers if spiller else ()
        for number, t in enumerate(self._transfers):
            moments = {"store": t.stored, "drop": t.dropped, "fetch": t.fetched, "ready": t.used}
            self._hooks |= {hook: getattr(spiller, hook) for hook in moments}
            for move in moments.items():
                self._moves.setdefault(move, []).append(number)
        self._graph = fx.Graph()
        self._emitted: dict[fx.Node, fx.Node] = {}
        self._updates: dict[str, Update] = {}
        self._repeated: set[int] = set()
        self._random_states: dict[fx.Node, fx.Node] = {}

    def emit(self, order: Sequence[int]) -> fx.GraphModule:
        module = self._module
        for node in module.graph.nodes:
            if node.op == "placeholder":
                self._copy(node)
        self._repeated = {*extra_runs(order)}
        for position, index in enumerate(order):
            self._move(position)
            self._emit_op(position, index)
            self._store(position)
        self._move(len(order))
        output = module.graph.output_node()
        self._require(output.all_input_nodes)
        self._copy(output)
        constants = {str(n.target): getattr(module, str(n.target)) for n in self._emitted if n.op == "get_attr"}
        root: dict[str, Any] = constants | self._updates | self._hooks
        return runnable(root, self._graph, "PlannedStep")

    def _emit_op(self, position: int, index: int) -> None:
        node = self._lowered.nodes[index]
        if reshapes_in_place(node.target):
            self._take_views_before(index)
        self._require(node.all_input_nodes)
        self._call("op", position)
        if node.target is UPDATE:
            self._emit_update(index)
            return
        if node in self._emitted:
            self._emit_again(index)
        else:
            if index in self._repeated and is_random(node):
                self._random_states[node] = self._graph.call_function(random_state, (_device_of(node),))
            self._copy(node)
        self._call("look", position, self._emitted[node])
        for part in node.users:
            if part.target is operator.getitem and part.users:
                self._copy(part)

    def _move(self, position: int) -> None:
        """What leaves and comes back between the op before ``position`` and the one there."""
        for hook in ("drop", "fetch", "ready"):
            numbers = self._moves.get((hook, position), ())
            if hook == "fetch" and numbers:
                self._call("op", position)  # it is the one that has what is allocated now
            for number in numbers:
                self._call(hook, number)

    def _store(self, position: int) -> None:
        """What may be copied out after the op at ``position``."""
        for number in self._moves.get(("store", position), ()):
            self._call("store", number, *self._tensor_on(self._transfers[number].storage))

    def _tensor_on(self, storage: int) -> tuple[fx.Node, int]:
        """Where the op that made it has returned ``storage``: the name, and the index of the tensor in its value."""
        ops = zip(self._lowered.nodes, self._lowered.graph.ops, strict=True)
        maker = next(node for node, op in ops if storage in op.creates)
        for part in maker.users:  # the tuple itself is not kept
            if part in self._emitted and self._lowered.views.get(part) == {storage}:
                return self._emitted[part], 0
        return self._emitted[maker], self._lowered.results[maker].index(storage)

    def _emit_again(self, index: int) -> None:
        node, op = self._lowered.nodes[index], self._lowered.graph.ops[index]
        for view, storages in self._lowered.views.items():
            if not storages.isdisjoint(op.creates):
                self._emitted.pop(view, None)  # it is on what was made the last time
        self._copy(node)
        again = self._emitted[node]
        if op.writes_once:
            statistics = [self._emitted[found] for found in statistics_of(node)]
            again.args = tuple(None if argument in statistics else argument for argument in again.args)
        if node in self._random_states:
            arguments: tuple[Any, ...] = (self._random_states[node], _device_of(node), again.target)
            again.args, again.target = (*arguments, *again.args), replay

    def _call(self, hook: str, *arguments: int | fx.Node) -> None:
        if hook in self._hooks:
            self._graph.call_module(hook, arguments)

    def _copy(self, node: fx.Node) -> None:
        copied = self._graph.node_copy(node, lambda argument: self._emitted[argument])
        if node.target is weight_gradient:
            copied.update_arg(6, slices_that_keep_the_bits(node))
        if node.target in self._methods and not node.kwargs:
            copied.op, copied.target = "call_method", self._methods[node.target]
        self._emitted[node] = copied

    def _require(self, nodes: Sequence[fx.Node]) -> None:
        """Take the views among ``nodes`` (and what they view) that were not taken yet."""
        pending = [node for node in reversed(nodes) if node not in self._emitted]
        while pending:
            missing = [node for node in pending[-1].all_input_nodes if node not in self._emitted]
            if missing:
                pending.extend(missing)
            elif (node := pending.pop()) not in self._emitted:
                self._copy(node)

    def _take_views_before(self, index: int) -> None:
        """Op ``index`` reshapes its tensor itself: a view of it that is older must be taken before."""
        changed = set(self._lowered.graph.ops[index].writes)
        for node in self._module.graph.nodes:
            if node is self._lowered.nodes[index]:
                break
            if changed & self._lowered.views.get(node, set()):
                self._require([node])

    def _emit_update(self, index: int) -> None:
        _, gradients, slot = self._lowered.nodes[index].args
        gradients = cast("Sequence[fx.Node]", gradients)
        assert isinstance(slot, int)
        name = "".join(c if c.isalnum() else "_" for c in self._lowered.graph.ops[index].name)
        while name in self._updates:  # stepped more than once
            name += "_again"
        self._updates[name] = self._slots[slot]
        self._graph.call_module(name, tuple(self._emitted[gradient] for gradient in gradients))


def _device_of(node: fx.Node) -> torch.device:
    return tensors_of(node.meta["val"])[0].device


def runnable(root: fx.GraphModule | dict[str, Any], graph: fx.Graph, name: str) -> fx.GraphModule:
    """A module that runs ``graph``, with a frame that begins a chunk of CPython's stack.

    The frame is large, and where it just fits into a chunk, each call of Python code from it (of an optimizer, say)
    would get a chunk from the system and give it back: that made a step of an MNASNet take half as long again.
    """
    module = fx.GraphModule(root, graph, class_name=name)
    forget_source_with(module)
    forward: Any = type(module).forward
    code = forward.__code__
    forward.__code__ = code.replace(co_stacksize=max(_OWN_CHUNK, code.co_stacksize))
    return module

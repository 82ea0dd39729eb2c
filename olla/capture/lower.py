"""A traced step to a dataflow graph: which bytes each operator touches.

Nothing here knows an operator by name. Two tensors share a storage if PyTorch says so; a call that
only hands out tensors on storages it was given is a view and costs nothing; what a call writes
stands in its schema. The few operators whose schema hides a write are listed in one table, and a
test looks for more.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from olla.capture.average import PROCESS_GROUP, START_SUM
from olla.capture.program import Program
from olla.capture.trace import Trace
from olla.capture.trial import footprint
from olla.capture.updates import UPDATE, Update
from olla.capture.workspace import spared_bytes, workspace_bytes
from olla.graph.graph import Graph, Op, Storage
from olla.torch_private import (
    FUNCTIONAL_BATCH_NORM,
    OpOverload,
    dense_parts,
    flatten,
    storage_key,
    written_arguments,
)

__all__ = ["Lowered", "is_random", "lower", "lower_module", "statistics_of", "tensors_of", "writes_of"]

# Arguments that an operator writes although its schema does not say so, and the one that enables it, if any.
_UNDECLARED_WRITES: Mapping[object, tuple[tuple[int, ...], int | None]] = {
    torch.ops.aten.native_batch_norm.default: ((3, 4), 5),
    torch.ops.aten.cudnn_batch_norm.default: ((3, 4), 5),
    torch.ops.aten.miopen_batch_norm.default: ((3, 4), 5),
    torch.ops.aten.mkldnn_rnn_layer_backward.default: ((22,), None),
}

# Where functional batch norms take statistics that are replaced later on, and the argument that says that they are
# in training: then what they return does not depend on these, but for the next ones.
_REPLACED: Mapping[object, tuple[tuple[int, ...], int]] = {FUNCTIONAL_BATCH_NORM: ((3, 4), 5)}


@dataclass(frozen=True)
class Lowered:
    """A graph, and the traced call that each of its ops stands for."""

    graph: Graph
    nodes: tuple[fx.Node, ...]  # nodes[i] is op i; all other calls are views, run when needed
    views: Mapping[fx.Node, set[int]]  # the storages that each view is on
    results: Mapping[fx.Node, tuple[int, ...]]  # the storage of each tensor that the call of an op returns


def lower(program: Program, traced: Trace, reused: Mapping[fx.Node, fx.Node] | None = None) -> Lowered:
    """Lower ``traced``. Names of storages and sources of ops are for people.

    ``reused`` holds, for calls that write over one of their inputs, which.
    """
    names = [*map(program.display_name, program.state), *(f"{name}.grad" for name in traced.gradients_in)]
    parameters = {id(tensor): program.display_name(name) for name, tensor in program.parameters.items()}
    return _Builder(reused or {}, traced.updates, parameters).lowered(traced.module, names)


def lower_module(module: fx.GraphModule, reused: Mapping[fx.Node, fx.Node] | None = None) -> Lowered:
    """Lower a graph that updates no parameters, whose calls have their results in ``meta["val"]``."""
    return _Builder(reused or {}).lowered(module)


@dataclass
class _Builder:
    reused: Mapping[fx.Node, fx.Node]
    updates: Sequence[Update] = ()
    parameters: Mapping[int, str] = field(default_factory=dict)  # id of a parameter -> its name, for people
    ops: list[Op] = field(default_factory=list)
    nodes: list[fx.Node] = field(default_factory=list)
    storages: list[Storage] = field(default_factory=list)
    ids: dict[int, int] = field(default_factory=dict)  # key of a torch storage -> our id
    views: dict[fx.Node, set[int]] = field(default_factory=dict)
    results: dict[fx.Node, tuple[int, ...]] = field(default_factory=dict)
    optimizer_state: dict[tuple[int, int], int] = field(default_factory=dict)  # optimizer, parameter -> our id
    sizeless: dict[str, int] = field(default_factory=dict)  # state without bytes -> our id

    def lowered(self, module: fx.GraphModule, names: Sequence[str] = ()) -> Lowered:
        """The whole graph; ``names`` of its first inputs are for people."""
        remaining = iter(names)
        for node in module.graph.nodes:
            if node.op == "placeholder":
                self.add_persistent(node, next(remaining, node.name))
            elif node.op == "get_attr":
                self.add_persistent(node, node.name)
            elif node.op == "call_function":
                if node.target is UPDATE:
                    self.add_update(node)
                elif self.is_view(node):
                    self.add_view(node)
                else:
                    self.add_op(node)
        outputs = self.existing(module.graph.output_node().all_input_nodes)
        graph = Graph(tuple(self.ops), tuple(self.storages), tuple(sorted(outputs)))
        return Lowered(graph, tuple(self.nodes), self.views, self.results)

    def add_persistent(self, node: fx.Node, name: str) -> None:
        for tensor in _tensors(node):
            self._add_storage(tensor, name, persistent=True)

    def is_view(self, node: fx.Node) -> bool:
        """Whether the call only hands out tensors on storages that exist: no bytes, no effect."""
        results = _tensors(node)
        if not results or writes_of(node) or is_random(node):
            return False
        return all(storage_key(tensor) in self.ids for tensor in results)

    def add_view(self, node: fx.Node) -> None:
        self.views[node] = self.existing([node])

    def add_op(self, node: fx.Node) -> None:
        writes = self.existing(writes_of(node))
        once = {s for s in self.existing(statistics_of(node)) if self.storages[s].persistent}
        if is_random(node):
            writes |= {self._generator()}
            once |= {self._generator()} if _is_replayable(node) else set()
        if node.target is START_SUM:
            writes |= {self._sizeless(PROCESS_GROUP)}
        reads = self.existing(node.all_input_nodes) - writes
        reads -= {s for s in self.existing(_replaced(node)) if self.storages[s].persistent}
        if node in self.reused:  # its first result was traced on a storage of its own
            self.ids[storage_key(_tensors(node)[0])] = self.ids[storage_key(self.reused[node].meta["val"])]
        held = node.meta.get("eager", ())
        creates = [
            self._add_storage(tensor, node.name, eager=eager)
            for tensor, eager in itertools.zip_longest(_tensors(node), held)
            if storage_key(tensor) not in self.ids
        ]
        self.results[node] = tuple(self.ids[storage_key(tensor)] for tensor in _tensors(node))
        spared = spared_bytes(node) + (_tensors(node)[0].untyped_storage().nbytes() if node in self.reused else 0)
        self._append(node, _name(node), creates, reads, writes, workspace_bytes(node), once, spared)

    def add_update(self, node: fx.Node) -> None:
        slot = node.args[2]
        assert isinstance(slot, int)
        update, names = self.updates[slot], self.parameters
        label = "all" if update.whole else " and ".join(names[id(p)] for p in update.parameters_updated)
        writes = self.existing(node.all_input_nodes)
        eager = 0
        for parameter in update.parameters_updated:
            needs = footprint(update.optimizer, parameter)
            eager = max(eager, needs.workspace)
            key = (id(update.optimizer), id(parameter))
            if key not in self.optimizer_state:
                self.optimizer_state[key] = len(self.storages)
                name = f"optimizer state of {names[id(parameter)]}"
                self.storages.append(Storage(name, needs.state, persistent=True))
            writes |= {self.optimizer_state[key]}
        if update.whole:
            writes |= {self._generator()}  # it may draw random numbers
        workspace = update.workspace(eager)
        self._append(node, f"update {label}", [], set(), writes, workspace, spared=eager - workspace)

    def existing(self, nodes: Iterable[fx.Node]) -> set[int]:
        return {self.ids[storage_key(tensor)] for node in nodes for tensor in _tensors(node)}

    def _append(
        self,
        node: fx.Node,
        name: str,
        creates: list[int],
        reads: set[int],
        writes: set[int],
        workspace: int,
        writes_once: Iterable[int] = (),
        spared: int = 0,
    ) -> None:
        self.ops.append(
            Op(
                name,
                creates=tuple(creates),
                reads=tuple(sorted(reads)),
                writes=tuple(sorted(writes)),
                workspace=workspace,
                source=node.meta.get("source", ""),
                backward=node.meta.get("backward", False),
                writes_once=tuple(sorted(writes_once)),
                reused=spared,
            )
        )
        self.nodes.append(node)

    def _add_storage(self, tensor: Tensor, name: str, *, persistent: bool = False, eager: int | None = None) -> int:
        """The id of the storage of ``tensor``, new or not; ``eager``: bytes that eager PyTorch holds in its place."""
        key = storage_key(tensor)
        if key not in self.ids:
            self.ids[key] = len(self.storages)
            size = int(tensor.untyped_storage().nbytes())  # symbolic where torch.compile gives views
            spared = 0 if eager is None else eager - size
            self.storages.append(Storage(name, size, persistent, spared))
        return self.ids[key]

    def _generator(self) -> int:
        return self._sizeless("random generator")

    def _sizeless(self, name: str) -> int:
        if name not in self.sizeless:
            self.sizeless[name] = len(self.storages)
            self.storages.append(Storage(name, 0, persistent=True))
        return self.sizeless[name]


def tensors_of(value: object) -> list[Tensor]:
    """The tensors with bytes of their own in what a call returns; of a sparse one, its indices and values."""
    leaves, _ = flatten(value)
    return [part for leaf in leaves if isinstance(leaf, Tensor) for part in dense_parts(leaf)]


def _name(node: fx.Node) -> str:
    target = node.target
    return str(target) if isinstance(target, OpOverload) else getattr(target, "__name__", str(target))


def _tensors(node: fx.Node) -> list[Tensor]:
    return tensors_of(node.meta.get("val"))


def writes_of(node: fx.Node) -> list[fx.Node]:
    """The arguments that the call changes in place."""
    if not isinstance(node.target, OpOverload):
        return []
    written: list[fx.Node] = []
    for position, name in written_arguments(node.target):
        written.extend(_nodes(node.args[position] if position < len(node.args) else node.kwargs.get(name)))
    positions, enabled_by = _UNDECLARED_WRITES.get(node.target, ((), None))
    if enabled_by is None or node.args[enabled_by]:
        written.extend(found for position in positions for found in _nodes(node.args[position]))
    return written


def statistics_of(node: fx.Node) -> list[fx.Node]:
    """The running statistics that a batch norm updates and does not use: given None instead, it computes the same."""
    positions, enabled_by = _UNDECLARED_WRITES.get(node.target, ((), None))
    if enabled_by is None or not node.args[enabled_by]:
        return []
    return [found for position in positions for found in _nodes(node.args[position])]


def _replaced(node: fx.Node) -> list[fx.Node]:
    positions, training = _REPLACED.get(node.target, ((), 0))
    return [found for position in positions if node.args[training] for found in _nodes(node.args[position])]


def _nodes(value: object) -> Iterator[fx.Node]:
    if isinstance(value, fx.Node):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _nodes(item)


def is_random(node: fx.Node) -> bool:
    """Whether the call draws random numbers."""
    target = node.target
    return isinstance(target, OpOverload) and torch.Tag.nondeterministic_seeded in target.tags


def _is_replayable(node: fx.Node) -> bool:
    """Whether all that a random call draws comes from the generator of its device, whose state can be kept."""
    devices = {tensor.device for tensor in _tensors(node)}
    return node.kwargs.get("generator") is None and len(devices) == 1

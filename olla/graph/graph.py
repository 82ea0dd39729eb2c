"""The dataflow graph: which operator touches which bytes.

A graph is a *program*: its ops stand in program order, the order in which they would run without
OLLA, and each says which storages it creates, reads and overwrites. Everything else (dependencies,
lifetimes, what a legal schedule is) follows from that.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from olla.errors import InvalidGraphError

__all__ = ["Graph", "Op", "Storage"]

FORMAT = "olla-graph-1"


@dataclass(frozen=True, slots=True)
class Storage:
    """Bytes in memory that one or several tensors view."""

    name: str
    size: int  # bytes
    persistent: bool = False  # lives across steps: parameters, buffers, optimizer state, inputs
    spared: int = 0  # bytes that eager PyTorch takes besides, where it keeps the same in a wider dtype

    @property
    def eager_size(self) -> int:
        """Bytes that eager PyTorch takes for it."""
        return self.size + self.spared


@dataclass(frozen=True, slots=True)
class Op:
    """One operator call. The tuples hold storage ids, positions in ``Graph.storages``.

    State that is not memory is modelled as a persistent storage of size 0 that the op writes: a
    random generator, for example, so that draws keep their order. An op that writes persistent storages
    can run again only if a repeat leaves them alone and makes the same of all others: a batch norm does without
    its running statistics, a dropout replays its state of the generator. These stand in ``writes_once``, too.
    """

    name: str
    creates: tuple[int, ...] = ()  # storages that this op allocates
    reads: tuple[int, ...] = ()  # storages that it reads and leaves as they are
    writes: tuple[int, ...] = ()  # storages that exist already and that it changes in place
    workspace: int = 0  # bytes that it holds only while it runs
    source: str = ""  # the line of the model it comes from, if known; in backward, that of what is differentiated
    backward: bool = False  # it runs in a backward pass: what it creates are gradients
    writes_once: tuple[int, ...] = ()  # of the writes, those to persistent storages that a repeat does without
    reused: int = 0  # bytes that eager PyTorch takes besides: a result that is written over an input here, temporaries

    @property
    def touches(self) -> tuple[int, ...]:
        """Every storage that must be in memory while the op runs."""
        return self.creates + self.reads + self.writes


@dataclass(frozen=True)
class Graph:
    """Ops in program order, the storages they touch, and the storages that outlive the step.

    Ids are positions: op ``i`` is ``ops[i]``, storage ``s`` is ``storages[s]``.

    Raises
    ------
    InvalidGraphError
        For an unknown storage, a negative size, a storage created twice, created although it is
        persistent, or touched before it exists. The message names the op.
    """

    ops: tuple[Op, ...]
    storages: tuple[Storage, ...]
    outputs: tuple[int, ...] = ()  # storages handed to the caller: live until the end

    def __post_init__(self) -> None:
        _validate(self)

    @property
    def persistent_bytes(self) -> int:
        """Bytes that live across steps, whatever the order."""
        return sum(storage.size for storage in self.storages if storage.persistent)

    @cached_property
    def predecessors(self) -> tuple[tuple[int, ...], ...]:
        """For each op, the ops that must run before it (those that follow from others included).

        Read after write, write after read and write after write, storage by storage.
        """
        last_writer: dict[int, int] = {}
        readers: dict[int, list[int]] = {}
        result: list[tuple[int, ...]] = []
        for index, op in enumerate(self.ops):
            before = {last_writer[s] for s in op.reads + op.writes if s in last_writer}
            for storage in op.writes:
                before.update(readers.get(storage, ()))
            before.discard(index)
            result.append(tuple(sorted(before)))
            for storage in op.reads:
                readers.setdefault(storage, []).append(index)
            for storage in op.creates + op.writes:
                last_writer[storage] = index
                readers[storage] = []
        return tuple(result)

    @cached_property
    def successors(self) -> tuple[tuple[int, ...], ...]:
        """For each op, the ops that must run after it: ``predecessors`` turned around."""
        after: list[list[int]] = [[] for _ in self.ops]
        for index, before in enumerate(self.predecessors):
            for other in before:
                after[other].append(index)
        return tuple(tuple(ops) for ops in after)

    @cached_property
    def digest(self) -> str:
        """A fingerprint of all that a plan depends on, which names, sources and passes are not."""
        ops = [(op.creates, op.reads, op.writes, op.workspace, op.writes_once, op.reused) for op in self.ops]
        storages = [(storage.size, storage.persistent, storage.spared) for storage in self.storages]
        return hashlib.sha256(json.dumps([ops, storages, self.outputs]).encode()).hexdigest()

    def save(self, path: str | Path) -> None:
        """Write the graph to ``path`` as JSON, in the form that docs/graphs.md describes."""
        Path(path).write_text(json.dumps(self.to_dict()) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Graph:
        """Read a graph that :meth:`save` wrote, or that follows docs/graphs.md.

        Raises
        ------
        InvalidGraphError
            If the file holds no graph, or one that contradicts itself.
        """
        try:
            data = json.loads(Path(path).read_text())
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise InvalidGraphError(f"{path} is not JSON: {error}") from error
        return cls.from_dict(data)

    def to_dict(self) -> dict[str, Any]:
        """The graph as JSON-ready data; :meth:`from_dict` reads it back."""
        return {
            "format": FORMAT,
            "ops": [asdict(op) for op in self.ops],
            "storages": [asdict(storage) for storage in self.storages],
            "outputs": list(self.outputs),
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Graph:
        """Read what :meth:`to_dict` wrote.

        Raises
        ------
        InvalidGraphError
            If ``data`` is not of that form or describes a graph that contradicts itself.
        """
        try:
            if data["format"] != FORMAT:
                raise InvalidGraphError(f"format is {data['format']!r}, this version reads {FORMAT!r}")
            ops = tuple(_op_from_dict(entry) for entry in data["ops"])
            storages = tuple(Storage(**entry) for entry in data["storages"])
            outputs = tuple(data.get("outputs", ()))
        except (AttributeError, KeyError, TypeError) as error:
            raise InvalidGraphError(f"not a graph of format {FORMAT!r}: {error!r}") from error
        return cls(ops, storages, outputs)


def _require_integers(values: Sequence[Any], where: str) -> None:
    for value in values:
        if type(value) is not int:
            raise InvalidGraphError(f"{where} holds {value!r} where an integer is needed")


def _op_from_dict(entry: dict[str, Any]) -> Op:
    tuples: dict[str, Any] = {
        key: tuple(entry[key]) for key in ("creates", "reads", "writes", "writes_once") if key in entry
    }
    return Op(**(entry | tuples))


def _validate(graph: Graph) -> None:
    for position, storage in enumerate(graph.storages):
        _require_integers([storage.size, storage.spared], f"storage {position} ({storage.name!r})")
        if storage.size < 0:
            creators = [
                f", created by op {i} ({op.name!r})" for i, op in enumerate(graph.ops) if position in op.creates
            ]
            raise InvalidGraphError(
                f"storage {position} ({storage.name!r}){''.join(creators)} has the negative size {storage.size}"
            )
        if storage.spared < 0:
            raise InvalidGraphError(
                f"storage {position} ({storage.name!r}) spares {storage.spared} bytes, less than none"
            )
    for index, op in enumerate(graph.ops):
        where = f"op {index} ({op.name!r})"
        _require_integers([*op.touches, op.workspace, op.reused], where)
        if op.workspace < 0 or op.reused < 0:
            raise InvalidGraphError(f"{where} has the negative workspace {min(op.workspace, op.reused)}")
        _require_known(op.touches, graph, where)
        if len(set(op.touches)) != len(op.touches):
            raise InvalidGraphError(f"{where} names a storage twice: creates, reads and writes must be disjoint")
        for once in op.writes_once:
            if once not in op.writes or not graph.storages[once].persistent:
                raise InvalidGraphError(f"{where} writes storage {once} once, but it is not persistent or not written")
    exists = {position for position, storage in enumerate(graph.storages) if storage.persistent}
    for index, op in enumerate(graph.ops):
        where = f"op {index} ({op.name!r})"
        for created in op.creates:
            if created in exists:
                raise InvalidGraphError(f"{where} creates storage {created}, which exists already")
            exists.add(created)
        for used in op.reads + op.writes:
            if used not in exists:
                raise InvalidGraphError(f"{where} touches storage {used} {_why_missing(graph, index, used)}")
    _require_integers(graph.outputs, "outputs")
    _require_known(graph.outputs, graph, "outputs")
    for output in graph.outputs:
        if output not in exists:
            raise InvalidGraphError(f"outputs name storage {output}, which no op creates")


def _why_missing(graph: Graph, op: int, storage: int) -> str:
    """Why ``storage`` is not there when ``op`` runs: never, later, or never because of a cycle."""
    creator = {created: index for index, other in enumerate(graph.ops) for created in other.creates}
    if storage not in creator:
        return "before any op has created it: none does"
    # From op to op that creates what the one before needs, back to where it began?
    came_from, pending = {creator[storage]: op}, [creator[storage]]
    while pending and op not in came_from:
        needing = pending.pop()
        for used in graph.ops[needing].reads + graph.ops[needing].writes:
            if used in creator and creator[used] not in came_from:
                came_from[creator[used]] = needing
                pending.append(creator[used])
    if op not in came_from:
        first = creator[storage]
        return f"before op {first} ({graph.ops[first].name!r}) creates it: ops must stand in an order that can run"
    cycle = [op]
    while len(cycle) == 1 or cycle[-1] != op:
        cycle.append(came_from[cycle[-1]])
    names = [f"op {index} ({graph.ops[index].name!r})" for index in reversed(cycle)]
    return f"before it is created, and never could: each needs what the next creates in {' -> '.join(names)}"


def _require_known(storages: Sequence[int], graph: Graph, where: str) -> None:
    for storage in storages:
        if not 0 <= storage < len(graph.storages):
            raise InvalidGraphError(f"{where} names storage {storage}, but there are {len(graph.storages)}")

"""The joint form: order and addresses in one model, for the smallest arena that any order allows."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from olla.graph.graph import Graph, Storage
from olla.graph.lifetimes import live_intervals, peak_bytes
from olla.graph.plan import Addresses, Plan, Schedule, Workspace
from olla.ilp.address_families import arena, certainly_apart, certainly_together, one_above_the_other, together
from olla.ilp.families import ORDER, resident_set
from olla.ilp.orders import OrderProgram
from olla.ilp.program import proven_bytes
from olla.order.problem import Integers, Problem
from olla.order.schedule import schedule
from olla.place.place import place
from olla.solve import Model, Result, solve

__all__ = ["JointForm", "joint"]

_TWO_PHASES = 0.25  # of the time limit, each: for the order, and then the addresses, that the solver starts from


def joint(
    graph: Graph,
    *,
    start: Plan | None = None,
    alignment: int = 1,
    solver: str = "auto",
    time_limit: float = 60.0,
) -> Plan:
    """The plan with the smallest arena that a solver finds, over all orders; ``arena_lower_bound_bytes`` is proven.

    For graphs of some tens of ops: a binary for each pair of storages and each op and step. The
    solver starts from ``start``, a plan with addresses; default: the planners' order, and their addresses for it.
    Sizes are rounded up to full units of ``alignment``.

    Raises
    ------
    SolverUnavailableError
        If the solver is not installed, or has no licence for a model of this size.
    """
    started = time.perf_counter()
    if start is None:
        known = schedule(graph, time_limit=_TWO_PHASES * time_limit)
        addresses = place(graph, known.order, alignment=alignment, time_limit=_TWO_PHASES * time_limit)
        start = Plan.of(graph, known, addresses)
    form = JointForm(graph, start, alignment=alignment)
    result = solve(form.model, solver, time_limit=max(0.0, time_limit - (time.perf_counter() - started)))
    return replace(form.plan(result), seconds=time.perf_counter() - started)


class JointForm:
    """The model; every storage that is no output, and every workspace, has an address. ``start`` is its hint."""

    def __init__(self, graph: Graph, start: Plan, *, alignment: int = 1) -> None:
        assert start.offsets is not None, "a plan with addresses"
        assert start.arena_bytes is not None
        self._graph, self._start, self._alignment = graph, start, alignment
        self._solid = _with_workspaces_as_storages(graph)
        self._own = [index for index, storage in enumerate(self._solid.storages) if not storage.persistent]
        program = self._program = OrderProgram(Problem.of(_rounded_up(self._solid, alignment)))
        for family in ORDER:
            family(program)
        outputs = np.isin(self._own, graph.outputs)
        self._inside = np.nonzero(~outputs)[0]
        sizes = (program.sizes // program.unit)[self._inside]
        top = -(-start.arena_bytes // program.unit)
        self._offsets = program.model.integers("address", len(sizes), 0, np.maximum(0, top - sizes))
        size = program.model.integers("arena", 1, 0, top)
        one, other = self._pairs(sizes)
        below, above = program.model.binaries("below", len(one)), program.model.binaries("above", len(one))
        steps = np.ones(len(sizes), np.int64)
        one_above_the_other(program.model, self._offsets, steps, sizes, one, other, below, above, top)
        storages = self._inside[one], self._inside[other]
        together(program, *storages, below, above, certainly_together(program, *storages))
        arena(program.model, self._offsets, steps, sizes, int(size[0]))
        resident_set(program, int(size[0]), self._inside)  # follows from the rest, but not in a relaxation
        program.model.minimize(size, [1])
        columns, values = program.values_of([*start.order, len(start.order)])
        at = self._placed(start.order, start.offsets, start.workspaces)
        program.model.hint(
            np.concatenate([columns, self._offsets, size, below, above]),
            np.concatenate([values, at, [top], at[one] + sizes[one] <= at[other], at[other] + sizes[other] <= at[one]]),
        )

    @property
    def model(self) -> Model:
        """What a solver is given."""
        return self._program.model

    def plan(self, result: Result) -> Plan:
        """What a solver's answer says."""
        assert result.values is not None, "the plan to start from is a solution"
        order = tuple(op for op in self._program.sequence(result.values).tolist() if op < len(self._graph.ops))
        addresses = self._addresses(order, result.values, proven_bytes(result, self._program.unit))
        peak, method = peak_bytes(self._graph, order), f"integer program ({result.solver})"
        bound = min(peak, self._start.lower_bound_bytes)
        return Plan.of(self._graph, Schedule(order, peak, bound, method, result.seconds), addresses)

    def _pairs(self, sizes: Integers) -> tuple[Integers, Integers]:
        """Pairs of what may be alive together, as positions in ``_inside``."""
        one, other = np.triu_indices(len(sizes), 1)
        apart = certainly_apart(self._program, self._inside[one], self._inside[other])
        wanted = (sizes[one] > 0) & (sizes[other] > 0) & ~apart
        return one[wanted], other[wanted]

    def _placed(
        self, order: tuple[int, ...], offsets: Sequence[int | None], workspaces: Sequence[Workspace]
    ) -> Integers:
        """The offsets that the planners have found, in units."""
        lives = live_intervals(self._graph, order)
        at = {life.storage: offset for life, offset in zip(lives, offsets, strict=True) if offset is not None}
        for step, offset, _ in workspaces:
            at[self._solid.ops[order[step]].creates[-1]] = offset
        return np.array([at[self._own[storage]] for storage in self._inside], np.int64) // self._program.unit

    def _addresses(self, order: tuple[int, ...], values: npt.NDArray[np.float64], bound: int) -> Addresses:
        """Where everything is in a solution."""
        found = values[self._offsets].astype(np.int64) * self._program.unit
        at = {self._own[storage]: int(offset) for storage, offset in zip(self._inside, found, strict=True)}
        workspaces = tuple(
            Workspace(step, at[self._solid.ops[op].creates[-1]], self._graph.ops[op].workspace)
            for step, op in enumerate(order)
            if self._graph.ops[op].workspace
        )
        top = max((offset + self._solid.storages[storage].size for storage, offset in at.items()), default=0)
        offsets = tuple(at.get(life.storage) for life in live_intervals(self._graph, order))
        return Addresses(offsets, workspaces, top, min(max(0, bound - self._alignment + 1), top))


def _with_workspaces_as_storages(graph: Graph) -> Graph:
    """The same graph with a storage for each workspace, which its op creates and no other touches."""
    storages, ops = list(graph.storages), []
    for op in graph.ops:
        own = (len(storages),) if op.workspace else ()
        storages += [Storage(f"workspace of {op.name}", op.workspace) for _ in own]
        ops.append(replace(op, creates=op.creates + own, workspace=0))
    return replace(graph, ops=tuple(ops), storages=tuple(storages))


def _rounded_up(graph: Graph, alignment: int) -> Graph:
    """The same graph with sizes in full units of ``alignment``, so that what is placed upon others is aligned."""
    return replace(graph, storages=tuple(replace(s, size=-(-s.size // alignment) * alignment) for s in graph.storages))

"""What a planner hands over: a schedule (when), a placement (where), and both as one plan."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from olla.errors import InvalidPlanError
from olla.graph.graph import Graph
from olla.graph.lifetimes import Spill, eager_peak_bytes

__all__ = ["Addresses", "Placement", "Plan", "Schedule", "Spill", "Workspace", "extra_runs"]

FORMAT = "olla-plan-1"


@dataclass(frozen=True, slots=True)
class Schedule:
    """A sequence of op ids. An op that stands in it more than once is recomputed."""

    order: tuple[int, ...]  # op ids, one a step
    peak_bytes: int  # live bytes at the worst step, persistent storages left out
    lower_bound_bytes: int  # no order of these ops can do better
    method: str  # the heuristic or search that found the order
    seconds: float  # spent planning
    spills: tuple[Spill, ...] = ()  # (storage, start, end): away at the steps start <= step < end
    extra_seconds: float = 0.0  # that recomputing and spilling are expected to take
    extra_seconds_lower_bound: float = 0.0  # within the same bytes, it cannot be less


@dataclass(frozen=True, slots=True)
class Placement:
    """An offset in the arena for every buffer."""

    offsets: tuple[int, ...]  # bytes from the start of the arena
    arena_bytes: int  # where the highest buffer ends
    lower_bound_bytes: int = 0  # no placement of these buffers can do better
    method: str = ""  # the heuristic or search that found it
    seconds: float = 0.0  # spent placing

    @property
    def gap(self) -> float:
        """How far the arena can be from the smallest possible one: ``arena / lower bound - 1``."""
        if self.arena_bytes == self.lower_bound_bytes:
            return 0.0
        return self.arena_bytes / self.lower_bound_bytes - 1 if self.lower_bound_bytes else float("inf")

    @property
    def status(self) -> str:
        """``"optimal"`` if the arena meets its lower bound, else ``"feasible"``."""
        return "optimal" if self.arena_bytes == self.lower_bound_bytes else "feasible"

    def to_dict(self) -> dict[str, Any]:
        """The placement as JSON-ready data; :meth:`from_dict` reads it back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Placement:
        """Read what :meth:`to_dict` wrote.

        Raises
        ------
        InvalidPlanError
            If ``data`` is not of that form.
        """
        try:
            found = cls(**{**data, "offsets": _integers("offsets", data["offsets"])})
        except (KeyError, TypeError) as error:
            raise InvalidPlanError(f"not a placement: {error!r}") from error
        _integers("arena_bytes", (found.arena_bytes, found.lower_bound_bytes))
        if not isinstance(found.method, str) or not isinstance(found.seconds, (int, float)):
            raise InvalidPlanError(f"not a placement: {found.method!r} in {found.seconds!r} s")
        return found


class Workspace(NamedTuple):
    """Bytes of the arena that the op at ``step`` of the order holds while it runs, or for a part of that time."""

    step: int
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class Addresses:
    """Where everything that a step allocates is in its arena."""

    # One for each of ``live_intervals(graph, order, spills)``. None: outside, because it outlives the step, say.
    offsets: tuple[int | None, ...]
    workspaces: tuple[Workspace, ...]
    arena_bytes: int
    lower_bound_bytes: int  # the most bytes alive at once inside of the arena


@dataclass(frozen=True, slots=True)
class Plan:
    """What will happen when the step runs. All sizes are in bytes.

    A plan knows its graph only by its digest: :func:`olla.graph.check.check` tells whether the two
    belong together and whether everything the plan claims is true.
    """

    graph_digest: str
    order: tuple[int, ...]  # op ids, repeats allowed
    recomputed: tuple[int, ...]  # the ops that run again, once per extra run, sorted
    peak_bytes: int  # live bytes at the worst step, without what lives across steps
    persistent_bytes: int  # parameters, buffers, optimizer state, inputs
    baseline_peak_bytes: int  # what eager PyTorch needs: program order, and nothing reused
    lower_bound_bytes: int  # no order can do better
    method: str  # the heuristic or search that found the order
    seconds: float  # spent planning
    offsets: tuple[int | None, ...] | None = None  # of each life of a storage; None: outside; no tuple: no arena
    workspaces: tuple[Workspace, ...] = ()  # (step, offset, size) in the arena
    arena_bytes: int | None = None
    arena_lower_bound_bytes: int | None = None  # no arena for this order can be smaller
    spills: tuple[Spill, ...] = ()  # (storage, start, end), sorted by storage
    extra_seconds: float = 0.0  # that recomputing and spilling are expected to take
    extra_seconds_lower_bound: float = 0.0  # within the same bytes, it cannot be less

    @classmethod
    def of(cls, graph: Graph, schedule: Schedule, addresses: Addresses | None = None) -> Plan:
        """The plan that runs ``schedule`` (at ``addresses``) on ``graph``."""
        return cls(
            graph_digest=graph.digest,
            order=schedule.order,
            recomputed=extra_runs(schedule.order),
            peak_bytes=schedule.peak_bytes,
            persistent_bytes=graph.persistent_bytes,
            baseline_peak_bytes=eager_peak_bytes(graph),
            lower_bound_bytes=schedule.lower_bound_bytes,
            method=schedule.method,
            seconds=schedule.seconds,
            spills=schedule.spills,
            extra_seconds=schedule.extra_seconds,
            extra_seconds_lower_bound=schedule.extra_seconds_lower_bound,
        ).at(addresses)

    @property
    def schedule(self) -> Schedule:
        """When ops run, and what is spilled."""
        return Schedule(
            self.order,
            self.peak_bytes,
            self.lower_bound_bytes,
            self.method,
            self.seconds,
            self.spills,
            self.extra_seconds,
            self.extra_seconds_lower_bound,
        )

    def at(self, addresses: Addresses | None) -> Plan:
        """The same plan, run at ``addresses``; None: wherever the allocator decides."""
        return replace(
            self,
            offsets=addresses.offsets if addresses else None,
            workspaces=addresses.workspaces if addresses else (),
            arena_bytes=addresses.arena_bytes if addresses else None,
            arena_lower_bound_bytes=addresses.lower_bound_bytes if addresses else None,
        )

    @property
    def gap(self) -> float:
        """How far the peak can be from the best possible one: ``peak / lower bound - 1``."""
        if self.peak_bytes == self.lower_bound_bytes:
            return 0.0
        return self.peak_bytes / self.lower_bound_bytes - 1 if self.lower_bound_bytes else float("inf")

    @property
    def saving(self) -> float:
        """The share of the baseline's peak that the plan saves."""
        return 1 - self.peak_bytes / self.baseline_peak_bytes if self.baseline_peak_bytes else 0.0

    @property
    def status(self) -> str:
        """``"optimal"`` if the peak meets its lower bound, else ``"feasible"``."""
        return "optimal" if self.peak_bytes == self.lower_bound_bytes else "feasible"

    @property
    def fragmentation(self) -> float | None:
        """The share of the arena that is never in use at once; None without addresses."""
        if self.arena_bytes is None or self.arena_lower_bound_bytes is None:
            return None
        return 1 - self.arena_lower_bound_bytes / self.arena_bytes if self.arena_bytes else 0.0

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON-ready data; :meth:`from_dict` reads it back."""
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Plan:
        """Read what :meth:`to_dict` wrote.

        Raises
        ------
        InvalidPlanError
            If ``data`` is not of that form.
        """
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise InvalidPlanError(f"not a plan of format {FORMAT!r}")
        fields = {key: value for key, value in data.items() if key != "format"}
        for key, expected in _FIELD_TYPES.items():
            if key in fields and not isinstance(fields[key], expected):
                raise InvalidPlanError(f"the plan's {key!r} is {fields[key]!r}")
        for key in ("order", "recomputed"):
            fields[key] = _integers(key, fields.get(key, ()))
        if fields.get("offsets") is not None:
            placed = iter(_integers("offsets", [offset for offset in fields["offsets"] if offset is not None]))
            fields["offsets"] = tuple(None if offset is None else next(placed) for offset in fields["offsets"])
        try:
            for key, kind in (("workspaces", Workspace), ("spills", Spill)):
                fields[key] = tuple(kind(*_integers(key, entry)) for entry in fields.get(key, ()))
            return cls(**fields)
        except TypeError as error:
            raise InvalidPlanError(f"not a plan of format {FORMAT!r}: {error}") from error

    def save(self, path: str | Path) -> None:
        """Write the plan to ``path`` as JSON."""
        Path(path).write_text(json.dumps(self.to_dict()) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan that :meth:`save` wrote. Nothing in the file is executed.

        Raises
        ------
        InvalidPlanError
            If the file holds no plan.
        """
        try:
            data = json.loads(Path(path).read_text())
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise InvalidPlanError(f"{path} is not JSON: {error}") from error
        return cls.from_dict(data)


_FIELD_TYPES: dict[str, type | tuple[type, ...]] = {
    "graph_digest": str,
    "order": (list, tuple),
    "recomputed": (list, tuple),
    "peak_bytes": int,
    "persistent_bytes": int,
    "baseline_peak_bytes": int,
    "lower_bound_bytes": int,
    "method": str,
    "seconds": (int, float),
    "extra_seconds": (int, float),
    "extra_seconds_lower_bound": (int, float),
    "offsets": (list, tuple, type(None)),
    "arena_bytes": (int, type(None)),
    "arena_lower_bound_bytes": (int, type(None)),
}


def extra_runs(order: Sequence[int]) -> tuple[int, ...]:
    """The ops that stand in ``order`` more than once, once per extra time, sorted."""
    seen: set[int] = set()
    extra: list[int] = []
    for op in order:
        if op in seen:
            extra.append(op)
        seen.add(op)
    return tuple(sorted(extra))


def _integers(key: str, values: Sequence[Any]) -> tuple[int, ...]:
    for value in values:
        if type(value) is not int:
            raise InvalidPlanError(f"the plan's {key!r} holds {value!r}, which is not an integer")
    return tuple(values)

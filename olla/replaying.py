"""What steps have in common that learn their addresses from a run of their own: to be replayed, judged, given up."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence

from olla.capture.lower import Lowered, tensors_of
from olla.errors import ExecutionError
from olla.graph.plan import Plan
from olla.planning import OUTSIDE, Options
from olla.run.arena import Arena, Clock, Replay
from olla.run.emit import Watch
from olla.run.recording import Recording

__all__ = ["Replaying", "watch_of"]

log = logging.getLogger(__name__)

_PATIENCE = 3  # steps with misses, and never so many without in a row, before a step is recorded again
_RECORDINGS_AGAIN = 2  # before its addresses are given up


class Replaying:
    """Where the allocations of a step are, once it was recorded, and whether it still goes as recorded.

    ``arena`` is where they are, which other steps may share that run at other times.
    """

    def __init__(self, arena: Arena, options: Options) -> None:
        self.arena = arena
        self.not_executed = "" if options.place else "place=False"  # why addresses are not executed
        self.replay: Replay | None = None
        self._clock = Clock()
        self._outside: list[int] = []  # sizes of what the step allocates outside of its arena
        self._recordings = 0
        self._bad_steps = 0
        self._good_steps = 0  # since the last bad one

    @property
    def settled(self) -> bool:
        """Whether the plan will not change any more, as things are."""
        return self.replay is not None or bool(self.not_executed)

    def _recording(
        self, events: Iterable[tuple[int, int, int, int]], seen: Mapping[tuple[int, int], int], plan: Plan
    ) -> Recording:
        """What a run by ``plan`` was recorded to allocate; see :class:`Recording`."""
        recording = Recording.of(events, seen)
        if not recording.allocations and plan.peak_bytes:
            raise ExecutionError("another allocator was installed, which is asked instead")
        return recording

    def _replay(self, plan: Plan, recording: Recording, offsets: Sequence[int]) -> None:
        """From now on, what was recorded is at ``offsets`` of the arena."""
        assert plan.arena_bytes is not None
        self.arena.reserve(plan.arena_bytes)
        self.replay = Replay(
            self.arena,
            self._clock,
            positions=[allocation.position for allocation in recording.allocations],
            sizes=[allocation.size for allocation in recording.allocations],
            offsets=offsets,
            arena_bytes=plan.arena_bytes,
        )
        self._outside = [a.size for a, at in zip(recording.allocations, offsets, strict=True) if at == OUTSIDE]

    def _judge(self, missed: int) -> None:
        """Record again, and in the end give up, if steps do not go as recorded: ``missed`` allocations of the last."""
        self._good_steps = 0 if missed else self._good_steps + 1
        self._bad_steps = 0 if self._good_steps == _PATIENCE else self._bad_steps + bool(missed)
        if self._bad_steps < _PATIENCE:
            return
        self._bad_steps = 0
        self._recordings += 1
        log.warning("%d allocations of the step miss their planned addresses: recording it again", missed)
        self.replay = None
        self.arena.close()  # whatever is in the way there is left behind
        if self._recordings > _RECORDINGS_AGAIN:
            self._give_up("its allocations are not the same in every step")

    def _give_up(self, reason: str) -> None:
        self.not_executed = reason
        log.warning("the step runs in its planned order, but not at planned addresses: %s", reason)


def watch_of(lowered: Lowered, order: Sequence[int], seen: dict[tuple[int, int], int]) -> Watch:
    """Is told what ops return, and puts down in ``seen``, by position and storage, where what they create lies."""

    def look(position: int, value: object) -> None:
        op, tensors = order[position], tensors_of(value)
        storages = lowered.results[lowered.nodes[op]]
        if len(storages) != len(tensors):
            return  # it returned None where a tensor was expected: its address stays unknown
        for storage, tensor in zip(storages, tensors, strict=True):
            if storage in lowered.graph.ops[op].creates:
                seen[position, storage] = tensor.untyped_storage().data_ptr()

    return look

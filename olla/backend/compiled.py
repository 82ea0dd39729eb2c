"""The parts of a compiled graph, forward and backward or an inference, at planned addresses of one arena.

They run when the caller wants them to, and between them the caller allocates as it likes: a part opens a session of its
own, in which ops have the positions that they have in the order of the whole. What forward saves keeps its address
until backward has used it. What forward hands out belongs to the caller, and is outside. So do gradients, but they are
most of what is there in the end: those that were gone before the next forward are inside, as long as that goes on.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx

from olla.backend.joint import boundary, device_of
from olla.capture.lower import Lowered, tensors_of
from olla.errors import InvalidPlanError, OllaError
from olla.graph.lifetimes import peak_bytes
from olla.graph.plan import Plan
from olla.planning import Options, addressed, budget_of, measured
from olla.replaying import Replaying, watch_of
from olla.run.arena import Arena, Recorder
from olla.run.recording import Recording
from olla.torch_private import Boxed, boxed, flatten, marked_as_boxed

__all__ = ["CompiledGraph"]

log = logging.getLogger(__name__)

_FAILURES = 3  # recordings that are of no use, before addresses are given up


@dataclass
class _Attempt:
    """A recording that has begun."""

    recorder: Recorder
    parts: list[Boxed]
    seen: dict[tuple[int, int], int]
    saved: set[int] = field(default_factory=set)  # addresses of what backward must be given
    handed_out: list[tuple[int, int]] = field(default_factory=list)  # part and address
    is_complete: bool = False  # but for what is released before the next forward


class CompiledGraph(Replaying):
    """One graph of ``torch.compile``, and how far it has got with its addresses.

    The first call warms up, the second one is recorded until the third one begins, which runs in the arena. Calls that
    come in between, or at once from several threads, run wherever PyTorch's allocator puts them.

    Parameters
    ----------
    lowered, plan
        Of all parts together.
    emitted
        Makes the code of each part, which tells what runs; see :func:`olla.run.emit.emit`.
    forward_outputs
        How many results of forward are the caller's; what follows is saved for backward.
    """

    def __init__(
        self,
        lowered: Lowered,
        plan: Plan,
        emitted: Callable[..., Sequence[fx.GraphModule]],
        forward_outputs: int,
        options: Options,
    ) -> None:
        super().__init__(Arena(device_of(flatten([node.meta.get("val") for node in lowered.nodes])[0])), options)
        self._lowered, self._plan, self._emitted = lowered, plan, emitted
        self._forward_outputs = forward_outputs
        self._options = options
        targets = [node.target for node in lowered.nodes]
        self._parts = 1 + (boundary in targets)
        self._boundary = plan.order.index(targets.index(boundary)) if self._parts > 1 else len(plan.order)
        self._told: list[Boxed] = []  # the parts, with code that tells which op runs
        self._attempt: _Attempt | None = None
        self._failures = 0
        self._is_warm = False
        self._is_over = False  # whether the last part has run since the first one
        self._missed = 0  # since then
        self._one_at_a_time = threading.Lock()

    def part(self, number: int, module: fx.GraphModule) -> Boxed:
        """What runs part ``number``; ``module`` is its code, which runs where there are no addresses."""
        anywhere = boxed(module)

        def run(inputs: list[Any]) -> Any:
            if self.not_executed or not self._one_at_a_time.acquire(blocking=False):
                return anywhere(inputs)
            try:
                return self._run(number, anywhere, inputs)
            finally:
                self._one_at_a_time.release()

        return marked_as_boxed(run)

    def _run(self, number: int, anywhere: Boxed, inputs: list[Any]) -> Any:
        is_last = number == self._parts - 1
        if number == 0:
            self._begin()
        self._is_over = is_last
        if self.replay is not None:
            with self.replay:
                result = self._told[number](inputs)
            self._missed += self.replay.counts.missed
            return result
        if self._attempt is not None:
            return self._record(self._attempt, number, anywhere, inputs)
        result = anywhere(inputs)
        self._is_warm = self._is_warm or is_last
        return result

    def _begin(self) -> None:
        """Forward begins: time to judge what was replayed, to learn from what was recorded, or to record."""
        attempt, self._attempt = self._attempt, None
        try:
            if self._is_over and self.replay is not None:
                self._judge(self._missed)
                self._missed = 0
            elif self._is_over and attempt is not None:
                with attempt.recorder:
                    pass  # its last part, in which nothing runs: until here, releases were noted
                try:
                    self._learn(attempt)
                except InvalidPlanError as error:  # another backward pass has kept what is saved, say
                    self._fail(f"what was recorded does not follow the plan: {error}")
            elif attempt is not None:
                attempt.recorder.abandon()  # a forward without its backward
            if self._is_warm and not self.settled:
                self._attempt = self._attempted()
        except OllaError as error:  # never the end of somebody's training
            self._give_up(str(error))

    def _attempted(self) -> _Attempt:
        """A recording that has not begun."""
        recorder, seen = Recorder(self.arena.library, self._clock, self._parts + 1), dict[tuple[int, int], int]()
        watch = watch_of(self._lowered, self._plan.order, seen)
        parts = [boxed(module) for module in self._emitted(tell=self._clock.tell, watch=watch)]
        return _Attempt(recorder, parts, seen)

    def _record(self, attempt: _Attempt, number: int, anywhere: Boxed, inputs: list[Any]) -> Any:
        if attempt.is_complete or not attempt.saved.issubset(_addresses(inputs)):  # another forward's backward
            self._is_over = attempt.is_complete
            self._fail("backward is not given what the forward before it has saved")
            return anywhere(inputs)
        self._attempt = None  # unless this part succeeds
        with attempt.recorder:
            result = attempt.parts[number](inputs)
        attempt.is_complete = number == self._parts - 1
        outputs = len(result) if attempt.is_complete else self._forward_outputs
        attempt.handed_out += [(number, address) for address in _addresses(result[:outputs])]
        attempt.saved = _addresses(result[outputs:])
        self._attempt = attempt
        return result

    def _fail(self, reason: str) -> None:
        self._failures += 1
        if self._failures == _FAILURES:
            self._give_up(reason)

    def _give_up(self, reason: str) -> None:
        if self._attempt is not None:
            self._attempt.recorder.abandon()
            self._attempt = None
        super()._give_up(reason)

    def _learn(self, attempt: _Attempt) -> None:
        recording = self._recording(attempt.recorder.events, attempt.seen, self._plan)
        recording = self._with_results(recording, attempt)
        graph = measured(self._lowered.graph, self._plan, recording)
        peak = peak_bytes(graph, self._plan.order)
        self._say_if_exceeded(graph.persistent_bytes + peak)
        schedule = replace(self._plan.schedule, peak_bytes=peak, lower_bound_bytes=0)
        plan, offsets = addressed(graph, Plan.of(graph, schedule), recording, self._options, self.arena.alignment)
        self._told = [boxed(module) for module in self._emitted(tell=self._clock.tell)]
        self._replay(plan, recording, offsets)

    def _say_if_exceeded(self, needed: int) -> None:
        """A budget that cannot be kept was said to be so when it was planned for."""
        if self._parts > 1 and self._options.memory_budget is not None:
            planned = self._lowered.graph.persistent_bytes + self._plan.peak_bytes
            if needed > max(planned, budget_of(self._lowered.graph, self._options)):
                log.warning("forward and backward hold %s bytes, more than their budget", f"{needed:,}")

    def _with_results(self, recording: Recording, attempt: _Attempt) -> Recording:
        """Results are the caller's, and outlive the step; but for gradients that have not, unless that went wrong."""
        latest: dict[tuple[int, int], int] = {}
        for index, allocation in enumerate(recording.allocations):
            for part in (0, 1) if allocation.position < self._boundary else (1,):
                latest[part, allocation.address] = index
        allocations, over = list(recording.allocations), len(attempt.recorder.events)
        for part, address in attempt.handed_out:
            if (part, address) in latest:
                result = allocations[latest[part, address]]
                is_gone = part > 0 and result.end is not None and not self._recordings
                result = replace(result, end=over if is_gone else None, last_position=len(self._plan.order) - 1)
                allocations[latest[part, address]] = result
        return replace(recording, allocations=tuple(allocations))


def _addresses(values: Iterable[object]) -> set[int]:
    """Where the bytes of the tensors among ``values`` are."""
    return {part.untyped_storage().data_ptr() for part in tensors_of([*values])}

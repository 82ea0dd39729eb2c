"""A planned step that learns its addresses in its first runs: warm up, record, place, replay.

Every run is a step of the user's, and gives the numbers that eager PyTorch gives; only where the
tensors are differs. The first run fills optimizer state and the caches of kernels. The second one
is recorded: what every operator allocates, workspaces included. With that the order is planned anew
(and recorded again, if it changed), and all addresses. From then on the step runs in its arena.

What is planned in the background, on request, is taken up by the first run after it is there; until then the step runs
in the order that it has, at first that of its program.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from typing import Any, TypeVar

from torch import Tensor, fx
from torch.optim import Optimizer

from olla.capture.program import Program
from olla.errors import OllaError
from olla.planning import Draft, Options, exceeds_budget, ordered, with_addresses, with_workspaces
from olla.replaying import Replaying, watch_of
from olla.run.arena import Arena, Recorder
from olla.run.emit import Tell, Watch, emit
from olla.run.products import choose_products, restore_products
from olla.run.ranks import ALONE, Ranks
from olla.run.recording import Recording
from olla.run.runner import Runner
from olla.run.spill import Spiller, SpillSpace
from olla.run.stopwatch import Stopwatch
from olla.show.progress import stage

__all__ = ["Execution"]

T = TypeVar("T")

_REORDERINGS = 3  # after recordings


class Execution(Replaying):
    """One captured and planned step, and how far it has got with its addresses.

    It shares the ``arena``, and the ``space`` to spill to, with other executions of one owner, which run one after
    the other; and its order with other ``ranks``.

    Raises
    ------
    SpillError
        If what the plan spills has no room there.
    """

    draft: Draft
    spiller: Spiller
    code: fx.GraphModule

    def __init__(
        self, program: Program, draft: Draft, options: Options, arena: Arena, space: SpillSpace, ranks: Ranks = ALONE
    ) -> None:
        super().__init__(arena, options)
        self.runner = Runner(program, draft.traced)
        self._optimizers = program.optimizers
        self._options = options
        self._space = space
        self._ranks = ranks
        self._warm: tuple[int, ...] | None = None
        self._is_timed = False
        self._reorderings = 0
        self._planning: tuple[Future[Any], Callable[[Any], None]] | None = None  # and who takes it up
        if ranks.is_alone or options.memory_budget is None:  # several ranks cannot have them restored
            with stage("trying out matrix products", options.progress):
                choose_products(draft.lowered.nodes)
        self._follow(draft, self._spiller_of(draft))
        if options.background:
            quiet = self._options = replace(options, progress=False)
            self._plan(lambda: ordered(draft, quiet), lambda found: self._follow(found, self._spiller_of(found)))

    @property
    def planned_bytes(self) -> int:
        """The peak that the statistics of the allocator will show for the step."""
        if self.replay is None or self.arena.device.type == "cpu":
            return self.draft.plan.peak_bytes
        # The arena is one block of CUDA's caching allocator, which counts in units.
        unit = self.arena.alignment
        return sum(-(-size // unit) * unit for size in (self.arena.arena_bytes, *self._outside))

    @property
    def outside_bytes(self) -> int:
        """What the step allocates outside of its arena, because it outlives the step."""
        return sum(self._outside)

    @property
    def settled(self) -> bool:
        """Whether the plan will not change any more, as things are."""
        return super().settled and self._planning is None

    @property
    def is_warm(self) -> bool:
        """Whether the next run finds what it would else allocate for others to find: optimizer state, say."""
        return self._warm is not None and self._warm == _state_of(self._optimizers)

    @property
    def records(self) -> bool:
        """Whether the next run will be recorded."""
        return not self.settled and self.is_warm

    def run(self, leaves: Sequence[Any], *, alone: bool) -> Any:
        """Run the step on the leaves of its arguments; ``alone``: if it is recorded, then not on all ranks."""
        if self._planning is not None and self._planning[0].done():
            self.wait()
        if self._planning is not None or self.not_executed:
            return self.run_anywhere(leaves)
        if not self.is_warm:
            result = self.run_anywhere(leaves)
            self._warm = _state_of(self._optimizers)
            return result
        replay = self.replay
        if replay is None:
            return self._record(leaves, ALONE if alone else self._ranks)
        with self.spiller:
            result = self.runner.run(leaves, self.code, replay)
        self._judge(replay.counts.missed)
        return result

    def run_anywhere(self, leaves: Sequence[Any]) -> Any:
        """Run the step in its order, wherever PyTorch's allocator puts it."""
        with self.spiller:
            return self.runner.run(leaves, self.code)

    def wait(self) -> None:
        """Until what is planned in the background is there, and taken up."""
        if self._planning is None:
            return
        future, take = self._planning
        wait([future])
        self._planning = None
        try:
            take(future.result())
        except OllaError as error:  # never the end of somebody's training
            self._give_up(str(error))

    def _plan(self, find: Callable[[], T], take: Callable[[T], None]) -> None:
        """Take what ``find`` returns: at once, or, if it is planned in the background, when it is there."""
        if not self._options.background:
            take(find())
            return
        planner = ThreadPoolExecutor(1, thread_name_prefix="olla")
        self._planning = planner.submit(find), take
        planner.shutdown(wait=False)  # the thread ends with its task

    def _record(self, leaves: Sequence[Any], ranks: Ranks) -> Any:
        try:
            with stage("preparing the arena", self._options.progress):
                library = ranks.together(lambda: self.arena.library)
        except OllaError as error:
            self._give_up(str(error))
            return self.run_anywhere(leaves)
        seen: dict[tuple[int, int], int] = {}
        lowered, order = self.draft.lowered, self.draft.plan.order
        watch = watch_of(lowered, order, seen)

        def look(position: int, value: object) -> None:
            stopwatch.stop()
            watch(position, value)

        recorder = Recorder(library, self._clock)
        stopwatch = Stopwatch(self._clock.tell, self.arena.device)
        with self.spiller:
            result = self.runner.run(leaves, self._emit(stopwatch.tell, look), recorder)
        stopwatch.stop()
        seen |= self.spiller.addresses
        seconds = stopwatch.seconds(order, len(lowered.graph.ops))
        if self._is_timed:
            seconds = tuple(map(min, seconds, self.draft.seconds))  # others may have used the machine, too
        self.draft, self._is_timed = replace(self.draft, seconds=seconds), True
        try:
            self._learn(ranks.together(lambda: self._recording(recorder.events, seen, self.draft.plan)), ranks)
        except OllaError as error:  # never the end of somebody's training
            self._give_up(str(error))
        return result

    def _learn(self, recording: Recording, ranks: Ranks) -> None:
        """Plan anew with what was recorded: another order, which must be recorded itself, or addresses."""
        reorder = ranks is self._ranks and self._reorderings < _REORDERINGS

        def find() -> tuple[Draft, Spiller, list[int] | None]:
            draft = with_workspaces(self.draft, recording, self._options, reorder=reorder, ranks=ranks)
            spiller = self._spiller_of(draft)
            if draft.plan.order != self.draft.plan.order or spiller.transfers != self.spiller.transfers:
                return draft, spiller, None
            draft, offsets = with_addresses(draft, recording, self._options, self.arena.alignment)
            return draft, self.spiller, offsets

        def take(found: tuple[Draft, Spiller, list[int] | None]) -> None:
            draft, spiller, offsets = found
            graph, plan = draft.lowered.graph, draft.plan
            is_too_large = offsets is not None and exceeds_budget(graph, plan.peak_bytes, self._options)
            if is_too_large and self._ranks.is_alone and restore_products(draft.lowered.nodes):
                offsets, self._reorderings = None, min(self._reorderings, _REORDERINGS - 2)  # again, once
            if offsets is None:
                self._reorderings += 1
                self._follow(draft, spiller)
                return
            self._replay(plan, recording, offsets)
            self.draft = draft

        self._plan(find, take)

    def _follow(self, draft: Draft, spiller: Spiller) -> None:
        self.draft, self.spiller = draft, spiller
        self.code = self._emit(self._clock.tell if self._options.place else None)

    def _give_up(self, reason: str) -> None:
        super()._give_up(reason)
        self.draft = replace(self.draft, plan=self.draft.plan.at(None))

    def _spiller_of(self, draft: Draft) -> Spiller:
        plan = draft.plan
        spiller = Spiller(draft.lowered.graph, plan.order, plan.spills, self._space, self.arena.device)
        spiller.reserve()
        return spiller

    def _emit(self, tell: Tell | None, watch: Watch | None = None) -> fx.GraphModule:
        traced, lowered, order = self.draft.traced, self.draft.lowered, self.draft.plan.order
        return emit(traced.module, lowered, order, updates=traced.updates, spiller=self.spiller, tell=tell, watch=watch)


def _state_of(optimizers: Iterable[Optimizer]) -> tuple[int, ...]:
    """How many tensors the optimizers keep: it changes when they allocate state."""
    return tuple(
        sum(isinstance(value, Tensor) for entry in optimizer.state.values() for value in entry.values())
        for optimizer in optimizers
    )

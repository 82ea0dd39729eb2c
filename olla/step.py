"""The object that the user holds: one plan for each way in which it is called."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from olla.capture.program import Program
from olla.capture.restore import Snapshot, random_state
from olla.capture.signature import Signature
from olla.errors import ExecutionError
from olla.execution import Execution
from olla.fit.frontier import Frontier
from olla.graph.graph import Graph
from olla.graph.plan import Plan
from olla.measure.measurement import Measurement, measure
from olla.measure.profile import MemoryProfile, profile
from olla.planning import Draft, Options, capture, draft, trade, unplanned, with_estimated_addresses
from olla.run.arena import Arena
from olla.run.ranks import ALONE, Ranks
from olla.run.spill import SpillSpace, require_spill_dir
from olla.show.formats import Drawing, draw
from olla.show.report import Report
from olla.torch_private import flatten

__all__ = ["Step"]

log = logging.getLogger(__name__)

_RUNS_TO_SETTLE = 8  # more than it takes, whatever happens
_WARM_UPS = 2
_MOST_PLANS = 16


@dataclass(frozen=True)
class _Planned:
    number: int  # of the plans of one step, in the order in which they were made: on all ranks the same
    signature: Signature
    execution: Execution


class Step:
    """A planned step: call it where you ran the step before. Made by :func:`olla.optimize`.

    One plan for each signature of arguments (shapes, dtypes, structure), model mode and autocast
    state, made when it first occurs; the 16 that were used last are kept. A step runs in one thread at a time.
    The first runs of a plan, two or three, find out what its operators allocate; from then on it runs at planned
    addresses. Planned in the background, a step runs in the order of its program meanwhile, wherever PyTorch's
    allocator puts it.

    It holds memory between its runs, its arena, until it is closed (:meth:`close`, or ``with step:``)
    or collected, and so does the file that it spills to. Results never lie there: they stay valid, whatever happens
    to the step.
    """

    def __init__(
        self,
        program: Program,
        *,
        options: Options,
        closure_of: Optimizer | None = None,
    ) -> None:
        self._program = program
        self._options = options
        self._closure_of = closure_of  # an optimizer that calls the planned step back, such as LBFGS
        self._ranks = Ranks(program.process_group) if program.process_group is not None else ALONE
        self._planned: list[_Planned] = []  # the one used last comes last
        self._plan_count = 0  # that were ever made
        self._measurement: Measurement | None = None
        self._arena = Arena(torch.device("cpu"))  # until the device is known
        self._space = SpillSpace(options.spill_dir)
        self._running = threading.Lock()
        self._closed = False

    @property
    def plan(self) -> Plan:
        """The plan used last. Once the step has run a few times, it is made from what its operators allocate."""
        return self._current.draft.plan

    @property
    def capture_seconds(self) -> float:
        """Seconds that capturing took, planning not counted."""
        return self._current.draft.capture_seconds

    @property
    def code(self) -> str:
        """The Python code that runs, for reading."""
        return str(self._current.code.code)

    @property
    def _current(self) -> Execution:
        return self._planned[-1].execution

    def close(self) -> None:
        """Give the memory of the step back, and the file it spills to. It cannot run again; results stay valid."""
        self._closed = True
        self._arena.close()
        self._space.close()

    def __enter__(self) -> Step:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run one step. Takes the same arguments as the example, returns what the eager step returns.

        Raises
        ------
        ExecutionError
            If the model was edited after planning, an input is on another device than planned,
            the step is running already (in another thread, or inside itself), it was closed, or other ranks
            run another step.
        CaptureError
            If the arguments have a new signature and the step cannot be captured with them.
        """
        if self._running.locked():
            raise ExecutionError("this step is running already: plan one step per thread, or take turns")
        with self._running:  # unlike acquire(), not left locked by a Ctrl-C right after it
            return self._run(args, kwargs)

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._closed:
            raise ExecutionError("this step was closed: call olla.optimize again")
        self._program.require_unedited()
        execution, alone = self._plan_for(args, kwargs)
        leaves, _ = flatten((args, kwargs))
        self._ranks.broadcast(self._program.buffers.values())
        if self._closure_of is None:
            return execution.run(leaves, alone=alone)
        return self._closure_of.step(lambda: execution.run(leaves, alone=alone))

    def prepare(self, *args: Any, **kwargs: Any) -> None:
        """Plan for these arguments without running, so that the first call need not.

        Raises
        ------
        CaptureError, InfeasibleError, SpillError
            As from :func:`olla.optimize`.
        ExecutionError
            If an input is on another device than planned.
        """
        self._plan_for(args, kwargs)

    def measure(self, *args: Any, **kwargs: Any) -> Measurement:
        """Run the planned and the eager step on these arguments and ask the allocator what they needed.

        Parameters, buffers, optimizer state, gradients and random state are as before afterwards;
        a copy of them is held meanwhile.

        Raises
        ------
        CaptureError, ExecutionError
            As from a call of the step.
        """
        with self._undone() as again:
            for _ in range(_RUNS_TO_SETTLE):
                again(self, args, kwargs)()
                self._current.wait()
                if all(settled for (settled,) in self._ranks.exchange(self._current.settled)):
                    break
            execution = self._current
            self._measurement = measure(
                again(self, args, kwargs),
                again(self._eager, args, kwargs),
                device=self._device(args, kwargs),
                planned_bytes=execution.planned_bytes,
                replay=execution.replay,
                spiller=execution.spiller,
                outside_bytes=execution.outside_bytes,
            )
        return self._measurement

    def profile(self, *args: Any, **kwargs: Any) -> tuple[MemoryProfile, MemoryProfile]:
        """Memory operator by operator, of the eager and of the planned step, where PyTorch's allocator decides.

        Leaves everything as it was, as :meth:`measure` does.

        Raises
        ------
        NativeUnavailableError
            If allocations cannot be recorded here; the message says why.
        """

        def planned(*args: Any, **kwargs: Any) -> None:
            self._plan_for(args, kwargs)[0].run_anywhere(flatten((args, kwargs))[0])

        with self._undone() as again:
            profiles = []
            for function in (self._eager, planned):
                call = again(function, args, kwargs)
                for _ in range(_WARM_UPS):
                    call()
                profiles.append(profile(call, self._device(args, kwargs)))
        eager_profile, planned_profile = profiles
        return eager_profile, planned_profile

    @contextmanager
    def _undone(self) -> Iterator[Callable[..., Callable[[], None]]]:
        """Gives a function that makes calls which start from the same gradients; in the end, all is as before."""
        self._program.require_unedited()
        snapshot = Snapshot(self._program)

        def again(function: Callable[..., Any], args: Any, kwargs: Any) -> Callable[[], None]:
            def run() -> None:
                function(*args, **kwargs)
                snapshot.restore_gradients()

            return run

        try:
            with random_state():
                yield again
        finally:
            snapshot.restore()

    def draft_for(self, *args: Any, **kwargs: Any) -> Draft:
        """The plan for these arguments and its graph, made without allocating or preparing anything to run.

        Raises as a call does.
        """
        drafted = self._draft(args, kwargs)
        return with_estimated_addresses(drafted, self._options) if self._options.place else drafted

    def graph_for(self, *args: Any, **kwargs: Any) -> Graph:
        """The graph of the step for these arguments, not planned. Raises CaptureError if it cannot be captured."""
        return capture(self._program, args, kwargs, self._options)[1].graph

    def frontier_for(self, points: int, *args: Any, **kwargs: Any) -> Frontier:
        """What ``points`` smaller and smaller budgets cost for these arguments; see :func:`olla.frontier`."""
        self._require_spill_dir(args, kwargs)
        _, lowered = capture(self._program, args, kwargs, self._options)
        return trade(lowered, points, self._options)

    def report(self) -> Report:
        """What was planned and, after :meth:`measure`, what was measured; what the peak is made of. Print it."""
        execution = self._current
        counts = execution.replay.counts if execution.replay else None
        spilled = sum(transfer.size for transfer in execution.spiller.transfers)
        graph = execution.draft.lowered.graph
        return Report(graph, self.plan, self._measurement, execution.not_executed, spilled, counts)

    def draw(self, path: str | Path, what: Drawing | None = None) -> None:
        """Draw the plan used last, in the form that the ending of ``path`` says: see :func:`olla.show.draw`.

        Times in a trace are estimated until the step has been recorded.

        Raises
        ------
        OllaError
            As from :func:`olla.show.draw`.
        """
        draft = self._current.draft
        draw(draft.lowered.graph, draft.plan, path, what, seconds=draft.seconds)

    def _plan_for(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Execution, bool]:
        """The planned step for these arguments, and whether not all ranks will record its next run."""
        latest = self._planned[-1].signature if self._planned else None
        signature = Signature.of(self._program, args, kwargs, like=latest)
        found = self._find(signature)
        plans = self._ranks.exchange(*((found.number, found.execution.records) if found else (-1, False)))
        if any(number != plans[0][0] for number, _ in plans):
            # Each would wait for what the others do not send. The lines say why; the last one always differs.
            modes = sum(part.training for part in self._program.parts)
            tensors = [leaf[1:4:2] if type(leaf) is tuple else leaf for leaf in signature.leaves]
            number = found.number if found else "to be made"
            self._ranks.require_same([f"arguments {tensors}", f"{modes} modules in training", f"plan {number}"])
        if found is None:
            if latest is not None:
                self._require_same_devices(signature, latest)
                log.warning("planning again for %s", signature.difference(latest))
            drafted = self._draft(args, kwargs)
            signature = Signature.of(self._program, args, kwargs)  # now it is known what the step itself changes
            if latest is None:
                self._arena = Arena(self._device(args, kwargs))
                self._ranks.broadcast(self._program.state.values())
            execution = Execution(self._program, drafted, self._options, self._arena, self._space, self._ranks)
            found = _Planned(self._plan_count, signature, execution)
            self._plan_count += 1
            self._planned.append(found)
            if len(self._planned) > _MOST_PLANS:
                self._forget_oldest()
        return found.execution, not all(records for _, records in plans)

    def _find(self, signature: Signature) -> _Planned | None:
        """What is planned for calls of this signature with the gradients that are there: now the one used last."""
        for position in reversed(range(len(self._planned))):
            planned = self._planned[position]
            if planned.signature == signature and planned.execution.runner.fits_gradients():
                used = replace(planned, signature=signature)  # the next call is likest to this one
                self._planned[position:] = [*self._planned[position + 1 :], used]  # whole, if it is interrupted
                return used
        return None

    def _forget_oldest(self) -> None:
        log.warning("more than %d plans: the least recently used one is dropped; pad to a few shapes", _MOST_PLANS)
        del self._planned[0]
        self._arena.close()  # it may have been the largest: the others reserve what they need when they run
        self._space.close()

    def _draft(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Draft:
        self._require_spill_dir(args, kwargs)
        make = unplanned if self._options.background else draft
        return make(self._program, args, kwargs, self._options, self._ranks)

    def _require_spill_dir(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._options.spill_dir is not None:
            require_spill_dir(self._options.spill_dir, self._device(args, kwargs))

    def _require_same_devices(self, signature: Signature, latest: Signature) -> None:
        moved = signature.moved(latest)
        if moved is not None:
            position, here, there = moved
            raise ExecutionError(
                f"input {position} is on {here}, the step was planned for {there}: move it, "
                "or call olla.optimize again with the model on that device"
            )

    def _eager(self, *args: Any, **kwargs: Any) -> Any:
        """The user's step as it ran before."""
        if self._closure_of is None:
            return self._program.function(*args, **kwargs)
        return self._closure_of.step(lambda: self._program.function(*args, **kwargs))

    def _device(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.device:
        leaves, _ = flatten((args, kwargs))
        tensors = [*self._program.state.values(), *(leaf for leaf in leaves if isinstance(leaf, Tensor))]
        return tensors[0].device if tensors else torch.device("cpu")

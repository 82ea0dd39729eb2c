"""The stages in order, and the object that the user holds."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from olla.capture.lower import Lowered, lower
from olla.capture.program import Program
from olla.capture.restore import Snapshot, random_state
from olla.capture.signature import Signature
from olla.capture.trace import Trace, trace
from olla.errors import ExecutionError
from olla.graph.check import verify
from olla.graph.graph import Graph
from olla.graph.plan import Plan
from olla.measure.measurement import Measurement, measure
from olla.order.schedule import program_order, schedule
from olla.run.emit import emit
from olla.run.runner import Runner
from olla.show.progress import stage
from olla.show.report import Report
from olla.torch_private import flatten

__all__ = ["Step"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Draft:
    traced: Trace
    lowered: Lowered
    plan: Plan
    capture_seconds: float


@dataclass(frozen=True)
class _Planned:
    signature: Signature
    draft: _Draft
    runner: Runner


class Step:
    """A planned step: call it where you ran the step before. Made by :func:`olla.optimize`.

    One plan for each signature of arguments (shapes, dtypes, structure), model mode and autocast
    state, made when it first occurs. A step runs in one thread at a time.
    """

    def __init__(
        self,
        program: Program,
        *,
        reorder: bool = True,
        time_limit: float = 60.0,
        progress: bool | None = None,
        closure_of: Optimizer | None = None,
    ) -> None:
        self._program = program
        self._reorder = reorder
        self._time_limit = time_limit
        self._progress = progress
        self._closure_of = closure_of  # an optimizer that calls the planned step back, such as LBFGS
        self._planned: dict[Signature, list[_Planned]] = {}
        self._latest: _Planned | None = None
        self._measurement: Measurement | None = None
        self._running = threading.Lock()

    @property
    def plan(self) -> Plan:
        """The plan used last."""
        return self._current.draft.plan

    @property
    def capture_seconds(self) -> float:
        """Seconds that capturing took, planning not counted."""
        return self._current.draft.capture_seconds

    @property
    def code(self) -> str:
        """The Python code that runs, for reading."""
        return str(self._current.runner.code.code)

    @property
    def _current(self) -> _Planned:
        assert self._latest is not None
        return self._latest

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run one step. Takes the same arguments as the example, returns what the eager step returns.

        Raises
        ------
        ExecutionError
            If the model was edited after planning, an input is on another device than planned,
            or the step is running already (in another thread, or inside itself).
        CaptureError
            If the arguments have a new signature and the step cannot be captured with them.
        """
        if not self._running.acquire(blocking=False):
            raise ExecutionError("this step is running already: plan one step per thread, or take turns")
        try:
            return self._run(args, kwargs)
        finally:
            self._running.release()

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._program.require_unedited()
        runner = self._plan_for(args, kwargs).runner
        leaves, _ = flatten((args, kwargs))
        if self._closure_of is None:
            return runner.run(leaves)
        return self._closure_of.step(lambda: runner.run(leaves))

    def prepare(self, *args: Any, **kwargs: Any) -> None:
        """Plan for these arguments without running, so that the first call need not."""
        self._plan_for(args, kwargs)

    def measure(self, *args: Any, **kwargs: Any) -> Measurement:
        """Run the planned and the eager step on these arguments and ask the allocator what they needed.

        Parameters, buffers, optimizer state, gradients and random state are as before afterwards;
        a copy of them is held meanwhile.
        """
        self._program.require_unedited()
        planned = self._plan_for(args, kwargs)
        snapshot = Snapshot(self._program)

        def from_the_start(call: Callable[..., Any]) -> Callable[[], None]:
            def run() -> None:
                call(*args, **kwargs)
                snapshot.restore_gradients()

            return run

        try:
            with random_state():
                self._measurement = measure(
                    from_the_start(self),
                    from_the_start(self._eager),
                    device=self._device(args, kwargs),
                    planned_bytes=planned.draft.plan.peak_bytes,
                )
        finally:
            snapshot.restore()
        return self._measurement

    def plan_for(self, *args: Any, **kwargs: Any) -> Plan:
        """The plan for these arguments, made without allocating or preparing anything to run."""
        return self._draft(args, kwargs).plan

    def graph_for(self, *args: Any, **kwargs: Any) -> Graph:
        """The graph of the step for these arguments, not planned."""
        return self._capture(args, kwargs)[1].graph

    def report(self) -> Report:
        """What was planned and, after :meth:`measure`, what was measured; print it."""
        return Report(self.plan, self._measurement)

    def _plan_for(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Planned:
        signature = Signature.of(self._program, args, kwargs)
        known = self._planned.get(signature, ())
        found = next((planned for planned in known if planned.runner.fits_gradients()), None)
        if found is None:
            if self._latest is not None:
                self._require_same_devices(signature)
                log.warning("planning again for %s", signature.difference(self._latest.signature))
            draft = self._draft(args, kwargs)
            code = emit(draft.traced, draft.lowered, draft.plan.order)
            signature = Signature.of(self._program, args, kwargs)  # now it is known what the step itself changes
            found = _Planned(signature, draft, Runner(self._program, draft.traced, code))
            self._planned.setdefault(signature, []).append(found)
        self._latest = found
        return found

    def _capture(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Trace, Lowered]:
        with stage("capturing the step", self._progress):
            traced = trace(self._program, args, kwargs)
            return traced, lower(self._program, traced)

    def _draft(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Draft:
        started = time.perf_counter()
        traced, lowered = self._capture(args, kwargs)
        capture_seconds = time.perf_counter() - started
        with stage(f"ordering {len(lowered.graph.ops):,} ops", self._progress):
            graph = lowered.graph
            order = schedule(graph, time_limit=self._time_limit) if self._reorder else program_order(graph)
            plan = Plan.of(graph, order)
        verify(graph, plan)
        return _Draft(traced, lowered, plan, capture_seconds)

    def _require_same_devices(self, signature: Signature) -> None:
        assert self._latest is not None
        moved = signature.moved(self._latest.signature)
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

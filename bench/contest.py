"""Contenders side by side in one process: what each needs in bytes and seconds, and whether its numbers are eager's."""

from __future__ import annotations

import gc
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import olla
from bench import cells
from bench.peers import EAGER, Change
from bench.training import Step, Subject, Training
from olla.measure.measurement import peak_of

_COMPARED_STEPS = 2
_WARM_UPS = 4  # more, until caches are filled and addresses found


@dataclass
class Result:
    """One contender and its figures."""

    model: str
    mode: str
    contender: str
    peak_bytes: int | None = None  # above what lives across steps
    saving: float | None = None  # the share of eager PyTorch's peak
    persistent_bytes: int | None = None  # of what lives across steps
    step_seconds: float | None = None  # median
    time_ratio: float | None = None  # median over rounds, to the step of eager PyTorch in the same round
    same_numbers: bool | None = None  # losses and parameters are eager PyTorch's, bit for bit
    same_buffers: bool | None = None  # running statistics are
    planning_seconds: float | None = None  # this, and what follows, where OLLA plans the whole step
    extra: float | None = None  # time for its budget, as a share of eager PyTorch's step, as planned
    least_extra: float | None = None  # as proven
    machine: str = ""
    date: str = ""
    command: str = ""  # that made it
    error: str = ""


Numbers = tuple[list[Tensor], list[Tensor], list[Tensor]]  # losses, parameters, buffers
Contenders = Mapping[str, Sequence[Change]]  # what each does to its training, by name; eager PyTorch is the first


def compete(
    subject: Subject,
    contenders: Contenders,
    result_of: Callable[[str], Result],
    tell: Callable[[str], None],
    rounds: int,
) -> list[Result]:
    """Train the subject with every contender; ``result_of`` makes its result, ``tell`` is told what is going on.

    All train copies of their own. A contender that fails has its error in its result; if that is eager PyTorch,
    there is nothing to compare with, and its result is the only one. Times are taken in so many ``rounds``.
    """
    torch.compiler.reset()
    results: list[Result] = []
    trainings: dict[str, Training] = {}  # that work
    expected: Numbers | None = None
    for contender, changes in contenders.items():
        tell(contender)
        result = result_of(contender)
        results.append(result)
        with _errors_in(result):
            training = subject.training()
            for change in changes:
                change(training)
            losses, parameters, buffers = numbers = _numbers(training)
            expected = expected or numbers
            result.same_numbers = _equal(losses + parameters, expected[0] + expected[1])
            result.same_buffers = _equal(buffers, expected[2])
            for _ in range(_WARM_UPS):
                training.step()
            result.peak_bytes, _ = peak_of(training.step, torch.device("cpu"))
            result.persistent_bytes = training.persistent_bytes()
            result.saving = 1 - result.peak_bytes / (results[0].peak_bytes or result.peak_bytes)
            trainings[contender] = training
        if expected is None:
            break
    tell("taking the times")
    _time({contender: training.step for contender, training in trainings.items()}, results, rounds)
    for result in results:
        if result.contender in trainings and (step := trainings[result.contender].planned):
            _note(result, step.plan, results[0].step_seconds or 1.0)
    return results


def _note(result: Result, plan: olla.Plan, eager_seconds: float) -> None:
    """What the plan of a whole step says."""
    result.planning_seconds = plan.seconds
    result.extra, result.least_extra = (
        seconds / eager_seconds for seconds in (plan.extra_seconds, plan.extra_seconds_lower_bound)
    )


@contextmanager
def _errors_in(result: Result) -> Iterator[None]:
    """What fails inside is noted: one failing contender must not end the run."""
    try:
        yield
    except Exception as error:
        result.error = f"{type(error).__name__}: {error}".replace("\n", " ")


def _numbers(training: Training) -> Numbers:
    """What the first steps compute."""
    losses = [training.step().clone() for _ in range(_COMPARED_STEPS)]
    model = training.model
    return losses, [p.detach().clone() for p in model.parameters()], [b.clone() for b in model.buffers()]


def _equal(some: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(some, others, strict=True))


def _time(steps: dict[str, Step], results: list[Result], rounds: int) -> None:
    """Every step in each round, in an order drawn anew, so that what else the machine does meets all alike.

    It runs twice, and the second time counts: in a loop, a step follows one of its own kind, whose memory is at hand.
    """
    draw = random.Random(0)
    seconds: dict[str, list[float]] = {contender: [] for contender in steps}
    for _ in range(rounds):
        for contender in draw.sample(list(steps), len(steps)):
            steps[contender]()
            started = time.perf_counter()
            steps[contender]()
            seconds[contender].append(time.perf_counter() - started)
    for result in results:
        if result.contender in steps:
            taken = seconds[result.contender]
            result.step_seconds = statistics.median(taken)
            result.time_ratio = statistics.median(a / b for a, b in zip(taken, seconds[EAGER], strict=True))


def show_contest(
    name: str, subject: Subject, contenders: Contenders, result_of: Callable[[str], Result], rounds: int
) -> list[Result]:
    """Run the contest of this name, say how far it is, and print its table."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(width=None if sys.stdout.isatty() else 200)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(name)
        results = compete(
            subject, contenders, result_of, lambda what: progress.update(task, description=f"{name}: {what}"), rounds
        )
    console.print(_table(name, results))
    gc.collect()
    return results


def _table(name: str, results: list[Result]) -> Any:
    """The smallest peak last; what failed after it."""
    from rich.table import Table

    table = Table(title=f"{name}: peak above what lives across steps, and step time")
    for column in ("contender", "peak MiB", "saved", "step s", "time", "same numbers", "same buffers", "error"):
        table.add_column(column, justify="left" if column in ("contender", "error") else "right")
    for result in sorted(results, key=lambda result: -(result.peak_bytes or 0)):
        table.add_row(
            result.contender,
            cells.mebibytes(result.peak_bytes),
            cells.share(result.saving),
            cells.seconds(result.step_seconds),
            cells.factor(result.time_ratio),
            cells.truth(result.same_numbers),
            cells.truth(result.same_buffers),
            result.error[:100],
        )
    return table

"""What a TARGET of the command line stands for: a model with all that a step of it takes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from olla.api import draft, frontier, optimize
from olla.errors import OllaError
from olla.fit.frontier import Frontier
from olla.graph.graph import Graph
from olla.graph.plan import Plan
from olla.planning import Options
from olla.show.report import Report

__all__ = ["Request", "Target", "optimizer_for", "unknown"]

_MOMENTUM = 0.9  # of SGD, which has none unless asked for


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked for beside the name of the target; None: whatever the target says, or the usual."""

    train: bool | None = None
    batch_size: int | None = None
    shape: tuple[int, ...] | None = None  # of an input, without the batch
    optimizer: str | None = None  # a name of torch.optim


@dataclass(frozen=True, slots=True)
class Target:
    """The arguments of :func:`olla.optimize`, and what the commands do with them."""

    model: nn.Module
    inputs: Tensor | Sequence[Any] | Mapping[str, Any]
    loss_fn: Callable[..., Tensor] | None = None
    targets: Tensor | Sequence[Tensor] | None = None
    optimizer: Optimizer | None = None

    def planned(self, **options: Any) -> tuple[Graph, Plan]:
        """A plan of the order, and its graph."""
        drafted = draft(self.model, self.inputs, **self._others, options=Options(place=False, **options))
        return drafted.lowered.graph, drafted.plan

    def frontier(self, **options: Any) -> Frontier:
        """What smaller and smaller budgets cost."""
        return frontier(self.model, self.inputs, **self._others, **options)

    def measured(self, **options: Any) -> Report:
        """The step, run both ways."""
        with optimize(self.model, self.inputs, **self._others, **options) as step:
            named = {} if self.targets is None else {"targets": self.targets}
            if isinstance(self.inputs, Mapping):
                step.measure(**self.inputs, **named)
            else:
                step.measure(*([self.inputs] if isinstance(self.inputs, Tensor) else self.inputs), **named)
            return step.report()

    @property
    def _others(self) -> dict[str, Any]:
        return {"loss_fn": self.loss_fn, "targets": self.targets, "optimizer": self.optimizer}


def optimizer_for(model: nn.Module, name: str) -> Optimizer:
    """The optimizer of ``torch.optim`` called ``name``, in any case of letters, with its usual settings.

    Raises
    ------
    OllaError
        If there is none, or it does not take the parameters.
    """
    known = {
        key: value
        for key, value in vars(torch.optim).items()
        if isinstance(value, type) and issubclass(value, Optimizer) and value is not Optimizer
    }
    found = next((key for key in known if key.lower() == name.lower()), None)
    if found is None:
        raise OllaError(unknown("torch.optim has no optimizer", name, known))
    settings: dict[str, Any] = {"momentum": _MOMENTUM} if found == "SGD" else {}
    try:
        return known[found](model.parameters(), **settings)
    except ValueError as error:
        raise OllaError(f"--optimizer {name}: {error}") from error


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """A message that names those ``known`` which ``name`` may be meant to be, the likeliest first."""
    by_letters = {key.lower(): key for key in known}
    near = [by_letters[letters] for letters in get_close_matches(name.lower(), by_letters, n=3)]
    return f"{what} {name!r}" + (f": did you mean {' or '.join(near)}?" if near else "")

"""The live optimizer, called parameter by parameter inside the backward pass of compiled graphs.

A parameter may be updated there only if its gradient is whole: if no other graph, and no code outside of graphs, adds
to it, and if the loop does not change it before ``optimizer.step()``. What one graph shows of the loop does not tell,
so each parameter is watched for one step, in which its gradient is returned as ever.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge
from torch.optim import Optimizer

from olla.capture.trial import divisible, separable
from olla.capture.updates import Update, is_watched, needs_closure
from olla.errors import CaptureError, ExecutionError, InvalidOptionError
from olla.torch_private import graph_task, has_gradient_hooks, is_called_by_scaler, will_accumulate

__all__ = ["BackwardOptimizer"]

_LIVE: weakref.WeakKeyDictionary[Optimizer, BackwardOptimizer] = weakref.WeakKeyDictionary()
_WITHOUT = "without the option 'optimizer' of the backend"


class BackwardOptimizer:
    """Updates parameters of one optimizer inside backward passes, each at most once between calls of its ``step``."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = weakref.ref(optimizer)  # it holds this object, by the hook
        self._divisible = divisible(optimizer)
        self._watched: dict[int, _Watched] = {}  # id of a parameter -> what is known of its gradient
        self._updated: set[int] = set()  # since the last step
        self._task = -1  # the backward pass that ...
        self._groups: dict[int, int] = {}  # ... found these: id of a parameter -> the position of its group
        optimizer.register_step_pre_hook(self._before_step)

    @classmethod
    def of(cls, optimizer: object) -> BackwardOptimizer:
        """The one of ``optimizer``.

        Raises
        ------
        InvalidOptionError
            If it is no optimizer.
        CaptureError
            If its step cannot be taken apart into updates of single parameters.
        """
        if not isinstance(optimizer, Optimizer):
            raise InvalidOptionError(
                f"the option 'optimizer' is a {type(optimizer).__name__}, not a torch.optim.Optimizer"
            )
        if optimizer not in _LIVE:
            _require_separable(optimizer)
            _LIVE[optimizer] = cls(optimizer)
        return _LIVE[optimizer]

    def update(self, parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> list[Tensor | None]:
        """Use the gradients up; returns those that backward must return as ever, and None for the others."""
        optimizer = self._optimizer()
        if optimizer is None:  # nobody will step
            return [*gradients]
        if self._task != graph_task():
            self._task = graph_task()
            self._groups = {id(p): n for n, group in enumerate(optimizer.param_groups) for p in group["params"]}
        due: dict[int, list[tuple[Tensor, Tensor]]] = {}
        left: list[Tensor | None] = []
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if id(parameter) in self._groups and self._is_due(parameter, gradient):
                due.setdefault(self._groups[id(parameter)], []).append((parameter, gradient))
                left.append(None)
            else:
                left.append(gradient)
        for pairs in due.values():
            self._updated.update(id(parameter) for parameter, _ in pairs)
            self.updating(optimizer, [parameter for parameter, _ in pairs])(*(gradient for _, gradient in pairs))
        return left

    def updating(self, optimizer: Optimizer, parameters: Sequence[Tensor]) -> Update:
        """What updates these, given their gradients; they are of one group of the ``optimizer``."""
        return Update(optimizer, parameters, whole=False, in_pieces=self._divisible)

    def _is_due(self, parameter: Tensor, gradient: Tensor) -> bool:
        """Whether ``gradient`` is all that ``parameter`` gets before the next step."""
        node = get_gradient_edge(parameter).node
        if parameter.grad is not None or torch.is_grad_enabled() or has_gradient_hooks(parameter):
            return False
        if not will_accumulate(node):
            return False
        found = self._watched.get(id(parameter))
        if found is None or found.node is not node:
            found = self._watch(parameter, node)
        if found.is_whole is None:
            found.returned = gradient
        elif found.is_whole and id(parameter) in self._updated:
            raise _second_gradient(parameter)
        return found.is_whole is True

    def _watch(self, parameter: Tensor, node: Node) -> _Watched:
        found = self._watched[id(parameter)] = _Watched(parameter, node)
        key, weak = id(parameter), weakref.ref(self)  # the node keeps its hooks, and must not keep itself by them

        def before(gradients: Sequence[Tensor | None]) -> None:
            if (this := weak()) is not None:
                this._arrives(key, gradients[0])

        def after(_: object, __: object) -> None:
            if (this := weak()) is not None:
                this._has_arrived(key)

        node.register_prehook(before)
        node.register_hook(after)
        return found

    def _arrives(self, key: int, gradient: Tensor | None) -> None:
        found = self._watched[key]
        if found.returned is not None:  # which nobody could add to in place, as it is held
            found.is_arriving = gradient is found.returned
            found.is_whole = None if found.is_arriving else False
            found.returned = None
        elif gradient is not None and key in self._updated:
            raise _second_gradient(found.parameter)

    def _has_arrived(self, key: int) -> None:
        found = self._watched[key]
        if found.is_arriving and found.parameter.grad is not None:
            found.arrived, found.is_arriving = (found.parameter.grad, found.parameter.grad._version), False

    def _before_step(self, _optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
        self._updated.clear()
        for found in self._watched.values():
            if found.arrived is None:
                continue
            (gradient, version), found.arrived = found.arrived, None
            if found.parameter.grad is not gradient or gradient._version != version or is_called_by_scaler():
                raise ExecutionError(
                    f"the gradient of {_described(found.parameter)} is changed between its backward pass and "
                    "optimizer.step(), as clipping, torch.amp.GradScaler and accumulation do: compile the model "
                    f"{_WITHOUT}, or plan the whole step with olla.optimize_step"
                )
            found.is_whole = True


@dataclass(slots=True)
class _Watched:
    """What is known of the gradient of a parameter."""

    parameter: Tensor
    node: Node  # that accumulates its gradient
    is_whole: bool | None = None  # whether one graph makes all of it, if that is known
    returned: Tensor | None = None  # by a graph, and has not arrived at the node
    is_arriving: bool = False
    arrived: tuple[Tensor, int] | None = None  # .grad and its version, until the next step


def _require_separable(optimizer: Optimizer) -> None:
    name = type(optimizer).__name__
    if needs_closure(optimizer):
        raise CaptureError(f"{name}.step calls the model back, and cannot run inside backward: compile {_WITHOUT}")
    if is_watched(optimizer):
        raise CaptureError(
            f"hooks on the step of {name}, or what replaces it, would not see the updates inside backward: remove "
            f"them, or compile {_WITHOUT}"
        )
    if not separable(optimizer):
        raise CaptureError(
            f"{name} couples its parameters, as clipping by a norm does, or counts its steps: it cannot update them "
            f"one by one inside backward: compile {_WITHOUT}"
        )


def _second_gradient(parameter: Tensor) -> ExecutionError:
    return ExecutionError(
        f"{_described(parameter)} was updated inside backward, and gets another gradient before optimizer.step(): call "
        "optimizer.step() after each backward pass. To accumulate gradients, or to use a parameter twice, compile the "
        f"model {_WITHOUT}"
    )


def _described(parameter: Tensor) -> str:
    return f"a parameter of shape {tuple(parameter.shape)}"

"""The optimizer in the graph: an update is one op, and running it calls the live optimizer itself.

So every optimizer works, numbers are those of eager PyTorch, and hyper-parameters are read when
the step runs. An optimizer that treats parameters separately gets one op per parameter (or per few,
where they are small), and a gradient can be used up as soon as it exists; any other gets one op
over all. If it even treats the elements of a parameter separately, a large one is updated in pieces. Which kind it is
gets tried out on tiny parameters, not looked up in a list.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from olla.capture.pieces import Narrowed, piece_bytes, pieces_of, update_in_pieces
from olla.capture.trial import divisible, hyper_parameters, separable
from olla.errors import CaptureError
from olla.torch_private import bare_step, has_step_hooks, is_wrapped_by_scheduler

__all__ = ["UPDATE", "Update", "UpdateRecorder", "chunks", "finish_step", "is_watched", "needs_closure"]

Value = TypeVar("Value")
Pair = tuple[Tensor, Tensor]  # a live parameter and the twin that stands for it while tracing

_LIBRARY = torch.library.Library("olla", "DEF")
_LIBRARY.define("update(Tensor(a!)[] parameters, Tensor(b!)[] gradients, int slot) -> ()")
_LIBRARY.impl("update", lambda parameters, gradients, slot: None, "CompositeExplicitAutograd")
UPDATE = torch.ops.olla.update.default  # marks an update while tracing; never runs


class Update:
    """Calling it with gradients makes the optimizer update the parameters they belong to.

    There is one for each large parameter, and what it does besides takes as long as a small one's update: so it is no
    module, and the optimizer's step is called without its hooks.
    """

    def __init__(
        self, optimizer: Optimizer, parameters: Sequence[Tensor], *, whole: bool, in_pieces: bool = False
    ) -> None:
        self.optimizer = optimizer
        self.parameters_updated = tuple(parameters)  # in the order of the gradients
        self.whole = whole
        self._pieces = pieces_of(parameters[0]) if in_pieces and len(parameters) == 1 else []
        self._bare_step = bare_step(optimizer)

    def __call__(self, *gradients: Tensor) -> None:
        """Update the parameters; the optimizer's state changes as in ``optimizer.step()``."""
        if self._pieces and gradients[0].layout == torch.strided:
            (parameter,), (gradient,) = self.parameters_updated, gradients
            update_in_pieces(self.optimizer, self._bare_step, parameter, gradient, self._pieces)
            return
        for parameter, gradient in zip(self.parameters_updated, gradients, strict=True):
            parameter.grad = gradient
        try:
            if self.whole:
                self.optimizer.step()
            else:
                with Narrowed(self.optimizer, self.parameters_updated):
                    self._bare_step(self.optimizer)
        finally:
            for parameter in self.parameters_updated:
                parameter.grad = None

    def workspace(self, eager: int) -> int:
        """Bytes that it holds while it runs, where one update of the whole parameter holds ``eager``."""
        if not self._pieces:
            return eager
        (parameter,) = self.parameters_updated
        return eager * piece_bytes(parameter) // parameter.nbytes


class UpdateRecorder:
    """Stands in for ``optimizer.step`` while a step is traced: a call records ops instead of updating.

    Make it before tracing starts: it tries the optimizers out on tiny parameters.
    """

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self._separable = {
            id(optimizer): not is_watched(optimizer) and not needs_closure(optimizer) and separable(optimizer)
            for optimizer in optimizers
        }
        self._divisible = {
            id(optimizer): self._separable[id(optimizer)] and divisible(optimizer) for optimizer in optimizers
        }
        self.updates: list[Update] = []
        self.consumed: set[int] = set()  # ids of the live parameters that were updated

    @contextmanager
    def installed(self, optimizer: Optimizer, traced: dict[int, Tensor]) -> Iterator[None]:
        """Make ``optimizer`` hold the traced twins of its parameters and record its steps.

        ``traced`` maps the id of each live parameter to its twin. The caller restores the optimizer.
        """
        live = list(optimizer.param_groups)
        one_by_one = self._separable[id(optimizer)]
        optimizer.param_groups = [{**group, "params": [traced[id(p)] for p in group["params"]]} for group in live]

        def step(closure: Callable[[], Any] | None = None) -> Any:
            if needs_closure(optimizer):
                raise CaptureError(
                    f"{type(optimizer).__name__}.step calls the model back and cannot be part of a planned step: "
                    "use olla.optimize(..., optimizer=...), which plans the call back, or plan the closure with "
                    "olla.optimize_step(closure, ...) and pass the planned step to optimizer.step"
                )
            with torch.enable_grad():
                result = closure() if closure is not None else None
            by_group = [[(p, traced[id(p)]) for p in g["params"] if traced[id(p)].grad is not None] for g in live]
            if one_by_one:
                size = sum(p.nbytes for pairs in by_group for p, _ in pairs)
                for chunk in (chunk for pairs in by_group for chunk in chunks(pairs, size)):
                    self._record(optimizer, chunk, whole=False)
            else:
                self._record(optimizer, [pair for pairs in by_group for pair in pairs], whole=True)
            return result

        optimizer.step = step  # type: ignore[method-assign]
        before = [hyper_parameters(group) for group in live]
        yield
        for index, (old, group) in enumerate(zip(before, optimizer.param_groups, strict=True)):
            changed = [name for name, value in hyper_parameters(group).items() if old.get(name) is not value]
            if changed:
                raise CaptureError(
                    f"the step function changes {changed[0]!r} of parameter group {index} of the optimizer: step "
                    "learning-rate schedulers outside of it (a scheduler that was stepped just now is one step ahead)"
                )

    def _record(self, optimizer: Optimizer, pairs: Sequence[Pair], *, whole: bool) -> None:
        with torch.no_grad():
            gradients = [cast(Tensor, twin.grad) for _, twin in pairs]
            torch.ops.olla.update([twin for _, twin in pairs], gradients, len(self.updates))
        in_pieces = self._divisible[id(optimizer)]
        self.updates.append(Update(optimizer, [parameter for parameter, _ in pairs], whole=whole, in_pieces=in_pieces))
        self.consumed.update(id(parameter) for parameter, _ in pairs)


_SMALL = 200  # neighbours share an update while they are less than this part of all gradients
_SMALL_ON_GPUS = 50  # where every call launches several kernels, which take longer than their work;
_FEW_ON_GPUS = 24  # or less than the largest of them, which must have room anyway, up to this part


def chunks(pairs: Sequence[tuple[Tensor, Value]], total: int) -> Iterator[list[tuple[Tensor, Value]]]:
    """Neighbours that are small together, so that a call of the optimizer is worth its overhead.

    ``pairs`` begin with parameters; ``total`` is the size of all gradients, in bytes.
    """
    small = total // _SMALL
    if pairs and pairs[0][0].is_cuda:
        largest = max(parameter.nbytes for parameter, _ in pairs)
        small = max(total // _SMALL_ON_GPUS, min(total // _FEW_ON_GPUS, largest))
    chunk: list[tuple[Tensor, Value]] = []
    size = 0
    for pair in pairs:
        if chunk and size + pair[0].nbytes > small:
            yield chunk
            chunk, size = [], 0
        chunk.append(pair)
        size += pair[0].nbytes
    if chunk:
        yield chunk


def finish_step(optimizer: Optimizer) -> None:
    """Let whoever counts calls of ``optimizer.step`` (schedulers do) see one without any parameter."""
    groups = optimizer.param_groups
    optimizer.param_groups = []
    try:
        optimizer.step()
    finally:
        optimizer.param_groups = groups


def needs_closure(optimizer: Optimizer) -> bool:
    """Whether ``step`` insists on a closure that evaluates the model again, as LBFGS does."""
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty


def is_watched(optimizer: Optimizer) -> bool:
    """Whether somebody's code runs around ``step``, and would see many steps instead of one."""
    replaced = "step" in vars(optimizer) and not is_wrapped_by_scheduler(optimizer.step)
    return replaced or has_step_hooks(optimizer)

"""Putting things back: after tracing, which computes nothing, and after measuring, which does."""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from olla.capture.program import Program
from olla.capture.signature import PLAIN

__all__ = ["Snapshot", "random_state", "unchanged"]


@contextmanager
def unchanged(program: Program) -> Iterator[None]:
    """Put everything that running the step in Python may change back as it was, except tensor values.

    Plain attributes that had changed, such as counters, are noted in ``program.own_attributes``.
    (Tensors kept aside, as caches do, are put back without a word.)
    """
    attributes = [_shallow(module) for module in program.parts]
    gradients = {name: program.parameters[name].grad for name in program.trainable}
    optimizers = [(optimizer, dict(vars(optimizer)), list(optimizer.param_groups)) for optimizer in program.optimizers]
    with random_state():
        try:
            yield
        finally:
            for module, before in zip(program.parts, attributes, strict=True):
                program.own_attributes.update((id(module), name) for name in _restore(module, before))
            for name, gradient in gradients.items():
                program.parameters[name].grad = gradient
            for optimizer, fields, groups in optimizers:
                vars(optimizer).clear()
                vars(optimizer).update(fields)
                optimizer.param_groups[:] = groups


def _shallow(module: nn.Module) -> dict[str, Any]:
    return {name: dict(value) if type(value) is dict else value for name, value in vars(module).items()}


def _restore(module: nn.Module, before: dict[str, Any]) -> list[str]:
    """Set the attributes of ``module`` back; returns the names of the plain ones that had changed."""
    now = vars(module)
    changed = []
    for name in now.keys() - before.keys():
        del now[name]
    for name, value in before.items():
        if type(value) is dict:
            inner = now[name] if isinstance(now.get(name), dict) else {}
            inner.clear()
            inner.update(value)
            now[name] = inner
        elif now.get(name) is not value:
            if type(now.get(name)) in PLAIN:
                changed.append(name)
            now[name] = value
    return changed


@contextmanager
def random_state() -> Iterator[None]:
    """Restore the random generators of torch, Python and, if it is loaded, NumPy."""
    numpy = sys.modules.get("numpy")
    python_state, numpy_state = random.getstate(), numpy and numpy.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() and torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(python_state)
            if numpy is not None:
                numpy.random.set_state(numpy_state)


class Snapshot:
    """The values of everything that running a step changes, to be put back by :meth:`restore`.

    Holds a copy of all parameters, buffers and optimizer state: as many bytes again.
    """

    def __init__(self, program: Program) -> None:
        self._program = program
        self._tensors = {name: _Value(tensor) for name, tensor in program.state.items()}
        self._gradients = {name: _Value(program.parameters[name].grad) for name in program.trainable}
        self._optimizers = [_OptimizerValues(optimizer) for optimizer in program.optimizers]

    def restore_gradients(self) -> None:
        """Put ``.grad`` of all parameters back."""
        for name, gradient in self._gradients.items():
            self._program.parameters[name].grad = gradient.restored()

    def restore(self) -> None:
        """Put all values back; every tensor that existed is the same object as before."""
        for name, tensor in self._tensors.items():
            value = tensor.restored()
            if name not in self._program.parameters:
                self._program.set_buffer(name, value)
        self.restore_gradients()
        for optimizer in self._optimizers:
            optimizer.restore()


class _Value:
    """Any value, and a copy of it; a tensor gets its old contents back and stays the same object."""

    def __init__(self, value: Any) -> None:
        self._value = value
        self._copy = value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)

    def restored(self) -> Any:
        if not isinstance(self._value, Tensor):
            return self._copy
        with torch.no_grad():
            self._value.copy_(self._copy)
        return self._value


class _OptimizerValues:
    """The state and the hyper-parameters of an optimizer."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._state = {key: {n: _Value(v) for n, v in entry.items()} for key, entry in optimizer.state.items()}
        self._groups = [
            {name: _Value(value) for name, value in group.items() if name != "params"}
            for group in optimizer.param_groups
        ]

    def restore(self) -> None:
        self._optimizer.state.clear()
        for key, entry in self._state.items():
            self._optimizer.state[key] = {name: value.restored() for name, value in entry.items()}
        for group, values in zip(self._optimizer.param_groups, self._groups, strict=True):
            group.update({name: value.restored() for name, value in values.items()})

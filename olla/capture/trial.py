"""Trying an optimizer out on tiny parameters: what it couples, what state it keeps, what memory it takes."""

from __future__ import annotations

import copy
import math
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from olla.capture.pieces import Narrowed, group_of, pieces_of, update_in_pieces
from olla.torch_private import FakeTensor, TorchDispatchMode, flatten, real_tensors, remove_step_hooks

__all__ = ["Footprint", "divisible", "footprint", "hyper_parameters", "separable"]

_PRIMES = (101, 53, 7, 5, 3)  # sizes of tiny dimensions, all different, so that they can be told apart
_PER_GROUP = 3
_PIECES = [slice(row, row + 2) for row in range(0, _PRIMES[0], 2)]  # so small that vectors leave much of them over
_SCALES = (1.0, 1e4, 1e-4)  # of gradients in three steps, so different that a clipping by a norm over all would show
# What an optimizer may raise that wants something tiny dense gradients are not.
_REFUSALS = (RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError)

_State = Mapping[Tensor, dict[Any, Any]]  # that of an optimizer, by parameter
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes that updating one parameter needs beside the parameter and its gradient."""

    state: int  # kept across steps
    workspace: int  # only during the update


def hyper_parameters(group: dict[str, Any]) -> dict[str, Any]:
    """A parameter group without its parameters."""
    return {name: value for name, value in group.items() if name != "params"}


def separable(optimizer: Optimizer) -> bool:
    """Whether updating parameters one by one, last first, gives the bits of one joint step."""
    groups = [{**group, "params": group["params"][:_PER_GROUP]} for group in optimizer.param_groups]

    def same(state: _State) -> bool:
        joint, single = _Trial.of(optimizer, groups, state), _Trial.of(optimizer, groups, state)
        generator = torch.Generator().manual_seed(0)
        for scale in _SCALES:
            gradients = [_random(p.shape, generator).mul_(scale).to(p) for p in joint.parameters]
            for trial in (joint, single):
                trial.set_gradients(gradients)
            joint.step()
            for parameter in reversed(single.parameters):
                with Narrowed(single.optimizer, (parameter,)):
                    single.step()
            single.step_without_parameters()
        return joint.moved and joint.equals(single)

    return _tried(optimizer, same) or False


def divisible(optimizer: Optimizer) -> bool:
    """Whether updates of large parameters hold something besides, and those of some rows after others give the same.

    The same bits, that is. Fused optimizers do not, on CPUs, whose kernels round what vectors leave over in another way
    than the rest. What holds nothing besides, such as SGD without weight decay, would only take longer.
    """
    groups = [
        {
            **group,
            "params": [*{parameter.dim(): parameter for parameter in filter(pieces_of, group["params"])}.values()],
        }
        for group in optimizer.param_groups
    ]
    if not any(group["params"] for group in groups):
        return False

    def same(state: _State) -> bool:
        whole, divided = _Trial.of(optimizer, groups, state), _Trial.of(optimizer, groups, state)
        generator = torch.Generator().manual_seed(0)
        held = 0.0
        for scale in _SCALES:
            for one, other in zip(whole.parameters, divided.parameters, strict=True):
                gradient = _random(one.shape, generator).mul_(scale).to(one)
                one.grad = gradient.clone()
                with Narrowed(whole.optimizer, (one,)), _PeakOfNewTensors() as new:
                    whole.step()
                update_in_pieces(divided.optimizer, lambda _: divided.step(), other, gradient, _PIECES)
                if scale == _SCALES[-1]:  # its state is there
                    held = max(held, new.peak / one.nbytes)
        return held > 0.5 and whole.moved and whole.equals(divided)

    return _tried(optimizer, same) or False


def footprint(optimizer: Optimizer, parameter: Tensor) -> Footprint:
    """The footprint of updating ``parameter``: of its live state, if there is one, else as tried out."""
    group = {**group_of(optimizer, parameter), "params": [parameter]}
    live = optimizer.state.get(parameter, {})

    def measured(state: _State) -> Footprint:
        trial = _Trial.of(optimizer, [group], state)
        tiny = trial.parameters[0]
        trial.set_gradients([torch.ones_like(tiny)])
        trial.step()
        with _PeakOfNewTensors() as new:
            trial.step()
        real_size = dict(zip(tiny.shape, parameter.shape, strict=True))
        return Footprint(
            state=_state_bytes(live, {}) if live else _state_bytes(trial.optimizer.state[tiny], real_size),
            workspace=round(new.peak / max(1, tiny.nbytes) * parameter.nbytes),
        )

    return _tried(optimizer, measured) or Footprint(_state_bytes(live, {}), 0)  # the rest is not known


def _tried(optimizer: Optimizer, trial: Callable[[_State], T]) -> T | None:
    """What a trial tells of parameters without state, else of some with the live state; None if both are refused.

    An optimizer that makes state in its constructor (Adagrad before torch 2.12) refuses parameters that have none.
    """
    states: tuple[_State, ...] = ({}, optimizer.state)
    with _isolated(optimizer):
        for state in states:
            try:
                return trial(state)
            except _REFUSALS:
                continue
    return None


class _Trial:
    """A copy of an optimizer that holds tiny parameters instead of its own."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.parameters: list[Tensor] = [p for group in optimizer.param_groups for p in group["params"]]
        self._first = [parameter.detach().clone() for parameter in self.parameters]

    @classmethod
    def of(cls, optimizer: Optimizer, groups: Sequence[dict[str, Any]], state: _State) -> _Trial:
        """A trial of ``optimizer`` with as many parameters as ``groups`` hold, of as many dimensions.

        Of these parameters' ``state``, each gets a tiny likeness.
        """
        twin = object.__new__(type(optimizer))  # not copy.copy, which leaves attributes behind
        vars(twin).update({name: _own_copy(value) for name, value in vars(optimizer).items()})
        remove_step_hooks(twin)
        twin.state = defaultdict(dict)
        generator = torch.Generator().manual_seed(1)
        twin.param_groups = [
            {**copy.deepcopy(hyper_parameters(group)), "params": [_tiny(p, generator) for p in group["params"]]}
            for group in groups
        ]
        for group, twins in zip(groups, twin.param_groups, strict=True):
            for parameter, tiny in zip(group["params"], twins["params"], strict=True):
                if parameter in state:
                    twin.state[tiny] = {name: _alike(v, parameter, tiny) for name, v in state[parameter].items()}
        for group in twin.param_groups:
            if group.get("lr") == 0:  # as at the start of a warm-up, where nothing would show
                group["lr"] = 1e-3
        return cls(twin)

    @property
    def moved(self) -> bool:
        """Whether the steps changed any parameter at all."""
        return not all(torch.equal(a, b) for a, b in zip(self.parameters, self._first, strict=True))

    def equals(self, other: _Trial) -> bool:
        """Whether parameters, their state, and hyper-parameters (some optimizers count steps there) are the same."""
        groups = zip(self.optimizer.param_groups, other.optimizer.param_groups, strict=True)
        return all(
            torch.equal(a, b) and _is_same_state(self.optimizer.state.get(a, {}), other.optimizer.state.get(b, {}))
            for a, b in zip(self.parameters, other.parameters, strict=True)
        ) and all(hyper_parameters(mine) == hyper_parameters(theirs) for mine, theirs in groups)

    def set_gradients(self, gradients: Sequence[Tensor]) -> None:
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient.clone()

    def step(self) -> None:
        """Step without the hooks of users and the wrappers of schedulers, which are not to see a trial."""
        step = type(self.optimizer).step
        getattr(step, "__wrapped__", step)(self.optimizer)

    def step_without_parameters(self) -> None:
        groups = self.optimizer.param_groups
        self.optimizer.param_groups = []
        self.step()
        self.optimizer.param_groups = groups


@contextmanager
def _isolated(optimizer: Optimizer) -> Iterator[None]:
    """Let a trial see no real gradients, draw from no real random generator, and make no tensor without bytes."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    gradients = [parameter.grad for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.grad = None
        default = torch.get_default_device()
        with (
            real_tensors(),
            torch.device("cpu" if default.type == "meta" else default),
            torch.random.fork_rng(devices=[]),
        ):
            yield
    finally:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient


def _alike(value: Any, parameter: Tensor, tiny: Tensor) -> Any:
    """An entry of the state of ``parameter``, for ``tiny``: of its shape, if it was of the parameter's."""
    if not isinstance(value, Tensor):
        return copy.deepcopy(value)
    of_tiny = value.shape == parameter.shape
    if _is_abstract(value):
        return torch.zeros(tiny.shape if of_tiny else value.shape, dtype=value.dtype, device=_real_device(value))
    return tiny.new_full(tiny.shape, value.flatten()[0].item(), dtype=value.dtype) if of_tiny else value.clone()


def _is_same_state(one: dict[Any, Any], other: dict[Any, Any]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(value, other[name]) if isinstance(value, Tensor) else value == other[name]
        for name, value in one.items()
    )


def _own_copy(value: Any) -> Any:
    """A copy of an attribute that a step may change in place."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    return copy.copy(value) if isinstance(value, (list, dict, set)) else value


class _PeakOfNewTensors(TorchDispatchMode):
    """The most bytes of tensors, made while it is active, that were alive at once."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._live: dict[int, weakref.ref[Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator and count what it made."""
        given = {_address(leaf) for leaf in flatten((args, kwargs))[0] if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in flatten(result)[0]:
            if isinstance(leaf, Tensor) and _address(leaf) not in given:
                self._live[id(leaf)] = weakref.ref(leaf)
        alive = [tensor for tensor in (reference() for reference in self._live.values()) if tensor is not None]
        self.peak = max(self.peak, sum(tensor.nbytes for tensor in alive))
        return result


def _tiny(parameter: Tensor, generator: torch.Generator) -> Tensor:
    shape = _PRIMES[: parameter.dim()]
    return _random(shape, generator).to(_real_device(parameter), parameter.dtype).requires_grad_()


def _is_abstract(tensor: Tensor) -> bool:
    return tensor.is_meta or isinstance(tensor, FakeTensor)


def _real_device(tensor: Tensor) -> torch.device:
    return torch.device("cpu") if _is_abstract(tensor) else tensor.device


def _random(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, device="cpu")  # whatever the default device is


def _state_bytes(state: dict[Any, Any], real_size: dict[int, int]) -> int:
    tensors = [value for value in state.values() if isinstance(value, Tensor)]
    return sum(math.prod(real_size.get(d, d) for d in t.shape) * t.element_size() for t in tensors)


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()

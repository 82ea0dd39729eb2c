"""The program to capture: a step function, and the modules and optimizers whose state it changes."""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from olla.capture.updates import is_watched
from olla.errors import CaptureError, ExecutionError
from olla.torch_private import TreeSpec, flatten

__all__ = ["Program", "Signature", "Snapshot", "random_state", "unchanged"]

_WRAPPERS = {
    "OptimizedModule": "it was compiled by torch.compile: pass the module you gave to torch.compile",
    "DataParallel": "pass its .module",
    "DistributedDataParallel": "pass its .module",
    "FullyShardedDataParallel": "pass the module before sharding",
}


class Container(nn.Module):
    """All modules of a program under one roof, so that one call can swap all their tensors."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, call: Callable[[], Any]) -> Any:
        """Run ``call`` while ``torch.func.functional_call`` has the tensors swapped."""
        return call()


@dataclass(frozen=True)
class Signature:
    """All that a capture depends on beside the values of tensors. Equal signatures share a plan."""

    structure: TreeSpec
    leaves: tuple[Any, ...]
    state: tuple[Any, ...]
    modules: tuple[Any, ...]
    autocast: tuple[Any, ...]
    watched: tuple[bool, ...]  # which optimizers have hooks

    def __hash__(self) -> int:
        return hash((self.leaves, self.state, self.modules, self.autocast, self.watched))

    def difference(self, other: Signature) -> str:
        """What differs from ``other``, for people."""
        what = {
            "structure": "arguments of another structure",
            "leaves": "arguments of another shape, dtype or value",
            "state": "other dtypes, shapes or requires_grad of parameters",
            "modules": "a changed setting of a module (train/eval, dropout rate, ...)",
            "autocast": "another autocast state",
            "watched": "hooks of an optimizer that were added or removed",
        }
        found = [text for name, text in what.items() if getattr(self, name) != getattr(other, name)]
        return " and ".join(found) or "gradients that are there instead of missing, or the reverse"

    def moved(self, other: Signature) -> tuple[int, torch.device, torch.device] | None:
        """The first tensor argument that is on another device than in ``other``: position, here, there."""
        if self.structure != other.structure:
            return None
        for position, (mine, theirs) in enumerate(zip(self.leaves, other.leaves, strict=True)):
            if mine[0] == theirs[0] == "tensor" and mine[4] != theirs[4]:
                return position, mine[4], theirs[4]
        return None


@dataclass(frozen=True)
class Program:
    """What the user runs today: ``function`` changes the state of ``modules`` through ``optimizers``.

    Raises
    ------
    CaptureError
        If a module is compiled or wrapped, or an optimizer holds parameters of none of the modules.
    """

    function: Callable[..., Any]
    modules: Mapping[str, nn.Module]
    optimizers: tuple[Optimizer, ...] = ()
    inference: bool = False  # whether ``function`` disables gradients
    container: Container = field(init=False)
    parameters: dict[str, Tensor] = field(init=False)  # tied ones once

    def __post_init__(self) -> None:
        for module in self.modules.values():
            _require_plain(module)
        container = Container(self.modules)
        object.__setattr__(self, "container", container)
        object.__setattr__(self, "parameters", dict(container.named_parameters()))
        object.__setattr__(self, "_buffers", _buffer_places(container))
        object.__setattr__(self, "_parts", tuple(container.modules()))
        _require_own_parameters(self)
        object.__setattr__(self, "_identity", _identity(self._parts, self.optimizers))

    _buffers: dict[str, tuple[dict[str, Any], str]] = field(init=False, repr=False)
    _parts: tuple[nn.Module, ...] = field(init=False, repr=False)
    _identity: tuple[int, ...] = field(init=False, repr=False)

    @property
    def state(self) -> dict[str, Tensor]:
        """The live parameters, then the live buffers (a model may replace its buffers at any time)."""
        return {**self.parameters, **{name: owner[key] for name, (owner, key) in self._buffers.items()}}

    def set_buffer(self, name: str, value: Tensor) -> None:
        """Make ``value`` the buffer of that name."""
        owner, key = self._buffers[name]
        owner[key] = value

    @property
    def trainable(self) -> list[str]:
        """Names of the parameters that may receive a gradient."""
        return [name for name, tensor in self.parameters.items() if tensor.requires_grad]

    def display_name(self, name: str) -> str:
        """The name of a state tensor as the user knows it."""
        return name.split(".", 1)[1] if len(self.modules) == 1 else name

    def require_unedited(self) -> None:
        """Raise :class:`ExecutionError` if modules or their tensors were exchanged since planning."""
        if self._identity == _identity(self._parts, self.optimizers):
            return
        now, old = dict(self.container.named_parameters()), self.parameters
        changed = [name for name in now.keys() | old.keys() if now.get(name) is not old.get(name)]
        what = f"parameter {self.display_name(min(changed))!r}" if changed else "a module, a hook or a parameter group"
        raise ExecutionError(
            f"the model was edited after planning ({what} was added, removed or exchanged); "
            "call olla.optimize again on the model as it is now"
        )

    def signature(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Signature:
        """The signature of a call.

        Raises
        ------
        CaptureError
            If an argument holds something that is neither a tensor nor a plain hashable value.
        """
        leaves, structure = flatten((args, kwargs))
        return Signature(
            structure=structure,
            leaves=tuple(_describe_leaf(leaf) for leaf in leaves),
            state=tuple(_describe_tensor(tensor) for tensor in self.state.values()),
            modules=tuple(_settings(module) for module in self._parts),
            autocast=_autocast(),
            watched=tuple(is_watched(optimizer) for optimizer in self.optimizers),
        )


def _buffer_places(container: nn.Module) -> dict[str, tuple[dict[str, Any], str]]:
    """Where each buffer is kept, tied ones once: a dictionary of its module and a key."""
    places: dict[str, tuple[dict[str, Any], str]] = {}
    for name, _ in container.named_buffers():
        module, _, key = name.rpartition(".")
        places[name] = (container.get_submodule(module)._buffers, key)
    return places


def _require_plain(module: nn.Module) -> None:
    if not isinstance(module, nn.Module):
        raise CaptureError(f"the model is a {type(module).__name__}, not a torch.nn.Module")
    if isinstance(module, torch.jit.ScriptModule):
        raise CaptureError("the model is a TorchScript module: pass the module it was scripted from")
    for name, part in module.named_modules():
        advice = _WRAPPERS.get(type(part).__name__)
        if advice is not None:
            where = f"submodule {name!r}" if name else "the model"
            raise CaptureError(f"{where} is wrapped in {type(part).__name__}: {advice}")


def _require_own_parameters(program: Program) -> None:
    own = {id(parameter) for parameter in program.parameters.values()}
    for optimizer in program.optimizers:
        if not isinstance(optimizer, Optimizer):
            raise CaptureError(f"the optimizer is a {type(optimizer).__name__}, not a torch.optim.Optimizer")
        for index, group in enumerate(optimizer.param_groups):
            for position, parameter in enumerate(group["params"]):
                if id(parameter) not in own:
                    raise CaptureError(
                        f"the optimizer ({type(optimizer).__name__}) holds a parameter of shape "
                        f"{tuple(parameter.shape)} (group {index}, position {position}) that belongs to none of the "
                        "modules given: build the optimizer from model.parameters(), or pass that module too"
                    )


def _identity(modules: Sequence[nn.Module], optimizers: Sequence[Optimizer]) -> tuple[int, ...]:
    """Changes when a module, parameter, hook or parameter group is added, removed or exchanged."""
    parts: list[int] = []
    for module in modules:
        parts.extend(map(id, module._modules.values()))
        parts.extend(map(id, module._parameters.values()))
        parts.append(len(module._buffers))
        parts.append(len(module._forward_hooks) + len(module._forward_pre_hooks) + len(module._backward_hooks))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            parts.extend(map(id, group["params"]))
    return tuple(parts)


_PLAIN = (bool, int, float, str, type(None))


def _settings(module: nn.Module) -> tuple[Any, ...]:
    """The plain attributes of a module: ``training``, a dropout's ``p``, a convolution's stride, ..."""
    return tuple(value for value in vars(module).values() if type(value) in _PLAIN or _is_plain_tuple(value))


def _is_plain_tuple(value: Any) -> bool:
    return type(value) is tuple and all(type(item) in _PLAIN for item in value)


def _describe_tensor(tensor: Tensor) -> tuple[Any, ...]:
    return (tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad)


def _describe_leaf(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return ("tensor", *_describe_tensor(leaf))
    try:
        hash(leaf)
    except TypeError as error:
        raise CaptureError(
            f"an argument holds a {type(leaf).__name__}, which OLLA cannot compare from call to call: "
            "pass tensors, numbers, strings, or containers of them"
        ) from error
    return (type(leaf), leaf)


def _autocast() -> tuple[Any, ...]:
    devices = ("cpu", "cuda")
    return tuple((torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in devices)


@contextmanager
def unchanged(program: Program) -> Iterator[list[str]]:
    """Put everything that running the step in Python may change back as it was, except tensor values.

    Yields a list that names, once the block has ended, the module attributes of plain values that
    had changed, such as counters. (Tensors kept aside, as caches do, are put back without a word.)
    """
    modules = list(program.container.modules())
    attributes = [_shallow(module) for module in modules]
    gradients = {name: program.parameters[name].grad for name in program.trainable}
    optimizers = [(optimizer, dict(vars(optimizer)), list(optimizer.param_groups)) for optimizer in program.optimizers]
    names = {id(module): name for name, module in program.container.named_modules()}
    changed: list[str] = []
    with random_state():
        try:
            yield changed
        finally:
            for module, before in zip(modules, attributes, strict=True):
                changed.extend(f"{names[id(module)]}.{name}" for name in _restore(module, before))
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
            if type(now.get(name)) in _PLAIN:
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

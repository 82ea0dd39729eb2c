"""The program to capture: a step function, and the modules and optimizers whose state it changes."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from olla.errors import CaptureError, ExecutionError
from olla.torch_private import ProcessGroup, buffers_of, hooks_of, is_distributed, members_of

__all__ = ["Program", "require_process_group"]

_WRAPPERS = {
    "OptimizedModule": "it was compiled by torch.compile: pass the module you gave to torch.compile",
    "DataParallel": "pass its .module",
    "DistributedDataParallel": "pass its .module, and process_group= to average its gradients",
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


class _Members:
    """The modules, parameters, hooks and parameter groups that are there; asked in every step, so compared in C."""

    def __init__(self, modules: Sequence[nn.Module], optimizers: Sequence[Optimizer]) -> None:
        self._holders = [holder for module in modules for holder in members_of(module)]
        self._counted: list[Sized] = [*self._holders, *map(buffers_of, modules)]
        self._counted += [hooks for module in modules for hooks in hooks_of(module)]
        self._optimizers = optimizers
        self._sizes, self._held = [*map(len, self._counted)], self._now()

    def are_the_same(self) -> bool:
        """Whether none was added, removed or exchanged."""
        now = self._now()
        same = len(now) == len(self._held) and all(map(operator.is_, now, self._held))
        return same and [*map(len, self._counted)] == self._sizes

    def _now(self) -> list[Any]:
        groups = [group["params"] for optimizer in self._optimizers for group in optimizer.param_groups]
        return [*chain.from_iterable(map(dict.values, self._holders)), *chain.from_iterable(groups)]


@dataclass(frozen=True)
class Program:
    """What the user runs today: ``function`` changes the state of ``modules`` through ``optimizers``.

    Raises
    ------
    CaptureError
        If a module is compiled, wrapped or sharded, an optimizer holds parameters of none of the modules, or
        this process does not belong to ``process_group``.
    """

    function: Callable[..., Any]
    modules: Mapping[str, nn.Module]
    optimizers: tuple[Optimizer, ...] = ()
    inference: bool = False  # whether ``function`` disables gradients
    process_group: ProcessGroup | None = None  # with which it exchanges tensors
    container: Container = field(init=False)
    parameters: dict[str, Tensor] = field(init=False)  # tied ones once
    parts: tuple[nn.Module, ...] = field(init=False, repr=False)  # all modules and their submodules
    # Plain attributes that ``function`` itself changes, such as counters: (id of a module, name).
    own_attributes: set[tuple[int, str]] = field(init=False, repr=False, default_factory=set)

    def __post_init__(self) -> None:
        if self.process_group is not None:
            require_process_group(self.process_group)
        for module in self.modules.values():
            _require_plain(module)
        container = Container(self.modules)
        object.__setattr__(self, "container", container)
        object.__setattr__(self, "parameters", dict(container.named_parameters()))
        object.__setattr__(self, "_places", _buffer_places(container))
        object.__setattr__(self, "parts", tuple(container.modules()))
        _require_own_parameters(self)
        object.__setattr__(self, "_members", _Members(self.parts, self.optimizers))

    _places: dict[str, tuple[dict[str, Any], str]] = field(init=False, repr=False)
    _members: _Members = field(init=False, repr=False)

    @property
    def state(self) -> dict[str, Tensor]:
        """The live parameters, then the live buffers (a model may replace its buffers at any time)."""
        return {**self.parameters, **self.buffers}

    @property
    def buffers(self) -> dict[str, Tensor]:
        """The live buffers."""
        return {name: owner[key] for name, (owner, key) in self._places.items()}

    def set_buffer(self, name: str, value: Tensor) -> None:
        """Make ``value`` the buffer of that name."""
        owner, key = self._places[name]
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
        if self._members.are_the_same():
            return
        now, old = dict(self.container.named_parameters()), self.parameters
        changed = [name for name in now.keys() | old.keys() if now.get(name) is not old.get(name)]
        what = f"parameter {self.display_name(min(changed))!r}" if changed else "a module, a hook or a parameter group"
        raise ExecutionError(
            f"the model was edited after planning ({what} was added, removed or exchanged); "
            "call olla.optimize again on the model as it is now"
        )


def _buffer_places(container: nn.Module) -> dict[str, tuple[dict[str, Any], str]]:
    """Where each buffer is kept, tied ones once: a dictionary of its module and a key."""
    places: dict[str, tuple[dict[str, Any], str]] = {}
    for name, _ in container.named_buffers():
        module, _, key = name.rpartition(".")
        places[name] = (buffers_of(container.get_submodule(module)), key)
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

    for name, tensor in module.named_parameters():
        if is_distributed(tensor):
            raise CaptureError(
                f"parameter {name!r} is a DTensor, of which each process has a part only (fully_shard, tensor "
                "parallelism): its collectives cannot be planned. Pass the model before sharding, with process_group= "
                "to average its gradients"
            )


def require_process_group(group: object) -> None:
    """Raise :class:`CaptureError` unless ``group`` is one that this process belongs to."""
    if not isinstance(group, ProcessGroup):
        raise CaptureError(
            f"the process group is {group!r}: call torch.distributed.init_process_group on every rank and pass "
            "torch.distributed.group.WORLD, or what new_group returns to its members"
        )


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

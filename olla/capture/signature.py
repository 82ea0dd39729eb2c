"""What a capture depends on: calls of equal signature share a plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from olla.capture.program import Program
from olla.capture.updates import is_watched
from olla.errors import CaptureError
from olla.torch_private import TreeSpec, flatten, guards_of

__all__ = ["PLAIN", "Signature"]

PLAIN = (bool, int, float, str, type(None))


@dataclass(frozen=True)
class Signature:
    """All that a capture depends on beside the values of tensors. Equal signatures share a plan."""

    structure: TreeSpec
    leaves: tuple[Any, ...]
    state: State
    modules: Settings
    autocast: tuple[Any, ...]
    watched: tuple[bool, ...]  # which optimizers have hooks

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

    @classmethod
    def of(
        cls, program: Program, args: tuple[Any, ...], kwargs: dict[str, Any], like: Signature | None = None
    ) -> Signature:
        """The signature of a call of ``program``, found faster if it is ``like`` another one.

        Raises
        ------
        CaptureError
            If an argument holds something that is neither a tensor nor a plain hashable value.
        """
        leaves, structure = flatten((args, kwargs))
        tensors = [*program.state.values()]
        return cls(
            structure=structure,
            leaves=tuple(_describe_leaf(leaf) for leaf in leaves),
            state=like.state if like and like.state.still_describes(tensors) else State(tensors),
            modules=like.modules if like and like.modules.still_hold(program) else Settings(program),
            autocast=_autocast(),
            watched=tuple(is_watched(optimizer) for optimizer in program.optimizers),
        )


class State:
    """Shapes, strides, dtypes, devices and requires_grad of parameters and buffers."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._described = tuple(map(_describe_tensor, tensors))
        # Asked in every step, so compared in C++. It may say no where nothing is different, as in another mode.
        self._are_alike = guards_of(tensors)

    def still_describes(self, tensors: Sequence[Tensor]) -> bool:
        """Whether they are the same for these, as far as can be seen at a glance."""
        return self._are_alike(*tensors)

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, State) and self._described == other._described)


class Settings:
    """The plain attributes of all modules: ``training``, a dropout's ``p``, a convolution's stride, ...

    Those that the step itself changes are left out: a planned step does not run that code.
    """

    def __init__(self, program: Program) -> None:
        own = program.own_attributes
        self._own = len(own)
        # All attributes, and as they were. Asked in every step, so compared in C, which sees at once what is the same.
        self._attributes = [vars(module) for module in program.parts]
        self._seen = [*map(dict, self._attributes)]
        self._values = tuple(
            value
            for module in program.parts
            for name, value in vars(module).items()
            if (type(value) in PLAIN or _is_plain_tuple(value)) and (id(module), name) not in own
        )

    def still_hold(self, program: Program) -> bool:
        """Whether they are the same now, as far as can be seen at a glance."""
        try:
            return self._own == len(program.own_attributes) and self._attributes == self._seen
        except Exception:  # whatever a user's attribute says when it is compared, such as a tensor
            return False

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Settings) and self._values == other._values)


def _is_plain_tuple(value: Any) -> bool:
    return type(value) is tuple and all(type(item) in PLAIN for item in value)


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

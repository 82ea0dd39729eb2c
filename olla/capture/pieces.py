"""Part of what an optimizer has, and a step of it for that part: a few parameters, or a few rows of a large one.

Where an optimizer treats elements alike, a large parameter is updated a few rows after the others. So what an update
holds besides is as large as a few rows: of an AdamW, for the square root, not as large as an embedding. Whether an
optimizer does treat elements alike is tried out (``trial.py``).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

__all__ = ["Narrowed", "group_of", "piece_bytes", "pieces_of", "update_in_pieces"]

_MOST = 8 * 2**20  # bytes of a parameter that are updated at once,
_MOST_ON_GPUS = 64 * 2**20  # where it is calls that take time


class Narrowed:
    """Inside of it, ``optimizer`` believes that ``parameters`` are all it has, in the group of ``one`` of its own."""

    def __init__(self, optimizer: Optimizer, parameters: Sequence[Tensor], one: Tensor | None = None) -> None:
        self._optimizer, self._only = optimizer, parameters
        self._groups = optimizer.param_groups
        self._group = group_of(optimizer, parameters[0] if one is None else one)
        self._everything = self._group["params"]

    def __enter__(self) -> None:
        try:
            self._optimizer.param_groups = [self._group]
            self._group["params"] = list(self._only)
        except BaseException:  # a signal, perhaps
            self.__exit__()
            raise

    def __exit__(self, *error: object) -> None:
        self._group["params"] = self._everything
        self._optimizer.param_groups = self._groups


def group_of(optimizer: Optimizer, parameter: Tensor) -> dict[str, Any]:
    """The group of ``optimizer`` that holds ``parameter``."""
    first, *others = optimizer.param_groups
    if not others:  # what is asked for each update is not looked for
        return first
    return next(group for group in optimizer.param_groups if any(p is parameter for p in group["params"]))


def pieces_of(parameter: Tensor) -> list[slice]:
    """The rows, of the first dimension, that are updated together; none if all of them are."""
    most = _MOST_ON_GPUS if parameter.is_cuda else _MOST
    if parameter.nbytes <= most or type(parameter) not in (Parameter, Tensor) or parameter.layout != torch.strided:
        return []
    count, rows = -(-parameter.nbytes // most), len(parameter)
    step = -(-rows // count)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def piece_bytes(parameter: Tensor) -> int:
    """How much of it is updated at once."""
    pieces = pieces_of(parameter)
    return parameter.nbytes // len(parameter) * (pieces[0].stop - pieces[0].start) if pieces else parameter.nbytes


def update_in_pieces(
    optimizer: Optimizer,
    step: Callable[[Optimizer], Any],
    parameter: Tensor,
    gradient: Tensor,
    pieces: Sequence[slice],
) -> None:
    """What ``step(optimizer)`` does with a parameter, some rows after the others.

    Each piece is a parameter, for a moment, whose state is a part of what was there before. What is not of the
    parameter's shape, such as a count of steps, is a copy for all pieces but the last.
    """
    before: dict[Any, Any] = optimizer.state.get(parameter, {})
    after: dict[Any, Any] = {name: value for name, value in before.items() if _is_divided(value, parameter)}
    for rows in pieces:
        piece = Parameter(parameter.detach()[rows], parameter.requires_grad)
        piece.grad = gradient[rows]
        given = {name: _part(value, parameter, rows, own=rows is not pieces[-1]) for name, value in before.items()}
        try:
            if given:
                optimizer.state[piece] = dict(given)
            with Narrowed(optimizer, (piece,), parameter):
                step(optimizer)
        finally:
            found: dict[Any, Any] = optimizer.state.pop(piece, {})
        for name, value in found.items():
            if not _is_divided(value, piece):
                after[name] = value
                continue
            if name not in after:
                after[name] = torch.empty_like(parameter, dtype=value.dtype)
            if value is not given.get(name):  # new, or instead of what was there
                after[name][rows] = value
    if after:
        optimizer.state[parameter].update(after)


def _part(value: Any, parameter: Tensor, rows: slice, *, own: bool) -> Any:
    if _is_divided(value, parameter):
        return value[rows]
    if not own:
        return value
    return value.clone() if isinstance(value, Tensor) else copy.copy(value)


def _is_divided(value: Any, parameter: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == parameter.shape

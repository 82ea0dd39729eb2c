"""The processes that run a step together, and what they must agree on so that none waits for another forever."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from olla.capture.average import unowned
from olla.errors import ExecutionError, OllaError
from olla.torch_private import ProcessGroup, collective_device

__all__ = ["ALONE", "Ranks"]

T = TypeVar("T")

_PACK_BYTES = 1 << 20  # of tensors that are copied together


class Ranks:
    """The processes of a group, each with a batch of its own; without a group, this process alone.

    All of them call the same methods in the same order. What fails on one rank raises an exception on every rank.
    """

    def __init__(self, group: ProcessGroup | None = None) -> None:
        self._group = group
        self.is_alone = group is None or group.size() == 1

    def together(self, function: Callable[[], T]) -> T:
        """What ``function`` returns here, if it succeeds on all ranks.

        Raises
        ------
        ExecutionError
            If it failed on another rank; where it failed, its own exception is raised.
        """
        if self.is_alone:
            return function()
        try:
            value, error = function(), None
        except Exception as failure:  # whatever it is, the others must hear of it
            error = failure
        for rank, message in enumerate(self._gathered(_text(error) if error else None)):
            if error is not None:
                raise error
            if message is not None:
                raise ExecutionError(f"rank {rank} cannot go on, so no rank does: {message}")
        return value

    def from_first(self, function: Callable[[], T]) -> T:
        """What ``function`` returns on rank 0, where alone it is called; its exception is raised on all ranks."""
        if self.is_alone:
            return function()
        assert self._group is not None
        sent: list[tuple[T | None, OllaError | None]] = [(None, None)]
        failure: Exception | None = None
        if self._group.rank() == 0:
            try:
                sent = [(function(), None)]
            except OllaError as error:
                sent, failure = [(None, error)], error
            except Exception as error:
                sent, failure = [(None, ExecutionError(f"rank 0 cannot go on, so no rank does: {_text(error)}"))], error
        dist.broadcast_object_list(sent, group=self._group, group_src=0)
        value, received = sent[0]
        if failure is not None or received is not None:
            raise failure or received  # type: ignore[misc]
        return value  # type: ignore[return-value]

    def exchange(self, *numbers: int) -> list[list[int]]:
        """The numbers of every rank."""
        if self.is_alone:
            return [[*numbers]]
        assert self._group is not None
        mine = torch.tensor(numbers, device=collective_device(self._group))
        found = [torch.empty_like(mine) for _ in range(self._group.size())]
        dist.all_gather([*map(unowned, found)], unowned(mine), group=self._group)
        return [tensor.tolist() for tensor in found]

    def largest(self, numbers: Sequence[float]) -> list[float]:
        """For each of as many numbers on all ranks, the largest. Integers are exact up to 2**53."""
        if self.is_alone:
            return [*numbers]
        assert self._group is not None
        found = torch.tensor(numbers, dtype=torch.float64, device=collective_device(self._group))
        dist.all_reduce(found, dist.ReduceOp.MAX, group=self._group)
        return found.tolist()

    def require_same(self, lines: Sequence[str]) -> None:
        """Raise :class:`ExecutionError`, with the first line that differs, unless the lines of all ranks are equal."""
        if self.is_alone:
            return
        first, *others = self._gathered([*lines])
        for rank, theirs in enumerate(others, start=1):
            if theirs != first:
                at = next((i for i, (a, b) in enumerate(zip(first, theirs, strict=False)) if a != b), None)
                what = (
                    f"{theirs[at]!r} where rank 0 has {first[at]!r}"
                    if at is not None
                    else f"{len(theirs):,} tensors and operators where rank 0 has {len(first):,}"
                )
                raise ExecutionError(
                    f"rank {rank} has another step than rank 0: {what}. All ranks must run the same model on inputs "
                    "of the same shapes: drop the last, incomplete batch, or pad it"
                )

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Make these tensors on all ranks those of rank 0; small ones travel together."""
        if self.is_alone:
            return
        for pack in _packs(tensor.detach() for tensor in tensors if tensor.numel()):
            flat = torch.cat([tensor.reshape(-1) for tensor in pack])
            dist.broadcast(unowned(flat), group=self._group, group_src=0)
            for tensor, part in zip(pack, flat.split([tensor.numel() for tensor in pack]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def _gathered(self, value: T) -> list[T]:
        assert self._group is not None
        found: list[T] = [value] * self._group.size()
        dist.all_gather_object(found, value, group=self._group)
        return found


ALONE = Ranks()


def _packs(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors of one dtype, on one device, as many as are small together."""
    alike: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        pack = alike.setdefault((tensor.dtype, tensor.device), [])
        if pack and sum(other.nbytes for other in pack) + tensor.nbytes > _PACK_BYTES:
            yield [*pack]
            pack.clear()
        pack.append(tensor)
    yield from alike.values()


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"

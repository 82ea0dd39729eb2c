"""One step as the allocator saw it: when each block was allocated and released, and inside which op."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import accumulate

__all__ = ["Allocation", "Recording"]


@dataclass(frozen=True, slots=True)
class Allocation:
    """One block of memory. Times are positions in the sequence of all allocations and releases."""

    position: int  # in the order of ops: the op that allocated it,
    last_position: int  # and the op that ran last when it was released
    size: int  # bytes
    start: int
    end: int | None  # half-open; None: it outlived the step
    address: int


@dataclass(frozen=True, slots=True)
class Recording:
    """Every allocation that one run of a step made on its thread."""

    allocations: tuple[Allocation, ...]
    storages: Mapping[int, tuple[int, int]]  # allocation -> position in the order, and the storage that it holds
    peaks: Mapping[int, int]  # position in the order -> most bytes alive while that op ran

    @property
    def peak_bytes(self) -> int:
        """The most bytes alive at once, of what the run has allocated."""
        return max(self.peaks.values(), default=0)

    @classmethod
    def of(cls, events: Iterable[tuple[int, int, int, int]], seen: Mapping[tuple[int, int], int]) -> Recording:
        """From events (id, position, size or -1, address), and from what each op created.

        ``seen`` holds the address of each storage, by position of the op in the order, and storage.
        """
        found: list[Allocation] = []
        changes, positions = [], []
        for time, (index, position, size, address) in enumerate(events):
            if size >= 0:
                found.append(Allocation(position, position, size, time, None, address))
            else:
                found[index] = replace(found[index], last_position=max(position, found[index].position), end=time)
            changes.append(size if size >= 0 else -found[index].size)
            positions.append(position)
        peaks: dict[int, int] = {}
        for position, alive in zip(positions, accumulate(changes), strict=True):
            peaks[position] = max(alive, peaks.get(position, 0))
        allocations = tuple(found)
        latest = {(a.position, a.address): index for index, a in enumerate(allocations)}
        lives = {(position, address): (position, storage) for (position, storage), address in seen.items()}
        storages = {latest[key]: life for key, life in lives.items() if key in latest}
        return cls(allocations, storages, peaks)

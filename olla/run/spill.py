"""Where spilled bytes go, and what takes them there and back.

On CPU they go to a mapped file, on CUDA to pinned memory of the host. A storage that leaves is resized to nothing,
so its bytes are given back to the allocator while every tensor on it stays; when it comes back it is allocated
again, and all these tensors, views and results of in-place operators alike, are on its new bytes.
"""

from __future__ import annotations

import mmap
import os
import shutil
import tempfile
import time
from bisect import bisect_left
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import torch
from torch import Tensor

from olla.capture.lower import tensors_of
from olla.errors import SpillError
from olla.fit.spill import Bandwidth
from olla.graph.graph import Graph
from olla.graph.plan import Spill
from olla.place.place import ALIGNMENT, pack

__all__ = ["HOST", "SpillDir", "SpillSpace", "Spiller", "Transfer", "measured_bandwidth", "require_spill_dir"]

SpillDir = str | os.PathLike[str]

HOST = "host"  # instead of a directory: pinned memory, for steps on CUDA
_PROBE = 2**25  # bytes that are written and read to measure the bandwidth
_ROUNDS = 3  # of which the fastest counts: in the first one, pages of the file are touched first
_PACKING = 1.0  # seconds at most, to place what is away in the file


def require_spill_dir(spill_dir: SpillDir, device: torch.device) -> None:
    """See to it that steps on ``device`` can spill to ``spill_dir``.

    Raises
    ------
    SpillError
        If it is not a directory, or not writable, or not for this device.
    """
    if not isinstance(spill_dir, (str, os.PathLike)):
        raise SpillError(f"spill_dir is {spill_dir!r}: give the path of a directory")
    if device.type == "cuda" and spill_dir != HOST:
        raise SpillError(f"on CUDA, storages are spilled to pinned memory: pass spill_dir={HOST!r}, not {spill_dir!r}")
    if device.type != "cuda" and spill_dir == HOST:
        raise SpillError(f"spill_dir={HOST!r} is for CUDA: on {device.type}, name a directory to spill to")
    if spill_dir == HOST:
        return
    if not hasattr(os, "posix_fallocate"):
        raise SpillError("files to spill to cannot be reserved on this platform: plan without spill_dir")
    os.close(_nameless_file(spill_dir))


def measured_bandwidth(spill_dir: SpillDir) -> Bandwidth:
    """How fast bytes go to ``spill_dir`` and back, by writing and reading 32 MiB as a spill does; measured once.

    As long as the page cache has room for a file, that is what is measured, and what a spill meets.

    Raises
    ------
    SpillError
        If there is no place for these bytes, or no GPU that they could come from.
    """
    if spill_dir == HOST and not torch.cuda.is_available():
        raise SpillError("how fast bytes move between a GPU and the host can only be measured where there is one")
    return _bandwidth(HOST if spill_dir == HOST else Path(spill_dir).resolve())


@cache
def _bandwidth(spill_dir: str | Path) -> Bandwidth:
    space, on_cuda = SpillSpace(spill_dir).reserve(_PROBE), spill_dir == HOST
    content = torch.ones(_PROBE, dtype=torch.uint8, device="cuda" if on_cuda else "cpu")

    def seconds(to: Tensor, source: Tensor) -> float:
        started = time.perf_counter()
        to.copy_(source, non_blocking=True)
        if on_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - started

    rounds = [(seconds(space, content), seconds(content, space)) for _ in range(_ROUNDS)]
    write, read = (_PROBE / min(times) for times in zip(*rounds, strict=True))
    return Bandwidth(write, read)


class SpillSpace:
    """Memory of the host for what is away, for steps that run one after the other.

    It grows to what the largest of them needs. A file has no name, so that nothing is left behind, whatever happens,
    and its bytes are reserved, so that a full disk is noticed now. A forked child gets a file of its own.
    """

    def __init__(self, spill_dir: SpillDir | None) -> None:
        self._spill_dir = spill_dir
        self._owner = 0  # the process that the memory belongs to
        self._memory: Tensor | None = None

    def reserve(self, size: int) -> Tensor:
        """At least ``size`` bytes.

        Raises
        ------
        SpillError
            If there are not so many.
        """
        if self._owner != os.getpid() or self._memory is None or len(self._memory) < size:
            self.close()
            self._memory, self._owner = self._allocated(size), os.getpid()
        return self._memory

    def close(self) -> None:
        """Give the bytes back, to the disk or to the host; they can be reserved again."""
        self._memory = None

    def _allocated(self, size: int) -> Tensor:
        if not size:
            return torch.empty(0, dtype=torch.uint8, device="cpu")
        assert self._spill_dir is not None, "nothing is spilled if nobody said where to"
        if self._spill_dir == HOST:
            try:
                return torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=True)
            except RuntimeError as error:
                raise SpillError(f"spilling needs {size:,} bytes of pinned memory, and gets none: {error}") from error
        file = _nameless_file(self._spill_dir)
        try:
            os.posix_fallocate(file, 0, size)
            return torch.frombuffer(mmap.mmap(file, size), dtype=torch.uint8)
        except OSError as error:
            free = shutil.disk_usage(self._spill_dir).free
            raise SpillError(
                f"spilling needs {size:,} bytes in {os.fspath(self._spill_dir)}, where {free:,} are free: "
                f"{error.strerror}; make room, name another directory, or raise the budget"
            ) from error
        finally:
            os.close(file)  # the mapping keeps what it needs


def _nameless_file(directory: SpillDir) -> int:
    """A descriptor of a file that is gone when nobody has it open any more."""
    if not Path(directory).is_dir():
        raise SpillError(f"spill_dir is {os.fspath(directory)!r}, which is not a directory: name one that exists")
    try:
        with tempfile.TemporaryFile(dir=directory) as file:
            return os.dup(file.fileno())
    except OSError as error:
        raise SpillError(f"no file can be written in spill_dir {os.fspath(directory)!r}: {error.strerror}") from error


class Transfer(NamedTuple):
    """When a spilled storage moves: positions in the order."""

    storage: int
    stored: int  # after this op, its last user before it leaves, the copy out may begin
    dropped: int  # before this one, its bytes are given back
    fetched: int  # before this one, it gets new bytes, and the copy back may begin
    used: int  # this one needs it; the number of all positions: the caller does
    size: int  # bytes
    offset: int = 0  # of these, where they are meanwhile


class Spiller:
    """Executes the spills of one plan, told by the emitted code when; entered around each run.

    ``addresses`` says where the latest run has put what came back, by position and storage.
    """

    def __init__(
        self, graph: Graph, order: Sequence[int], spills: Sequence[Spill], space: SpillSpace, device: torch.device
    ) -> None:
        found = _transfers(graph, order, spills)
        placed = pack([(t.stored, t.fetched, t.size) for t in found], alignment=ALIGNMENT, time_limit=_PACKING)
        self.transfers = tuple(t._replace(offset=at) for t, at in zip(found, placed.offsets, strict=True))
        self.addresses: dict[tuple[int, int], int] = {}
        self.spilled_bytes = 0  # that the latest run has sent away
        self._space, self._space_bytes = space, placed.arena_bytes
        self._copies = _StreamCopies(device) if spills and device.type == "cuda" else _Copies()
        self._memory: Tensor | None = None
        self._away: dict[int, tuple[torch.UntypedStorage, int]] = {}

    @property
    def seconds(self) -> float:
        """That the copies of the latest run took, whether or not others waited for them."""
        return self._copies.seconds

    def reserve(self) -> None:
        """See to it that there is room for all that will be away.

        Raises
        ------
        SpillError
            If there is not.
        """
        self._space.reserve(self._space_bytes)

    def __enter__(self) -> None:
        self._memory = self._space.reserve(self._space_bytes)
        self.addresses.clear()
        self._away.clear()
        self.spilled_bytes = 0
        self._copies.begin()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._copies.end()
        self._away.clear()
        self._memory = None  # it is the space that decides how long there is any

    def store(self, number: int, value: object, index: int) -> None:
        """Transfer ``number`` may begin; its storage is that of the tensor at ``index`` of ``value``.

        What PyTorch cannot resize, memory that is not its own, or what is larger than planned, stays where it is.
        """
        storage, transfer = tensors_of(value)[index].untyped_storage(), self.transfers[number]
        size = storage.nbytes()
        if storage.resizable() and size <= transfer.size:
            self._copies.copy(transfer.storage, self._region(number, size), _bytes_of(storage))
            self._away[number] = storage, size
            self.spilled_bytes += size

    def drop(self, number: int) -> None:
        """Give the bytes back."""
        if number in self._away:
            self._copies.wait(self.transfers[number].storage)
            self._away[number][0].resize_(0)

    def fetch(self, number: int) -> None:
        """Allocate the bytes again; the copy back may begin."""
        if number in self._away:
            storage, size = self._away.pop(number)
            storage.resize_(size)
            transfer = self.transfers[number]
            self._copies.copy(transfer.storage, _bytes_of(storage), self._region(number, size))
            self.addresses[transfer.fetched, transfer.storage] = storage.data_ptr()

    def ready(self, number: int) -> None:
        """What comes next uses the storage."""
        self._copies.wait(self.transfers[number].storage)

    def _region(self, number: int, size: int) -> Tensor:
        assert self._memory is not None, "a run has begun"
        offset = self.transfers[number].offset
        return self._memory[offset : offset + size]


def _transfers(graph: Graph, order: Sequence[int], spills: Sequence[Spill]) -> list[Transfer]:
    """With offsets that are not known yet."""
    users: dict[int, list[int]] = {spill.storage: [] for spill in spills}
    for step, op in enumerate(order):
        for storage in users.keys() & {*graph.ops[op].touches}:
            users[storage].append(step)
    found = []
    for storage, start, end in spills:
        steps = [*users[storage], len(order)]
        before, after = steps[bisect_left(steps, start) - 1], steps[bisect_left(steps, end)]
        found.append(Transfer(storage, before, start, end, after, graph.storages[storage].size))
    return found


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    """All bytes of a storage, as a tensor on it."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


class _Copies:
    """Copies that are done when they have begun."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def begin(self) -> None:
        """A run begins."""
        self.seconds = 0.0

    def copy(self, storage: int, to: Tensor, source: Tensor) -> None:
        """Copy the bytes of ``storage``, there or back."""
        started = time.perf_counter()
        to.copy_(source)
        self.seconds += time.perf_counter() - started

    def wait(self, storage: int) -> None:
        """The latest copy of ``storage`` must be done."""

    def end(self) -> None:
        """A run ends: no copy may be left."""


class _StreamCopies:
    """Copies on a stream of their own, one after the other, beside the kernels of the stream that is current."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._done: dict[int, torch.cuda.Event] = {}
        self._times: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @property
    def seconds(self) -> float:
        self._stream.synchronize()
        return float(sum(started.elapsed_time(done) for started, done in self._times) / 1000)

    def begin(self) -> None:
        self._times.clear()

    def copy(self, storage: int, to: Tensor, source: Tensor) -> None:
        # After the kernels so far: they made what is to be copied, or used the bytes that it is copied to.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        started, done = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.stream(self._stream):
            started.record()
            to.copy_(source, non_blocking=True)
            done.record()
        self._done[storage] = done
        self._times.append((started, done))

    def wait(self, storage: int) -> None:
        if storage in self._done:
            torch.cuda.current_stream(self._device).wait_event(self._done[storage])

    def end(self) -> None:
        torch.cuda.current_stream(self._device).wait_stream(self._stream)

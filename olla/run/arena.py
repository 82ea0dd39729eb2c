"""A step's allocations, recorded once and then answered at planned addresses in one block of memory.

The decisions are made in C++ (``arena.h``), inside PyTorch's allocator; this file is its Python side.
Safety does not rest on the plan: an address is handed out only if nothing alive is there, and what
does not go as recorded is answered by PyTorch's own allocator and counted.
"""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields
from functools import partial
from types import TracebackType

import numpy as np
import torch

from olla.errors import ExecutionError
from olla.run import native

__all__ = ["Arena", "Clock", "Counts", "Recorder", "Replay"]


@dataclass(frozen=True, slots=True)
class Counts:
    """How the allocations of one step were answered."""

    hits: int = 0  # at the planned address
    outside: int = 0  # outside of the arena, as planned: they outlive the step
    sizes: int = 0  # missed: not an allocation that was recorded
    conflicts: int = 0  # missed: something alive was at the planned address
    escapes: int = 0  # blocks of the arena still alive when the step ended
    foreign: int = 0  # made by other threads meanwhile, and left to PyTorch's allocator

    @property
    def missed(self) -> int:
        """Allocations that were planned to be in the arena and are not."""
        return self.sizes + self.conflicts


class Clock:
    """Where a step is: the position of the op that runs, told by the emitted code, read by the allocator."""

    def __init__(self) -> None:
        self._memory = (ctypes.c_int64 * 1)(-1)
        # A call of this costs some 50 ns.
        self.tell: Callable[[int], None] = partial(memoryview(self._memory).cast("B").cast("q").__setitem__, 0)
        self.pointer = ctypes.cast(self._memory, ctypes.POINTER(ctypes.c_int64))


class _Open(threading.local):
    """The sessions of a thread that have not ended.

    C++ reads what they hold: so it is there, even if a signal comes when one should end. It ends when it begins again,
    or with the one that it is in.
    """

    def __init__(self) -> None:
        self.sessions: list[_Session] = []


_OPEN = _Open()


class _Session:
    """While it is entered, the allocations of this thread are recorded or replayed."""

    def __init__(self, library: ctypes.PyDLL, clock: Clock) -> None:
        self._library = library
        self._clock = clock
        self._handle: int | None = None
        self.counts = Counts()

    def _begin(self) -> int:
        raise NotImplementedError

    def _ended(self, events: Sequence[native.Event]) -> None:
        raise NotImplementedError

    def __enter__(self) -> None:
        if self._handle is not None:  # a signal, perhaps, when the last one should have ended
            self._end()
        self._clock.tell(-1)
        _OPEN.sessions.append(self)
        outer = self._library.olla_innermost()
        try:
            self._handle = self._begin()
        except BaseException:  # a signal, perhaps, when the session had begun, and before its handle was here
            self._handle = self._library.olla_innermost()
            if self._handle != outer:
                self._end()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self._end()
        except BaseException:
            if self._handle is not None:
                self._end()
            raise

    def _end(self) -> None:
        counts = native.Counts()
        number = self._library.olla_end(self._handle, ctypes.byref(counts))
        if number >= 0:
            events = (native.Event * number)()
            self._library.olla_drop_session(self._handle, events)
            self.counts = Counts(*(getattr(counts, field.name) for field in fields(Counts)))
            self._ended(events)
        self._handle = None
        if self in _OPEN.sessions:
            _OPEN.sessions.remove(self)


class Recorder(_Session):
    """Records one step. Its allocations are answered as always.

    A step that runs in ``parts`` enters it once for each, on any thread. In between, what is allocated is not the
    step's; what the step has allocated may be released. An exception in a part ends the recording.
    """

    def __init__(self, library: ctypes.PyDLL, clock: Clock, parts: int = 1) -> None:
        super().__init__(library, clock)
        self.events: list[tuple[int, int, int, int]] = []
        self._parts = parts
        self._paused: weakref.finalize[[int], Recorder] | None = None

    def __enter__(self) -> None:
        if self._paused is None:
            super().__enter__()
            return
        self._paused.detach()
        self._clock.tell(-1)
        _OPEN.sessions.append(self)
        self._library.olla_resume(self._handle)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._parts -= 1
        if self._parts and kind is None:
            assert self._handle is not None
            self._library.olla_pause(self._handle)
            _OPEN.sessions.remove(self)
            self._paused = weakref.finalize(self, self._library.olla_abandon, self._handle)
        else:
            super().__exit__(kind, error, traceback)

    def abandon(self) -> None:
        """Forget what was recorded, if the step has begun and not ended."""
        if self._paused is not None:
            self._paused()

    def _begin(self) -> int:
        return int(self._library.olla_begin_recording(self._clock.pointer))

    def _ended(self, events: Sequence[native.Event]) -> None:
        self.events = [(event.id, event.position, event.size, event.address) for event in events]


class Arena:
    """One block of memory, for steps that run one after the other.

    It grows to what the largest of them needs. Blocks that are alive in it keep the memory that they
    are in, whatever happens to the arena.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.alignment = 512 if device.type == "cuda" else 64  # bytes; that of PyTorch's allocators
        self.arena_bytes = 0
        self._handle: int | None = None
        self._drop: weakref.finalize[[int], Arena] | None = None

    @property
    def library(self) -> ctypes.PyDLL:
        """The C++ side; see :func:`olla.run.native.load`."""
        return native.load(self.device.type)

    @property
    def handle(self) -> int:
        """What the C++ side knows it by."""
        assert self._handle, "memory was reserved"
        return self._handle

    @property
    def base(self) -> int:
        """The address of its first byte."""
        return int(self.library.olla_arena_base(self.handle))

    def reserve(self, arena_bytes: int) -> None:
        """See to it that there is so much memory; on CUDA in whole units, as the caching allocator counts it.

        Raises
        ------
        ExecutionError
            If there is not.
        """
        if self._handle and arena_bytes <= self.arena_bytes:
            return
        if self.device.type == "cuda":
            arena_bytes = -(-arena_bytes // self.alignment) * self.alignment
        self.close()
        with torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext():
            self._handle = self.library.olla_new_arena(arena_bytes)
        if not self._handle:
            raise ExecutionError(f"there is no memory for an arena of {arena_bytes:,} bytes")
        self.arena_bytes = arena_bytes
        self._drop = weakref.finalize(self, self.library.olla_drop_arena, self._handle)

    def close(self) -> None:
        """Give the memory back; it can be reserved again."""
        if self._drop:
            self._drop()
        self._handle, self._drop, self.arena_bytes = None, None, 0


class Replay(_Session):
    """Answers the allocations of one step in an arena: which allocation of which op is where.

    Parameters
    ----------
    arena, clock
        Where, and how far the code that runs has got. ``arena_bytes`` are reserved when it is entered.
    positions, sizes, offsets
        The allocations of the step in order of time: the position of their op in the order of ops,
        bytes, and the offset in the arena; -1 stands for outside.
    """

    def __init__(
        self,
        arena: Arena,
        clock: Clock,
        *,
        positions: Sequence[int],
        sizes: Sequence[int],
        offsets: Sequence[int],
        arena_bytes: int,
    ) -> None:
        super().__init__(arena.library, clock)
        self.arena = arena
        self.arena_bytes = arena_bytes
        order = np.argsort(positions, kind="stable")
        count = 1 + max(positions, default=-1)
        start = np.searchsorted(np.array(positions, np.int64)[order], np.arange(count + 1))
        # Kept here, because the C++ side reads them.
        self._arrays = [np.array(a, np.int64) for a in (start, np.array(sizes)[order], np.array(offsets)[order])]
        pointers = [array.ctypes.data_as(ctypes.POINTER(ctypes.c_int64)) for array in self._arrays]
        self._slots = native.Slots(count, *pointers)

    def _begin(self) -> int:
        self.arena.reserve(self.arena_bytes)
        slots = ctypes.byref(self._slots)
        return int(self._library.olla_begin_replay(self._clock.pointer, self.arena.handle, slots))

    def _ended(self, events: Sequence[native.Event]) -> None:
        """A replay records nothing."""

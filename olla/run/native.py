"""The C++ half of the arena, loaded with ctypes."""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from functools import cache
from pathlib import Path

from olla.compiling import Library, NativeUnavailableError

__all__ = ["Counts", "Event", "Slots", "arena", "cuda_headers", "load"]

_HERE = Path(__file__).parent

_integers = ctypes.POINTER(ctypes.c_int64)


class Slots(ctypes.Structure):
    """What a replayed step expects; as in arena.h."""

    _fields_ = [("positions", ctypes.c_int64), ("start", _integers), ("sizes", _integers), ("offsets", _integers)]


class Counts(ctypes.Structure):
    """How the allocations of one step were answered; as in arena.h."""

    _fields_ = [(n, ctypes.c_int64) for n in ("hits", "outside", "sizes", "conflicts", "escapes", "foreign")]


class Event(ctypes.Structure):
    """One recorded allocation or release; as in arena.h."""

    _fields_ = [(name, ctypes.c_int64) for name in ("id", "position", "size", "address")]


@cache
def load(device: str) -> ctypes.PyDLL:
    """The library for ``"cpu"`` or ``"cuda"``, installed in front of PyTorch's allocator.

    Raises
    ------
    NativeUnavailableError
        If there is no compiler, it fails, or the platform or the allocator in place is not supported.
    """
    if sys.platform != "linux":
        raise NativeUnavailableError(f"arenas are not supported on {sys.platform}, only on Linux")
    if device not in ("cpu", "cuda"):
        raise NativeUnavailableError(f"arenas are not supported on {device}, only on cpu and cuda")
    # PyDLL: calls are shorter than giving up the interpreter lock and taking it again.
    library = ctypes.PyDLL(str(arena(device).compiled()))
    library.olla_new_arena.argtypes, library.olla_new_arena.restype = [ctypes.c_size_t], ctypes.c_void_p
    library.olla_drop_arena.argtypes, library.olla_drop_arena.restype = [ctypes.c_void_p], None
    library.olla_arena_base.argtypes, library.olla_arena_base.restype = [ctypes.c_void_p], ctypes.c_size_t
    library.olla_begin_recording.argtypes, library.olla_begin_recording.restype = [_integers], ctypes.c_void_p
    library.olla_begin_replay.argtypes = [_integers, ctypes.c_void_p, ctypes.POINTER(Slots)]
    library.olla_begin_replay.restype = ctypes.c_void_p
    library.olla_innermost.argtypes, library.olla_innermost.restype = [], ctypes.c_void_p
    library.olla_end.argtypes, library.olla_end.restype = [ctypes.c_void_p, ctypes.POINTER(Counts)], ctypes.c_int64
    library.olla_drop_session.argtypes = [ctypes.c_void_p, ctypes.POINTER(Event)]
    library.olla_drop_session.restype = None
    library.olla_pause.argtypes, library.olla_pause.restype = [ctypes.c_void_p], None
    library.olla_resume.argtypes, library.olla_resume.restype = [ctypes.c_void_p], None
    library.olla_abandon.argtypes, library.olla_abandon.restype = [ctypes.c_void_p], None
    if not library.olla_install():
        raise NativeUnavailableError(f"another {device} allocator is installed that does not let itself be replaced")
    return library


def arena(device: str) -> Library:
    """The library for a device."""
    is_cuda = device == "cuda"
    return Library(
        _HERE / f"arena_{device}.cpp",
        own_headers=(_HERE / "arena.h",),
        headers=tuple(cuda_headers()) if is_cuda else (),
        links=("c10", "c10_cuda") if is_cuda else ("c10",),
    )


def cuda_headers() -> list[Path]:
    """Where the headers of CUDA are: they come with triton, which comes with the CUDA build of PyTorch."""
    found = importlib.util.find_spec("triton")
    folders = found.submodule_search_locations if found else None
    return [Path(folder) / "backends" / "nvidia" / "include" for folder in folders or ()]

"""The C++ half of the arena: compiled at first use, kept for the next, loaded with ctypes."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import logging
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import torch

from olla.errors import OllaError

__all__ = ["Counts", "Event", "NativeUnavailableError", "Slots", "command", "load"]

_HERE = Path(__file__).parent
_TORCH = Path(torch.__file__).parent
_FLAGS = ("-std=c++20", "-O2", "-shared", "-fPIC", "-Wall", "-Wextra", "-Wno-unknown-pragmas")
_SECONDS = 300  # a compiler that takes longer hangs

log = logging.getLogger(__name__)

_integers = ctypes.POINTER(ctypes.c_int64)


class NativeUnavailableError(OllaError):
    """Addresses cannot be executed here; the message says why."""


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
    library = ctypes.PyDLL(str(_compiled(device)))
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


def command(device: str, compiler: str, output: Path) -> list[str]:
    """The command that compiles the library for a device."""
    headers = [_TORCH / "include", *(cuda_headers() if device == "cuda" else ())]
    libraries = ["-lc10", *(["-lc10_cuda"] if device == "cuda" else ())]
    include = [argument for path in headers for argument in ("-isystem", str(path))]
    source = _HERE / f"arena_{device}.cpp"
    return [compiler, *_FLAGS, *include, str(source), "-o", str(output), f"-L{_TORCH / 'lib'}", *libraries]


def _compiled(device: str) -> Path:
    """The library as a file: from the cache, or compiled now."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if not compiler:
        raise NativeUnavailableError("no C++ compiler was found: install g++, or name one in the variable CXX")
    sources = [(_HERE / name).read_bytes() for name in ("arena.h", f"arena_{device}.cpp")]
    key = hashlib.sha256(b"\0".join([*sources, torch.__version__.encode(), compiler.encode(), *_encoded_flags()]))
    name = f"arena_{device}-{key.hexdigest()[:16]}.so"
    folder = _cache_folder()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if _is_private(folder):
            return _compiled_in(folder, device, compiler, name)
        log.warning(
            "%s is not used, because others than you can write there: the arena is compiled for this process alone; "
            "remove that directory, or name another one in the variable XDG_CACHE_HOME",
            folder,
        )
    except OSError:
        pass  # not writable
    return _compiled_in(_folder_of_this_process(), device, compiler, name)


def cuda_headers() -> list[Path]:
    """Where the headers of CUDA are: they come with triton, which comes with the CUDA build of PyTorch."""
    found = importlib.util.find_spec("triton")
    folders = found.submodule_search_locations if found else None
    return [Path(folder) / "backends" / "nvidia" / "include" for folder in folders or ()]


def _encoded_flags() -> list[bytes]:
    return [flag.encode() for flag in _FLAGS]


def _compiled_in(folder: Path, device: str, compiler: str, name: str) -> Path:
    """Several processes may do this at once: each writes a file of its own and moves it into place."""
    target = folder / name
    if target.exists() and _is_private(target):
        return target
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        output = Path(scratch) / name
        try:
            done = subprocess.run(
                command(device, compiler, output), capture_output=True, text=True, timeout=_SECONDS, check=False
            )
        except (FileNotFoundError, PermissionError, subprocess.TimeoutExpired) as error:
            raise NativeUnavailableError(f"the compiler {compiler} cannot be run: {error}") from error
        if done.returncode:
            raise NativeUnavailableError(f"{compiler} cannot compile the arena: {done.stderr.strip()[:500]}")
        output.chmod(0o700)
        os.replace(output, target)
    return target


def _is_private(path: Path) -> bool:
    """Whether only this user can write to it: what others write there would be run as this user."""
    found = path.stat()
    return found.st_uid == os.geteuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "olla"


@cache
def _folder_of_this_process() -> Path:
    return Path(tempfile.mkdtemp(prefix="olla-"))

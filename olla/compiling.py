"""C++ of OLLA, compiled against PyTorch's headers at first use, and kept for the next."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import stat
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from olla.errors import OllaError

__all__ = ["Library", "NativeUnavailableError", "load_operators", "vectors"]

_TORCH = Path(torch.__file__).parent
_FLAGS = ("-std=c++20", "-O2", "-shared", "-fPIC", "-Wall", "-Wextra", "-Wno-unknown-pragmas")
_SECONDS = 300  # a compiler that takes longer hangs

log = logging.getLogger(__name__)


class NativeUnavailableError(OllaError):
    """What is written in C++ cannot be used here; the message says why."""


@dataclass(frozen=True)
class Library:
    """A shared library of one source file, its ``own_headers``, and PyTorch's.

    ``headers`` are more directories to look for headers in, ``flags`` are for the compiler, besides those that all
    share, and ``links`` are the libraries of PyTorch that it needs.
    """

    source: Path
    own_headers: tuple[Path, ...] = ()
    headers: tuple[Path, ...] = ()
    flags: tuple[str, ...] = ()
    links: tuple[str, ...] = ("c10",)

    def compiled(self) -> Path:
        """The library as a file: from the user's cache, or compiled now. Several processes may do this at once.

        Raises
        ------
        NativeUnavailableError
            If there is no compiler, or it fails.
        """
        compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
        if not compiler:
            raise NativeUnavailableError("no C++ compiler was found: install g++, or name one in the variable CXX")
        contents = [path.read_bytes() for path in (*self.own_headers, self.source)]
        given = [torch.__version__, compiler, *_FLAGS, *self.flags, *self.links]
        key = hashlib.sha256(b"\0".join([*contents, *(text.encode() for text in given)]))
        name = f"{self.source.stem}-{key.hexdigest()[:16]}.so"
        folder = _cache_folder()
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if _is_private(folder):
                return self._compiled_in(folder, compiler, name)
            log.warning(
                "%s is not used, because others than you can write there: %s is compiled for this process alone; "
                "remove that directory, or name another one in the variable XDG_CACHE_HOME",
                folder,
                self.source.name,
            )
        except OSError:
            pass  # not writable
        return self._compiled_in(_folder_of_this_process(), compiler, name)

    def command(self, compiler: str, output: Path) -> list[str]:
        """The command that compiles it."""
        include = [argument for path in (_TORCH / "include", *self.headers) for argument in ("-isystem", str(path))]
        link = [f"-L{_TORCH / 'lib'}", *(f"-l{name}" for name in self.links)]
        return [compiler, *_FLAGS, *self.flags, *include, str(self.source), "-o", str(output), *link]

    def _compiled_in(self, folder: Path, compiler: str, name: str) -> Path:
        """Each process writes a file of its own and moves it into place."""
        target = folder / name
        if target.exists() and _is_private(target):
            return target
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            output = Path(scratch) / name
            try:
                done = subprocess.run(
                    self.command(compiler, output), capture_output=True, text=True, timeout=_SECONDS, check=False
                )
            except (FileNotFoundError, PermissionError, subprocess.TimeoutExpired) as error:
                raise NativeUnavailableError(f"the compiler {compiler} cannot be run: {error}") from error
            if done.returncode:
                raise NativeUnavailableError(
                    f"{compiler} cannot compile {self.source.name}: {done.stderr.strip()[:500]}"
                )
            output.chmod(0o700)
            os.replace(output, target)
        return target


def vectors() -> tuple[str, ...]:
    """Flags for vectors of 256 bits, if the processor has them; sums of products are rounded as they are without."""
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return ()
    named = ("-DCPU_CAPABILITY=AVX2", "-DCPU_CAPABILITY_AVX2")  # for PyTorch's headers
    return ("-mavx2", "-mfma", "-mf16c", "-ffp-contract=off", *named)


def load_operators(library: Library, otherwise: str) -> bool:
    """Register the operators of a library with PyTorch; whether that is possible. If not, ``otherwise`` is logged."""
    try:
        torch.ops.load_library(library.compiled())
    except (NativeUnavailableError, OSError) as error:  # as from a PyTorch that was built for other processors
        log.info("%s: %s", otherwise, error)
        return False
    return True


def _is_private(path: Path) -> bool:
    """Whether only this user can write to it: what others write there would be run as this user."""
    found = path.stat()
    return found.st_uid == os.geteuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "olla"


@cache
def _folder_of_this_process() -> Path:
    return Path(tempfile.mkdtemp(prefix="olla-"))

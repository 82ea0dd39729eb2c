"""What was planned, in files, so that another process need not plan it again.

A file is JSON, and named by the digest of its key, which stands in it, too. Nothing in it is believed because it is
there: whoever reads it checks it. Files are written aside and moved into place, so that processes can share a folder.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import stat
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from olla.errors import CacheError, OllaError
from olla.version import __version__

__all__ = ["Cache", "CacheDir", "digest"]

CacheDir = str | os.PathLike[str]
FORMAT = "olla-cache-1"
_LARGEST = 2**26  # bytes of a file; larger ones were not written here
T = TypeVar("T")

log = logging.getLogger(__name__)


def digest(data: object) -> str:
    """A fingerprint of JSON-ready data."""
    return hashlib.sha256(json.dumps(data).encode()).hexdigest()


class Cache:
    """A folder of results, each under a key: all that decides what is found, but the time there was to find it.

    The folder is made if it is not there; ``~`` is the user's home.

    Raises
    ------
    CacheError
        If the folder cannot be made, or nothing can be written there.
    """

    def __init__(self, cache_dir: CacheDir) -> None:
        if not isinstance(cache_dir, (str, os.PathLike)):
            raise CacheError(f"cache_dir is {cache_dir!r}: give the path of a directory")
        try:
            self._folder = Path(cache_dir).expanduser().absolute()
            self._folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self._folder).close()
        except (OSError, RuntimeError, ValueError) as error:
            raise CacheError(
                f"cache_dir is {os.fspath(cache_dir)!r}, where no plans can be kept: {error}; "
                "name a directory that you can write to"
            ) from error

    def path(self, key: Mapping[str, Any]) -> Path:
        """The file for a key."""
        return self._folder / f"{digest(_complete(key))}.json"

    def find(self, key: Mapping[str, Any], time_limit: float, read: Callable[[dict[str, Any]], T]) -> T | None:
        """What ``read`` makes of what is kept; None if there is nothing, or nothing that is any good.

        What was found in less than ``time_limit`` seconds does not count, unless more of them cannot better it.
        ``read`` raises an :class:`OllaError` for what it does not believe; then a warning names the file.
        """
        path = self.path(key)
        try:
            found = path.stat()
            if not stat.S_ISREG(found.st_mode) or found.st_size > _LARGEST:
                raise CacheError(f"it is no ordinary file, or larger than {_LARGEST:,} bytes")
            entry = _entry(path.read_bytes(), key)
            limit = entry["time_limit"]
            if limit is not None and not limit >= time_limit:
                return None
            return read(entry["found"])
        except FileNotFoundError:
            return None
        except (OllaError, OSError) as error:
            log.warning("%s is not used, and will be replaced: %s", path, error)
            return None

    def keep(self, key: Mapping[str, Any], time_limit: float | None, found: dict[str, Any]) -> None:
        """Keep JSON-ready data, found within ``time_limit`` seconds; None: more of them cannot better it.

        If that fails, because the disk is full, say, there is a warning.
        """
        path = self.path(key)
        entry = {**_complete(key), "time_limit": time_limit, "digest": digest(found), "found": found}
        try:
            file, aside = tempfile.mkstemp(dir=self._folder, suffix=".tmp")
            try:
                with open(file, "w") as stream:
                    stream.write(json.dumps(entry))
                os.replace(aside, path)
            except BaseException:
                os.unlink(aside)
                raise
        except OSError as error:
            log.warning("the plan cannot be kept in %s: %s", path, error)


def _complete(key: Mapping[str, Any]) -> dict[str, Any]:
    return {"format": FORMAT, "olla": __version__, "key": dict(key)}


def _entry(text: bytes, key: Mapping[str, Any]) -> dict[str, Any]:
    try:
        entry = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CacheError(f"it is not JSON: {error}") from error
    expected = _complete(key)
    if not isinstance(entry, dict) or {name: entry.get(name) for name in expected} != expected:
        raise CacheError("it is not what its name says")
    if not isinstance(entry.get("time_limit", ""), (int, float, type(None))):
        raise CacheError("it does not say how long the search was")
    if not isinstance(entry.get("found"), dict) or digest(entry["found"]) != entry.get("digest"):
        raise CacheError("it was changed, or is damaged")
    return entry

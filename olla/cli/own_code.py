"""Models of the user's own: of a script, and of a module that can be imported."""

from __future__ import annotations

import runpy
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from olla.capture.source import line_of_error
from olla.cli.target import Request, Target, optimizer_for, unknown
from olla.errors import OllaError

__all__ = ["module", "script"]


def script(path: str, request: Request) -> Target:
    """What the script at ``path`` defines as ``model``, ``inputs``, ``loss_fn``, ``targets`` and ``optimizer``.

    It runs as with ``python``, but under another name than ``__main__`` and without arguments.

    Raises
    ------
    OllaError
        If it fails, exits, or defines no model.
    """
    if not Path(path).is_file():
        raise OllaError(f"{path}: no such script")
    with _found_in(Path(path).resolve().parent), _explained(path, path):
        arguments, sys.argv = sys.argv, [path]
        try:
            defined = runpy.run_path(path, run_name="olla_target")
        finally:
            sys.argv = arguments
    return _target(path, defined, request)


def module(name: str, attribute: str, request: Request) -> Target:
    """``attribute`` of the module ``name``: a model, or what a function returns as a model or as (model, inputs).

    Raises
    ------
    OllaError
        If there is no such thing, or the function fails.
    """
    target = f"{name}:{attribute}"
    with _found_in(Path.cwd()):
        with _explained(name, None):
            found = _imported(name)
        for part in attribute.split("."):
            if not hasattr(found, part):
                raise OllaError(unknown(f"{target}: {getattr(found, '__name__', part)} has no", part, dir(found)))
            found = getattr(found, part)
        if not isinstance(found, nn.Module):
            if not callable(found):
                raise OllaError(f"{target} is a {type(found).__name__}: name a model, or a function that returns one")
            with _explained(target, getattr(getattr(found, "__code__", None), "co_filename", None)):
                found = found()
    model, inputs = found if isinstance(found, tuple) and len(found) == 2 else (found, None)
    return _target(target, {"model": model, "inputs": inputs}, request)


def _imported(name: str) -> Any:
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # a module that this one imports
        raise OllaError(f"there is no module {error.name!r}, neither in this folder nor installed") from error


def _target(name: str, defined: Mapping[str, Any], request: Request) -> Target:
    model, inputs = defined.get("model"), defined.get("inputs")
    loss_fn, targets, optimizer = (defined.get(key) for key in ("loss_fn", "targets", "optimizer"))
    if model is None:
        raise OllaError(f"{name} defines no model: name it so, model = ...")
    if not isinstance(model, nn.Module):
        raise OllaError(f"{name}: the model is a {type(model).__name__}, not a torch.nn.Module")
    if inputs is None:
        if request.shape is None:
            raise OllaError(f"{name} defines no inputs: define them beside the model, or give a --shape")
        inputs = torch.randn(request.batch_size or 1, *request.shape)
    elif request.shape or request.batch_size:
        option = "--shape" if request.shape else "--batch-size"
        raise OllaError(f"{name} defines its own inputs: {option} would change nothing")
    if request.train is not None:
        model.train(request.train)
    if request.train is False:
        return Target(model, inputs)
    if request.optimizer is not None:
        if optimizer is not None:
            raise OllaError(f"{name} defines its own optimizer: --optimizer would change nothing")
        optimizer = optimizer_for(model, request.optimizer)
    return Target(model, inputs, loss_fn, targets, optimizer)


@contextmanager
def _found_in(folder: Path) -> Iterator[None]:
    """Modules of ``folder`` can be imported inside, as they can where ``python`` starts a script."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


@contextmanager
def _explained(what: str, file: str | None) -> Iterator[None]:
    """Whatever the user's code raises, as one line that says where: in ``file``, if it has been there."""
    try:
        yield
    except OllaError:
        raise
    except (Exception, SystemExit) as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == file]
        line = f"{frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line}" if frames else line_of_error(error)
        at = f" at {line}" if line else ""
        advice = " (--device cpu gives tensors values)" if "meta tensor" in str(error) else ""
        raise OllaError(f"{what} fails{at}: {type(error).__name__}: {error}{advice}") from error

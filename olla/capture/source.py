"""Where in the user's code something happens: the innermost line outside PyTorch and OLLA."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
from torch import fx

from olla.errors import CaptureError
from olla.torch_private import (
    OpOverload,
    TorchDispatchMode,
    graph_being_traced,
    latest_autograd_node,
    running_autograd_node,
    runs_scaler,
)

__all__ = ["SourceRecorder", "line_of_error"]

_LIBRARIES = (str(Path(torch.__file__).parent) + os.sep, str(Path(__file__).parents[1]) + os.sep, "<")


def line_of_error(error: BaseException) -> str:
    """``file:line: code`` of the user's line that led to ``error``; empty if there is none."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(_LIBRARIES)]
    return f"{frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line}" if frames else ""


class SourceRecorder(TorchDispatchMode):
    """Notes where each call comes from that is traced inside: ``source`` and ``backward`` in the ``meta`` of its node.

    ``source`` is ``file:line`` of the user's innermost line, below the function whose code is ``root``; empty if
    there is none. ``backward`` is whether autograd makes the call; its source is then that of the forward call which
    autograd differentiates.

    Raises
    ------
    CaptureError
        At the first call of a ``GradScaler``: whether it skips an update, and how it scales the next loss, are decided
        by values, in Python or in tensors of its own, which no plan knows.
    """

    supports_higher_order_operators = True

    def __init__(self, root: CodeType) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's own has no types
        self._root = root
        self._sources: dict[int, str] = {}  # of the forward call that made each autograd node

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        nodes = graph_being_traced().nodes
        before: fx.Node = next(iter(reversed(nodes)))
        line = self._line()
        result = func(*args, **(kwargs or {}))
        running = running_autograd_node()
        if running is None:
            # It is the first call that sees the node which was made for it; those after it may make none.
            self._sources.setdefault(latest_autograd_node(), line)
        source = line if running is None else self._sources.get(running, line)
        for node in reversed(nodes):
            if node is before:
                break
            node.meta.update(source=source, backward=running is not None)
        return result

    def _line(self) -> str:
        frame: FrameType | None = sys._getframe(2)
        line, is_scaling = "", False
        while frame is not None and frame.f_code is not self._root and not line:
            is_scaling = is_scaling or runs_scaler(frame)
            if not frame.f_code.co_filename.startswith(_LIBRARIES):
                line = f"{frame.f_code.co_filename}:{frame.f_lineno}"
            frame = frame.f_back
        if is_scaling:
            raise CaptureError(
                f"the step uses a torch.amp.GradScaler at {line}, which skips updates where values overflow: "
                "use bfloat16, which needs none, or plan the backward pass alone and step the scaler outside"
            )
        return line

"""Where in the user's code something happened: the innermost line outside PyTorch and OLLA."""

from __future__ import annotations

import re
import traceback
from pathlib import Path

import torch

__all__ = ["line_of_error", "line_of_trace"]

_LIBRARIES = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]), "<")
_FRAME = re.compile(r'File "(.+)", line (\d+)')


def line_of_error(error: BaseException) -> str:
    """``file:line: code`` of the user's line that led to ``error``; empty if there is none."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(_LIBRARIES)]
    return f"{frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line}" if frames else ""


def line_of_trace(text: str) -> str:
    """``file:line`` of the user's innermost line in a printed stack; empty if there is none."""
    frames = [(file, line) for file, line in _FRAME.findall(text) if not file.startswith(_LIBRARIES)]
    return ":".join(frames[-1]) if frames else ""

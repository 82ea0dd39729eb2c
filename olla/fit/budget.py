"""What the user calls a budget, in bytes."""

from __future__ import annotations

import math
import re

from olla.errors import InvalidBudgetError

__all__ = ["Budget", "bytes_of"]

Budget = int | float | str

_UNITS = {"": 1, "B": 1, **{f"{k}B": 1000**i for i, k in enumerate("kMGT", 1)}}
_UNITS |= {"KB": 1000, **{f"{k}iB": 1024**i for i, k in enumerate("KMGT", 1)}}
_TEXT = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*(%|[A-Za-z]*)\s*")


def bytes_of(budget: Budget, baseline_bytes: int) -> int:
    """Bytes: of an int; of a float up to 1, or a text like ``"50%"``, that share of the baseline; of ``"6GiB"``.

    Raises
    ------
    InvalidBudgetError
        If it is none of these, or not positive.
    """
    if isinstance(budget, str):
        found = _TEXT.fullmatch(budget)
        if found is None or found[2] not in ("%", *_UNITS):
            raise InvalidBudgetError(f"the memory budget {budget!r} cannot be read: write '6GiB', '500MB' or '50%'")
        size = float(found[1]) * (baseline_bytes / 100 if found[2] == "%" else _UNITS[found[2]])
    elif isinstance(budget, bool) or not isinstance(budget, (int, float)) or not math.isfinite(budget):
        raise InvalidBudgetError(f"the memory budget is {budget!r}: give bytes, a share like 0.5, or text like '6GiB'")
    elif isinstance(budget, float) and budget <= 1:
        size = budget * baseline_bytes
    else:
        size = budget
    if not size > 0:
        raise InvalidBudgetError(f"the memory budget is {budget!r}: it must be positive")
    return max(1, int(size))

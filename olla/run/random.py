"""Drawing the same random numbers again, for ops that are recomputed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

__all__ = ["RandomState", "random_state", "replay"]

RandomState = npt.NDArray[np.uint8]  # not a tensor, so that the allocator of the step has nothing to do with it


def random_state(device: torch.device) -> RandomState:
    """The state of the generator of ``device``: kilobytes on CPUs, 16 bytes on GPUs."""
    state = torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
    return state.numpy().copy()


def replay(state: RandomState, device: torch.device, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call ``function`` where the generator is at ``state``; then it is where it was."""
    here = random_state(device)
    _set_random_state(state, device)
    try:
        return function(*args, **kwargs)
    finally:
        _set_random_state(here, device)


def _set_random_state(state: RandomState, device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(torch.from_numpy(state), device)
    else:
        torch.set_rng_state(torch.from_numpy(state))

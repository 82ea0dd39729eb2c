"""OLLA plans and runs PyTorch steps in less memory: operator order, lifetimes and addresses of arrays.

>>> step = olla.optimize(model, inputs, loss_fn=loss_fn, targets=targets, optimizer=optimizer)
>>> loss = step(inputs, targets=targets)

The names that need PyTorch load it when they are first used: graphs and plans work without it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from olla.errors import CaptureError, ExecutionError, InvalidGraphError, InvalidPlanError, OllaError
from olla.graph.graph import Graph, Op, Storage
from olla.graph.plan import Plan

if TYPE_CHECKING:
    from olla.api import optimize, optimize_step, plan
    from olla.measure.measurement import Measurement
    from olla.step import Step

__all__ = [
    "CaptureError",
    "ExecutionError",
    "Graph",
    "InvalidGraphError",
    "InvalidPlanError",
    "Measurement",
    "OllaError",
    "Op",
    "Plan",
    "Step",
    "Storage",
    "optimize",
    "optimize_step",
    "plan",
]
__version__ = "0.1.0"

_NEEDS_TORCH = {
    "Measurement": "olla.measure.measurement",
    "Step": "olla.step",
    "optimize": "olla.api",
    "optimize_step": "olla.api",
    "plan": "olla.api",
}


def __getattr__(name: str) -> Any:
    if name not in _NEEDS_TORCH:
        raise AttributeError(f"module 'olla' has no attribute {name!r}")
    value = getattr(import_module(_NEEDS_TORCH[name]), name)
    globals()[name] = value
    return value

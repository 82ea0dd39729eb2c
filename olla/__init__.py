"""OLLA plans and runs PyTorch steps in less memory: operator order, lifetimes and addresses of arrays.

>>> step = olla.optimize(model, inputs, loss_fn=loss_fn, targets=targets, optimizer=optimizer)
>>> loss = step(inputs, targets=targets)

What needs PyTorch loads it when it is first used: graphs, plans and ``olla.schedule`` work without it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from olla.errors import (
    CacheError,
    CaptureError,
    ExecutionError,
    InfeasibleError,
    InvalidBudgetError,
    InvalidBuffersError,
    InvalidGraphError,
    InvalidModelError,
    InvalidOptionError,
    InvalidPlanError,
    OllaError,
    OutOfMemoryError,
    SolverUnavailableError,
    SpillError,
)
from olla.graph.graph import Graph, Op, Storage
from olla.graph.plan import Placement, Plan, Schedule
from olla.version import __version__ as __version__

if TYPE_CHECKING:
    from olla.api import frontier, optimize, optimize_step, plan, to_graph
    from olla.capture.average import average_gradients
    from olla.measure.measurement import Measurement
    from olla.order.schedule import schedule
    from olla.place.allocate import allocate
    from olla.place.buffers import Buffer
    from olla.step import Step

__all__ = [
    "Buffer",
    "CacheError",
    "CaptureError",
    "ExecutionError",
    "Graph",
    "InfeasibleError",
    "InvalidBudgetError",
    "InvalidBuffersError",
    "InvalidGraphError",
    "InvalidModelError",
    "InvalidOptionError",
    "InvalidPlanError",
    "Measurement",
    "OllaError",
    "Op",
    "OutOfMemoryError",
    "Placement",
    "Plan",
    "Schedule",
    "SolverUnavailableError",
    "SpillError",
    "Step",
    "Storage",
    "allocate",
    "average_gradients",
    "frontier",
    "optimize",
    "optimize_step",
    "plan",
    "schedule",
    "to_graph",
]

_LOADED_WHEN_USED = {
    "Buffer": "olla.place.buffers",
    "Measurement": "olla.measure.measurement",
    "Step": "olla.step",
    "allocate": "olla.place.allocate",
    "average_gradients": "olla.capture.average",
    "frontier": "olla.api",
    "optimize": "olla.api",
    "optimize_step": "olla.api",
    "plan": "olla.api",
    "schedule": "olla.order.schedule",
    "to_graph": "olla.api",
}


def __getattr__(name: str) -> Any:
    if name not in _LOADED_WHEN_USED:
        raise AttributeError(f"module 'olla' has no attribute {name!r}")
    value = getattr(import_module(_LOADED_WHEN_USED[name]), name)
    globals()[name] = value
    return value

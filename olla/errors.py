"""The exceptions that OLLA raises. Catch :class:`OllaError` to catch them all.

::

    OllaError
    ├── CaptureError        the model, its inputs or its optimizer cannot be captured
    ├── InvalidGraphError   a dataflow graph contradicts itself
    ├── InvalidPlanError    a plan does not fit its graph, or claims what is not true
    └── ExecutionError      a planned step cannot run as it was called
"""

__all__ = ["CaptureError", "ExecutionError", "InvalidGraphError", "InvalidPlanError", "OllaError"]


class OllaError(Exception):
    """Base of every error that OLLA raises on purpose."""


class CaptureError(OllaError):
    """The step cannot be captured as one dataflow graph; nothing was changed by the attempt."""


class InvalidGraphError(OllaError):
    """A dataflow graph contradicts itself: the message names the op or the storage."""


class InvalidPlanError(OllaError):
    """A plan does not fit its graph, or is not a plan at all."""


class ExecutionError(OllaError):
    """A planned step was called in a way that it cannot serve."""

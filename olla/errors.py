"""The exceptions that OLLA raises. Catch :class:`OllaError` to catch them all.

::

    OllaError
    ├── CacheError             there is no place to keep plans in
    ├── CaptureError           the model, its inputs or its optimizer cannot be captured
    ├── InvalidGraphError      a dataflow graph contradicts itself
    ├── InvalidBuffersError    buffers to place contradict themselves
    ├── InvalidBudgetError     a memory budget cannot be read, or is not positive
    ├── InvalidOptionError     an option is not known, of the wrong type, or does not go with another
    ├── InvalidModelError      an integer program contradicts itself, or its solver cannot take it
    ├── InvalidPlanError       a plan does not fit its graph, or claims what is not true
    ├── InfeasibleError        what was asked for does not fit
    ├── OutOfMemoryError       a modelled allocator has no room for a request
    ├── SolverUnavailableError a solver is not installed, or has no licence for a model
    ├── SpillError             there is no place to spill to
    └── ExecutionError         a planned step cannot run as it was called
"""

__all__ = [
    "CacheError",
    "CaptureError",
    "ExecutionError",
    "InfeasibleError",
    "InvalidBudgetError",
    "InvalidBuffersError",
    "InvalidGraphError",
    "InvalidModelError",
    "InvalidOptionError",
    "InvalidPlanError",
    "OllaError",
    "OutOfMemoryError",
    "SolverUnavailableError",
    "SpillError",
]


class OllaError(Exception):
    """Base of every error that OLLA raises on purpose."""


class CacheError(OllaError):
    """Plans cannot be kept in a directory, or what is kept there is not used; the message says why."""


class CaptureError(OllaError):
    """The step cannot be captured as one dataflow graph; nothing was changed by the attempt."""


class InvalidGraphError(OllaError):
    """A dataflow graph contradicts itself: the message names the op or the storage."""


class InvalidBudgetError(OllaError):
    """A memory budget cannot be read, or is not positive."""


class InvalidOptionError(OllaError):
    """An option is not known, of the wrong type, or does not go with another one; the message names it."""


class InvalidBuffersError(OllaError):
    """Buffers to place contradict themselves: the message names the buffer, or the line of the file."""


class InfeasibleError(OllaError):
    """What was asked for does not fit, or nothing that fits was found in time; the message says which.

    Attributes
    ----------
    lower_bound_bytes
        Nothing can fit into less.
    best_bytes
        What was found fits into this.
    """

    def __init__(self, message: str, lower_bound_bytes: int, best_bytes: int) -> None:
        super().__init__(message)
        self.lower_bound_bytes = lower_bound_bytes
        self.best_bytes = best_bytes

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:
        """For pickle: it would pass the message alone."""
        return type(self), (*self.args, self.lower_bound_bytes, self.best_bytes)


class OutOfMemoryError(OllaError):
    """A modelled allocator has no room for a request; the message says what it holds. A device was not asked."""


class InvalidModelError(OllaError):
    """An integer program contradicts itself, or its solver cannot take it; the message names a variable or a row."""


class SolverUnavailableError(OllaError):
    """A solver is not installed, or has no licence for this model; the message says what to do."""


class SpillError(OllaError):
    """There is no place to spill to: not a directory, not writable, or too small; the message says which."""


class InvalidPlanError(OllaError):
    """A plan does not fit its graph, or is not a plan at all."""


class ExecutionError(OllaError):
    """A planned step was called in a way that it cannot serve."""

"""One captured and planned step, ready to be called with live tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, fx

from olla.capture.program import Program
from olla.capture.trace import Trace
from olla.capture.updates import finish_step
from olla.torch_private import unflatten

__all__ = ["Runner"]


class Runner:
    """Feeds the live state and the inputs to the emitted code and hands out what it returns."""

    def __init__(self, program: Program, traced: Trace) -> None:
        self._program = program
        self._traced = traced
        keep = {*traced.gradient_use.untouched}
        self._cleared = [program.parameters[name] for name in program.trainable if name not in keep]
        self._gradients_in = [program.parameters[name] for name in traced.gradients_in]
        self._gradients_out = [program.parameters[name] for name in traced.gradients_out]
        # An update over all parameters calls optimizer.step() as it is; single ones must be rounded off.
        self._to_finish = {id(u.optimizer): u.optimizer for u in traced.updates if not u.whole}.values()

    def fits_gradients(self) -> bool:
        """Whether the gradients that the step adds to are there, and no others."""
        present = {n for n in self._traced.gradient_use.accumulating if self._program.parameters[n].grad is not None}
        return present == set(self._traced.gradients_in)

    def run(
        self, leaves: Sequence[Any], code: fx.GraphModule, session: AbstractContextManager[Any] | None = None
    ) -> Any:
        """Run ``code`` on the leaves of the step's arguments and return the result of the user's function.

        ``session`` is entered around the operators alone. After an exception, gradients that were there are there.
        """
        state = [*self._program.state.values()]
        if not self._program.inference:
            state = [tensor.detach() for tensor in state]
        inputs = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        gradients = [parameter.grad for parameter in self._gradients_in]
        for parameter in self._cleared:
            parameter.grad = None
        # Nothing here requires a gradient. The mode still matters: some kernels ask for it.
        mode = torch.is_grad_enabled()
        try:
            torch.set_grad_enabled(not self._program.inference)
            with _without_autocast(), session or nullcontext():
                outputs = list(code(*state, *gradients, *inputs))
        except BaseException:
            for parameter, gradient in zip(self._gradients_in, gradients, strict=True):
                parameter.grad = gradient
            raise
        finally:
            torch.set_grad_enabled(mode)
        for optimizer in self._to_finish:
            finish_step(optimizer)
        first_gradient = len(outputs) - len(self._gradients_out)
        for parameter, gradient in zip(self._gradients_out, outputs[first_gradient:], strict=True):
            parameter.grad = gradient
        # Of an inference, a parameter may be a result.
        tensors = iter([tensor.detach() if tensor.requires_grad else tensor for tensor in outputs[:first_gradient]])
        results = [
            next(tensors) if is_tensor else value
            for value, is_tensor in zip(self._traced.results, self._traced.result_is_tensor, strict=True)
        ]
        return unflatten(results, self._traced.structure)


@contextmanager
def _without_autocast() -> Iterator[None]:
    """The casts are in the code already."""
    with ExitStack() as stack:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield

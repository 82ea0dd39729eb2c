"""One whole step of a program, run once on tensors without bytes, as one flat graph of operators."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx

from olla.capture.program import Program
from olla.capture.restore import unchanged
from olla.capture.rewrite import rewrite
from olla.capture.source import SourceRecorder, line_of_error
from olla.capture.updates import Update, UpdateRecorder
from olla.errors import CaptureError, OllaError
from olla.torch_private import (
    DATA_DEPENDENT_ERRORS,
    TRACED_VALUE_MESSAGE,
    FakeTensor,
    OpOverload,
    TreeSpec,
    fake_mode,
    fake_tensor,
    flatten,
    real_tensors,
    trace_fake,
    unflatten,
)

__all__ = ["Trace", "trace"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class GradientUse:
    """What a step does with the gradients that it finds; those of all other parameters it drops."""

    accumulating: tuple[str, ...]  # parameters to whose .grad it adds
    untouched: tuple[str, ...]  # parameters whose .grad it neither reads nor clears


@dataclass(frozen=True)
class Trace:
    """A traced step.

    The inputs of ``module`` are, in this order: the tensors of ``Program.state``, the gradients
    named in ``gradients_in``, and the tensors among the leaves of the arguments. Its outputs are
    the tensors among the leaves of the result, then the gradients named in ``gradients_out``.
    """

    module: fx.GraphModule
    updates: tuple[Update, ...]  # what the slots of the update ops stand for
    gradient_use: GradientUse
    gradients_in: tuple[str, ...]  # the accumulating parameters that had a .grad when the step was traced
    gradients_out: tuple[str, ...]  # parameters whose .grad the step leaves filled
    results: tuple[Any, ...]  # leaves of the result, tensors replaced by None
    result_is_tensor: tuple[bool, ...]  # which leaves of the result are tensors
    structure: TreeSpec  # of the result


def trace(program: Program, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Trace:
    """Trace one call of ``program.function``. Nothing is computed, and nothing is left changed.

    Raises
    ------
    CaptureError
        If the step cannot be traced: the message names the line of the user's code.
    """
    # First as if every parameter had a gradient: the step accumulates into those that it reads.
    traced = _Attempt(program, args, kwargs, program.trainable).traced()
    use = traced.gradient_use
    if not use.accumulating:
        return traced
    present = [name for name in use.accumulating if program.parameters[name].grad is not None]
    return _Attempt(program, args, kwargs, present, use).traced()


class _Attempt:
    """One run of the step on tensors without bytes, and what is learnt from it.

    ``gradients_in`` names the parameters that have a gradient at its start.
    """

    def __init__(
        self,
        program: Program,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        gradients_in: Sequence[str],
        gradient_use: GradientUse | None = None,
    ) -> None:
        self.program = program
        self.leaves, self.arguments = flatten((args, kwargs))
        self.gradients_in = tuple(gradients_in)
        self.gradient_use = gradient_use  # None: to be learnt
        self.recorder = UpdateRecorder(program.optimizers)
        self.gradients_left: list[str] = []
        self.same: set[str] = set()  # parameters whose gradient is the tensor that was found
        self.results: list[Any] = []
        self.structure = self.arguments

    def traced(self) -> Trace:
        """Trace the step."""
        program, mode = self.program, fake_mode()
        _require_leaves(self.leaves, training=not program.inference)
        known = set(program.own_attributes)
        with real_tensors(), unchanged(program):
            try:
                state = [fake_tensor(tensor, mode) for tensor in program.state.values()]
                twins = dict(zip(program.state, state, strict=True))
                with mode:
                    gradients = [torch.empty_like(twins[name]) for name in self.gradients_in]
                inputs = [fake_tensor(leaf, mode) for leaf in self.leaves if isinstance(leaf, Tensor)]
                module = trace_fake(lambda *tensors: self._run(*tensors), state, gradients, inputs)
            except OllaError:
                raise
            except Exception as error:  # whatever the user's code raises: explained and chained
                raise _explained(error) from error
        _warn_of_changes(program, program.own_attributes - known)
        _require_known_tensors(module)
        _erase_profiler_marks(module)
        finished = self._finished(module)
        rewrite(module)
        return finished

    def _run(self, state: list[Tensor], gradients: list[Tensor], inputs: list[Tensor]) -> list[Tensor]:
        """The step as a function of all the tensors it depends on; this is what is traced."""
        program = self.program
        twins = dict(zip(program.state, state, strict=True))
        for name, gradient in zip(self.gradients_in, gradients, strict=True):
            twins[name].grad = gradient
        remaining = iter(inputs)
        leaves = [next(remaining) if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
        args, kwargs = unflatten(leaves, self.arguments)
        by_id = {id(live): twins[name] for name, live in program.state.items()}

        def call() -> Any:
            with ExitStack() as stack, torch.enable_grad():
                for optimizer in program.optimizers:
                    stack.enter_context(self.recorder.installed(optimizer, by_id))
                stack.enter_context(SourceRecorder(call.__code__))
                result = program.function(*args, **kwargs)
            _write_back_rebound_buffers(program, twins)
            return result

        result = torch.func.functional_call(program.container, dict(twins), (call,))
        self.results, self.structure = flatten(result)
        _require_results(self.results)
        found = dict(zip(self.gradients_in, gradients, strict=True))
        left: dict[str, Tensor] = {}
        for name in program.trainable:
            now = twins[name].grad
            twins[name].grad = None
            if now is not None:
                left[name] = now
            if now is not None and now is found.get(name):
                self.same.add(name)
        self.gradients_left = list(left)
        return [*(leaf for leaf in self.results if isinstance(leaf, Tensor)), *left.values()]

    def _finished(self, module: fx.GraphModule) -> Trace:
        placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
        first = len(self.program.state)
        of_gradients = placeholders[first : first + len(self.gradients_in)]
        output = module.graph.output_node()
        used = [n for n, node in zip(self.gradients_in, of_gradients, strict=True) if set(node.users) - {output}]
        untouched = tuple(name for name in self.gradients_in if name in self.same and name not in used)
        use = self.gradient_use or GradientUse(tuple(used), untouched)
        is_tensor = tuple(isinstance(leaf, Tensor) for leaf in self.results)
        values = cast(Sequence[fx.Node], output.args[0])
        left = dict(zip(self.gradients_left, values[sum(is_tensor) :], strict=True))
        # A gradient that the optimizer has used up is dropped: the next step starts without it.
        out = [name for name in left if name in use.accumulating or not self._used_up(name)]
        out = [name for name in out if name not in untouched]
        output.args = ((*values[: sum(is_tensor)], *(left[name] for name in out)),)
        for node in of_gradients:
            if not node.users:
                module.graph.erase_node(node)
        return Trace(
            module=module,
            updates=tuple(self.recorder.updates),
            gradient_use=use,
            gradients_in=tuple(used),
            gradients_out=tuple(out),
            results=tuple(None if tensor else leaf for leaf, tensor in zip(self.results, is_tensor, strict=True)),
            result_is_tensor=is_tensor,
            structure=self.structure,
        )

    def _used_up(self, name: str) -> bool:
        return id(self.program.parameters[name]) in self.recorder.consumed


def _write_back_rebound_buffers(program: Program, twins: dict[str, Tensor]) -> None:
    """A buffer that the model replaced (``self.mean = ...``) is written in place instead."""
    with torch.no_grad():
        for name, value in program.container.named_buffers():
            twin = twins.get(name)
            if twin is None or value is twin:
                continue
            if value.shape != twin.shape or value.dtype != twin.dtype:
                raise CaptureError(
                    f"buffer {program.display_name(name)!r} is replaced by one of another shape or dtype: "
                    f"{tuple(twin.shape)} {twin.dtype} by {tuple(value.shape)} {value.dtype}"
                )
            twin.copy_(value)


def _warn_of_changes(program: Program, changes: set[tuple[int, str]]) -> None:
    modules = {id(module): name for name, module in program.container.named_modules()}
    names = sorted(f"{modules[module]}.{attribute}" for module, attribute in changes)
    if names:
        log.warning("a planned step runs no Python code of the model: it will not change %s", ", ".join(names))


def _require_leaves(leaves: Sequence[Any], *, training: bool) -> None:
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    if training and any(tensor.requires_grad for tensor in tensors):
        raise CaptureError("an input requires a gradient, which a planned step would not fill: pass input.detach()")
    if any(tensor.layout is not torch.strided for tensor in tensors):
        raise CaptureError("an input is a sparse tensor: only dense inputs can be planned")


def _require_results(results: Sequence[Any]) -> None:
    for leaf in results:
        if not isinstance(leaf, (Tensor, bool, int, float, str, bytes, type(None))):
            raise CaptureError(
                f"the step returns a {type(leaf).__name__}: return tensors, plain values, or tuples, lists, dicts or "
                "dataclasses of them that are registered with torch.utils._pytree"
            )


def _require_known_tensors(module: fx.GraphModule) -> None:
    """Tensors that are neither state nor input are constants; one that wants a gradient was forgotten."""
    constants = [getattr(module, node.target) for node in module.graph.find_nodes(op="get_attr")]
    forgotten = [constant for constant in constants if isinstance(constant, Tensor) and constant.requires_grad]
    for constant in forgotten:
        if isinstance(constant.grad, FakeTensor):
            constant.grad = None
    if forgotten:
        raise CaptureError(
            f"the step uses a parameter of shape {tuple(forgotten[0].shape)} that belongs to none of the modules "
            "given: pass its module too (model=[...]), or register it with nn.Parameter in the model"
        )


def _erase_profiler_marks(module: fx.GraphModule) -> None:
    for node in reversed(module.graph.nodes):
        if isinstance(node.target, OpOverload) and node.target.namespace == "profiler":
            module.graph.erase_node(node)


def _explained(error: Exception) -> CaptureError:
    """What went wrong, in the user's words and at the user's line."""
    line = line_of_error(error)
    at = f" at {line}" if line else ""
    if isinstance(error, DATA_DEPENDENT_ERRORS) or TRACED_VALUE_MESSAGE in str(error):
        return CaptureError(
            f"the step asks for the value of a tensor{at}. A plan is made once and must hold for all values: replace "
            "the branch or the .item() by tensor operations (torch.where), or move it out of the step"
        )
    return CaptureError(f"the step fails on these inputs{at}: {type(error).__name__}: {error}")

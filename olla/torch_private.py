"""The parts of PyTorch that OLLA needs and PyTorch does not promise to keep: all of them are here.

Works with torch 2.11 to 2.14. When a new release moves something, this is the file to mend.
"""

from __future__ import annotations

import inspect
import linecache
import logging
import os
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch._C._autograd import DeviceType
from torch._C._distributed_c10d import ProcessGroup as ProcessGroup
from torch._C._distributed_c10d import _resolve_process_group
from torch._C._dynamo.guards import TensorGuards
from torch._functorch._aot_autograd.descriptors import InputMutationAOTOutput, PlainAOTInput
from torch._ops import OpOverload as OpOverload
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch._subclasses.fake_tensor import FakeTensor as FakeTensor
from torch.amp import GradScaler
from torch.distributed.distributed_c10d import _get_object_coll_device
from torch.fx.experimental.proxy_tensor import get_proxy_mode, make_fx
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.fx.graph import _BoxedCodeGen
from torch.fx.graph_module import _loader
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks
from torch.utils import _pytree
from torch.utils._ordered_set import OrderedSet
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode

__all__ = [
    "DATA_DEPENDENT_ERRORS",
    "Boxed",
    "FUNCTIONAL_BATCH_NORM",
    "Buffer",
    "FakeTensor",
    "Kernel",
    "OpOverload",
    "ProcessGroup",
    "TorchDispatchMode",
    "TreeSpec",
    "aot_backend",
    "bare_step",
    "boxed",
    "buffers_of",
    "changed_inputs",
    "collective_device",
    "cpu_allocations",
    "dense_parts",
    "fake_mode",
    "fake_tensor",
    "flatten",
    "forget_source_with",
    "gradient_inputs",
    "graph_being_traced",
    "graph_task",
    "guards_of",
    "has_gradient_hooks",
    "has_step_hooks",
    "hooks_of",
    "inductor",
    "inductor_planned",
    "input_position",
    "is_called_by_scaler",
    "is_collective",
    "is_distributed",
    "is_tangent",
    "is_wrapped_by_scheduler",
    "latest_autograd_node",
    "marked_as_boxed",
    "members_of",
    "min_cut",
    "process_group",
    "real_tensors",
    "remove_step_hooks",
    "reshapes_in_place",
    "running_autograd_node",
    "runs_scaler",
    "storage_key",
    "trace_fake",
    "unflatten",
    "will_accumulate",
    "written_arguments",
]

TreeSpec = _pytree.TreeSpec

# What tracing raises where Python asks for the value of a tensor.
DATA_DEPENDENT_ERRORS = (DataDependentOutputException, DynamicOutputShapeException, GuardOnDataDependentSymNode)
FUNCTIONAL_BATCH_NORM = torch.ops.aten._native_batch_norm_legit_functional.default  # of what AOTAutograd traces
TRACED_VALUE_MESSAGE = "get value out of a tracing tensor"


def flatten(tree: Any) -> tuple[list[Any], TreeSpec]:
    """The leaves of nested containers (also those of Hugging Face), and what rebuilds the containers."""
    return _pytree.tree_flatten(tree)


def unflatten(leaves: Sequence[Any], spec: TreeSpec) -> Any:
    """The inverse of :func:`flatten`."""
    return _pytree.tree_unflatten(leaves, spec)


def fake_mode() -> FakeTensorMode:
    """A mode whose tensors have shapes but no bytes; real tensors met on the way become constants."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def fake_tensor(tensor: Tensor, mode: FakeTensorMode) -> Tensor:
    """A leaf without bytes like ``tensor``, which may itself be real, fake (of another mode) or meta.

    Meta tensors become CPU tensors, so that the operators are those that a CPU would run.
    """
    if tensor.is_meta or isinstance(tensor, FakeTensor):
        device = torch.device("cpu") if tensor.is_meta else tensor.device
        with mode:
            fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
        return fake.requires_grad_(tensor.requires_grad)
    return mode.from_tensor(tensor, static_shapes=True)


def real_tensors() -> AbstractContextManager[Any]:
    """Tensors made inside are real, even if the caller is inside a fake tensor mode."""
    return unset_fake_temporarily()


def trace_fake(function: Callable[..., Any], *args: Any) -> fx.GraphModule:
    """Run ``function`` on fake tensors and record every operator call, with shapes in ``meta["val"]``."""
    with _without_logged_errors():
        module = make_fx(function, tracing_mode="fake", _allow_non_fake_inputs=True)(*args)
    forget_source_with(module)
    return module


@contextmanager
def _without_logged_errors() -> Iterator[None]:
    """What an operator rejects is raised; fake tensors log it, too, with a page of their own traceback."""
    log = logging.getLogger(FakeTensor.__module__)

    def quiet(record: logging.LogRecord) -> bool:
        return record.levelno != logging.ERROR

    log.addFilter(quiet)
    try:
        yield
    finally:
        log.removeFilter(quiet)


def forget_source_with(module: fx.GraphModule) -> None:
    """Drop the source of ``module`` when it is collected: PyTorch would keep it until the process ends."""
    name = type(module).forward.__code__.co_filename
    weakref.finalize(module, _forget_source, name).atexit = False


def _forget_source(name: str) -> None:
    _loader.eval_cache.pop(name, None)
    linecache.cache.pop(name, None)


def graph_being_traced() -> fx.Graph:
    """What :func:`trace_fake` has recorded so far, for use inside of the function that it runs."""
    mode = get_proxy_mode()
    assert mode is not None
    return mode.tracer.graph


def latest_autograd_node() -> int:
    """The number of the autograd node that was made last: while an operator runs that has one, its own."""
    return int(torch._C._autograd._get_sequence_nr()) - 1


def running_autograd_node() -> int | None:
    """The number of the autograd node that runs; None outside of a backward pass."""
    node = torch._C._current_autograd_node()
    return None if node is None else int(node._sequence_nr())


def storage_key(tensor: Tensor) -> int:
    """Equal for two tensors if and only if they view one storage, as long as both are kept alive."""
    return int(tensor.untyped_storage()._cdata)


def guards_of(tensors: Sequence[Tensor]) -> Callable[..., bool]:
    """Tells whether as many tensors have the types, dtypes, devices, shapes, strides and requires_grad of these."""
    sizes: list[Any] = [[*tensor.shape] for tensor in tensors]
    strides: list[Any] = [[*tensor.stride()] for tensor in tensors]
    guards = TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)
    return cast("Callable[..., bool]", guards.check)


def dense_parts(tensor: Tensor) -> tuple[Tensor, ...]:
    """The tensors that hold the bytes of ``tensor``: itself, or the indices and values of a sparse one."""
    return (tensor._indices(), tensor._values()) if tensor.is_sparse else (tensor,)


def written_arguments(operator: OpOverload) -> list[tuple[int, str]]:
    """Position and name of each argument that ``operator`` declares to change in place."""
    arguments = enumerate(operator._schema.arguments)
    return [(i, a.name) for i, a in arguments if a.alias_info is not None and a.alias_info.is_write]


def reshapes_in_place(target: object) -> bool:
    """Whether a call of ``target`` changes the shape of the tensor that it is given, but not of other views of it."""
    return isinstance(target, OpOverload) and torch.Tag.inplace_view in target.tags


def process_group(name: str) -> ProcessGroup:
    """The group of this ``group_name``."""
    return _resolve_process_group(name)  # type: ignore[arg-type]


def is_collective(target: object) -> bool:
    """Whether a traced call of ``target`` is a collective of PyTorch's own."""
    return isinstance(target, OpOverload) and target.namespace.startswith(("c10d", "_c10d"))


def is_distributed(tensor: Tensor) -> bool:
    """Whether ``tensor`` is a ``DTensor``, of which each process has a part."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def collective_device(group: ProcessGroup) -> torch.device:
    """Where tensors must be that ``group`` sends."""
    return torch.device(_get_object_coll_device(group))


def members_of(module: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    """The dictionaries in which ``module`` keeps its own submodules and parameters, live."""
    return module._modules, module._parameters


def hooks_of(module: nn.Module) -> tuple[Mapping[int, Any], ...]:
    """The dictionaries in which ``module`` keeps its own hooks, live."""
    return module._forward_hooks, module._forward_pre_hooks, module._backward_hooks


def buffers_of(module: nn.Module) -> dict[str, Any]:
    """The dictionary in which ``module`` keeps its own buffers, live."""
    return module._buffers


def has_step_hooks(optimizer: Optimizer) -> bool:
    """Whether code of users runs before or after ``optimizer.step``."""
    own = optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks
    return bool(own or _global_optimizer_pre_hooks or _global_optimizer_post_hooks)


def bare_step(optimizer: Optimizer) -> Callable[[Optimizer], Any]:
    """``step`` of its class without what calls hooks and tells the profiler, which costs as much as a small update."""
    step = type(optimizer).step
    return step.__wrapped__ if getattr(step, "hooked", False) else step  # type: ignore[attr-defined]


def runs_scaler(frame: FrameType) -> bool:
    """Whether a method of a ``GradScaler`` that scales runs in ``frame``."""
    if frame.f_code.co_filename != GradScaler.step.__code__.co_filename:
        return False
    scaler = frame.f_locals.get("self")
    return isinstance(scaler, GradScaler) and scaler.is_enabled()


def is_called_by_scaler() -> bool:
    """Whether such a method is among the callers."""
    frame = inspect.currentframe()
    while frame is not None:
        if runs_scaler(frame):
            return True
        frame = frame.f_back
    return False


def remove_step_hooks(optimizer: Optimizer) -> None:
    """Forget the hooks of this one optimizer."""
    vars(optimizer).update(_optimizer_step_pre_hooks={}, _optimizer_step_post_hooks={})


def is_wrapped_by_scheduler(step: Callable[..., Any]) -> bool:
    """Whether ``optimizer.step`` was wrapped by an ``lr_scheduler`` merely to notice that it is called."""
    return hasattr(step, "_wrapped_by_lr_sched")


def cpu_allocations(call: Callable[[], Any]) -> list[int]:
    """Every CPU allocation (+bytes) and release (-bytes) while ``call`` runs, in order of time.

    The allocator itself reports them, to the profiler.
    """
    profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
    with _silence():
        profile.start()
    try:
        call()
    finally:
        with _silence():
            profile.stop()
    assert profile.profiler is not None
    assert profile.profiler.kineto_results is not None
    events: list[Any] = profile.profiler.kineto_results.events()
    memory = [event for event in events if event.name() == "[memory]" and event.device_type() == DeviceType.CPU]
    memory.sort(key=lambda event: event.start_ns())  # stable: equal times keep the recorded order
    return [event.nbytes() for event in memory]


def inductor(activation_memory_budget: float = 1.0) -> Callable[..., Any]:
    """The default backend of ``torch.compile``, with a budget: the share of the activations that it may keep.

    Each call makes another backend, and backends do not share what they compiled.
    """
    from torch._functorch import config
    from torch._inductor.compile_fx import compile_fx

    def backend(graph: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        with config.patch(activation_memory_budget=activation_memory_budget):
            return compile_fx(graph, inputs)

    return backend


@dataclass(frozen=True, slots=True)
class Buffer:
    """What a kernel of Inductor makes: bytes, another name for such, a tuple of tensors, or a part of one."""

    name: str
    allocated: int  # bytes, when the kernel runs: of a tuple, for all of its parts, whose own are 0
    freed: int  # bytes, when nobody needs it any more; of tuples and other names 0
    of: tuple[str, ...] = ()  # whose bytes it has, if these are not its own: buffers, inputs, the tuple

    @property
    def is_part(self) -> bool:
        """Whether it is one of the tensors of a tuple."""
        return self.freed > 0 and self.allocated == 0


@dataclass(frozen=True, slots=True)
class Kernel:
    """One node of Inductor's scheduler after fusion: one call of the code that it will write."""

    name: str
    buffers: tuple[Buffer, ...]
    needs: tuple[str, ...]  # the buffers and inputs that it reads or changes
    follows: tuple[str, ...]  # the buffers whose kernels must run before, though it does not need their bytes


Reorder = Callable[[Sequence[Kernel], Sequence[int], Set[str]], Sequence[int]]
Boxed = Callable[[list[Any]], Any]  # empties the list of its inputs, so that each can die at its last use


def inductor_planned(
    module: fx.GraphModule,
    inputs: Sequence[Any],
    partition: Callable[..., Any],
    reorder: Reorder,
    observed: Callable[[Boxed, bool], Boxed],
) -> Callable[..., Any]:
    """``module`` as Inductor compiles it, but for two decisions. Nothing of Inductor's configuration stays changed.

    ``partition(joint, inputs, num_fwd_outputs=..., ...)`` divides a joint graph of Inductor's own operators.
    ``reorder(kernels, inductors, outputs)`` gets the kernels of each part as they were traced, the order in which
    Inductor would run them, and the names of the buffers that are returned; what it returns is the order they run in.
    ``observed(run, is_backward)`` gets what runs each part, and returns what is to be run instead.

    PyTorch does not keep such graphs on disk, because it cannot know what the two depend on; their kernels it does.
    """
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner
    from torch._inductor.custom_graph_pass import CustomPartitionerFn
    from torch._inductor.memory import reorder_for_peak_memory
    from torch._inductor.virtualized import V

    class Partitioner(CustomPartitionerFn):
        def __call__(self, gm: fx.GraphModule, joint_inputs: Any, **kwargs: Any) -> Any:
            kwargs.pop("compiler", None)
            return partition(gm, joint_inputs, **kwargs)

        def uuid(self) -> None:
            return None

    def reordered(nodes: list[Any]) -> list[Any]:
        scheduler = V.graph.scheduler
        given, outputs = OrderedSet(V.graph.graph_inputs), OrderedSet(V.graph.get_output_names())
        theirs = reorder_for_peak_memory(nodes, scheduler.name_to_buf, scheduler.name_to_fused_node, given, outputs)
        position = {node: index for index, node in enumerate(nodes)}
        order = reorder(_kernels(nodes, given, outputs), [position[node] for node in theirs], outputs)
        return [nodes[index] for index in order]

    def compiled_inside(*args: Any, is_backward: bool = False, **kwargs: Any) -> Any:
        part: Any = compile_fx_inner(*args, is_backward=is_backward, **kwargs)
        if not hasattr(part, "current_callable"):  # a function: there was nothing to compile
            return marked_as_boxed(observed(part, is_backward))
        part.current_callable = observed(part.current_callable, is_backward)
        return part

    found: Any = compile_fx(
        module,
        inputs,
        inner_compile=compiled_inside,
        config_patches={
            "custom_partitioner_fn": Partitioner(),
            "_post_fusion_custom_pass": reordered,
            "reorder_for_peak_memory": False,
        },
    )
    compiled: Callable[..., Any] = found
    return compiled


def _kernels(nodes: Sequence[Any], inputs: Set[str], outputs: Set[str]) -> list[Kernel]:
    """What Inductor's scheduler knows of its nodes, by the rules of its own estimate of the peak."""
    from torch._inductor.dependencies import WeakDep
    from torch._inductor.memory import compute_size_for_scheduler_buffer
    from torch._inductor.virtualized import V

    scheduler = V.graph.scheduler
    sizes = compute_size_for_scheduler_buffer(scheduler.name_to_buf)
    found = []
    for node in nodes:
        parts = OrderedSet([part.get_name() for part in node.get_nodes()])
        late = [dep for dep in node.unmet_dependencies if isinstance(dep, WeakDep) and dep.is_fake]
        needs = {dep.name for dep in node.unmet_dependencies} - {dep.name for dep in late}
        needs |= {dep.name for dep in node.read_writes.reads if dep.name in inputs}
        buffers = []
        for buffer in node.get_outputs():
            name = buffer.get_name()
            allocated, freed = sizes[name]
            if len(parts) > 1 and name not in outputs and scheduler.can_buffer_be_removed_through_fusion(name, parts):
                allocated, freed = 0, 0  # it stays in registers
            of = [*buffer.get_mutations(), *buffer.get_aliases()]
            if freed and not allocated:
                given = [dep.name for dep in node.unmet_dependencies]
                of = [whole for whole in given if sizes.get(whole, (0, 0))[0] and not sizes[whole][1]]
            buffers.append(Buffer(name, allocated, freed, tuple(of)))
        found.append(
            Kernel(node.get_name(), tuple(buffers), tuple(sorted(needs)), tuple(sorted({dep.name for dep in late})))
        )
    return found


def aot_backend(
    partition: Callable[..., Any],
    forward: Callable[..., Any],
    backward: Callable[..., Any],
    infer: Callable[..., Any],
) -> Callable[..., Any]:
    """A backend of ``torch.compile`` whose graphs are of the operators that eager PyTorch runs: nothing is decomposed.

    ``partition(joint, inputs, num_fwd_outputs=...)`` turns a joint graph into those of forward and backward;
    ``forward(graph, inputs)`` and ``backward(graph, inputs)`` turn these into what runs, as :func:`boxed` does, and
    ``infer(graph, inputs)`` a graph that needs no backward.
    """
    from torch._dynamo.backends.common import aot_autograd

    backend: Callable[..., Any] = aot_autograd(
        fw_compiler=forward,
        bw_compiler=backward,
        inference_compiler=infer,
        partition_fn=partition,
        keep_inference_input_mutations=True,
    )
    return backend


def boxed(module: fx.GraphModule) -> Boxed:
    """``module`` as such a function."""
    module.graph.set_codegen(_BoxedCodeGen())
    module.recompile()
    forget_source_with(module)
    return marked_as_boxed(lambda inputs: module.forward(inputs))


def marked_as_boxed(function: Boxed) -> Boxed:
    """``function``, of which AOTAutograd knows now that it empties the list of its inputs."""
    function._boxed_call = True  # type: ignore[attr-defined]
    return function


def min_cut(
    joint: fx.GraphModule, inputs: Any, forward_outputs: int, **options: Any
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Forward and backward as PyTorch divides them, backward with what it would run again.

    Calls keep their names. In ``joint`` itself equal calls become one, and dead ones go.
    """
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    found: tuple[fx.GraphModule, fx.GraphModule] = min_cut_rematerialization_partition(
        joint, inputs, num_fwd_outputs=forward_outputs, **options
    )
    return found


def is_tangent(placeholder: fx.Node) -> bool:
    """Whether an input of a joint graph is the gradient of an output of forward."""
    return str(placeholder.target).startswith("tangents")


def input_position(placeholder: fx.Node) -> int | None:
    """Which of the inputs that ``torch.compile`` gave, as they were given, an input of a joint graph is, if any."""
    described = placeholder.meta["desc"]
    return described.idx if isinstance(described, PlainAOTInput) else None


def gradient_inputs(joint: fx.GraphModule, forward_outputs: int) -> dict[int, int]:
    """Of each result of a joint graph that is a gradient, the :func:`input_position` that it is the gradient of."""
    output = joint.graph.output_node()
    results = zip(output.args[0], output.meta["desc"], strict=True)  # type: ignore[arg-type]
    return {
        at: found.grad_of.idx
        for at, (result, found) in enumerate(results)
        if at >= forward_outputs and isinstance(result, fx.Node) and isinstance(found.grad_of, PlainAOTInput)
    }


def changed_inputs(joint: fx.GraphModule, forward_outputs: int) -> set[int]:
    """The positions of inputs that are given the value of a result when forward has run."""
    results = joint.graph.output_node().meta["desc"][:forward_outputs]
    found = [result.mutated_input for result in results if isinstance(result, InputMutationAOTOutput)]
    return {described.idx for described in found if isinstance(described, PlainAOTInput)}


def graph_task() -> int:
    """The number of the backward pass that runs in this thread; -1 outside of one."""
    return int(torch._C._current_graph_task_id())


def will_accumulate(node: torch.autograd.graph.Node) -> bool:
    """Whether the backward pass that runs fills the ``.grad`` that ``node`` accumulates into."""
    try:
        return bool(torch._C._will_engine_execute_node(node))
    except RuntimeError:  # torch.autograd.grad, which returns it instead
        return False


def has_gradient_hooks(parameter: Tensor) -> bool:
    """Whether code of users sees the gradient of ``parameter`` in a backward pass."""
    return bool(parameter._backward_hooks or parameter._post_accumulate_grad_hooks)


@contextmanager
def _silence() -> Iterator[None]:
    """Keep what the profiler's C++ code writes to standard error away from the user: it has no switch."""
    sys.stderr.flush()
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)

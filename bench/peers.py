"""What fits a training step into less memory: means that PyTorch has, and OLLA. Each changes a training in place."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import olla
from bench.training import SGD, Training
from olla.torch_private import inductor

Change = Callable[[Training], None]

EAGER = "eager PyTorch"
OLLA = "OLLA"

_PRODUCTS = [getattr(torch.ops.aten, name).default for name in ("mm", "addmm", "bmm", "baddbmm", "convolution")]


def update_in_backward(training: Training) -> None:
    """Step an optimizer of its own for each parameter as soon as its gradient is complete, and drop the gradient."""
    optimizers = {parameter: SGD([parameter]) for parameter in training.model.parameters()}

    def update(parameter: Tensor) -> None:
        optimizers[parameter].step()
        optimizers[parameter].zero_grad(set_to_none=True)

    for parameter in optimizers:
        parameter.register_post_accumulate_grad_hook(update)


def checkpoint_blocks(training: Training, *, every: int = 1) -> None:
    """Keep only the input of each block, or of every second, and run it again in the backward pass."""
    for block in training.blocks[::every]:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def checkpoint_all_but_products(training: Training) -> None:
    """Run again, in each block, what is neither a matrix product nor a convolution."""
    contexts = partial(create_selective_checkpoint_contexts, _PRODUCTS)
    for block in training.blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, context_fn=contexts)


def compile_model(training: Training, *, budget: float = 1.0) -> None:
    """``torch.compile``, which may keep this share of the activations of a forward pass."""
    training.model.compile(backend=inductor(budget))


def plan(training: Training, *, budget: int | None = None) -> None:
    """OLLA within so many MiB above what lives across steps."""
    workload = training.workload
    arguments = {"loss_fn": workload.loss_fn, "targets": workload.targets, "optimizer": training.optimizer}
    memory_budget = None
    if budget is not None:
        planned = olla.plan(workload.model, workload.inputs, **arguments, place=False, progress=False)
        memory_budget = planned.persistent_bytes + budget * 2**20
    step = olla.optimize(workload.model, workload.inputs, **arguments, memory_budget=memory_budget, progress=False)
    training.step, training.planned = partial(workload.call, step, train=True), step


def contenders(budgets: tuple[int, ...]) -> dict[str, tuple[Change, ...]]:
    """What each contender does to its training, by name; eager PyTorch is the first. Budgets of OLLA in MiB."""
    every_second = partial(checkpoint_blocks, every=2)
    return {
        EAGER: (),
        "optimizer in backward": (update_in_backward,),
        "checkpoint every block": (checkpoint_blocks,),
        "checkpoint every 2nd block": (every_second,),
        "checkpoint every block, optimizer in backward": (checkpoint_blocks, update_in_backward),
        "checkpoint every 2nd block, optimizer in backward": (every_second, update_in_backward),
        "checkpoint all but products": (checkpoint_all_but_products,),
        "torch.compile": (compile_model,),
        **{f"torch.compile, budget {share}": (partial(compile_model, budget=share),) for share in (0.8, 0.5, 0.1, 0.0)},
        "torch.compile, checkpoint every block": (checkpoint_blocks, compile_model),
        OLLA: (plan,),
        **{f"{OLLA}, {budget} MiB": (partial(plan, budget=budget),) for budget in budgets},
    }

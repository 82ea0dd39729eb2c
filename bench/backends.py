"""What ``torch.compile`` does with a training step and an inference, by backend: models at sizes that take seconds."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from bench.models import MODELS, Workload
from bench.peers import EAGER, Change
from bench.training import SUBJECTS, Subject, Training

BUDGET = 0.6  # of what forward and backward hold without OLLA, parameters and the optimizer's state included
WITHIN = f"olla, the same within {BUDGET}"  # as the one above it, which has no budget
_GPT2 = "gpt2_6x384"
_BATCHES = {
    "deeplabv3_resnet50": 2,
    "efficientnet_b0": 8,
    "googlenet": 8,
    "inception_v3": 4,
    "mnasnet0_5": 8,
    "mobilenet_v2": 8,
    "r3d_18": 1,
    "raft_small": 1,
    "resnet18": 8,
    "squeezenet1_0": 8,
    "swin_t": 8,
}


def _in_one_graph(batch: int) -> Workload:
    """GPT-2 with its loss, which is named, because a warning that it is not would break the graph there."""
    workload = SUBJECTS[_GPT2].build(batch)
    workload.model.loss_type = "ForCausalLM"  # type: ignore[assignment]  # the default
    return workload


COMPILED = {
    **SUBJECTS,
    _GPT2: replace(SUBJECTS[_GPT2], build=_in_one_graph),
    **{name: Subject(batch, MODELS[name], lambda model: (), ()) for name, batch in _BATCHES.items()},
}


def compile_with(training: Training, *, backend: str, **options: Any) -> None:
    """``torch.compile`` the model, with a backend and its options."""
    training.model.compile(backend=backend, options=options or None)


def compile_with_updates(training: Training, **options: Any) -> None:
    """Let OLLA's backward pass update the parameters."""
    compile_with(training, backend="olla", optimizer=training.optimizer, **options)


def backends(mode: str) -> dict[str, tuple[Change, ...]]:
    """What each contender does to its training, by name; eager PyTorch is the first."""
    names = ("aot_eager", "inductor", "olla")
    plain = {EAGER: (), **{name: (partial(compile_with, backend=name),) for name in names}}
    if mode == "eval":
        return {name: (Training.infer, *changes) for name, changes in plain.items()}
    return plain | {
        "olla, optimizer in backward": (compile_with_updates,),
        WITHIN: (partial(compile_with_updates, memory_budget=BUDGET),),
    }

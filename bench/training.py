"""A training step as most programs write it, of models that have blocks to checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import olla
from bench.models import Workload, classifier, language
from olla.torch_private import flatten

Step = Callable[[], Tensor]  # runs one, and returns the loss
SGD = partial(torch.optim.SGD, lr=1e-3, momentum=0.9)


class Training:
    """A model with its batch and its optimizer. What :meth:`step` does can be exchanged."""

    def __init__(self, workload: Workload, blocks: Iterable[nn.Module]) -> None:
        self.workload = workload
        self.model = workload.model.train()
        self.blocks = tuple(blocks)
        self.optimizer = SGD(self.model.parameters())
        self.step: Step = self.eager_step
        self.planned: olla.Step | None = None  # by OLLA

    def eager_step(self) -> Tensor:
        """The body of the loop; it leaves no gradients. Returns the loss."""
        loss = self.workload.call(self._loss, train=True)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def infer(self) -> None:
        """Make it an inference, which returns the loss, too."""
        self.model.eval()
        self.step = torch.no_grad()(partial(self.workload.call, self._loss, train=True))

    def persistent_bytes(self) -> int:
        """Of parameters, buffers, optimizer state and the batch: what lives across steps."""
        held = [*self.model.parameters(), *self.model.buffers(), self.workload.inputs, self.workload.targets]
        leaves, _ = flatten([held, [list(state.values()) for state in self.optimizer.state.values()]])
        storages = [leaf.untyped_storage() for leaf in leaves if isinstance(leaf, Tensor)]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    def _loss(self, *args: Any, targets: Tensor | None = None, **kwargs: Any) -> Tensor:
        output = self.model(*args, **kwargs)
        return output.loss if self.workload.loss_fn is None else self.workload.loss_fn(output, targets)


@dataclass(frozen=True, slots=True)
class Subject:
    """What contenders train: a model, its blocks, and the budgets that tell them apart."""

    batch_size: int
    build: Callable[[int], Workload]
    blocks: Callable[[Any], Iterable[nn.Module]]
    budgets: tuple[int, ...]  # MiB above what lives across steps

    def training(self) -> Training:
        """A new one; all have equal weights and equal batches."""
        torch.manual_seed(0)
        workload = self.build(self.batch_size)
        return Training(workload, self.blocks(workload.model))


def _vit(batch: int) -> Workload:
    import torchvision

    model = torchvision.models.VisionTransformer(224, 16, num_layers=6, num_heads=6, hidden_dim=384, mlp_dim=1536)
    return Workload(model, (torch.randn(batch, 3, 224, 224),), F.cross_entropy, torch.randint(0, 1000, (batch,)))


SUBJECTS = {
    "gpt2_6x384": Subject(
        8,
        language(
            "GPT2LMHeadModel",
            "GPT2Config",
            length=256,
            n_layer=6,
            n_embd=384,
            n_head=6,
            vocab_size=8192,
            n_positions=256,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        ),
        lambda model: model.transformer.h,
        (216, 179, 160, 105),
    ),
    "resnet50_128": Subject(
        8,
        classifier("resnet50", shape=(3, 128, 128)),
        lambda model: [*model.layer1, *model.layer2, *model.layer3, *model.layer4],
        (210, 160, 98, 65),
    ),
    "vit_6x384": Subject(8, _vit, lambda model: model.encoder.layers, (138, 86, 62, 50)),
}

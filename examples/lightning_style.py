"""A module that brings its step and its optimizer along, as in Lightning, and the loop that runs such modules."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR
from torch.utils.data import DataLoader, TensorDataset

import olla

Batch = list[Tensor]


class Classifier(nn.Module):
    """What its author writes."""

    def __init__(self) -> None:
        super().__init__()
        hidden = (nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Dropout(0.1)) for _ in range(5))
        self.layers = nn.Sequential(nn.Linear(64, 256), *hidden, nn.Linear(256, 10))

    def training_step(self, batch: Batch) -> Tensor:
        """The loss."""
        inputs, labels = batch
        return F.cross_entropy(self.layers(inputs), labels)

    def validation_step(self, batch: Batch) -> Tensor:
        """The accuracy."""
        inputs, labels = batch
        return (self.layers(inputs).argmax(1) == labels).float().mean()

    def configure_optimizers(self) -> tuple[Optimizer, LRScheduler]:
        """An optimizer, and a scheduler that is stepped after each batch."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3)
        return optimizer, OneCycleLR(optimizer, max_lr=3e-3, total_steps=3 * 17)


def fit(module: Classifier, loader: Iterable[Batch], validation: Batch, epochs: int) -> tuple[olla.Step, Tensor]:
    """The loop: one line of it was ``train(batch)`` before."""
    optimizer, scheduler = module.configure_optimizers()

    def train(batch: Batch) -> Tensor:
        optimizer.zero_grad()
        loss = module.training_step(batch)
        loss.backward()
        optimizer.step()
        return loss.detach()

    step = olla.optimize_step(train, (next(iter(loader)),), model=module, optimizer=optimizer)
    for epoch in range(epochs):
        module.train()
        for batch in loader:  # the last one is smaller, so it has a plan of its own
            loss = step(batch)
            scheduler.step()
        module.eval()
        with torch.no_grad():
            print(f"epoch {epoch}: loss {loss:.3f}, accuracy {module.validation_step(validation):.1%}")
    return step, loss


torch.manual_seed(0)
inputs = torch.randn(520, 64)
labels = (inputs @ torch.randn(64, 10)).argmax(1)
model = Classifier()
step, loss = fit(model, DataLoader(TensorDataset(inputs, labels), batch_size=32, shuffle=True), [inputs, labels], 3)

model.train()
measured = step.measure([inputs[:32], labels[:32]])
print(f"eager {measured.baseline_peak_bytes:,} bytes, planned {measured.peak_bytes:,}: {measured.saving:.0%} less")

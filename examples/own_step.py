"""A step function of your own: bfloat16 autocast, gradient accumulation and clipping."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import olla

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 256), *(nn.Sequential(nn.Linear(256, 256), nn.GELU()) for _ in range(6)))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)


def train(batches: list[tuple[Tensor, Tensor]]) -> Tensor:
    """One update from several small batches."""
    optimizer.zero_grad(set_to_none=True)
    total = torch.zeros(())
    for inputs, labels in batches:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = F.cross_entropy(model(inputs), labels) / len(batches)
        loss.backward()
        total = total + loss.detach()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return total


def random_batches() -> list[tuple[Tensor, Tensor]]:
    """Four batches of eight examples."""
    return [(torch.randn(8, 64), torch.randint(0, 256, (8,))) for _ in range(4)]


step = olla.optimize_step(train, (random_batches(),), model=model, optimizer=optimizer)
for _ in range(10):
    loss = step(random_batches())  # called as train is
print(f"loss {loss:.3f}")

measured = step.measure(random_batches())
print(f"eager {measured.baseline_peak_bytes:,} bytes, planned {measured.peak_bytes:,}: {measured.saving:.0%} less")

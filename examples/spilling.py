"""Fewer bytes than running operators again can reach: tensors wait in a file while nobody needs them."""

import tempfile

import torch
from torch import nn
from torch.nn import functional as F

import olla

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(32, 64), *(nn.Sequential(nn.Linear(64, 64), nn.GELU()) for _ in range(8)))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
inputs, labels = torch.randn(1024, 32), torch.randint(0, 64, (1024,))
example = {"inputs": inputs, "targets": labels, "loss_fn": F.cross_entropy, "optimizer": optimizer}

try:
    olla.optimize(model, **example, memory_budget=1)  # one byte: the error names the smallest budget
except olla.InfeasibleError as error:
    print("running operators again:", error)

with tempfile.TemporaryDirectory() as folder:
    try:
        olla.optimize(model, **example, memory_budget=1, spill_dir=folder)
    except olla.InfeasibleError as error:
        print("spilling, too:", error)
        budget = int(1.05 * error.best_bytes)
    with olla.optimize(model, **example, memory_budget=budget, spill_dir=folder) as step:
        for _ in range(5):
            loss = step(inputs, targets=labels)
        measured = step.measure(inputs, targets=labels)
print(f"loss {loss:.3f}; {measured.spilled_bytes:,} bytes go to the file and back in each step")
print(f"eager {measured.baseline_peak_bytes:,} bytes, planned {measured.peak_bytes:,}: {measured.saving:.0%} less")
print(f"in all {step.plan.persistent_bytes + measured.peak_bytes:,} bytes of {budget:,}")

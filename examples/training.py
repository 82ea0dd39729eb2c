"""A training loop with a scheduler, evaluation and checkpoints: one line of it is another one."""

import tempfile
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import olla

torch.manual_seed(0)
inputs = torch.randn(512, 64)
labels = (inputs @ torch.randn(64, 10)).argmax(1)
loader = DataLoader(TensorDataset(inputs, labels), batch_size=32, shuffle=True)

hidden = (nn.Sequential(nn.Linear(256, 256), nn.ReLU()) for _ in range(5))
model = nn.Sequential(nn.Linear(64, 256), *hidden, nn.Linear(256, 10))
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=3 * len(loader))
checkpoint = Path(tempfile.mkdtemp()) / "checkpoint.pt"

step = olla.optimize(model, inputs[:32], loss_fn=F.cross_entropy, targets=labels[:32], optimizer=optimizer)
for epoch in range(3):
    for some_inputs, some_labels in loader:
        loss = step(some_inputs, targets=some_labels)  # for zero_grad, forward, loss, backward and optimizer.step
        scheduler.step()
    model.eval()
    with torch.no_grad():
        accuracy = (model(inputs).argmax(1) == labels).float().mean()
    model.train()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, checkpoint)
    print(f"epoch {epoch}: loss {loss:.3f}, accuracy {accuracy:.1%}")

saved = torch.load(checkpoint)
model.load_state_dict(saved["model"])  # the step goes on from here: it works on the live model and optimizer
optimizer.load_state_dict(saved["optimizer"])
loss = step(inputs[:32], targets=labels[:32])

measured = step.measure(inputs[:32], targets=labels[:32])  # runs both ways, and puts everything back
print(f"eager {measured.baseline_peak_bytes:,} bytes, planned {measured.peak_bytes:,}: {measured.saving:.0%} less")

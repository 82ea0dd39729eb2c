"""Inference: the peak of a network with branches depends on the order in which they run."""

import torch
from torch import Tensor, nn

import olla


class Pyramid(nn.Module):
    """Looks at an image in several widths, and sums up what it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Conv2d(3, width, 3, padding=1) for width in (8, 16, 32, 64))
        self.heads = nn.ModuleList(nn.Conv2d(width, 4, 1) for width in (8, 16, 32, 64))

    def forward(self, image: Tensor) -> Tensor:
        """The features of all branches, added."""
        seen = [torch.relu(branch(image)) for branch in self.branches]
        return torch.stack([head(features) for head, features in zip(self.heads, seen, strict=True)]).sum(0)


torch.manual_seed(0)
model = Pyramid().eval()
image = torch.randn(1, 3, 64, 64)

with olla.optimize(model, image) as net:  # it holds its memory until it is closed
    features = net(image)
    with torch.no_grad():
        print("equal, bit for bit:", torch.equal(features, model(image)))
    measured = net.measure(image)
print(f"eager {measured.baseline_peak_bytes:,} bytes, planned {measured.peak_bytes:,}: {measured.saving:.0%} less")

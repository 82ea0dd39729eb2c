"""What checks on a GPU share: kernels that give equal bits, and tensors that are there."""

from __future__ import annotations

import os
import unittest

import torch
from eager import EagerTestCase

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what deterministic products need


@unittest.skipUnless(torch.cuda.is_available(), "needs a GPU and a CUDA build of PyTorch")
class GpuTestCase(EagerTestCase):
    """Deterministic where PyTorch can be; new tensors are on the GPU."""

    def setUp(self) -> None:
        torch.use_deterministic_algorithms(True, warn_only=True)
        self.addCleanup(torch.use_deterministic_algorithms, torch.are_deterministic_algorithms_enabled())
        torch.set_default_device("cuda")
        self.addCleanup(torch.set_default_device, None)
        torch.manual_seed(0)

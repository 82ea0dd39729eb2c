"""The gradient of a cross-entropy loss, computed by rows, has the bits of the whole."""

from __future__ import annotations

import itertools
import unittest
from typing import Any
from unittest import mock

import torch
from eager import EagerTestCase, bits, sgd, side
from torch import Tensor, nn, ops
from torch.nn import functional as F

import olla
from olla.capture.rewrite import cross_entropy
from olla.capture.rewrite.cross_entropy import CROSS_ENTROPY_BACKWARD, CROSS_ENTROPY_BACKWARD_OUT, bytes_of_rows
from olla.graph.lifetimes import eager_peak_bytes, peak_bytes
from olla.torch_private import cpu_allocations

aten = ops.aten
SHAPES = [(7, 5), (64, 1000), (33, 257), (3, 5, 4, 6), (2, 21, 17, 33)]
NAMES = {0: "none", 1: "mean", 2: "sum"}


def of_eager(gradient: Tensor, known: Tensor, *others: Any) -> Tensor:
    """What eager PyTorch computes, with the last argument added as label smoothing does."""
    *loss, smoothing = others
    fill = aten.nll_loss_backward if known.dim() == 2 else aten.nll_loss2d_backward
    filled = fill(gradient, known, *loss)
    filled = filled if smoothing is None else smoothing + filled
    result: Tensor = aten._log_softmax_backward_data(filled, known, 1, known.dtype)
    return result


class KernelTest(unittest.TestCase):
    def variations(self, dtype: torch.dtype) -> Any:
        for shape, reduction, weighted, ignored, smooth in itertools.product(SHAPES, NAMES, (0, 1), (-100, 2), (0, 1)):
            torch.manual_seed(0)
            classes, rest = shape[1], (shape[0], *shape[2:])
            known = F.log_softmax(3 * torch.randn(shape), 1).to(dtype)
            target = torch.randint(0, classes, rest)
            weight = torch.rand(classes).to(dtype) if weighted else None
            forward = aten.nll_loss_forward if len(shape) == 2 else aten.nll_loss2d_forward
            loss, total = forward(known, target, weight, reduction, ignored)
            smoothing = torch.randn(rest).to(dtype).unsqueeze(1).expand(shape) if smooth else None
            yield torch.randn_like(loss), known, target, weight, reduction, ignored, total, smoothing

    def test_rows_have_the_bits_of_the_whole(self) -> None:
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            for arguments in self.variations(dtype):
                expected, known = bits(of_eager(*arguments)), arguments[1]
                for size in (1, 3 * known[0].nbytes, 2**20):
                    with mock.patch.object(cross_entropy, "_ROWS", size):
                        made = CROSS_ENTROPY_BACKWARD(*arguments)
                        self.assertTrue(torch.equal(bits(made), expected))
                        over = known.clone()
                        result = CROSS_ENTROPY_BACKWARD_OUT(arguments[0], over, *arguments[2:], out=over)
                        self.assertEqual(result.data_ptr(), over.data_ptr())
                        self.assertTrue(torch.equal(bits(over), expected))

    def test_it_allocates_what_it_says(self) -> None:
        known = F.log_softmax(torch.randn(1000, 3000), 1)
        arguments = (torch.ones(()), known, torch.randint(0, 3000, (1000,)), None, 1, -100, torch.tensor(1000.0), None)
        sizes = cpu_allocations(lambda: CROSS_ENTROPY_BACKWARD_OUT(*arguments, out=known))
        self.assertEqual([size for size in sizes if size > 0], [bytes_of_rows(known)])
        self.assertLessEqual(bytes_of_rows(known), 2**22)


class CrossEntropyTest(EagerTestCase):
    CLASSES = 12_000

    def loss(self, **options: Any) -> Any:
        return lambda output, target: F.cross_entropy(output, target, **options).mean()

    def train(self, loss: Any, **options: Any) -> olla.Step:
        torch.manual_seed(0)
        return self.assert_training_same(
            nn.Linear(8, self.CLASSES),
            lambda: torch.randn(96, 8),
            loss_fn=loss,
            targets=lambda: torch.randint(0, self.CLASSES, (96,)),
            make_optimizer=sgd,
            steps=2,
            **options,
        )

    def test_all_losses_are_the_same_bits(self) -> None:
        for reduction in NAMES.values():
            for options in (
                {},
                {"ignore_index": 3},
                {"weight": torch.rand(self.CLASSES)},
                {"label_smoothing": 0.1},
                {"weight": torch.rand(self.CLASSES), "label_smoothing": 0.1},
            ):
                with self.subTest(reduction=reduction, **options):
                    step = self.train(self.loss(reduction=reduction, **options))
                    self.assertEqual(step.code.count("cross_entropy_backward.out("), 1)

    def test_images_are_the_same_bits(self) -> None:
        torch.manual_seed(0)
        step = self.assert_training_same(
            nn.Conv2d(3, 21, 3),
            lambda: torch.randn(3, 3, 152, 152),
            loss_fn=lambda output, target: F.cross_entropy(output, target, ignore_index=20),
            targets=lambda: torch.randint(0, 21, (3, 150, 150)),
            make_optimizer=sgd,
            steps=2,
        )
        self.assertEqual(step.code.count("cross_entropy_backward.out("), 1)

    def test_half_precision_is_the_same_bits(self) -> None:
        for dtype in (torch.bfloat16, torch.float16):
            step = self.train(lambda output, target, dtype=dtype: F.cross_entropy(output.to(dtype), target))
            self.assertNotIn("cross_entropy_backward", step.code)  # too small
        self.CLASSES = 24_000
        for dtype in (torch.bfloat16, torch.float16):
            step = self.train(lambda output, target, dtype=dtype: F.cross_entropy(output.to(dtype), target))
            self.assertIn("cross_entropy_backward.out(", step.code)

    def test_log_probabilities_that_are_needed_are_kept(self) -> None:
        def make(model: nn.Module, optimizer: Any) -> Any:
            def step(x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
                optimizer.zero_grad()
                known = F.log_softmax(model(x), -1)
                loss = F.nll_loss(known, target)
                loss.backward()
                optimizer.step()
                return loss, known

            return step

        torch.manual_seed(0)
        eager = side(nn.Linear(8, self.CLASSES), sgd)
        planned = eager.copy()
        batches = [((torch.randn(96, 8), torch.randint(0, self.CLASSES, (96,))), {}) for _ in range(3)]
        own = make(planned.model, planned.optimizer)
        step = olla.optimize_step(own, batches[0][0], model=planned.model, optimizer=planned.optimizer)
        self.assert_steps_same(planned, eager, step, make(eager.model, eager.optimizer), batches)
        self.assertIn("cross_entropy_backward.default(", step.code)

    def test_one_tensor_of_the_size_of_the_logits_is_enough(self) -> None:
        model = nn.Linear(8, 5000)
        captured = {"inputs": torch.randn(2048, 8), "targets": torch.randint(0, 5000, (2048,))}
        graph = olla.to_graph(model, **captured, loss_fn=F.cross_entropy, optimizer=sgd(model.parameters()))
        with mock.patch.object(cross_entropy, "_ROWS", 2**40):
            plain = olla.to_graph(model, **captured, loss_fn=F.cross_entropy, optimizer=sgd(model.parameters()))
        logits = 4 * 2048 * 5000
        self.assertGreater(peak_bytes(plain, range(len(plain.ops))), 2 * logits)
        self.assertLess(peak_bytes(graph, range(len(graph.ops))), 1.2 * logits)
        used_up = 8  # the loss and the weight of all rows, which eager PyTorch's second kernel does not need
        self.assertEqual(eager_peak_bytes(graph), eager_peak_bytes(plain) + used_up)


if __name__ == "__main__":
    unittest.main()

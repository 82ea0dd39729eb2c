"""Operators write over an input what they would write elsewhere, and steps need less for it."""

from __future__ import annotations

import itertools
import unittest
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from eager import EagerTestCase, bits, sgd
from torch import Tensor, nn, ops
from torch.nn import functional as F

import olla
from olla.capture.reuse import IN_PLACE, OVERWRITING, fits
from olla.capture.rewrite.batch_norm import BATCH_NORM_BACKWARD
from olla.capture.rewrite.cross_entropy import CROSS_ENTROPY_BACKWARD
from olla.capture.rewrite.dropout import DROPOUT
from olla.capture.rewrite.embedding_sum import EMBEDDING_SUM
from olla.graph.events import Allocate, Event, eager_events_of, events_of
from olla.graph.lifetimes import eager_peak_bytes, peak_bytes
from olla.torch_private import OpOverload, cpu_allocations

aten = ops.aten
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SHAPES = [(3, 5), (2, 64, 33), (128, 257)]

# What stands in the place of the arguments; x are tensors of the result's shape, which may be written over.
ARGUMENTS: dict[OpOverload, Callable[[Callable[[], Tensor]], list[Any]]] = {
    aten.add.Tensor: lambda x: [x(), x()],
    aten.sub.Tensor: lambda x: [x(), x()],
    aten.mul.Tensor: lambda x: [x(), x()],
    aten.div.Tensor: lambda x: [x(), x()],
    aten.pow.Tensor_Scalar: lambda x: [x(), 3],
    aten.sqrt.default: lambda x: [x()],
    aten.rsqrt.default: lambda x: [x()],
    aten.neg.default: lambda x: [x()],
    aten.exp.default: lambda x: [x()],
    aten.tanh.default: lambda x: [x()],
    aten.sigmoid.default: lambda x: [x()],
    aten.gelu.default: lambda x: [x()],
    aten.silu.default: lambda x: [x()],
    aten.where.self: lambda x: [x() > 0, x(), x()],
    aten._softmax.default: lambda x: [x(), -1, False],
    aten._log_softmax.default: lambda x: [x(), -1, False],
    aten.gelu_backward.default: lambda x: [x(), x()],
    aten.silu_backward.default: lambda x: [x(), x()],
    aten.tanh_backward.default: lambda x: [x(), x()],
    aten.sigmoid_backward.default: lambda x: [x(), x()],
    aten.threshold_backward.default: lambda x: [x(), x(), 0],
    aten.hardtanh_backward.default: lambda x: [x(), x(), -1, 1],
    aten.leaky_relu_backward.default: lambda x: [x(), x(), 0.1, False],
    aten._softmax_backward_data.default: lambda x: [x(), x(), -1, x().dtype],
    aten._log_softmax_backward_data.default: lambda x: [x(), x(), -1, x().dtype],
    aten.add.Scalar: lambda x: [x(), 0.3],
    aten.sub.Scalar: lambda x: [x(), 0.3],
    aten.mul.Scalar: lambda x: [x(), 0.3],
    aten.div.Scalar: lambda x: [x(), 0.3],
    aten.masked_fill.Scalar: lambda x: [x(), x() > 0, 0.3],
    aten.relu.default: lambda x: [x()],
    aten.hardtanh.default: lambda x: [x(), -1, 1],
    aten.hardswish.default: lambda x: [x()],
}


def variations(target: OpOverload, dtype: torch.dtype) -> Iterator[list[Any]]:
    """Arguments of several shapes and layouts, also with one tensor in two places, and with other dimensions."""
    make = ARGUMENTS[target]
    for shape, transposed in itertools.product(SHAPES, (False, True)):
        torch.manual_seed(0)

        def tensor(shape: tuple[int, ...] = shape, transposed: bool = transposed) -> Tensor:
            x = torch.randn(shape[::-1] if transposed else shape).to(dtype) * 3
            return x.permute(*range(x.dim())[::-1]) if transposed else x

        yield make(tensor)
        same = tensor()
        yield make(same.clone)
        yield make(lambda same=same: same)
        if "softmax" in target.name():
            arguments = make(tensor)
            arguments[2 if "backward" in target.name() else 1] = 0
            yield arguments


def changes(events: Sequence[Event]) -> list[int]:
    """Bytes more, or less, op by op; within one op, releases come in any order."""
    sizes, found = dict[int, int](), list[int]()
    for event in events:
        if isinstance(event, Allocate):
            sizes[event.name] = event.size
            found.append(event.size)
        elif found and found[-1] < 0:
            found[-1] -= sizes[event.name]
        else:
            found.append(-sizes[event.name])
    return found


class OverwritingTest(unittest.TestCase):
    def test_every_operator_gives_the_same_bits_over_each_of_its_inputs(self) -> None:
        others = {BATCH_NORM_BACKWARD, CROSS_ENTROPY_BACKWARD, DROPOUT, EMBEDDING_SUM}  # with tests of their own
        self.assertEqual(set(ARGUMENTS), {*OVERWRITING, *IN_PLACE} - others)
        for target in ARGUMENTS:
            for arguments in [a for dtype in DTYPES for a in variations(target, dtype)]:
                expected = target(*arguments)
                for position, over in enumerate(arguments):
                    if not isinstance(over, Tensor) or (target in IN_PLACE and position):
                        continue
                    if (over.dtype, over.stride()) != (expected.dtype, expected.stride()):
                        continue  # as it is in steps
                    if not fits(target, over):
                        continue
                    with self.subTest(target=target, shape=tuple(over.shape), over=position):
                        self.compare(target, arguments, position, expected)

    def compare(self, target: OpOverload, arguments: list[Any], position: int, expected: Tensor) -> None:
        copies = {id(a): a.clone() for a in arguments if isinstance(a, Tensor)}
        copied = [copies.get(id(a), a) for a in arguments]
        address = copied[position].data_ptr()
        variant, name = (IN_PLACE[target], None) if target in IN_PLACE else OVERWRITING[target]

        self.result = None  # else its release would be news to the profiler

        def call() -> None:
            self.result = variant(*copied, **({name: copied[position]} if name else {}))

        allocated = sum(size for size in cpu_allocations(call) if size > 0)
        self.assertLess(allocated, 64)  # a number becomes a tensor
        self.assertEqual(self.result.data_ptr(), address)
        self.assertTrue(torch.equal(bits(self.result), bits(expected)))


class ReuseTest(EagerTestCase):
    def test_a_transformer_needs_less_and_learns_the_same(self) -> None:
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, activation="gelu", batch_first=True)
        model = nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(16, 40))

        def loss(output: Tensor, target: Tensor) -> Tensor:
            return F.cross_entropy(output.flatten(0, 1), target.flatten())

        step = self.assert_training_same(
            model,
            lambda: torch.randn(8, 12, 16),
            loss_fn=loss,
            targets=lambda: torch.randint(0, 40, (8, 12)),
            make_optimizer=sgd,
        )
        measured = step.measure(torch.randn(8, 12, 16), targets=torch.randint(0, 40, (8, 12)))
        self.assertTrue(measured.exact)
        self.assertIn("_log_softmax_backward_data.out", step.code)

    def test_the_baseline_is_what_eager_pytorch_needs(self) -> None:
        def infer(x: Tensor) -> Tensor:
            return ((x * 2).exp() + 1).tanh().sum()

        class Model(nn.Module):
            forward = staticmethod(infer)

        x = torch.randn(1000)
        graph = olla.to_graph(Model().eval(), x)
        self.assertEqual(sum(op.reused for op in graph.ops), 3 * 4000)
        self.assertEqual(peak_bytes(graph, range(len(graph.ops))), 4004)
        plan = olla.plan(Model().eval(), x, place=False)
        self.assertEqual((plan.peak_bytes, plan.baseline_peak_bytes), (4004, 8000))

    def test_what_eager_pytorch_asks_of_the_allocator_is_still_known(self) -> None:
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(16, 2, 32, activation="gelu")
        captured = {"inputs": torch.randn(5, 3, 16), "optimizer": sgd(layer.parameters())}
        with mock.patch("olla.capture.trace.rewrite"):
            graph = olla.to_graph(layer, **captured)
            with mock.patch("olla.planning.reuse", return_value={}):
                plain = olla.to_graph(layer, **captured)
        self.assertGreater(sum(op.reused > 0 for op in graph.ops), 10)
        self.assertEqual(sum(op.reused for op in plain.ops), 0)
        self.assertEqual(changes(eager_events_of(graph)), changes(events_of(plain, range(len(plain.ops)))))
        self.assertEqual(eager_peak_bytes(graph), peak_bytes(plain, range(len(plain.ops))))
        self.assertEqual(max(itertools.accumulate(changes(eager_events_of(graph)))), eager_peak_bytes(graph))

    def test_what_is_needed_later_or_belongs_to_others_is_not_written_over(self) -> None:
        class Model(nn.Module):
            def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
                kept = x * 2  # used twice
                first = kept.exp()
                row = kept[0] + kept.sum()  # smaller
                whole = x + x  # an input
                return first + kept, row.tanh(), whole

        self.assert_inference_same(Model(), lambda: torch.randn(4, 5))
        graph = olla.to_graph(Model().eval(), torch.randn(4, 5))
        outputs = {graph.storages[storage].name for storage in graph.outputs}
        self.assertEqual(len(outputs), 3)

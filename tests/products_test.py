"""Matrix products by oneDNN have the bits of MKL's, are used where they are faster, and never cost a budget."""

from __future__ import annotations

import itertools
import unittest
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from eager import EagerTestCase, sgd
from torch import Tensor, fx, nn, ops
from torch.nn import functional as F

import olla
from olla.run import products
from olla.run.products import choose_products, restore_products
from olla.torch_private import trace_fake

aten = ops.aten
MAY_BE_FASTER = products._onednn_may_be_faster()
SHAPES = [(64, 64, 64), (37, 200, 51), (2050, 256, 30), (30, 385, 1030), (2049, 64, 1025), (96, 2000, 128)]
SPECIAL = [0.0, -0.0, 1e-40, -1e-30, torch.inf, -torch.inf, torch.nan, 3e38]
LAYOUTS = (((300, 400), (400, 1), 0), ((400, 500), (1, 400), 8))

only_here = unittest.skipUnless(MAY_BE_FASTER, "MKL uses all of this processor, or oneDNN cannot be called")
any_time = mock.patch.object(products, "_FASTER", float("inf"))  # bits decide alone


def matrices() -> Iterator[tuple[Tensor, Tensor]]:
    """Factors of several shapes: both, one or none of them transposed, or a part of a larger one."""
    for (rows, depth, columns), layouts in itertools.product(SHAPES, itertools.product(range(3), repeat=2)):
        torch.manual_seed(0)
        yield tuple(  # type: ignore[misc]
            (torch.randn(shape), torch.randn(shape[::-1]).t(), torch.randn(shape[0], shape[1] + 5)[:, 2:-3])[layout]
            for shape, layout in zip(((rows, depth), (depth, columns)), layouts, strict=True)
        )


@only_here
class OperatorTest(EagerTestCase):
    def test_products_have_the_bits_of_mkl(self) -> None:
        threads = torch.get_num_threads()
        for one, other in matrices():
            out = one.shape[0], other.shape[1]
            with self.subTest(one=(one.shape, one.stride()), other=(other.shape, other.stride())):
                self.assert_same(ops.olla.mm(one, other, threads), aten.mm(one, other), "mm")
                for bias in (torch.randn(out[1]), torch.randn(out), torch.randn(out[0], 1)):
                    found, expected = ops.olla.addmm(bias, one, other, threads), aten.addmm(bias, one, other)
                    self.assert_same(found, expected, f"addmm, bias of {tuple(bias.shape)}")

    def test_special_numbers_have_them_too(self) -> None:
        torch.manual_seed(0)
        one, other = torch.randn(64, 300), torch.randn(300, 48)
        for row, (first, second) in enumerate(itertools.product(SPECIAL, repeat=2)):
            one[row, 7 * row % 300], other[7 * row % 300, row % 48] = first, second
        one[5], other[:, 5] = -0.0, 1.0  # nothing but -0 is added up
        found, expected = ops.olla.mm(one, other, torch.get_num_threads()), aten.mm(one, other)
        self.assertTrue(expected.isnan().any() and expected.isinf().any() and expected.isfinite().any())
        self.assert_same(found, expected, "special numbers")

    def test_another_number_of_threads_is_left_to_mkl(self) -> None:
        one, other = torch.randn(40, 300), torch.randn(300, 50)
        with torch.profiler.profile() as profile:
            found = ops.olla.mm(one, other, torch.get_num_threads() + 1)
        self.assertIn("aten::mm", {event.key for event in profile.key_averages()})
        self.assert_same(found, aten.mm(one, other), "mm")


@only_here
class ChoiceTest(unittest.TestCase):
    def chosen(self, one: Tensor, other: Tensor) -> fx.Node:
        """The call, as it is chosen, that multiplies these."""
        node = trace_fake(torch.mm, one, other).graph.find_nodes(op="call_function", target=aten.mm.default)[0]
        with any_time:
            choose_products([node])
        return node

    def test_what_is_faster_is_taken_and_can_be_put_back(self) -> None:
        node = self.chosen(torch.randn(300, 400), torch.randn(400, 500))
        self.assertIs(node.target, ops.olla.mm.default)
        self.assertEqual(node.args[2], torch.get_num_threads())
        with self.assertLogs("olla", "WARNING"):
            self.assertTrue(restore_products([node]))
        self.assertIs(node.target, aten.mm.default)
        self.assertEqual(len(node.args), 2)
        self.assertFalse(restore_products([node]))

    def test_what_is_small_or_in_double_precision_stays(self) -> None:
        for one in (torch.randn(30, 400), torch.randn(300, 400, dtype=torch.float64)):
            node = self.chosen(one, torch.randn(400, 500, dtype=one.dtype))
            self.assertIs(node.target, aten.mm.default)

    def test_nothing_changes_where_onednn_is_turned_off(self) -> None:
        with torch.backends.mkldnn.flags(enabled=False):
            node = self.chosen(torch.randn(300, 400), torch.randn(400, 500))
        self.assertIs(node.target, aten.mm.default)

    def test_what_takes_longer_stays(self) -> None:
        with mock.patch.object(products, "_timed", lambda call: (call(), 1.0)):
            self.assertFalse(products._is_faster.__wrapped__(aten.mm.default, LAYOUTS, torch.get_num_threads()))

    def test_what_has_other_bits_stays(self) -> None:
        def halves(one: Tensor, other: Tensor, _: int) -> Tensor:
            return one[:, :200] @ other[:200] + one[:, 200:] @ other[200:]

        with any_time, mock.patch.dict(products.BY_ONEDNN, {aten.mm.default: halves}):  # type: ignore[dict-item]
            self.assertFalse(products._is_faster.__wrapped__(aten.mm.default, LAYOUTS, torch.get_num_threads()))


class MachineTest(unittest.TestCase):
    def test_processors_that_mkl_uses_whole_are_left_to_it(self) -> None:
        capability, maker = "torch.backends.cpu.get_cpu_capability", "olla.run.products._is_of_intel"
        for name, value in (("platform.machine", "aarch64"), (capability, "AVX2"), (maker, True)):
            with self.subTest(name), mock.patch(name, return_value=value):
                self.assertFalse(products._onednn_may_be_faster.__wrapped__())


@only_here
@any_time
class StepTest(EagerTestCase):
    def setUp(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 8))

    def inputs(self) -> Tensor:
        return torch.randn(2048, 512)

    def targets(self) -> Tensor:
        return torch.randint(0, 8, (2048,))

    def train(self, **options: Any) -> set[object]:
        """What planned steps call, which are held against eager ones and then measured."""
        training = {"loss_fn": F.cross_entropy, "targets": self.targets, **options}
        step = self.assert_training_same(self.model, self.inputs, **training)
        self.assertTrue(step.measure(self.inputs(), targets=self.targets()).exact)
        return {node.target for node in step._current.draft.lowered.nodes}

    def test_steps_call_them(self) -> None:
        self.assertLessEqual({ops.olla.mm.default, ops.olla.addmm.default}, self.train())

    def test_the_smallest_budget_is_kept_by_mkl(self) -> None:
        training = {"loss_fn": F.cross_entropy, "targets": self.targets(), "optimizer": sgd(self.model.parameters())}
        with self.assertRaises(olla.InfeasibleError) as raised:
            olla.plan(self.model, self.inputs(), **training, memory_budget=1, place=False)
        with self.assertLogs("olla", "WARNING") as logged:
            targets = self.train(memory_budget=raised.exception.best_bytes)
        self.assertIn("MKL's again", " ".join(logged.output))
        self.assertLessEqual({aten.mm.default, aten.addmm.default}, targets)
        self.assertNotIn(ops.olla.mm.default, targets)

    def test_compiled_models_call_them(self) -> None:
        self.assertIn("olla::mm", self.assert_compiled_same(self.model, self.inputs, self.targets))


if __name__ == "__main__":
    unittest.main()

"""What operators write and draw is what the graph says: checked by running real steps op by op."""

from __future__ import annotations

import unittest
from pathlib import Path
from typing import Any

import torch
import torchvision
from eager import bits, sgd
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils import _pytree

import olla
from olla.capture.lower import Lowered
from olla.graph.graph import Graph


def captured(model: nn.Module, x: Any, y: Tensor | None = None) -> tuple[olla.Step, Lowered]:
    loss_fn = F.cross_entropy if y is not None else None
    step = olla.optimize(model.train(), x, loss_fn=loss_fn, targets=y, optimizer=sgd(model.parameters()), reorder=False)
    return step, step._current.draft.lowered


class WatchingInterpreter(fx.Interpreter):
    """Runs a traced step and notes each call that changes an argument, or draws, without saying so."""

    def __init__(self, module: fx.GraphModule, lowered: Lowered) -> None:
        super().__init__(module)
        self.ops = dict(zip(lowered.nodes, lowered.graph.ops, strict=True))
        self.generators = {i for i, s in enumerate(lowered.graph.storages) if s.name == "random generator"}
        self.undeclared: list[str] = []

    def run_node(self, node: fx.Node) -> Any:
        if node.op != "call_function" or "olla.update" in str(node.target):
            return super().run_node(node)
        arguments = [node.args, node.kwargs]
        values = [v for v in _pytree.tree_leaves(self.map_nodes_to_values(arguments, node)) if isinstance(v, Tensor)]
        before = [bits(value).clone() for value in values]
        random_state = torch.get_rng_state()
        result = super().run_node(node)
        op = self.ops.get(node)
        changes = not all(torch.equal(bits(v), b) for v, b in zip(values, before, strict=True))
        if changes and (op is None or not set(op.writes) - self.generators):
            self.undeclared.append(f"{node.target} writes")
        draws = not torch.equal(torch.get_rng_state(), random_state)
        if draws and (op is None or not set(op.writes) & self.generators):
            self.undeclared.append(f"{node.target} draws")
        if op is None:  # a view: it must not have made new bytes
            inputs = {value.untyped_storage().data_ptr() for value in values}
            for made in _pytree.tree_leaves(result):
                if isinstance(made, Tensor) and made.numel() and made.untyped_storage().data_ptr() not in inputs:
                    self.undeclared.append(f"{node.target} allocates")
        return result


class EffectsTest(unittest.TestCase):
    def check(self, model: nn.Module, x: Any, y: Tensor | None = None) -> None:
        torch.manual_seed(0)
        step, lowered = captured(model, x, y)
        traced = step._current.draft.traced
        watcher = WatchingInterpreter(traced.module, lowered)
        state = [tensor.detach() for tensor in step._program.state.values()]
        inputs = [leaf for leaf in _pytree.tree_leaves((x, {"targets": y})) if isinstance(leaf, Tensor)]
        watcher.run(*state, *inputs, enable_io_processing=False)
        self.assertEqual(watcher.undeclared, [])
        self.assertGreater(len(watcher.ops), 5)

    def test_batch_norm_writes_its_statistics(self) -> None:
        _, lowered = captured(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), torch.randn(2, 3, 8, 8))
        storages = lowered.graph.storages
        written = {
            storages[s].name
            for op in lowered.graph.ops
            if "batch_norm_s" in op.name or "native_batch_norm.d" in op.name
            for s in op.writes
        }
        self.assertEqual(written, {"1.running_mean", "1.running_var"})

    def test_efficientnet(self) -> None:
        model = torchvision.models.efficientnet_b0(weights=None, num_classes=5)
        self.check(model, torch.randn(2, 3, 64, 64), torch.randint(0, 5, (2,)))

    def test_swin(self) -> None:
        model = torchvision.models.swin_t(weights=None, num_classes=5)
        self.check(model, torch.randn(2, 3, 64, 64), torch.randint(0, 5, (2,)))

    def test_transformer(self) -> None:
        self.check(nn.Transformer(16, 2, 1, 1, 32), (torch.randn(4, 2, 16), torch.randn(5, 2, 16)))

    def test_recurrent_layers(self) -> None:
        class Last(nn.Module):
            def __init__(self, layer: nn.Module) -> None:
                super().__init__()
                self.layer = layer

            def forward(self, x: Tensor) -> Tensor:
                return self.layer(x)[0]

        for layer in (nn.LSTM(4, 6, 2, dropout=0.5), nn.GRU(4, 6, bidirectional=True), nn.RNN(4, 6)):
            with self.subTest(type(layer).__name__):
                self.check(Last(layer), torch.randn(5, 2, 4))

    def test_an_assortment_of_layers(self) -> None:
        model = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.InstanceNorm2d(8, affine=True, track_running_stats=True),
            nn.RReLU(),
            nn.GroupNorm(2, 8),
            nn.Dropout2d(0.3),
            nn.AvgPool2d(2),
            nn.AlphaDropout(0.2),
            nn.FeatureAlphaDropout(0.2),
            nn.ConvTranspose2d(8, 4, 2, stride=2),
            nn.FractionalMaxPool2d(2, output_size=3),
            nn.Hardswish(inplace=True),
            nn.BatchNorm2d(4),
            nn.ELU(inplace=True),
            nn.Flatten(),
            nn.Linear(36, 5),
            nn.GELU(),
        )
        self.check(model, torch.randn(4, 3, 8, 8), torch.randint(0, 5, (4,)))


class LowerTest(unittest.TestCase):
    def lowered(self, model: nn.Module, *args: Any, **options: Any) -> Graph:
        return olla.optimize(model, args, **options)._current.draft.lowered.graph

    def test_views_are_no_ops_and_in_place_operators_make_no_storages(self) -> None:
        class Views(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                y = (x + 1).t().reshape(-1)[2:]
                y.mul_(2)
                return y

        graph = self.lowered(Views().eval(), torch.randn(4, 4))
        self.assertEqual([op.name for op in graph.ops], ["aten.add.Tensor", "aten.clone.default", "aten.mul_.Tensor"])
        self.assertEqual([len(op.creates) for op in graph.ops], [1, 1, 0])
        self.assertEqual([s.size for s in graph.storages], [64, 64, 64])
        self.assertEqual(graph.outputs, (graph.ops[1].creates[0],))

    def test_state_is_persistent_under_its_own_names(self) -> None:
        model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
        optimizer = torch.optim.Adam(model.parameters())
        graph = self.lowered(model, torch.randn(4, 3), optimizer=optimizer)
        sizes = {storage.name: storage.size for storage in graph.storages if storage.persistent}
        for name, tensor in model.state_dict().items():
            self.assertEqual(sizes[name], tensor.numel() * tensor.element_size())
        self.assertEqual(sizes["optimizer state of 0.weight"], 2 * 6 * 4 + 4)  # two moments and a step counter

    def test_an_update_comes_after_the_last_reader_of_its_parameter(self) -> None:
        model = nn.Sequential(nn.Linear(3, 200), nn.Linear(200, 2))
        graph = self.lowered(model, torch.randn(4, 3), optimizer=sgd(model.parameters()))
        weight = next(i for i, storage in enumerate(graph.storages) if storage.name == "1.weight")
        update = next(i for i, op in enumerate(graph.ops) if op.name.startswith("update") and weight in op.writes)
        readers = {i for i, op in enumerate(graph.ops) if weight in op.reads}
        self.assertGreaterEqual(len(readers), 2)  # forward and backward
        self.assertLessEqual(readers, set(graph.predecessors[update]))

    def test_small_neighbours_share_an_update(self) -> None:
        even = nn.Sequential(nn.Linear(100, 100), nn.BatchNorm1d(100))
        graph = self.lowered(even, torch.randn(4, 100), optimizer=sgd(even.parameters()))
        updates = [op.name for op in graph.ops if op.name.startswith("update")]
        self.assertEqual(len(updates), 4)  # each is a hundredth of all gradients: too large to share
        wide = nn.Sequential(nn.Linear(2000, 2000), nn.Unflatten(1, (20, 100)), nn.LayerNorm(100), nn.LayerNorm(100))
        graph = self.lowered(wide, torch.randn(4, 2000), optimizer=sgd(wide.parameters()))
        updates = [op.name for op in graph.ops if op.name.startswith("update")]
        self.assertEqual(updates[-1], "update 0.bias and 2.weight and 2.bias and 3.weight and 3.bias")

    def test_an_op_of_the_forward_pass_knows_its_line(self) -> None:
        class Lines(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return F.gelu(x)

        graph = self.lowered(Lines().eval(), torch.randn(3))
        file, line = graph.ops[0].source.rsplit(":", 1)
        self.assertEqual(Path(file).name, "lower_test.py")
        self.assertIn("F.gelu(x)", Path(file).read_text().splitlines()[int(line) - 1])

    def test_an_op_of_the_backward_pass_knows_the_line_that_it_differentiates(self) -> None:
        class Lines(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.weight = nn.Parameter(torch.randn(300, 300))

            def forward(self, x: Tensor) -> Tensor:
                hidden = torch.tanh(x @ self.weight)
                return hidden.exp().sum()

        model = Lines()

        def train_step(x: Tensor) -> Tensor:
            loss = model(x) * 2
            loss.backward()
            return loss.detach()

        graph = olla.optimize_step(train_step, (torch.randn(4, 300),), model=model)._current.draft.lowered.graph
        lines = Path(__file__).read_text().splitlines()
        for forward, backward, code in (
            ("aten.tanh", "aten.tanh_backward", "hidden = torch.tanh(x @ self.weight)"),
            ("aten.mm", "aten.mm", "hidden = torch.tanh(x @ self.weight)"),
            ("aten.exp", "aten.mul", "return hidden.exp().sum()"),
            ("aten.mul", "aten.mul", "loss = model(x) * 2"),
        ):
            for name, is_backward in ((forward, False), (backward, True)):
                ops = [op for op in graph.ops if op.name.startswith(f"{name}.") and op.backward == is_backward]
                found = {lines[int(op.source.rsplit(":", 1)[1]) - 1].strip() for op in ops}
                self.assertIn(code, found, f"{name}, backward: {is_backward}")

    def test_what_calls_the_step_is_no_line_of_it(self) -> None:
        model = nn.Linear(3, 2)
        graph = self.lowered(model, torch.randn(4, 3), optimizer=sgd(model.parameters()))
        self.assertEqual({op.source for op in graph.ops}, {""})

    def test_random_operators_are_in_one_chain(self) -> None:
        class Draws(nn.Module):
            def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
                return x + torch.rand(3), x * torch.randn(3)

        graph = self.lowered(Draws().eval(), torch.randn(3))
        first, second = (i for i, op in enumerate(graph.ops) if "rand" in op.name)
        self.assertIn(first, graph.predecessors[second])

    def test_simulated_peak_of_program_order_is_what_eager_needs(self) -> None:
        model = nn.Sequential(nn.Linear(300, 400), nn.ReLU(), nn.Linear(400, 300), nn.Tanh())
        x = torch.randn(50, 300)
        step = olla.optimize(model, x, optimizer=sgd(model.parameters()), reorder=False)
        measured = step.measure(x)
        self.assertAlmostEqual(measured.peak_bytes / step.plan.peak_bytes, 1, delta=0.01)
        self.assertAlmostEqual(measured.baseline_peak_bytes / step.plan.baseline_peak_bytes, 1, delta=0.01)

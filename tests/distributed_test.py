"""Several processes train one model as DistributedDataParallel does, bit by bit, and none waits for another forever.

Each test starts processes that run one of the functions ``*_rank`` below, with gloo. Four processes are started with
``RUN_SKIPPED=1``.
"""

from __future__ import annotations

import copy
import os
import tempfile
import unittest
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree

import olla
from olla.measure.measurement import peak_of
from tests.eager import bits

STEPS = 10
TIMEOUT = timedelta(seconds=120)  # so that nothing hangs
slow = unittest.skipUnless(os.environ.get("RUN_SKIPPED"), "takes minutes: set RUN_SKIPPED=1")

Batch = tuple[tuple[Any, ...], dict[str, Any]]


def together(function: Callable[..., Any], *args: Any, count: int = 2) -> list[Any]:
    """What ``function(*args)`` returns on each of several ranks."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_run, args=(count, folder, function, args), nprocs=count)
        return [torch.load(Path(folder, f"{rank}.pt"), weights_only=False) for rank in range(count)]


def _run(rank: int, count: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=count, timeout=TIMEOUT)
    torch.manual_seed(rank)  # ranks begin with different models, as far as it is left to them
    torch.save(function(*args), Path(folder, f"{rank}.pt"))
    dist.barrier()
    dist.destroy_process_group()
    # PyTorch keeps the group (in default arguments of torch.distributed.nn, in device meshes), and one that is there
    # when the interpreter ends may abort the process (pytorch issue 190489): so it does not end in the usual way.
    os._exit(0)


def net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Dropout(0.1),
        nn.Linear(8 * 36, 64), nn.Tanh(), nn.Linear(64, 10),
    )  # fmt: skip


def net_batch(size: int = 4) -> Batch:
    return (torch.randn(size, 3, 8, 8),), {"targets": torch.randint(0, 10, (size,))}


def resnet18() -> nn.Module:
    import torchvision

    return torchvision.models.resnet18(num_classes=10)


def resnet18_batch() -> Batch:
    return (torch.randn(2, 3, 64, 64),), {"targets": torch.randint(0, 10, (2,))}


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=64, n_head=2, vocab_size=500, n_positions=64))


def gpt2_batch() -> Batch:
    tokens = torch.randint(0, 500, (2, 32))
    return (), {"input_ids": tokens, "labels": tokens}


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)


def loss_of(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    named = dict(kwargs)
    targets = named.pop("targets", None)
    output = model(*args, **named)
    return output.loss if targets is None else F.cross_entropy(output, targets)


def planned(model: nn.Module, batch: Batch, optimizer: torch.optim.Optimizer, **options: Any) -> olla.Step:
    args, kwargs = batch
    named = dict(kwargs)
    targets = named.pop("targets", None)
    loss_fn = None if targets is None else F.cross_entropy
    options = {"process_group": dist.group.WORLD, "progress": False, **options}
    return olla.optimize(model, args or named, loss_fn=loss_fn, targets=targets, optimizer=optimizer, **options)


def same(one: Any, other: Any) -> bool:
    """Whether all tensors are, bit by bit."""
    pairs = zip(_pytree.tree_leaves(one), _pytree.tree_leaves(other), strict=True)
    return all(torch.equal(bits(a), bits(b)) if isinstance(a, Tensor) else a == b for a, b in pairs)


def training_rank(make: Callable[[], nn.Module], make_batch: Callable[[], Batch], **options: Any) -> dict[str, Any]:
    """Train with OLLA and with DistributedDataParallel; what is equal, and both peaks."""
    model = make().train()
    reference = copy.deepcopy(model)
    # Gloo adds the parts of a bucket in different orders, so more than two ranks need a bucket for each parameter;
    # without find_unused_parameters, the first step would have one for all.
    alone = {} if dist.get_world_size() == 2 else {"bucket_cap_mb": 1e-6, "find_unused_parameters": True}
    wrapped = DistributedDataParallel(reference, **alone)
    optimizer, other = sgd(model), sgd(reference)
    batches = [make_batch() for _ in range(STEPS)]
    step = planned(model, batches[0], optimizer, **options)
    found = {"losses": True, "random": True}
    for number, (args, kwargs) in enumerate(batches):
        torch.manual_seed(number)
        loss = step(*args, **kwargs)
        state = torch.get_rng_state()
        torch.manual_seed(number)
        other.zero_grad(set_to_none=True)
        expected = loss_of(wrapped, args, kwargs)
        expected.backward()
        other.step()
        found["losses"] &= same(loss, expected.detach())
        found["random"] &= same(state, torch.get_rng_state())
    found["states"] = same(model.state_dict(), reference.state_dict())
    found["optimizers"] = same(
        [optimizer.state[p] for p in model.parameters()], [other.state[p] for p in reference.parameters()]
    )
    found["counts"] = (step._current.replay.counts.missed, step._current.replay.counts.escapes)

    measured = step.measure(*args, **kwargs)
    found["exact"] = measured.exact

    def eager() -> None:
        other.zero_grad(set_to_none=True)
        loss_of(wrapped, args, kwargs).backward()
        other.step()

    other.zero_grad(set_to_none=True)
    found["peaks"] = (measured.peak_bytes, peak_of(eager, torch.device("cpu"))[0])
    found["order"], found["model"] = step.plan.order, model.state_dict()
    return found


def models_rank(*models: tuple[Callable[[], nn.Module], Callable[[], Batch]]) -> list[dict[str, Any]]:
    return [training_rank(*model) for model in models]


def error_of(call: Callable[[], Any]) -> str:
    """What a call raises, as text; empty if it does not."""
    try:
        call()
    except olla.OllaError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def errors_rank() -> dict[str, Any]:
    """What goes wrong on one rank is an error on both, changes nothing, and the step can go on."""
    rank, group = dist.get_rank(), dist.group.WORLD
    found: dict[str, Any] = {}
    wide = nn.Sequential(nn.Linear(8, 8 + rank), nn.Linear(8 + rank, 2))
    before = copy.deepcopy(wide.state_dict())
    batch = ((torch.randn(4, 8),), {"targets": torch.randint(0, 2, (4,))})
    found["model"] = error_of(lambda: planned(wide, batch, sgd(wide)))

    class Careless(nn.Linear):
        def forward(self, inputs: Tensor) -> Tensor:
            return super().forward(inputs) * (inputs.sum().item() if rank else 1.0)

    careless = Careless(8, 2)
    found["capture"] = error_of(lambda: planned(careless, batch, sgd(careless)))
    plain = nn.Linear(8, 2)
    found["budget"] = error_of(lambda: planned(plain, batch, sgd(plain), memory_budget=1))
    found["unchanged"] = same(before, wide.state_dict())

    model = net()
    step = planned(model, net_batch(), sgd(model))
    step(*net_batch()[0], **net_batch()[1])
    kept = copy.deepcopy(model.state_dict())
    args, kwargs = net_batch(4 - rank)
    found["shape"] = error_of(lambda: step(*args, **kwargs))
    if rank:
        model.eval()
    args, kwargs = net_batch()
    found["mode"] = error_of(lambda: step(*args, **kwargs))
    model.train()
    found["kept"] = same(kept, model.state_dict())
    found["goes on"] = [error_of(lambda: step(*args, **kwargs)) for _ in range(4)]
    args, kwargs = net_batch(3)
    found["new shape"] = error_of(lambda: step(*args, **kwargs))

    ddp, lbfgs = DistributedDataParallel(net()), torch.optim.LBFGS(model.parameters())
    found["wrapped"] = error_of(lambda: planned(ddp, net_batch(), sgd(ddp)))
    found["no optimizer"] = error_of(lambda: olla.optimize(model, args, process_group=group))
    found["closure"] = error_of(lambda: planned(model, net_batch(), lbfgs))
    found["spill"] = error_of(lambda: planned(model, net_batch(), sgd(model), spill_dir="."))
    found["no group"] = error_of(lambda: planned(model, net_batch(), sgd(model), process_group="gloo"))
    found["not told"] = error_of(lambda: own_step(model, sgd(model), process_group=None))
    embedding = nn.Embedding(4, 2, sparse=True)
    found["sparse"] = error_of(lambda: planned(embedding, ((torch.tensor([1]),), {}), sgd(embedding)))

    from torch.distributed.fsdp import fully_shard

    sharded = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    fully_shard(sharded, mesh=dist.init_device_mesh("cpu", (2,)))
    found["sharded"] = error_of(lambda: planned(sharded, batch, sgd(sharded)))
    return found


def own_step(model: nn.Module, optimizer: torch.optim.Optimizer, process_group: Any) -> olla.Step:
    def train_step(inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(model(inputs), targets)
        loss.backward()
        olla.average_gradients(model.parameters(), dist.group.WORLD)
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        return loss.detach(), norm

    args, kwargs = net_batch()
    return olla.optimize_step(
        train_step, (*args, kwargs["targets"]), model=model, optimizer=optimizer, process_group=process_group
    )


def own_step_rank() -> dict[str, Any]:
    """A step of its own that clips what was averaged; and two steps of equal ranks that run in turn."""
    model = net()
    reference = copy.deepcopy(model)
    wrapped, optimizer, other = DistributedDataParallel(reference), sgd(model), sgd(reference)
    step = own_step(model, optimizer, dist.group.WORLD)
    found = {"results": True}
    for number in range(STEPS):
        (inputs,), kwargs = net_batch()
        torch.manual_seed(number)
        result = step(inputs, kwargs["targets"])
        torch.manual_seed(number)
        other.zero_grad(set_to_none=True)
        loss = loss_of(wrapped, (inputs,), kwargs)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(reference.parameters(), 0.1)
        other.step()
        found["results"] &= same(result, (loss.detach(), norm))
    found["states"] = same(model.state_dict(), reference.state_dict())
    graph = step._current.draft.lowered.graph
    group = next(i for i, storage in enumerate(graph.storages) if storage.name == "process group")
    found["collectives"] = [op for op in step.plan.order if group in graph.ops[op].writes]
    found["gradients"] = [graph.ops[op].writes for op in found["collectives"]]
    return found


class DistributedTest(unittest.TestCase):
    def assert_trained(self, ranks: list[dict[str, Any]]) -> None:
        for rank, found in enumerate(ranks):
            with self.subTest(rank=rank):
                for what in ("losses", "random", "states", "optimizers", "exact"):
                    self.assertTrue(found[what], what)
                self.assertEqual(found["counts"], (0, 0))
                peak, others = found["peaks"]
                self.assertLess(peak, others)
        first, *others = ranks
        for found in others:
            self.assertEqual(found["order"], first["order"])

    def test_two_ranks_train_as_distributed_data_parallel_does(self) -> None:
        models = ((net, net_batch), (resnet18, resnet18_batch), (gpt2, gpt2_batch))
        for ranks in zip(*together(models_rank, *models), strict=True):
            self.assert_trained([*ranks])

    @slow
    def test_four_ranks_train_as_distributed_data_parallel_does(self) -> None:
        models = ((net, net_batch), (resnet18, resnet18_batch), (gpt2, gpt2_batch))
        for ranks in zip(*together(models_rank, *models, count=4), strict=True):
            self.assert_trained([*ranks])

    def test_a_step_of_ones_own_clips_averaged_gradients(self) -> None:
        ranks = together(own_step_rank)
        for found in ranks:
            self.assertTrue(found["results"])
            self.assertTrue(found["states"])
            self.assertEqual(found["collectives"], sorted(found["collectives"]))
            self.assertEqual(len(set(found["gradients"])), len([*net().parameters()]))

    def test_what_fails_on_one_rank_is_a_clear_error_on_every_rank(self) -> None:
        first, second = together(errors_rank)
        self.assertIn("CaptureError: the step asks for the value of a tensor", second["capture"])
        self.assertIn("ExecutionError: rank 1 cannot go on, so no rank does: CaptureError: the step", first["capture"])
        for found in (first, second):
            self.assertIn(
                "rank 1 has another step than rank 0: '0.weight of torch.float32, shape [9, 8]", found["model"]
            )
            self.assertIn("where rank 0 has '0.weight of torch.float32, shape [8, 8]", found["model"])
            self.assertIn("InfeasibleError: the step does not fit into 1 bytes", found["budget"])
            self.assertIn("rank 1 has another step than rank 0: 'arguments [(torch.Size([3, 3, 8", found["shape"])
            self.assertIn("modules in training' where rank 0 has '10 modules in training'", found["mode"])
            self.assertTrue(found["unchanged"] and found["kept"])
            self.assertEqual((found["goes on"], found["new shape"]), ([""] * 4, ""))
            self.assertIn("pass its .module, and process_group=", found["wrapped"])
            self.assertIn("process_group without an optimizer", found["no optimizer"])
            self.assertIn("the optimizer calls the step back", found["closure"])
            self.assertIn("spill_dir with process_group", found["spill"])
            self.assertIn("the process group is 'gloo'", found["no group"])
            self.assertIn("pass process_group= to olla.optimize_step", found["not told"])
            self.assertIn("is sparse: only dense ones are averaged", found["sparse"])
            self.assertIn("parameter '0.weight' is a DTensor", found["sharded"])

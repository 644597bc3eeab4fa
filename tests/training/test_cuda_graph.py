"""Steps replayed from a CUDA graph against eager ones, bit for bit: with TEST_GPU=1 on a GPU.

On a CPU a stand-in takes the place of CUDA's graph. Like it, its capture changes nothing, and its replay
computes the same function on the captured tensors: what `StepGraph` does around it is tested everywhere.
"""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from runs import assert_same, call, pretraining
from torch import nn

from datasets.images import CIFAR10_STATS, ImageSet
from datasets.rand_augment import RandAugment
from datasets.transforms import (
    Augmentation,
    finetune_ops,
    instance_ops,
    patch_ops,
    two_view_ops,
)
from lib.loading.batches import Batches, Streams
from lib.objectives.classification import Classification
from lib.objectives.coding_rate import ManyPatches
from lib.objectives.consistency import Consistency
from lib.objectives.instance import InstanceDiscrimination
from lib.objectives.memory_bank import MemoryBank, build_loss
from lib.objectives.objective import Objective
from lib.objectives.two_view import TwoViews
from lib.runtime.devices import Device
from lib.runtime.seeding import generator
from lib.training import cuda_graph
from lib.training.cuda_graph import WARM_UP, StepGraph, step_graph
from lib.training.optimizer import learning_rate, sgd
from lib.training.step import train_steps
from models import build_model

pytestmark = pytest.mark.gpu
ON_GPU = torch.cuda.is_available()
DEVICE = Device(torch.device("cuda", 0) if ON_GPU else torch.device("cpu"), bf16=ON_GPU)
TASKS = ("softmax", "nce", "two-view", "patches-tcr", "classifier", "consistency")
NUM_IMAGES, BATCH_SIZE = 30, 8  # three full batches an epoch, and one of six images


@pytest.fixture(autouse=True)
def _deterministic():
    torch.use_deterministic_algorithms(ON_GPU)
    yield
    torch.use_deterministic_algorithms(False)


class Run:
    """A network in training, and everything that changes with it."""

    def __init__(self, task: str) -> None:
        rng = generator(0, "sample")
        images = torch.randint(0, 256, (NUM_IMAGES, 3, 8, 8), dtype=torch.uint8, generator=rng)
        targets = torch.arange(NUM_IMAGES) % 3
        data = ImageSet("random", images, targets, ("a", "b", "c"), CIFAR10_STATS)
        torch.manual_seed(0)
        dim = 0 if task in ("two-view", "patches-tcr") else 12
        self.model = DEVICE.prepare(build_model("wrn-10-1", dim, normalize=task not in TASKS[-2:]))
        self.objective: Objective = Classification(targets, torch.ones(NUM_IMAGES))
        if task == "two-view":
            self.objective = TwoViews(64, DEVICE, temperature=0.5, batch_size=BATCH_SIZE)
        elif task == "patches-tcr":
            self.objective = ManyPatches(64, DEVICE, views=3)
        elif task in ("softmax", "nce"):
            loss = build_loss({"softmax": 0, "nce": 5}[task], 0.2, z_momentum=0.9)
            views = 2 if task == "nce" else 1
            self.objective = InstanceDiscrimination(MemoryBank(NUM_IMAGES, 12), loss, views)
        self.objective.to(DEVICE.torch_device)
        learned = [*self.model.parameters(), *self.objective.parameters()]
        self.optimizer = sgd(learned, 0.1, 5e-4, kind="lars" if task == "patches-tcr" else "sgd")
        chains = {"two-view": two_view_ops, "patches-tcr": patch_ops}
        chains |= dict.fromkeys(("classifier", "consistency"), finetune_ops)
        ops = chains.get(task, instance_ops)()
        views = [Augmentation(ops, CIFAR10_STATS)] * self.objective.views
        self.batches = Batches(data, views, DEVICE, batch_size=BATCH_SIZE)
        self.repeats, self.streams = task in ("classifier", "consistency"), Streams(self.batches)
        if task == "consistency":
            posteriors = torch.rand(NUM_IMAGES, 12, generator=rng).softmax(dim=1)
            made = Consistency(targets, posteriors, ratio=2, num_batches=48)
            self.objective = made.to(DEVICE.torch_device)
            both = [views[0], Augmentation([*finetune_ops(), RandAugment()], CIFAR10_STATS)]
            others = Batches(data, both, DEVICE, batch_size=2 * BATCH_SIZE, stream=1)
            self.streams = Streams(self.batches, others)

    def state(self) -> dict[str, Any]:
        learning = self.model, self.objective, self.optimizer
        return dict(enumerate(part.state_dict() for part in learning))

    def train(self, epochs: int, iter_size: int, graph: StepGraph | None) -> list[float]:
        """The losses of some epochs, as the scripts train: one graph, and one loop for each epoch."""
        losses: list[float] = []
        per_epoch = -(-self.batches.per_epoch // iter_size)
        schedule = learning_rate("cosine", 0.1, epochs * per_epoch)
        for epoch in range(epochs):
            items = self.batches.epoch(epoch)
            if self.repeats:
                first = epoch * per_epoch * iter_size
                rows = torch.arange(NUM_IMAGES)
                items = self.streams.repeat(rows, first, first + per_epoch * iter_size, others=rows)
            steps = train_steps(
                *(self.model, self.objective, self.optimizer, items, schedule, DEVICE),
                first_step=epoch * per_epoch,
                iter_size=iter_size,
                full_steps=self.repeats,
                graph=graph,
            )
            losses += [float(step.loss) for step in steps]
        return losses


class Stand:
    """What takes the place of `cuda_graph.capture` on a CPU, for one run; it counts."""

    def __init__(self, run: Run, *, fails: bool = False) -> None:
        self.run, self.fails, self.captures, self.replays = run, fails, 0, 0

    def __call__(self, function):
        self.captures += 1
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        kept = [(x, x.detach().clone()) for x in self.tensors()]
        result = function()
        with torch.no_grad():
            for tensor, value in kept:
                tensor.copy_(value)

        def replay() -> None:
            self.replays += 1
            for name, value in function()[0].items():
                result[0][name].copy_(value)

        return replay, result

    def tensors(self) -> list[torch.Tensor]:
        momenta = [x["momentum_buffer"] for x in self.run.optimizer.state.values()]
        parts: list[nn.Module] = [self.run.model, self.run.objective]
        return [*momenta, *(x for part in parts for x in part.state_dict().values())]


@pytest.fixture
def on_any_machine(monkeypatch):
    """A function that prepares a run for a graph, and returns its stand-in; None with CUDA."""
    if ON_GPU:
        return lambda run, **_: None
    monkeypatch.setattr(cuda_graph, "on_stream", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: None)
    monkeypatch.setattr(Device, "scalar", lambda _, value: torch.tensor(value))

    def prepare(run: Run, **options: bool) -> Stand:
        stand = Stand(run, **options)
        monkeypatch.setattr(cuda_graph, "capture", stand)
        return stand

    return prepare


@pytest.mark.parametrize("iter_size", [1, 2])
@pytest.mark.parametrize("task", TASKS)
def test_replayed_steps_have_the_bits_of_eager_ones(task, iter_size, on_any_machine):
    eager, replayed = Run(task), Run(task)
    expected = eager.train(6, iter_size, None)
    stand = on_any_machine(replayed)
    graph = StepGraph(DEVICE)
    assert replayed.train(6, iter_size, graph) == expected
    assert_same(replayed.state(), eager.state())
    assert graph.captured == (1 if replayed.repeats else 2)
    assert isinstance(replayed.optimizer.param_groups[0]["lr"], float)  # as checkpoints hold it
    if stand:
        assert stand.captures == graph.captured
        assert stand.replays == len(expected) - graph.captured * WARM_UP


def test_a_step_that_cannot_be_captured_stays_eager_and_says_why_once(
    on_any_machine, capsys, monkeypatch
):
    eager, other = Run("softmax"), Run("softmax")
    expected = eager.train(6, 1, None)
    if not on_any_machine(other, fails=True):  # inside a capture, CUDA refuses to wait
        capture, wait = cuda_graph.capture, torch.cuda.synchronize
        waiting = lambda step: capture(lambda: (step(), wait())[0])  # noqa: E731
        monkeypatch.setattr(cuda_graph, "capture", waiting)
    graph = StepGraph(DEVICE)
    assert other.train(6, 1, graph) == expected
    assert graph.captured == 0
    assert_same(other.state(), eager.state())
    printed = capsys.readouterr().out
    assert printed.count("cannot be captured as a CUDA graph and stays eager: ") == 1
    assert "and more" not in printed


def test_a_graph_is_for_one_gpu_and_images_in_memory_unless_asked_for(monkeypatch):
    monkeypatch.setattr(cuda_graph, "StepGraph", lambda device: device)
    batches = Run("softmax").batches
    cpu, gpu = (Device(torch.device(name), bf16=False) for name in ("cpu", "cuda:0"))
    batches.device = cpu
    assert step_graph("auto", batches) is None
    with pytest.raises(
        ValueError, match="--cuda-graph on: a step can be captured for a single GPU"
    ):
        step_graph("on", batches)
    batches.device = gpu
    assert step_graph("auto", batches, "default") == step_graph("on", batches) == gpu
    assert step_graph("off", batches) is step_graph("auto", batches, "reduce-overhead") is None
    with pytest.raises(ValueError, match="--compile reduce-overhead records graphs of its own"):
        step_graph("on", batches, "reduce-overhead")
    batches.in_memory = False
    assert step_graph("auto", batches) is None
    assert step_graph("on", batches) == gpu


def test_the_option_is_refused_where_it_cannot_be_kept(tmp_path):
    words = ("--dataset", "patches", "--arch", "wrn-10-1", "--gpus", "cpu", "--cuda-graph", "on")
    with pytest.raises(ValueError, match="--cuda-graph on"):
        call(pretraining, *words, "--model-dir", tmp_path / "m", "--log-dir", tmp_path / "l")

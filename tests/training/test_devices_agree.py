"""What a device computes against naive float64 on the CPU: on the CPU, and with TEST_GPU=1 on a GPU."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import blobs
from torch import nn

from datasets.images import CIFAR10_STATS, ImageSet
from datasets.transforms import Augmentation, finetune_ops, instance_ops
from lib.features.extraction import extract
from lib.graph.knn import classify
from lib.graph.neighbors import nearest_neighbors
from lib.labels.split import labeled_split
from lib.loading.batches import Batches
from lib.objectives.classification import Classification
from lib.objectives.instance import InstanceDiscrimination
from lib.objectives.memory_bank import MemoryBank, build_loss
from lib.propagation import EmbeddingGraph, propagate
from lib.runtime.devices import Device
from lib.runtime.seeding import generator
from lib.training.optimizer import sgd
from lib.training.step import train_steps
from models import build_model

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FLOAT32 = Device(DEVICE, bf16=False)


@pytest.fixture(autouse=True)
def _full_float32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def random_set(n: int = 48, size: int = 16) -> ImageSet:
    rng = generator(0, "sample")
    images = torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=rng)
    return ImageSet("random", images, torch.arange(n) % 3, ("a", "b", "c"), CIFAR10_STATS)


@pytest.mark.parametrize("ops", [instance_ops(), finetune_ops()], ids=["phase 1", "phase 3"])
def test_a_batch_is_augmented_as_its_images_are_one_by_one_on_the_cpu(ops):
    data, augmentation = random_set(), Augmentation(ops, CIFAR10_STATS)
    rows = augmentation.sample_params(len(data), generator(1, "augmentation"))
    together = augmentation(data.images.to(DEVICE), rows).cpu()
    for i, image in enumerate(data.images):
        alone = augmentation(image[None], [values[i : i + 1] for values in rows])
        torch.testing.assert_close(together[i : i + 1], alone, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["wrn-10-1", "resnet18"])
def test_forward_and_backward_are_those_of_float64(name):
    exact = build_model(name, 10).double()
    for layer in exact.modules():
        # large beside the epsilon of BatchNorm, as after some training
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    model = FLOAT32.prepare(build_model(name, 10))
    model.load_state_dict(exact.state_dict())
    x = torch.randn(8, 3, 32, 32, generator=generator(0, "sample"))
    targets = torch.arange(8)
    F.cross_entropy(exact(x.double()), targets).backward()
    F.cross_entropy(model(x.to(DEVICE)), targets.to(DEVICE)).backward()
    for (name, p), q in zip(exact.named_parameters(), model.parameters(), strict=True):
        error = (p.grad - q.grad.cpu().double()).norm() / p.grad.norm().clamp_min(1e-9)
        assert error < 1e-2, name  # float32 through many layers of BatchNorm


@pytest.mark.parametrize("bf16", [False, True])
def test_the_softmax_over_the_bank_is_that_of_float64(bf16):
    v, memory = blobs(4, 8, dim=32)[0], blobs(10, 50, dim=32, seed=1)[0]
    indexes, exact = torch.arange(len(v)), v.double().requires_grad_()
    F.cross_entropy(exact @ memory.double().T / 0.1, indexes).backward()
    own = v.to(DEVICE).requires_grad_()
    build_loss(0, 0.1, bf16=bf16)(own, indexes.to(DEVICE), memory.to(DEVICE)).backward()
    error = (own.grad.cpu().double() - exact.grad).norm() / exact.grad.norm()
    assert error < (2e-2 if bf16 else 1e-5)


@pytest.mark.parametrize("bf16", [False, True])
def test_twenty_steps_end_near_those_of_float64(bf16):
    data = random_set()

    def train(device: Device, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(0)
        model = device.prepare(build_model("wrn-10-1", 16, normalize=True)).to(dtype)
        model.apply(lambda m: m.eval() if isinstance(m, nn.BatchNorm2d) else m)
        bank = MemoryBank(len(data), 16).to(device.torch_device, dtype)
        ops = Augmentation(finetune_ops(), data.stats)
        batches = Batches(data, ops, device, batch_size=16)
        items = [batch for epoch in range(7) for batch in batches.epoch(epoch)][:20]
        items = [
            replace(b, pixels=(b.images.to(dtype),), augmentations=()) for b in items
        ]  # the same pixels
        optimizer = sgd(model.parameters(), 0.01, 5e-4)
        objective = InstanceDiscrimination(bank, build_loss(0, 0.1, bf16=device.bf16))
        steps = list(train_steps(model, objective, optimizer, items, lambda _: 0.01, device))
        losses = torch.stack([step.loss for step in steps])
        return losses.cpu().double(), bank.memory.cpu().double()

    exact, bank = train(Device(torch.device("cpu"), bf16=False), torch.float64)
    losses, own = train(Device(DEVICE, bf16=bf16), torch.float32)
    torch.testing.assert_close(losses, exact, rtol=3e-2 if bf16 else 1e-3, atol=0)
    assert (own * bank).sum(dim=1).min() > (0.98 if bf16 else 0.9999)


def test_features_do_not_depend_on_the_batch():
    data, model = random_set(), FLOAT32.prepare(build_model("wrn-10-1", 16, normalize=True))
    whole = extract(model, data, FLOAT32, batch_size=48).cpu()
    parts = extract(model, data, FLOAT32, batch_size=7).cpu()
    torch.testing.assert_close(whole, parts, atol=1e-5, rtol=0)


def test_neighbors_and_votes_are_those_of_float64():
    features, targets = blobs(5, 60, dim=24)
    found = nearest_neighbors(features.to(DEVICE), 10, include_self=False)
    cosines = features.double() @ features.double().T
    cosines.fill_diagonal_(-2)
    values, _ = cosines.topk(10, dim=1)
    reached = cosines.gather(1, torch.as_tensor(np.asarray(found.indexes)).cpu().long())
    torch.testing.assert_close(
        reached.sort(dim=1, descending=True).values, values, atol=1e-5, rtol=0
    )
    labeled = torch.arange(0, 300, 6)
    votes = classify(
        features.to(DEVICE), features[labeled].to(DEVICE), targets[labeled].to(DEVICE), 5, k=7
    )
    naive = torch.zeros(len(features), 5, dtype=torch.float64)
    top, places = (features.double() @ features[labeled].double().T).topk(7, dim=1)
    naive.scatter_add_(1, targets[labeled][places], (top / 0.1).exp())
    agree = votes.cpu().argmax(dim=1) == naive.argmax(dim=1)
    assert agree.double().mean() > 0.99


@pytest.mark.parametrize("method", ["nc", "filter", "poisson", "spreading"])
def test_labels_spread_on_the_device_as_on_the_cpu_by_dense_matrices(method):
    features, targets = blobs(4, 100, dim=24, spread=0.35)
    split = labeled_split(targets, 20, 4, 0)
    metric = EmbeddingGraph(features.to(DEVICE), num_neighbors=10, solver={"solver": "block"})
    scores = propagate(metric, method, split, targets[split.labeled], 4).scores.cpu()
    exact = EmbeddingGraph(features, num_neighbors=10)  # few images: all eigenvectors by LAPACK
    expected = propagate(exact, method, split, targets[split.labeled], 4).scores
    assert (scores.argmax(dim=1) == expected.argmax(dim=1)).double().mean() > 0.97
    right = (scores.argmax(dim=1) == targets)[split.unlabeled].double().mean()
    assert right > 0.8


@pytest.mark.parametrize("phase", [1, 3])
def test_the_loop_never_waits_for_a_gpu(phase):
    """On the CPU there is nothing to wait for: there tests/runtime/test_profiling.py counts reads."""
    data, device = random_set(), FLOAT32
    model = device.prepare(build_model("wrn-10-1", 8, normalize=phase == 1))
    ops = instance_ops() if phase == 1 else finetune_ops()
    batches = Batches(data, Augmentation(ops, data.stats), device, batch_size=8)
    if phase == 1:
        objective = InstanceDiscrimination(MemoryBank(len(data), 8), build_loss(0, 0.1))
        items = batches.epoch(0)
    else:
        objective = Classification(data.targets, torch.ones(len(data)))
        items = batches.repeat(torch.arange(len(data)), 0, 12)
    optimizer = sgd(model.parameters(), 0.1, 5e-4)
    steps = train_steps(model, objective.to(DEVICE), optimizer, items, lambda _: 0.1, device)
    next(steps)
    if DEVICE.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        assert [step.number for _, step in zip(range(4), steps, strict=False)] == [1, 2, 3, 4]
    finally:
        if DEVICE.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")

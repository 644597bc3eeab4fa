"""Writes files as the published scripts of 2019 did: their classes, their format, their keys.

The classes exist while a file is written and at no other time. Nothing here is imported by the project.
"""

import contextlib
import importlib.util
import pickle
import struct
import sys
import tempfile
import types
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import torch
from torch import Tensor, nn

SOURCES = {
    "torch.nn.backends.thnn": """
class Backend:
    def __reduce__(self):
        return _get_thnn_function_backend, ()


def _get_thnn_function_backend():
    return Backend()
""",
    "lib.alias_multinomial": """
class AliasMethod(object):
    def __init__(self, prob, alias):
        self.prob, self.alias = prob, alias
""",
    "lib.LinearAverage": """
import torch.nn.backends.thnn
from torch import nn


class LinearAverage(nn.Module):
    # stands for the full softmax over the bank: \N{GREEK SMALL LETTER TAU} and momentum in `params`
    def __init__(self, memory, params):
        super().__init__()
        self._backend = torch.nn.backends.thnn._get_thnn_function_backend()
        self.nLem = len(memory)
        self.register_buffer("params", params)
        self.register_buffer("memory", memory)
""",
    "lib.NCEAverage": """
import torch.nn.backends.thnn
from torch import nn


class NCEAverage(nn.Module):
    def __init__(self, memory, params, sampler, K):
        super().__init__()
        self._backend = torch.nn.backends.thnn._get_thnn_function_backend()
        self.nLem, self.K, self.multinomial = len(memory), K, sampler
        self.register_buffer("params", params)
        self.register_buffer("memory", memory)
""",
}


@contextlib.contextmanager
def original_classes() -> Iterator[None]:
    """Modules under the names of the original, with source files, as pickle looks for them."""
    names = ("torch.nn.backends", *SOURCES)
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(sys.modules):
        sys.modules[names[0]] = torch.nn.backends = types.ModuleType(names[0])
        for name, source in SOURCES.items():
            path = Path(folder) / (name.rpartition(".")[2] + ".py")
            path.write_text(source, encoding="utf-8")
            spec = importlib.util.spec_from_file_location(name, path)
            sys.modules[name] = module = importlib.util.module_from_spec(spec)
            if name.startswith("torch"):
                torch.nn.backends.thnn = module
            spec.loader.exec_module(module)
        yield
        del torch.nn.backends


def linear_average(memory: Tensor) -> nn.Module:
    """The bank of the full softmax; inside `original_classes` only."""
    return sys.modules["lib.LinearAverage"].LinearAverage(memory, torch.tensor([0.1, 0.5]))


def nce_average(memory: Tensor) -> nn.Module:
    """The bank of NCE with its sampler; inside `original_classes` only."""
    alias = torch.arange(len(memory)).flip(0)
    sampler = sys.modules["lib.alias_multinomial"].AliasMethod(torch.rand(len(memory)), alias)
    params = torch.tensor([4096, 0.07, 28319.5, 0.5])
    return sys.modules["lib.NCEAverage"].NCEAverage(memory, params, sampler, 4096)


class Python2Pickler(pickle._Pickler):
    """Text as the `str` of Python 2: bytes of no declared encoding."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)

    def save_text(self, text: str) -> None:
        data = text.encode("utf-8")
        if len(data) < 256:
            self.write(pickle.SHORT_BINSTRING + bytes([len(data)]) + data)
        else:
            self.write(pickle.BINSTRING + struct.pack("<i", len(data)) + data)
        self.memoize(text)

    dispatch[str] = save_text


python2 = types.ModuleType("python2")
python2.Pickler = Python2Pickler
python2.dump = lambda value, file, protocol: Python2Pickler(file, protocol).dump(value)


def write(state: Any, path: Path, kind: str = "legacy") -> Path:
    """Write `state` with `cuda:0` as the place of every tensor.

    Args:
        kind: `legacy` (the stream of torch before 1.6), `python2` (the same, written by Python 2), `zip`.
    """
    with mock.patch("torch.serialization.location_tag", return_value="cuda:0"):
        torch.save(
            state,
            path,
            pickle_module=python2 if kind == "python2" else pickle,
            _use_new_zipfile_serialization=kind == "zip",
        )
    return path


def wrapped(model: nn.Module) -> OrderedDict:
    """The state dict of a model inside DataParallel."""
    return OrderedDict((f"module.{name}", value) for name, value in model.state_dict().items())


def optimizer_state(model: nn.Module, lr: float = 0.03) -> dict[str, Any]:
    """SGD's state as torch 0.4 wrote it: parameters go by their address, not by their place."""
    parameters = list(model.parameters())
    momenta = {
        140_000_000_000_000 + 64 * i: {"momentum_buffer": torch.randn_like(p)}
        for i, p in enumerate(parameters)
    }
    group = {"lr": lr, "momentum": 0.9, "dampening": 0, "weight_decay": 5e-4, "nesterov": True}
    return {"state": momenta, "param_groups": [{"params": list(momenta), **group}]}


def cifar_checkpoint(
    path: Path, model: nn.Module, memory: Tensor, *, nce: bool = False, kind: str = "legacy"
) -> dict[str, Any]:
    """Phase 1 on CIFAR, with its memory bank as a pickled module; returns the entries."""
    with original_classes():
        state = {
            "net": wrapped(model),
            "optimizer": optimizer_state(model),
            "acc": 0.8212,
            "epoch": 1269,
            "lemniscate": (nce_average if nce else linear_average)(memory),
        }
        write(state, path, kind)
    return state


def imagenet_checkpoint(path: Path, model: nn.Module, arch: str, memory: Tensor) -> dict[str, Any]:
    """Phase 1 on ImageNet (`lemniscate_resnet18.pth.tar`); returns the entries."""
    with original_classes():
        state = {
            "epoch": 200,
            "arch": arch,
            "state_dict": wrapped(model),
            "best_prec1": 0.41,
            "lemniscate": nce_average(memory),
            "optimizer": optimizer_state(model),
        }
        write(state, path)
    return state


def colorization_backbone(path: Path, model: nn.Module) -> OrderedDict:
    """The gray backbone: numbered parts of a wide residual network, without bn1 and head."""
    parts = {"conv1": "0", "block1": "1", "block2": "2", "block3": "3"}
    named = (name.split(".", 1) + [value] for name, value in model.state_dict().items())
    weights = OrderedDict((f"{parts[a]}.{b}", value) for a, b, value in named if a in parts)
    write(weights, path)
    return weights


def pseudo_labels(
    path: Path,
    labeled: Tensor,
    unlabeled: Tensor,
    num_classes: int,
    *,
    nc: bool,
    chunk: bool = False,
) -> dict[str, Tensor]:
    """A pseudo-label file with made-up labels; chunks of ImageNet have no probabilities."""
    probs = torch.rand(len(unlabeled), num_classes).mul(3).softmax(dim=1)
    order = probs.amax(dim=1).argsort(descending=True)
    state = {
        "pseudo_indexes": unlabeled[order],
        "pseudo_labels": probs[order].argmax(dim=1),
        "labeled_indexes": labeled,
        "unlabeled_indexes": unlabeled,
    }
    if nc:
        state["pseudo_weights"] = probs[order].amax(dim=1)
    if not chunk:
        state["pseudo_probs"] = probs[order]
    write(state, path)
    return state

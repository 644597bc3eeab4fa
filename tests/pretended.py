"""Tensors that say they lie on a GPU, and compute on the CPU: they show on any machine what mixes devices."""

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from lib.graph import affinity, files, laplacian, sparse

DEVICE = torch.device("cuda:0")
aten = torch.ops.aten
MOVES = (aten._to_copy.default, aten.copy_.default)
INDEXES = (aten.index.Tensor, aten.index_put_.default, aten.index_put.default)


class Pretended(Tensor):
    """A tensor "on the GPU"; `held` has its numbers."""

    @staticmethod
    def __new__(cls, held: Tensor) -> "Pretended":
        return Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=DEVICE,
        )

    def __init__(self, held: Tensor) -> None:
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None) -> Any:
        return _compute(func, args, kwargs or {})

    def __repr__(self) -> str:
        return f"Pretended({self.held!r})"

    # These look for CUDA's driver before they come to `_compute`.
    def __getitem__(self, index) -> "Pretended":
        return Pretended(self.held[pytree.tree_map(_plain, index)])

    def __setitem__(self, index, value) -> None:
        there = not isinstance(value, Tensor) or isinstance(value, Pretended) or not value.ndim
        assert there, "a tensor on the CPU is put into one on the GPU"
        self.held[pytree.tree_map(_plain, index)] = _plain(value)

    def nonzero(self, *, as_tuple: bool = False) -> Any:
        return pytree.tree_map(Pretended, self.held.nonzero(as_tuple=as_tuple))

    def tolist(self) -> Any:
        return self.held.tolist()

    def item(self) -> Any:
        return self.held.item()

    def __invert__(self) -> "Pretended":
        return Pretended(~self.held)

    def contiguous(self) -> "Pretended":
        return Pretended(self.held.contiguous())

    def copy_(self, source: Tensor, non_blocking: bool = False) -> "Pretended":
        self.held.copy_(_plain(source))
        return self

    def __bool__(self) -> bool:
        return bool(self.held)

    def __int__(self) -> int:
        return int(self.held)

    def __float__(self) -> float:
        return float(self.held)


def _plain(x: Any) -> Any:
    return x.held if isinstance(x, Pretended) else x


class Pretending(TorchDispatchMode):
    """Within it, tensors can be made on the pretended GPU, too."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        return _compute(func, args, kwargs or {})


def _compute(func, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Run an operation on what the tensors hold, unless it mixes devices as CUDA would not allow."""
    given = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    there = [x for x in given if isinstance(x, Pretended)]
    target = kwargs.get("device")
    on_gpu = torch.device(target).type == "cuda" if target is not None else bool(there)
    if not there and not on_gpu:
        return func(*args, **kwargs)
    checked = given
    if func in INDEXES:  # a tensor on the GPU takes indexes on the CPU
        checked = [args[0], *(x for x in args[2:] if isinstance(x, Tensor))]
        assert isinstance(args[0], Pretended), f"{func}: indexes on the GPU, values on the CPU"
    if func not in MOVES:
        strangers = [x for x in checked if not isinstance(x, Pretended) and x.ndim]
        assert not strangers or not there, f"{func}: tensors on two devices"
    held = {id(x.held): x for x in there}
    args, kwargs = pytree.tree_map(_plain, (args, kwargs))
    if target is not None:
        kwargs["device"] = "cpu"
    made = func(*args, **kwargs)
    if func is aten.copy_.default and not isinstance(given[0], Pretended):
        return given[0]
    if not on_gpu:
        return made

    def placed(x: Any) -> Any:
        if id(x) in held:
            return held[id(x)]
        return Pretended(x) if isinstance(x, Tensor) else x

    return pytree.tree_map(placed, made)


class Csr:
    """What `lib.graph.sparse.csr` makes, of pretended tensors."""

    def __init__(self, crow: Tensor, col: Tensor, values: Tensor, num_columns: int) -> None:
        assert crow.device == col.device == values.device
        self.arrays, self.shape = (crow, col, values), (len(crow) - 1, num_columns)

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def device(self) -> torch.device:
        return self.arrays[0].device

    def crow_indices(self) -> Tensor:
        return self.arrays[0]

    def col_indices(self) -> Tensor:
        return self.arrays[1]

    def values(self) -> Tensor:
        return self.arrays[2]

    def to(self, device: torch.device) -> "Csr":
        return Csr(*(x.to(device) for x in self.arrays), self.shape[1])

    def __matmul__(self, x: Tensor) -> Tensor:
        assert self.device == x.device
        product = REAL(*map(_plain, self.arrays), self.shape[1]) @ _plain(x)
        return Pretended(product) if isinstance(x, Pretended) else product


REAL = sparse.csr


def prepare(monkeypatch) -> None:
    """Let graphs be made of pretended tensors, and nobody look for CUDA's driver."""
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
    for module in (affinity, files, laplacian, sparse):
        monkeypatch.setattr(module, "csr", Csr)

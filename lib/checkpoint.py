"""Files of tensors: saved all or nothing, loaded without running code, matched to a model by name."""

import contextlib
import io
import os
import pickle
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

WRAPPERS = ("module.", "_orig_mod.")  # DataParallel / DDP, torch.compile


def save(state: Mapping[str, Any], path: str | Path) -> None:
    """Write `state` so that `path` holds either the old file or the new one, never a part.

    Serialised to memory first, written beside the target, flushed to the disk, then renamed.

    Raises:
        ValueError: if the folder cannot be written to or the disk is full; the old file stays.
    """
    path = Path(path)
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        with contextlib.suppress(OSError):  # half a file on a full disk helps nobody
            temporary.unlink()
        raise ValueError(
            f"cannot write {path} ({buffer.getbuffer().nbytes} bytes, {_free_bytes(path.parent)} "
            f"free): {error.strerror or error}; whatever stood there before is intact"
        ) from error


def _free_bytes(folder: Path) -> int | str:
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return "an unknown number"


def load(path: str | Path) -> Any:
    """Read a file of tensors and plain values on the CPU. Nothing in it is ever executed.

    Raises:
        ValueError: if it is missing, no such file, or asks for more than tensors and plain values.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} does not exist or is no file; check the path")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        reason = named[1] if named else "it is no plain archive of tensors"
        raise ValueError(
            f"{path} was refused: it holds more than tensors and plain values, which could run code "
            f"when opened ({reason})"
        ) from error
    except Exception as error:  # torch's readers meet damage with a dozen different exceptions
        raise ValueError(
            f"{path} cannot be read as a checkpoint; it is damaged or of another kind ({error})"
        ) from error


def load_dict(path: str | Path, *keys: str) -> dict[str, Any]:
    """`load`, for a file that must be a dict holding `keys`.

    Raises:
        ValueError: as `load`, or naming the keys that are missing.
    """
    state = load(path)
    if not isinstance(state, dict):
        raise ValueError(
            f"{path} holds a {type(state).__name__} where a dict of entries is expected"
        )
    missing = [key for key in keys if key not in state]
    if missing:
        raise ValueError(
            f"{path} has no {', '.join(missing)}; it holds: {', '.join(map(str, state))}"
        )
    return state


def strip_wrappers(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameter names without the prefixes that wrappers of a model put before them."""
    plain = {}
    for name, value in weights.items():
        while name.startswith(WRAPPERS):
            name = name.split(".", 1)[1]
        plain[name] = value
    return plain


def model_weights(state: Mapping[str, Any], path: str | Path) -> dict[str, Tensor]:
    """The weights inside a checkpoint: `net` (CIFAR), `state_dict` (ImageNet), or a bare state dict.

    Raises:
        ValueError: if there are none.
    """
    weights = state.get("net", state.get("state_dict", state))
    if isinstance(weights, Mapping) and all(isinstance(name, str) for name in weights):
        plain = strip_wrappers(weights)
        if any(isinstance(value, Tensor) for value in plain.values()):
            return plain
    raise ValueError(
        f"{path} holds no network weights; its entries are: {', '.join(map(str, state))}"
    )


@dataclass(frozen=True)
class LoadReport:
    """What `load_weights` did with each name."""

    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[str, ...]

    def __str__(self) -> str:
        parts = [f"{len(self.loaded)} tensors loaded"]
        for kind in ("missing", "unexpected", "mismatched"):
            names = getattr(self, kind)
            if names:
                shown = ", ".join(names[:6]) + (" ..." if len(names) > 6 else "")
                parts.append(f"{len(names)} {kind} ({shown})")
        return "; ".join(parts)


def load_weights(
    model: nn.Module, weights: Mapping[str, Tensor], *, source: str | Path, keep_head: bool = True
) -> LoadReport:
    """Copy weights into a model by name and prove that the right ones arrived.

    Args:
        model: a network of `models`, with `head_name`.
        weights: names without wrappers' prefixes.
        source: the file, for messages.
        keep_head: False leaves the last layer as it is (phase 1 -> phase 3).

    Returns:
        What was loaded; with `keep_head=False` exactly the head is missing.

    Raises:
        ValueError: if anything else is missing, left over or of another shape. The model is unchanged.
    """
    head = tuple(f"{model.head_name}.{kind}" for kind in ("weight", "bias"))
    own = model.state_dict()
    given = dict(weights) if keep_head else {k: v for k, v in weights.items() if k not in head}
    # absent in files from before PyTorch 0.4.1, and only a counter
    optional = {name for name in own if name.endswith("num_batches_tracked")}
    shapes = {name: getattr(value, "shape", None) for name, value in given.items()}
    same = [name for name in given if name in own and own[name].shape == shapes[name]]
    report = LoadReport(
        loaded=tuple(same),
        missing=tuple(n for n in own if n not in given and n not in optional),
        unexpected=tuple(n for n in given if n not in own),
        mismatched=tuple(n for n in given if n in own and n not in same),
    )
    allowed = set() if keep_head else set(head)
    if set(report.missing) - allowed or report.unexpected or report.mismatched:
        raise ValueError(
            f"{source} does not fit this network: {report}. Was it trained with another "
            "--architecture, or for another number of classes or --low-dim?"
        )
    model.load_state_dict({name: given[name] for name in same}, strict=False)
    return report

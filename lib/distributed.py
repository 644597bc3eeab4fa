"""Several processes on one run: torch.distributed, under the few names that this project needs.

Without a process group every function answers for a single process, so that callers need no case of
their own. Ranks are in the order of the processes; rank 0 alone writes files and prints.
"""

import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing import ProcessExitedException, start_processes

TIMEOUT = timedelta(minutes=30)  # of one collective: rank 0 may be writing a large file meanwhile
MAIN_FIRST_S = (
    2.0  # what every rank finds wrong is said by rank 0; its launcher ends the others first
)


@dataclass(frozen=True)
class Share:
    """The part of the work of one process: number `rank` of `size` processes."""

    rank: int = 0
    size: int = 1

    def rows(self, n: int) -> slice:
        """Its contiguous part of n rows; the parts differ by one row at most and may be empty."""
        return slice(n * self.rank // self.size, n * (self.rank + 1) // self.size)


def _active() -> bool:
    return dist.is_available() and dist.is_initialized()


def share() -> Share:
    """Which of how many processes this one is."""
    return Share(dist.get_rank(), dist.get_world_size()) if _active() else Share()


def is_main() -> bool:
    """Whether this process is the one that writes and prints."""
    return share().rank == 0


def barrier() -> None:
    """Wait for all processes."""
    if _active():
        dist.barrier()


def all_reduce_sum(x: Tensor) -> Tensor:
    """Sum over the processes, in place."""
    if share().size > 1:
        dist.all_reduce(x)
    return x


def all_gather_rows(x: Tensor) -> Tensor:
    """The rows of every process one behind the other, in the order of the ranks; their number may differ.

    Args:
        x: n_rank x ..., the other sizes equal on all processes.
    """
    size = share().size
    if size == 1:
        return x
    counts = [torch.zeros(1, dtype=torch.int64, device=x.device) for _ in range(size)]
    dist.all_gather(counts, torch.tensor([len(x)], device=x.device))
    lengths = [int(count) for count in counts]
    if len(set(lengths)) == 1:
        whole = x.new_empty(sum(lengths), *x.shape[1:])
        dist.all_gather_into_tensor(whole, x.contiguous())
        return whole
    padded = x.new_zeros(max(lengths), *x.shape[1:])  # gloo and NCCL gather equal sizes only
    padded[: len(x)] = x
    parts = [torch.empty_like(padded) for _ in range(size)]
    dist.all_gather(parts, padded)
    return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])


def any_process(flag: bool) -> bool:
    """Whether the flag is set on any process; the same answer on all of them."""
    if share().size == 1:
        return flag
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    return bool(all_reduce_sum(torch.tensor(int(flag), device=device)))


def from_main(value: Any) -> Any:
    """The value that rank 0 has, on every process. A few plain values, no tensors."""
    if share().size == 1:
        return value
    holder = [value]
    dist.broadcast_object_list(holder)
    return holder[0]


@contextmanager
def main_first() -> Iterator[None]:
    """Run a block on rank 0 before the others: it makes the files that they read."""
    if not is_main():
        barrier()
    yield
    if is_main():
        barrier()


def local_rank() -> int:
    """Number of this process on its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def under_torchrun() -> bool:
    """Whether a launcher such as torchrun started this process and tells it where the others are."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def device_names(gpus: str) -> list[str]:
    """`--gpus` taken apart: `0,1` -> ["0", "1"]; without CUDA numbers stand for one CPU.

    Raises:
        ValueError: for what is neither a device number nor cpu, or a number given twice.
    """
    names = [name.strip() for name in gpus.split(",") if name.strip()]
    if not names or any(name != "cpu" and not name.isdecimal() for name in names):
        raise ValueError(
            f"--gpus {gpus}: give device numbers such as 0,1, or cpu (cpu,cpu for two)"
        )
    numbers = [name for name in names if name != "cpu"]
    if numbers and len(numbers) != len(names):
        raise ValueError(f"--gpus {gpus}: processes on CPU and GPU do not work together")
    if len(set(numbers)) != len(numbers):
        raise ValueError(f"--gpus {gpus}: a device number is there twice")
    if numbers and not torch.cuda.is_available():
        return ["cpu"]
    missing = [number for number in numbers if int(number) >= torch.cuda.device_count()]
    if missing:
        raise ValueError(
            f"--gpus {gpus}: there is no device {', '.join(missing)}, only "
            f"{torch.cuda.device_count()} CUDA devices are visible, counted from 0"
        )
    return names


@contextmanager
def group(backend: str, **where: Any) -> Iterator[None]:
    """A process group around a block. `where` goes to torch.distributed.init_process_group."""
    if backend == "gloo" and "GLOO_SOCKET_IFNAME" not in os.environ and not _resolves():
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # a host without a name in any directory
    dist.init_process_group(backend, timeout=TIMEOUT, **where)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _resolves() -> bool:
    try:
        socket.getaddrinfo(socket.gethostname(), None)
    except OSError:
        return False
    return True


def _backend(names: list[str]) -> str:
    return "gloo" if names[0] == "cpu" else "nccl"


def _child(rank: int, work: Callable[[], int], names: list[str], store: str, threads: int) -> None:
    os.environ["LOCAL_RANK"] = str(rank)
    torch.set_num_threads(threads)
    where = {"init_method": f"file://{store}", "rank": rank, "world_size": len(names)}
    try:
        with group(_backend(names), **where):
            code = work()
    except Exception:
        time.sleep(
            MAIN_FIRST_S
        )  # the launcher shall meet the process that died before those it left
        raise
    sys.exit(code)


def _stop(number: int, _: FrameType | None) -> None:
    sys.exit(128 + number)


def run(work: Callable[[], int], gpus: str) -> int:
    """Run `work` in every process that the run shall have; its exit code, the first failure's.

    One device: here. Several in `gpus`: one new process each. Under torchrun: here, in the group that
    the environment describes. A process that dies ends the others.

    Args:
        work: a picklable function that gives an exit code.
        gpus: as in `device_names`.
    """
    names = device_names(gpus)
    if under_torchrun():
        if names[0] != "cpu":
            torch.cuda.set_device(local_rank())
        with group(_backend(names)):
            return work()
    if len(names) == 1:
        return work()
    threads = max(1, torch.get_num_threads() // len(names)) if names[0] == "cpu" else 4
    before = signal.signal(signal.SIGTERM, _stop)
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "rendezvous")
        started = start_processes(
            _child,
            (work, names, store, threads),
            nprocs=len(names),
            join=False,
            start_method="spawn",
        )
        try:
            while not started.join():
                pass
        except ProcessExitedException as error:
            if error.exit_code > 0:
                return error.exit_code
            print(f"process {error.error_index} was killed ({error})", file=sys.stderr)
            return 1
        finally:
            for process in started.processes:
                if process.is_alive():
                    process.terminate()
            signal.signal(signal.SIGTERM, before)
    return 0

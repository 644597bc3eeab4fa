"""Several processes on one run: torch.distributed, under the few names that this project needs.

Without a process group every function answers for a single process, so that callers need no case of
their own. Ranks are in the order of the processes; rank 0 alone writes files and prints.
"""

import logging
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
from torch import Tensor, nn
from torch.multiprocessing import ProcessContext, ProcessExitedException, start_processes
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

TIMEOUT = timedelta(minutes=30)  # of one collective: rank 0 may be writing a large file meanwhile
MAIN_FIRST_S = 10.0  # what every rank finds wrong is said by rank 0, whose end ends the others


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


def all_reduce_sum(x: Tensor) -> Tensor:
    """Sum over the processes, in place."""
    if share().size > 1:
        dist.all_reduce(x)
    return x


def all_gather_rows(x: Tensor, total: int | None = None) -> Tensor:
    """The rows of every process one behind the other, in the order of the ranks; their number may differ.

    Args:
        x: n_rank x ..., the other sizes equal on all processes.
        total: rows of all together, where each process holds its `Share.rows` of them. Without it the
            processes tell each other their numbers, and a GPU is waited for.
    """
    size = share().size
    if size == 1:
        return x
    if total is None:
        counts = [torch.zeros(1, dtype=torch.int64, device=x.device) for _ in range(size)]
        dist.all_gather(counts, torch.tensor([len(x)], device=x.device))
        lengths = [int(count) for count in counts]
    else:
        parts = [Share(rank, size).rows(total) for rank in range(size)]
        lengths = [part.stop - part.start for part in parts]
    padded = x.new_zeros(max(lengths), *x.shape[1:])  # gloo and NCCL gather equal sizes only
    padded[: len(x)] = x
    blocks = [torch.empty_like(padded) for _ in range(size)]
    dist.all_gather(blocks, padded)
    return torch.cat([block[:length] for block, length in zip(blocks, lengths, strict=True)])


def wrap_ddp(model: nn.Module) -> nn.Module:
    """The model as each process trains it: backward averages its gradients over the processes."""
    if share().size == 1:
        return model
    device = next(model.parameters()).device
    return DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)


def share_buffers(model: nn.Module) -> None:
    """Give every process the buffers of rank 0 (running statistics of BatchNorm), in place."""
    if share().size > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


def print_main(text: str) -> None:
    """Print a line, on rank 0 alone, and leave a progress bar at the bottom whole."""
    if is_main():
        tqdm.write(text)
        sys.stdout.flush()


def progress_bar(*, shown: bool = True, **words: Any) -> tqdm:
    """A tqdm bar that leaves no trace; shown on rank 0 alone, and only where there is a terminal.

    Args:
        shown: False keeps it out of sight everywhere.
        words: of tqdm.
    """
    return tqdm(**words, leave=False, disable=None if shown and is_main() else True)


def all_reduce_max(value: int) -> int:
    """The largest of the processes' values, on all of them; a GPU is not waited for."""
    if share().size == 1:
        return value
    held = torch.tensor(value)  # on the CPU: every group of ours has a backend for it
    dist.all_reduce(held, dist.ReduceOp.MAX)
    return int(held)


def barrier() -> None:
    """Wait for all processes."""
    all_reduce_max(0)


def any_process(flag: bool) -> bool:
    """Whether the flag is set on any process; the same answer on all of them."""
    return bool(all_reduce_max(int(flag)))


def broadcast_object(value: Any) -> Any:
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


def own_workers(num_workers: int) -> int:
    """This process's share of `num_workers` image-reading processes on each machine, rounded up."""
    here = os.environ.get("LOCAL_WORLD_SIZE") if under_torchrun() else None
    return -(-num_workers // (int(here) if here else share().size))


def under_torchrun() -> bool:
    """Whether a launcher such as torchrun started this process and tells it where the others are."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def device_names(gpus: str) -> list[str]:
    """`--gpus` taken apart: `0,1` -> ["0", "1"]; without CUDA numbers stand for one CPU.

    Under torchrun numbers stand for the device of this process's local rank.

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
    if numbers and under_torchrun():  # it says how many processes there are
        numbers = [str(local_rank())]
        names = numbers
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
    if "GLOO_SOCKET_IFNAME" not in os.environ and _one_machine() and not _resolves():
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # a host without a name in any directory
    dist.init_process_group(backend, timeout=TIMEOUT, **where)
    together = False
    try:
        yield
        together = True
    except SystemExit:  # how a stopped run ends, on all of them
        together = True
        raise
    finally:
        # after the failure of one, leaving NCCL's group would wait for processes that wait for this one
        if together or "nccl" not in backend:
            dist.destroy_process_group()


def _one_machine() -> bool:
    size = os.environ.get("WORLD_SIZE")
    return size is None or size == os.environ.get("LOCAL_WORLD_SIZE")


def _in_group(work: Callable[[], int], names: list[str], **where: Any) -> int:
    """The exit code of `work`, run in a process group; a process that failed does not leave it in peace."""
    backend = _backend(names)
    with group(backend, **where):
        code = work()
        if code and "nccl" in backend:  # its end would wait for the others' collectives
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return code


def _resolves() -> bool:
    try:
        socket.getaddrinfo(socket.gethostname(), None)
    except OSError:
        return False
    return True


def _backend(names: list[str]) -> str:
    # gloo on GPUs too, for the few numbers that steer a run: they need not wait for the device
    return "gloo" if names[0] == "cpu" else "cpu:gloo,cuda:nccl"


def _child(rank: int, work: Callable[[], int], names: list[str], store: str, threads: int) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ["LOCAL_RANK"] = str(rank)
    torch.set_num_threads(threads)
    if names[0] != "cpu":
        torch.cuda.set_device(int(names[rank]))  # NCCL would take the device numbered as the rank
    where = {"init_method": f"file://{store}", "rank": rank, "world_size": len(names)}
    try:
        code = _in_group(work, names, **where)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)  # torch's launcher would count it as a success
    except Exception:
        time.sleep(MAIN_FIRST_S)  # the launcher shall meet the one that died before those it left
        raise
    sys.exit(code)


class _Launched:
    """The processes of a run, and the signal by which this one was asked to end them."""

    def __init__(self, context: ProcessContext) -> None:
        self._context, self._signal = context, 0

    def pass_on(self, number: int, _: FrameType | None) -> None:
        """The signal handler: they are asked to end, and know what there is to save."""
        self._signal = self._signal or number
        for process in self._context.processes:
            if process.is_alive():
                process.terminate()

    def join(self) -> int:
        """Wait for them; the first failure's exit code, as a shell gives it (128 + signal)."""
        before = {n: signal.signal(n, self.pass_on) for n in (signal.SIGTERM, signal.SIGINT)}
        try:
            while not self._context.join():
                pass
        except ProcessExitedException as error:
            return self._exit_code(error)
        finally:
            for process in self._context.processes:
                if process.is_alive():
                    process.terminate()
            for number, handler in before.items():
                signal.signal(number, handler)
        return 0

    def _exit_code(self, error: ProcessExitedException) -> int:
        code = error.exit_code if error.exit_code > 0 else 128 - error.exit_code
        if self._signal and code in (128 + signal.SIGTERM, 128 + signal.SIGINT):
            return 128 + self._signal
        if error.exit_code < 0:
            print(f"process {error.error_index} was killed ({error})", file=sys.stderr)
        return code


@contextmanager
def _deaf_to_ctrl_c() -> Iterator[None]:
    """A terminal's Ctrl-C reaches started processes too; while they import, it is this one's to handle."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


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
        return _in_group(work, names)
    if len(names) == 1:
        return work()
    threads = max(1, torch.get_num_threads() // len(names)) if names[0] == "cpu" else 4
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)  # we say it ourselves
    with tempfile.TemporaryDirectory() as folder:
        arguments = (work, names, str(Path(folder) / "rendezvous"), threads)
        with _deaf_to_ctrl_c():
            started = start_processes(
                *(_child, arguments), nprocs=len(names), join=False, start_method="spawn"
            )
        assert started is not None
        return _Launched(started).join()

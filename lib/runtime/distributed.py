"""The few functions of torch.distributed that a run in several processes needs.

Without a process group every function answers for a single process, so that callers need no special case.
Rank 0 alone writes files and prints.
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

from lib.runtime import terminal

TIMEOUT = timedelta(minutes=30)  # of a collective: rank 0 may be writing a large file meanwhile
ALL = "all"  # value of `--gpus` for every visible device
MAIN_FIRST_S = 10.0  # delay of an error on other ranks: rank 0 reports it first, and ends them


def _active() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Return the number of this process, from 0."""
    return dist.get_rank() if _active() else 0


def world_size() -> int:
    """Return the number of processes of the run."""
    return dist.get_world_size() if _active() else 1


def shard_of(n: int, rank: int, world_size: int) -> slice:
    """Return the contiguous part of n rows of process `rank`; parts differ by one row and may be empty."""
    return slice(n * rank // world_size, n * (rank + 1) // world_size)


def shard(n: int) -> slice:
    """Return this process's part of n rows."""
    return shard_of(n, rank(), world_size())


def is_main() -> bool:
    """Return whether this process is the one that writes and prints."""
    return rank() == 0


def all_reduce_sum(x: Tensor) -> Tensor:
    """Sum `x` over the processes, in place."""
    if world_size() > 1:
        dist.all_reduce(x)
    return x


def all_gather_rows(x: Tensor, total: int) -> Tensor:
    """Concatenate the rows of all processes, each of which holds its `shard` of `total` rows."""
    size = world_size()
    if size == 1:
        return x
    parts = [shard_of(total, number, size) for number in range(size)]
    lengths = [part.stop - part.start for part in parts]
    padded = x.new_zeros(max(lengths), *x.shape[1:])  # gloo and NCCL gather equal sizes only
    padded[: len(x)] = x
    blocks = [torch.empty_like(padded) for _ in range(size)]
    dist.all_gather(blocks, padded)
    return torch.cat([block[:length] for block, length in zip(blocks, lengths, strict=True)])


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, total: int) -> Tensor:
        ctx.total = total
        return all_gather_rows(x, total)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        # every process has the gradient of its own part of the loss with respect to all rows
        return all_reduce_sum(gradient.clone())[shard(ctx.total)], None


def all_gather_rows_with_gradient(x: Tensor, total: int) -> Tensor:
    """Concatenate rows as `all_gather_rows` does; the gradients of all processes reach the rows of each."""
    return x if world_size() == 1 else _GatherRows.apply(x, total)


def wrap_ddp(model: nn.Module) -> nn.Module:
    """Wrap the model so that backward averages its gradients over the processes."""
    if world_size() == 1:
        return model
    device = next(model.parameters()).device
    return DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)


def share_buffers(model: nn.Module) -> None:
    """Copy the buffers of rank 0 (running statistics of BatchNorm) to every process, in place."""
    if world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put `model` in evaluation mode for a block, with BatchNorm's running statistics of rank 0."""
    was_training = model.training
    model.eval()
    share_buffers(model)
    yield
    model.train(was_training)


def print_main(text: str) -> None:
    """Print a line on rank 0 alone, above any progress bar."""
    if is_main():
        tqdm.write(text)
        sys.stdout.flush()


def progress_bar(*, shown: bool = True, **options: Any) -> tqdm:
    """Return a tqdm bar with `options` that leaves no trace, shown on rank 0 alone and in a terminal only."""
    return tqdm(**options, leave=False, disable=None if shown and is_main() else True)


def all_reduce_max(value: int) -> int:
    """Return the largest of the processes' values, without waiting for a GPU."""
    if world_size() == 1:
        return value
    held = torch.tensor(value)  # stays on the CPU: every group of ours has a backend for it
    dist.all_reduce(held, dist.ReduceOp.MAX)
    return int(held)


def barrier() -> None:
    """Wait for all processes."""
    all_reduce_max(0)


def any_process(flag: bool) -> bool:
    """Return whether the flag is set on any process, the same answer on all of them."""
    return bool(all_reduce_max(int(flag)))


def broadcast_object(value: Any) -> Any:
    """Return rank 0's value on every process: a few plain values, no tensors."""
    if world_size() == 1:
        return value
    holder = [value]
    dist.broadcast_object_list(holder)
    return holder[0]


@contextmanager
def main_first() -> Iterator[None]:
    """Run a block on rank 0 before the others, because it makes the files that they read."""
    if not is_main():
        barrier()
    yield
    if is_main():
        barrier()


def local_rank() -> int:
    """Return the number of this process on its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def own_workers(num_workers: int) -> int:
    """Return this process's share of `num_workers` image-reading processes of a machine, rounded up."""
    here = os.environ.get("LOCAL_WORLD_SIZE") if under_torchrun() else None
    return -(-num_workers // (int(here) if here else world_size()))


def under_torchrun() -> bool:
    """Return whether a launcher such as torchrun started this process and describes the group."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def device_names(gpus: str) -> list[str]:
    """Split `--gpus` into names: `0,1` -> ["0", "1"]; `all` -> the numbers of all visible devices.

    Without CUDA, numbers and `all` stand for one CPU. Under torchrun they stand for the device of this
    process's local rank. Names of another kind, and numbers that are given twice, are a ValueError.
    """
    names = [name.strip() for name in gpus.split(",") if name.strip()]
    if names == [ALL]:
        names = [str(number) for number in range(torch.cuda.device_count())] or ["cpu"]
    if not names or any(name != "cpu" and not name.isdecimal() for name in names):
        raise ValueError(
            f"--gpus {gpus}: give device numbers such as 0,1, or all, or cpu (cpu,cpu for two)"
        )
    numbers = [name for name in names if name != "cpu"]
    if numbers and len(numbers) != len(names):
        raise ValueError(
            f"--gpus {gpus}: a run cannot mix CPU and GPU; give numbers only, or cpu only"
        )
    if len(set(numbers)) != len(numbers):
        raise ValueError(f"--gpus {gpus}: a device number is given twice; give each one once")
    if numbers and not torch.cuda.is_available():
        return ["cpu"]
    if numbers and under_torchrun():  # torchrun decides how many processes there are
        names = numbers = [str(local_rank())]
    missing = [number for number in numbers if int(number) >= torch.cuda.device_count()]
    if missing:
        raise ValueError(
            f"--gpus {gpus}: there is no device {', '.join(missing)}, only "
            f"{torch.cuda.device_count()} CUDA devices are visible, counted from 0"
        )
    return names


def _in_group(work: Callable[[], int], names: list[str], **options: Any) -> int:
    """Run `work` in a process group and return its exit code; under NCCL a failure ends the process.

    Leaving NCCL's group would wait for the collectives of other processes, which wait for this one.
    """
    on_gpus = names[0] != "cpu"
    on_one_machine = os.environ.get("WORLD_SIZE") in (None, os.environ.get("LOCAL_WORLD_SIZE"))
    if on_one_machine and "GLOO_SOCKET_IFNAME" not in os.environ:
        try:
            socket.getaddrinfo(socket.gethostname(), None)
        except OSError:  # gloo takes its address from the host name, which does not resolve
            os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    # gloo beside NCCL carries the few numbers that steer a run, which need not wait for the device
    backend = "cpu:gloo,cuda:nccl" if on_gpus else "gloo"
    dist.init_process_group(backend, timeout=TIMEOUT, **options)
    together = not on_gpus
    try:
        code = work()
        if code and on_gpus:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        together = True
        return code
    except SystemExit:  # a stopped run ends like this on all processes
        together = True
        raise
    finally:
        if together:
            dist.destroy_process_group()


def _child(rank: int, work: Callable[[], int], names: list[str], store: str, threads: int) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    terminal.guard_outputs()
    os.environ["LOCAL_RANK"] = str(rank)
    torch.set_num_threads(threads)
    if names[0] != "cpu":
        torch.cuda.set_device(int(names[rank]))  # NCCL would take the device numbered as the rank
    try:
        code = _in_group(
            work, names, init_method=f"file://{store}", rank=rank, world_size=len(names)
        )
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)  # torch's launcher would count it as a success
    except Exception:
        time.sleep(MAIN_FIRST_S)  # the launcher should see the first process to die before this one
        raise
    sys.exit(code)


def _join(context: ProcessContext) -> int:
    """Wait for the processes and return the first failure's exit code, as a shell does (128 + signal).

    SIGTERM, Ctrl-C and SIGHUP ask the processes to end, which save their work first.
    """
    received = 0

    def end_all() -> None:
        for process in context.processes:
            if process.is_alive():
                process.terminate()

    def pass_on(number: int, _: FrameType | None) -> None:
        nonlocal received
        received = received or number
        end_all()

    before = {n: signal.signal(n, pass_on) for n in terminal.ending_signals()}
    try:
        while not context.join():
            pass
    except ProcessExitedException as error:
        code = error.exit_code if error.exit_code > 0 else 128 - error.exit_code
        if received and code - 128 in before:
            return 128 + received
        if error.exit_code < 0:
            print(f"process {error.error_index} was killed ({error})", file=sys.stderr)
        return code
    finally:
        end_all()
        for number, handler in before.items():
            signal.signal(number, handler)
    return 0


def run(work: Callable[[], int], gpus: str) -> int:
    """Run `work`, which is picklable and returns an exit code, in every process; return the first failure's.

    With one device it runs in this process, with several in `gpus` in one new process each, under torchrun
    here, in the group that the environment describes. A process that dies ends the others.
    """
    names = device_names(gpus)
    if under_torchrun():
        if names[0] != "cpu":
            torch.cuda.set_device(local_rank())
        return _in_group(work, names)
    if len(names) == 1:
        return work()
    threads = max(1, torch.get_num_threads() // len(names)) if names[0] == "cpu" else 4
    # `_join` reports a failure.
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        parameters = (work, names, str(Path(folder) / "rendezvous"), threads)
        # Processes ignore a terminal's Ctrl-C while they import; this one handles it.
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            started = start_processes(
                _child, parameters, nprocs=len(names), join=False, start_method="spawn"
            )
        finally:
            signal.signal(signal.SIGINT, before)
        assert started is not None
        return _join(started)

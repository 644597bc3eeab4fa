"""The training step of a single GPU as a CUDA graph: one launch in place of several hundred.

The kernels of a small network take less time than the host needs to launch them. A step whose shapes are
fixed, and whose host reads no value, is captured once; every later step copies its batch and learning rate
into the tensors of the captured one and launches all kernels together. They are the kernels of the eager
step, so results have the same bits (https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs).
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from lib.loading.batches import Batch, Batches
from lib.runtime.devices import Device
from lib.runtime.distributed import print_main, world_size
from lib.runtime.profiling import COMPILE_MODES

CHOICES = ("auto", "on", "off")
WARM_UP = 3  # eager steps, in which libraries choose algorithms and compile, and momenta are made

Item = tuple[Batch, bool]  # a batch of a step, and whether it is the last
Result = tuple[dict[str, Tensor], int]  # loss and other means by name, and the rows of all batches
TakeStep = Callable[[Iterable[Item], float | Tensor], Result]
Shapes = tuple[torch.Size, ...]  # of all tensors that a step reads


@contextmanager
def on_stream(stream: torch.cuda.Stream) -> Iterator[None]:
    """Let a block compute on `stream`, after what the device was asked for before and before what follows."""
    outside = torch.cuda.current_stream(stream.device)
    stream.wait_stream(outside)
    with torch.cuda.stream(stream):
        yield
    outside.wait_stream(stream)


def capture(function: Callable[[], Result]) -> tuple[Callable[[], None], Result]:
    """Record the kernels of a function on the current stream; nothing is computed yet.

    Returns:
        A function that computes them, and the result of `function`, whose tensors it fills.
    """
    graph = torch.cuda.CUDAGraph()
    # other threads, such as those that pin memory, may go on meanwhile
    with torch.cuda.graph(
        graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"
    ):
        result = function()
    return graph.replay, result


@dataclass(frozen=True)
class _Captured:
    """A captured step: the tensors that it reads, how to repeat it, and the result that it writes."""

    inputs: list[Tensor]
    replay: Callable[[], None]
    result: Result


class StepGraph:
    """A training step that is eager until it has been captured, and replayed from then on.

    Steps of other shapes, such as the short last one of an epoch, are captured by themselves. All run on one
    stream, as autograd adds up a gradient on the stream where it first met the weight.
    """

    def __init__(self, device: Device) -> None:
        self.stream = torch.cuda.Stream(device.torch_device)
        self._taken: Counter[Shapes] = Counter()  # eager steps so far
        self._captured: dict[Shapes, _Captured] = {}
        self._failed = False

    @property
    def captured(self) -> int:
        """Number of shapes captured so far."""
        return len(self._captured)

    def __call__(self, take_step: TakeStep, group: Iterable[Item], lr: Tensor) -> Result:
        """Take a step. `take_step` must do the same in every call."""
        group = list(group)
        inputs = _inputs(group, lr)
        shapes = tuple(tensor.shape for tensor in inputs)
        with on_stream(self.stream):
            if shapes not in self._captured and self._taken[shapes] == WARM_UP and not self._failed:
                self._capture(shapes, take_step, group, lr)
            if shapes not in self._captured:
                self._taken[shapes] += 1
                return take_step(group, lr)
            captured = self._captured[shapes]
            torch._foreach_copy_(captured.inputs, inputs)
            captured.replay()
        return captured.result

    def _capture(
        self, shapes: Shapes, take_step: TakeStep, group: Sequence[Item], lr: Tensor
    ) -> None:
        """Capture the step for batches of these shapes, or say why that fails."""
        own, own_lr = [(batch.map(torch.clone), is_last) for batch, is_last in group], lr.clone()
        try:
            parts = capture(lambda: take_step(own, own_lr))
        except RuntimeError as error:
            # The failure frees a workspace of cuBLAS that earlier graphs use (PyTorch's issue 193402).
            self._failed, self._captured = True, {}
            # The end of a capture that has failed is an error by itself, which hides the first one.
            cause: BaseException = error
            while cause.__context__ is not None:
                cause = cause.__context__
            reason = [*str(cause).splitlines(), type(cause).__name__][0]
            print_main(f"the step cannot be captured as a CUDA graph and stays eager: {reason}")
        else:
            self._captured[shapes] = _Captured(_inputs(own, own_lr), *parts)


def _inputs(group: Iterable[Item], lr: Tensor) -> list[Tensor]:
    return [*(tensor for batch, _ in group for tensor in batch.tensors), lr]


def step_graph(choice: str, batches: Batches, compile_mode: str = "") -> StepGraph | None:
    """Return the graph that `--cuda-graph` asks for; None where steps stay eager.

    `auto` takes one for a single GPU and images in its memory: those of files go through large networks,
    whose kernels outlast their launches. `on` takes one for files too.

    Raises:
        ValueError: if there can be none.
    """
    alone = batches.device.torch_device.type == "cuda" and world_size() == 1
    own_graphs = compile_mode not in ("", COMPILE_MODES[0])
    if choice == "on" and not alone:
        raise ValueError("--cuda-graph on: a step can be captured for a single GPU alone")
    if choice == "on" and own_graphs:
        raise ValueError(f"--cuda-graph on: --compile {compile_mode} records graphs of its own")
    wanted = choice == "on" or (choice == "auto" and batches.in_memory)
    return StepGraph(batches.device) if wanted and alone and not own_graphs else None

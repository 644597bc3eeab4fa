"""Choice of the images of a batch, as a pure function of the seed and the step."""

import torch
from torch import Tensor

from lib.runtime.seeding import address, generator


def permutation(n: int, seed: int, epoch: int, stream: int = 0) -> Tensor:
    """Return the order in which epoch `epoch` of a stream visits n items: int64, shape (n,)."""
    return torch.randperm(n, generator=generator(seed, "order", *address(epoch, stream)))


def num_batches(n: int, batch_size: int) -> int:
    """Count the batches of one epoch, a short last one included."""
    return -(-n // batch_size)


class Stream:
    """An endless series of full batches from concatenated permutations of n items, maybe fewer than a batch.

    Batch `step` depends on (n, batch_size, seed, stream, step) alone.
    """

    def __init__(self, n: int, batch_size: int, seed: int, stream: int = 0) -> None:
        if n < 1 or batch_size < 1:
            raise ValueError(f"cannot draw batches of {batch_size} from {n} images")
        self.n, self.batch_size, self.seed, self.stream = n, batch_size, seed, stream
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def _permutation(self, epoch: int) -> Tensor:
        if epoch != self._epoch:  # the order is only cached: neighboring steps share an epoch
            self._epoch, self._order = epoch, permutation(self.n, self.seed, epoch, self.stream)
        return self._order

    def batch(self, step: int) -> Tensor:
        """Return the positions of the items of batch `step`: int64, shape (batch_size,)."""
        start, stop = step * self.batch_size, (step + 1) * self.batch_size
        pieces = []
        while start < stop:
            epoch, offset = divmod(start, self.n)
            count = min(stop - start, self.n - offset)
            pieces.append(self._permutation(epoch)[offset : offset + count])
            start += count
        return torch.cat(pieces)

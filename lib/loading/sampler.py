"""Which images make up a batch: a pure function of the seed and the step."""

import torch
from torch import Tensor

from lib.runtime.seeding import generator


def permutation(n: int, seed: int, epoch: int) -> Tensor:
    """The order in which epoch `epoch` visits n items; int64, shape (n,)."""
    return torch.randperm(n, generator=generator(seed, "order", epoch))


def num_batches(n: int, batch_size: int) -> int:
    """Batches of one epoch, a short last one included."""
    return -(-n // batch_size)


class Stream:
    """An endless series of full batches: whole permutations of n items, one behind the other.

    A set smaller than the batch (10 labeled images, batches of 128) repeats inside a batch instead
    of giving tiny ones. Batch `step` depends on (n, batch_size, seed, step) alone.
    """

    def __init__(self, n: int, batch_size: int, seed: int) -> None:
        if n < 1 or batch_size < 1:
            raise ValueError(f"cannot draw batches of {batch_size} from {n} images")
        self.n, self.batch_size, self.seed = n, batch_size, seed
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def _permutation(self, epoch: int) -> Tensor:
        if epoch != self._epoch:  # neighboring steps share an epoch: a cache, no state
            self._epoch, self._order = epoch, permutation(self.n, self.seed, epoch)
        return self._order

    def batch(self, step: int) -> Tensor:
        """Positions of the items of batch `step`, int64, shape (batch_size,)."""
        start, stop = step * self.batch_size, (step + 1) * self.batch_size
        pieces = []
        while start < stop:
            epoch, offset = divmod(start, self.n)
            count = min(stop - start, self.n - offset)
            pieces.append(self._permutation(epoch)[offset : offset + count])
            start += count
        return torch.cat(pieces)

"""The memory bank of instance discrimination and its three losses (Wu et al. 2018, arXiv 1805.01978).

The bank M (N x D) holds one unit vector per training image. A loss compares the embeddings v (B x D,
unit norm) of a batch with the bank; the gradient flows into v alone. After the optimizer step,
`MemoryBank.update` moves the rows of the batch toward their new embeddings, outside of backward.

Every process holds the whole bank and computes the loss of its rows of a batch: their part of the mean over
the `total` rows of the whole batch. Random numbers are drawn for the whole batch, before the step.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib.runtime.distributed import all_reduce_sum
from lib.runtime.seeding import generator
from models.layers import NORM_EPS, l2_normalize

LOSSES = ("nce", "infonce")
GATHER_COST = 32  # copying one row costs about as much as multiplying by this many
EPS = 1e-7  # what the published code adds to K/N in the denominators of the NCE loss


class MemoryBank(nn.Module):
    """Memory bank M: one unit vector per training image, of whose old value an update keeps `momentum`.

    Initial values are uniform in +-1/sqrt(D/3) and then scaled to unit norm; the published bank starts
    without that scaling, off the sphere.
    """

    def __init__(self, num_images: int, dim: int, momentum: float = 0.5, seed: int = 0) -> None:
        super().__init__()
        if not 0 <= momentum < 1:
            raise ValueError(f"bank momentum {momentum}: must lie in [0, 1)")
        self.momentum = momentum
        bound = 1 / math.sqrt(dim / 3)
        rows = torch.rand(num_images, dim, generator=generator(seed, "bank"))
        self.register_buffer("memory", l2_normalize(rows * 2 * bound - bound))

    @torch.no_grad()
    def update(self, indexes: Tensor, embeddings: Tensor) -> None:
        """Set rows m `indexes` (B) to normalize(momentum m + (1 - momentum) v), with v: B x D."""
        mixed = self.memory[indexes].lerp(embeddings.to(self.memory.dtype), 1 - self.momentum)
        self.memory[indexes] = F.normalize(mixed, dim=1, eps=NORM_EPS)

    def __len__(self) -> int:
        return len(self.memory)


class _BankSoftmax(torch.autograd.Function):
    """Cross-entropy of softmax(v M^T / T), summed and divided by `num_rows`, without B x N in memory.

    The bank takes no gradient, so that one pass gives the loss and d loss / d v: it keeps a running maximum
    and sum (online softmax) and the running sum of p m. Sums are in the number format of the bank.
    """

    block = 8192  # rows of the bank at a time: B x 8192 logits stay inside the cache
    block_on_gpu = 2**18  # few large steps are faster on a GPU; 134 MB at 128 images

    @staticmethod
    def forward(
        ctx: Any,
        v: Tensor,
        targets: Tensor,
        memory: Tensor,
        temperature: float,
        bf16: bool,
        num_rows: int,
    ) -> Tensor:
        dtype = torch.bfloat16 if bf16 else memory.dtype
        v = v.to(memory.dtype)
        query = (v / temperature).to(dtype)
        top = v.new_full((len(v), 1), -torch.inf)
        total = torch.zeros_like(top)
        weighted = torch.zeros_like(v)
        block = _BankSoftmax.block_on_gpu if memory.is_cuda else _BankSoftmax.block
        for rows in memory.split(block):
            rows = rows.to(dtype)
            logits = (query @ rows.T).to(v.dtype)
            new_top = torch.maximum(top, logits.amax(dim=1, keepdim=True))
            shrink = (top - new_top).exp()
            logits.sub_(new_top).exp_()
            total = total * shrink + logits.sum(dim=1, keepdim=True)
            weighted = weighted * shrink + (logits.to(dtype) @ rows).to(v.dtype)
            top = new_top
        positive = memory[targets]
        own = (v * positive).sum(dim=1) / temperature
        ctx.save_for_backward((weighted / total - positive) / (temperature * num_rows))
        return (top[:, 0] + total[:, 0].log() - own).sum() / num_rows

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return grad * grad_output, None, None, None, None, None


class FullSoftmax(nn.Module):
    """Cross-entropy over all N images with logits v M^T / T ("LinearAverage", `--nce-k 0`).

    Its value for random embeddings is log(N).
    """

    def __init__(self, temperature: float = 0.1, bf16: bool = False) -> None:
        super().__init__()
        self.temperature, self.bf16 = temperature, bf16

    def chance(self, num_images: int) -> float:
        return math.log(num_images)

    def flops(self, num_images: int, dim: int) -> float:
        """Count operations per image: the logits, and the weighted rows of the gradient."""
        return 4.0 * num_images * dim

    def draw(self, total: int, num_images: int, step: int) -> tuple[Tensor, ...]:
        return ()

    def forward(self, v: Tensor, indexes: Tensor, memory: Tensor, *, total: int = 0) -> Tensor:
        """Compute the part of the mean loss of v (B x D unit vectors, images `indexes`), memory: N x D."""
        return _BankSoftmax.apply(
            v, indexes, memory, self.temperature, self.bf16, total or len(indexes)
        )


def others(drawn: Tensor, indexes: Tensor) -> Tensor:
    """Turn B x K uniform numbers below N - 1 into images, exactly uniform over all but each row's own."""
    return drawn + (drawn >= indexes[:, None])


class _Sampled(nn.Module):
    """Base of the two losses over K drawn negatives."""

    def __init__(self, k: int, temperature: float, seed: int) -> None:
        super().__init__()
        if k < 1:
            raise ValueError(f"{k} negatives: at least 1 is needed")
        self.k, self.temperature, self.seed = k, temperature, seed

    def _by_products(self, num_images: int) -> bool:
        return num_images < GATHER_COST * self.k  # B x N products are cheaper than B x K x D copies

    def flops(self, num_images: int, dim: int) -> float:
        """Count operations per image: similarities and their gradient."""
        return 4.0 * dim * (num_images if self._by_products(num_images) else 1 + self.k)

    def draw(self, total: int, num_images: int, step: int) -> tuple[Tensor, ...]:
        """Draw total x K uniform numbers below N - 1, for `others`; ValueError if an image has none."""
        if num_images < 2:
            raise ValueError(f"no negatives among {num_images} images: at least 2 are needed")
        rng = generator(self.seed, "negatives", step)
        return (torch.randint(num_images - 1, (total, self.k), generator=rng),)

    def summed(self, similarities: Tensor, num_images: int, total: int) -> Tensor:
        """Sum the losses of rows, of `total` in the whole batch, from B x (1 + K) v.m / T, positive first."""
        raise NotImplementedError

    def forward(
        self, v: Tensor, indexes: Tensor, memory: Tensor, drawn: Tensor, *, total: int = 0
    ) -> Tensor:
        """Compute the part of the mean loss of v (B x D unit vectors, images `indexes`), memory: N x D.

        `drawn` are these rows of the numbers of `draw`, B x K.
        """
        n, total, v = len(memory), total or len(indexes), v.to(memory.dtype)
        rows = torch.cat([indexes[:, None], others(drawn, indexes)], dim=1)
        if self._by_products(n):
            products = (v @ memory.T).gather(1, rows)
        else:
            products = torch.einsum("bd,bkd->bk", v, memory[rows])
        return self.summed(products / self.temperature, n, total) / total


class NCE(_Sampled):
    """Noise-contrastive estimation with K uniform negatives (`--nce-k K`).

    P = exp(v.m / T) / Z; the loss is -[log(P / (P + K/N + eps)) for the positive + sum over the negatives of
    log((K/N) / (P + K/N + eps))], averaged over the batch. With c = K/N + eps, P / (P + c) is the logistic
    function of log(P / c), whose logarithm stays finite where P vanishes or overflows.

    With `z_momentum` None, Z is estimated once, as N mean(exp) of the first batch, as published. A number
    such as 0.99 updates it as an exponential moving average: the embeddings of the first batch are random,
    and Z changes a lot as they learn.
    """

    def __init__(self, k: int, temperature: float, seed: int, z_momentum: float | None) -> None:
        super().__init__(k, temperature, seed)
        self.z_momentum = z_momentum
        self.register_buffer("z", torch.tensor(-1.0))  # -1 means not yet estimated

    def chance(self, num_images: int) -> float:
        """Return the loss if every image is equally probable, P = 1/N."""
        whole = (1 + self.k) / num_images + EPS
        return math.log(whole * num_images) + self.k * math.log(whole * num_images / self.k)

    @torch.no_grad()
    def _estimate_z(self, exponentials: Tensor, num_images: int, num_rows: int) -> None:
        mean = all_reduce_sum(exponentials.sum()) / (num_rows * exponentials.shape[1])
        estimate = mean.float() * num_images
        moving = self.z_momentum is not None and self.training
        later = self.z.lerp(estimate, 1 - self.z_momentum) if moving else self.z
        # torch.where chooses on the device: asking whether this is the first batch would wait for it
        self.z.copy_(torch.where(self.z < 0, estimate, later))

    def summed(self, similarities: Tensor, num_images: int, total: int) -> Tensor:
        self._estimate_z(similarities.exp(), num_images, total)
        noise = self.k / num_images
        log_odds = similarities - self.z.log() - math.log(noise + EPS)  # of data against noise
        positive = F.logsigmoid(log_odds[:, 0])
        negative = F.logsigmoid(-log_odds[:, 1:]) + math.log(noise / (noise + EPS))
        return -(positive + negative.sum(dim=1)).sum()


class InfoNCE(_Sampled):
    """Softmax cross-entropy of the positive against K bank negatives (`--nce-loss infonce`), without Z.

    Later releases of instance discrimination use it (K = 65,536).
    """

    def chance(self, num_images: int) -> float:
        return math.log(1 + self.k)

    def summed(self, similarities: Tensor, num_images: int, total: int) -> Tensor:
        own = torch.zeros(len(similarities), dtype=torch.int64, device=similarities.device)
        return F.cross_entropy(similarities, own, reduction="sum")


def build_loss(
    k: int,
    temperature: float,
    *,
    kind: str = "nce",
    z_momentum: float | None = None,
    seed: int = 0,
    bf16: bool = False,
) -> FullSoftmax | NCE | InfoNCE:
    """Build the loss that `--nce-k` and `--nce-loss` describe; K = 0 is the full softmax."""
    if temperature <= 0:
        raise ValueError(f"temperature {temperature}: must be positive")
    if k == 0:
        return FullSoftmax(temperature, bf16)
    if kind == "nce":
        return NCE(k, temperature, seed, z_momentum)
    if kind == "infonce":
        return InfoNCE(k, temperature, seed)
    raise ValueError(f"unknown loss {kind!r}: take one of {', '.join(LOSSES)}")

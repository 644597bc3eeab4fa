"""Instance discrimination (Wu et al. 2018, arXiv 1805.01978), where each image is a class of its own."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lib.loading.batches import Batch
from lib.objectives.memory_bank import NCE, FullSoftmax, InfoNCE, MemoryBank
from lib.objectives.objective import Network, Objective
from lib.runtime.distributed import all_gather_rows


class InstanceDiscrimination(Objective):
    """Objective that pulls an embedding to its image's row of a memory bank and away from all others.

    Published is one view of each image in a step; of several, each is compared with the row, and with the
    same negatives, and the row moves toward their mean.
    """

    def __init__(self, bank: MemoryBank, loss: FullSoftmax | NCE | InfoNCE, views: int = 1) -> None:
        super().__init__()
        self.bank, self.loss, self.views = bank, loss, views

    def draw(self, total: int, place: int) -> tuple[Tensor, ...]:
        return self.loss.draw(total, len(self.bank), place)

    def forward(self, network: Network, batch: Batch) -> tuple[dict[str, Tensor], Any]:
        several = lambda x: torch.cat([x] * self.views) if self.views > 1 else x  # noqa: E731
        embeddings = network(batch.stacked)
        loss = self.loss(
            embeddings,
            several(batch.indexes),
            self.bank.memory,
            *map(several, batch.drawn),
            total=self.views * batch.total,
        )
        # a new tensor: the next forward pass of a network compiled into CUDA graphs writes to the same place
        mean = embeddings.detach().unflatten(0, (self.views, -1)).mean(dim=0)
        return {"loss": loss}, (batch.indexes, mean, batch.total)

    def after_step(self, kept: Sequence[tuple[Tensor, Tensor, int]]) -> None:
        """Move the rows of the step's images toward the means of their new embeddings, batch by batch."""
        for indexes, embeddings, total in kept:
            self.bank.update(all_gather_rows(indexes, total), all_gather_rows(embeddings, total))

    @property
    def chance(self) -> float:
        return self.loss.chance(len(self.bank))

    @property
    def bank_rows(self) -> Tensor:
        return self.bank.memory

    def flops_per_image(self) -> float:
        return self.views * self.loss.flops(*self.bank.memory.shape)

    def checkpoint_entries(self) -> dict[str, Any]:
        """Return the memory bank under its published name `lemniscate`, and NCE's normalizer."""
        return {"lemniscate": {"memory": self.bank.memory}, "criterion": self.loss.state_dict()}

    def load_entries(self, state: Mapping[str, Any]) -> None:
        self.bank.load_state_dict(state["lemniscate"])
        self.loss.load_state_dict(state["criterion"])

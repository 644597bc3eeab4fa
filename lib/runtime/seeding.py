"""Random numbers addressed by what they are for, so that there is no generator state to save."""

import numpy as np
import torch

# One number per use: two uses with one seed must not share their stream.
PURPOSES = ("order", "augmentation", "negatives", "model", "bank", "sample")


def generator(seed: int, purpose: str, *address: int) -> torch.Generator:
    """A CPU generator that depends on nothing but its arguments.

    `generator(seed, "augmentation", step)` gives the same numbers in a run that was never
    interrupted, in one that resumes at `step`, and on every device and process.
    """
    entropy = (seed, PURPOSES.index(purpose), *address)
    state = np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state) & 0x7FFFFFFFFFFFFFFF)

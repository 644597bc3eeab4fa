"""Random numbers addressed by their purpose, so that there is no generator state to save."""

import numpy as np
import torch

# Each use has its own purpose: two uses with one seed must not share random numbers.
PURPOSES = ("order", "augmentation", "negatives", "model", "bank", "sample", "boxes")


def generator(seed: int, purpose: str, *address: int) -> torch.Generator:
    """Return a CPU generator that depends on nothing but its arguments.

    `generator(seed, "augmentation", step)` gives the same numbers in a run that was never
    interrupted, in one that resumes at `step`, and on every device and process.
    """
    entropy = (seed, PURPOSES.index(purpose), *address)
    state = np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state) & 0x7FFFFFFFFFFFFFFF)


def address(step: int, stream: int = 0, view: int = 0) -> tuple[int, ...]:
    """Return the address of a batch's random numbers, for `generator(seed, purpose, *address(...))`.

    Views are augmentations of the same images, streams are of labeled or unlabeled batches. The first view of
    the first stream keeps the addresses of runs that have only one of each.
    """
    return (step, stream, view) if stream or view else (step,)

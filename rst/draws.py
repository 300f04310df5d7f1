"""Everything random is a function of (seed, stream, index). No random state is stored, so a run can resume
anywhere, and what one part draws never shifts what another part draws."""

import numpy as np
import torch

# The numbers are part of every recorded result: append, never renumber.
STREAMS = {"coin": 0, "init": 1, "order": 2, "augment": 3, "model": 4, "split": 5, "label_noise": 6}
STREAMS |= {"offset": 7}


def draw(seed: int, stream: str, index: int = 0) -> int:
    """64 uniform random bits for (seed, stream, index), the same in every process and on every machine.

    numpy's `SeedSequence` hashes the three integers; its output is guaranteed not to change between
    numpy versions (NEP 19).
    """
    if seed < 0:
        raise ValueError(f"seed must be a non-negative integer, got {seed}")
    return int(np.random.SeedSequence((seed, STREAMS[stream], index)).generate_state(1, np.uint64)[0])


def generator(seed: int, stream: str, index: int = 0) -> torch.Generator:
    """A generator for (seed, stream, index). It is on the CPU whatever the run's device, so that a seed means
    the same data order and augmentation everywhere."""
    return torch.Generator().manual_seed(draw(seed, stream, index))

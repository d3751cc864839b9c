"""The noise that ops draw when they are given no seed."""

import torch
from torch import Tensor

from aefast.ops import _philox


def next_seed() -> Tensor:
    """The seed that the next call of an op on the CPU draws from torch's generator, which stays as it is."""
    with torch.random.fork_rng(devices=[]):
        return _philox.seed_of(None, None, torch.empty(0), "test")


def next_normals(*shape: int) -> Tensor:
    """The N(0, 1) values, in float64, of the next call."""
    return _philox.normals(next_seed(), torch.Size(shape), torch.float64)


def next_uniforms(*shape: int) -> Tensor:
    """The values from [0, 1), in float64, that the next call compares with a chance."""
    count = torch.Size(shape).numel()
    return (_philox.words(next_seed(), count) * 2.0**-32).reshape(shape)

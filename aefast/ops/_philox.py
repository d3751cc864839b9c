"""The noise of kernels/include/philox.h in plain PyTorch, and the seeds of all noise.

Element i of a draw takes word i % 4 of Philox4x32-10's block i / 4 (Salmon, Moraes, Dror, Shaw: Parallel Random
Numbers: As Easy as 1, 2, 3, SC 2011); the key is the seed.
"""

import math
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from aefast.errors import InputError
from aefast.ops import _registry
from aefast.ops._library import LIBRARY, below_autograd, implement

LIBRARY.define(
    "draw_seed(Tensor like) -> Tensor", tags=(torch.Tag.nondeterministic_seeded, torch.Tag.pt2_compliant_tag)
)


@implement("draw_seed")
def _(like):
    return _draw(like.device, None)


@torch.library.impl(LIBRARY, "draw_seed", "Autograd")
def _(like):
    with below_autograd():
        return torch.ops.aefast.draw_seed.default(like)


@torch.library.impl(LIBRARY, "draw_seed", "FuncTorchVmapMode")
def _(like):
    # What follows vmap's randomness argument.
    return torch.randint(2**63 - 1, (), device=like.device)


@torch.library.register_fake("aefast::draw_seed", lib=LIBRARY)
def _(like):
    return like.new_empty((), dtype=torch.int64)


def _draw(device: torch.device, generator: torch.Generator | None) -> Tensor:
    return torch.empty((), dtype=torch.int64, device=device).random_(generator=generator)


def seed_of(seed: Any, generator: Any, like: Tensor, op: str) -> Tensor:
    """The seed of a call as an int64 scalar on `like`'s device: the one given, or a draw from a generator.

    Raises:
        InputError: both a seed and a generator are given, or one of them is none.
    """
    if seed is None:
        if generator is None:
            if not _registry.is_watched():
                return _draw(like.device, None)
            if torch.compiler.is_exporting() and _registry.choose(op, like) == "eager":
                # A program of nothing but references runs without aefast, and draws what they draw.
                return torch.ops.aten.random.default(torch.zeros((), dtype=torch.int64, device=like.device))
            return torch.ops.aefast.draw_seed.default(like)
        if not isinstance(generator, torch.Generator):
            raise InputError(f"{op}: generator must be a torch.Generator, got {type(generator).__name__}")
        if generator.device.type != like.device.type:
            raise InputError(
                f"{op}: generator must be on the device of the input, {like.device}, got {generator.device}"
            )
        if torch.compiler.is_compiling():
            raise InputError(
                f"{op}: torch.compile takes no generator; give a seed, or draw from the default generator"
            )
        return _draw(like.device, generator)
    if generator is not None:
        raise InputError(f"{op}: give either seed or generator, not both")
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1:
            raise InputError(
                f"{op}: seed must be an int or an int64 tensor of one element, got a {seed.dtype} tensor of shape "
                f"{tuple(seed.shape)}"
            )
        if seed.device != like.device:
            raise InputError(
                f"{op}: seed must be on the device of the input, {like.device}, got {seed.device}"
            )
        return seed.detach().reshape(())
    if isinstance(seed, bool) or not isinstance(seed, Integral | torch.SymInt):
        raise InputError(f"{op}: seed must be an int or an int64 tensor of one element, got {seed!r}")
    if not -(2**63) <= seed < 2**63:
        raise InputError(f"{op}: seed must be from -2**63 to 2**63 - 1, got {seed}")
    number = seed if isinstance(seed, int | torch.SymInt) else int(seed)
    return torch.full((), number, dtype=torch.int64, device=like.device)


_LOW = 0xFFFFFFFF


def _wide_product(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """The two words of a * b, for b of 32 bits in int64."""
    high = (a * (b >> 16) + (a * (b & 0xFFFF) >> 16)) >> 16
    return high, (a * b) & _LOW


def words(seed: Tensor, count: int, first: int = 0) -> Tensor:
    """The words of elements `first`, a multiple of 4, to first + count - 1: (..., count) int64 for seeds (...)."""
    if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
        return torch.ops.aefast.philox_words.default(seed, count, first)
    return _words(seed, count, first)


def _words(seed: Tensor, count: int, first: int) -> Tensor:
    block = torch.arange(first // 4, first // 4 + -(-count // 4), device=seed.device)
    zero = torch.zeros_like(block)
    counter = [block & _LOW, block >> 32, zero, zero]
    low_key, high_key = (seed & _LOW).unsqueeze(-1), ((seed >> 32) & _LOW).unsqueeze(-1)
    for _ in range(10):
        high0, low0 = _wide_product(0xD2511F53, counter[0])
        high2, low2 = _wide_product(0xCD9E8D57, counter[2])
        counter = [high2 ^ counter[1] ^ low_key, low2, high0 ^ counter[3] ^ high_key, low0]
        low_key, high_key = (low_key + 0x9E3779B9) & _LOW, (high_key + 0xBB67AE85) & _LOW
    return torch.stack(counter, dim=-1).flatten(-2)[..., :count]


# Inductor writes an element out by following all paths to it, of which ten rounds have too many.
LIBRARY.define(
    "philox_words(Tensor seed, SymInt count, SymInt first) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,)
)


@implement("philox_words")
def _(seed, count, first):
    return _words(seed, count, first)


@torch.library.impl(LIBRARY, "philox_words", "Autograd")
def _(seed, count, first):
    with below_autograd():
        return torch.ops.aefast.philox_words.default(seed, count, first)


@torch.library.register_fake("aefast::philox_words", lib=LIBRARY)
def _(seed, count, first):
    return seed.new_empty((*seed.shape, count))


@torch.library.register_vmap("aefast::philox_words", lib=LIBRARY)
def _(info, in_dims, seed, count, first):
    return torch.ops.aefast.philox_words.default(seed.movedim(in_dims[0], 0), count, first), 0


def normals(seed: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """N(0, 1) by Box and Muller from pairs of words, computed in float64."""
    count = math.prod(shape)
    pairs = words(seed, count + -count % 4).reshape(-1, 2).double()
    radius = (-2.0 * ((pairs[:, 0] + 0.5) * 2.0**-32).log()).sqrt()
    angle = (pairs[:, 1] + 0.5) * (2.0 * math.pi * 2.0**-32)
    values = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1).reshape(-1)
    return values[:count].reshape(shape).to(dtype)


def limit_of(p: float) -> int:
    """A word is below it with chance p, to the nearest multiple of 2^-32; 0 for p = 0 alone."""
    return min(2**32, max(1, math.floor(p * 2.0**32 + 0.5))) if p > 0 else 0

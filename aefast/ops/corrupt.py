"""Noise on the input of a denoising autoencoder, made in place and made again for the gradient."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator
from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from torch.overrides import has_torch_function_variadic

from aefast.errors import InputError
from aefast.ops import _arguments, _philox, _registry
from aefast.ops._library import LIBRARY, below_autograd, define, direct_apply, implement

# The noises, and the options of each with their defaults.
NOISES: dict[str, dict[str, Any]] = {
    "gaussian": {"mean": 0.0, "std": 0.1},
    "salt_and_pepper": {"p": 0.1, "low": 0.0, "high": 1.0},
    "masking": {"p": 0.1, "block": 1},
    "dropout": {"p": 0.1},
}

OPTIONS = ("mean", "std", "p", "low", "high", "block")


@dataclasses.dataclass(frozen=True)
class Noise:
    """What launchers are told of a noise.

    `first` and `second` are the gaussian's mean and standard deviation, salt and pepper's low and high, and dropout's
    scale and nothing. An element is replaced if its word is below `limit`, by salt and pepper's low if it is below
    half of that. Masking replaces squares of `block` × `block` elements; squares are counted along the rows of an
    image, then over its rows and then over the images, and the words are theirs.
    """

    kind: str
    first: float
    second: float
    limit: int
    block: int

    @property
    def arguments(self) -> tuple[Any, ...]:
        return self.kind, self.first, self.second, self.limit, self.block

    @property
    def gradient(self) -> Noise:
        """What takes the gradient of the result to that of x: the same noise, with zeros for salt and pepper."""
        return dataclasses.replace(self, first=0.0, second=0.0) if self.kind == "salt_and_pepper" else self


# typed, lest a True that equals a 1 seen before goes unchecked.
@functools.lru_cache(maxsize=256, typed=True)
def _known_noise(noise: Any, op: str, *options: Any) -> Noise:
    return noise_of(noise, dict(zip(OPTIONS, options, strict=True)), op)


def noise_of(noise: Any, options: dict[str, Any], op: str) -> Noise:
    """The noise called `noise` with its defaults and those `options` that are not None.

    Raises:
        InputError: an unknown noise, an option of another noise, or a value out of its range.
    """
    _arguments.check_name("noise", noise, NOISES, op)
    given = {name: value for name, value in options.items() if value is not None}
    for name in given:
        if name not in NOISES[noise]:
            raise InputError(f"{op}: {noise} noise has no {name}; it takes {', '.join(NOISES[noise])}")
    values = NOISES[noise] | given
    for name, value in values.items():
        if name == "p":
            _arguments.check_number(name, value, op, 0.0, 1.0)
        elif name == "std":
            _arguments.check_number(name, value, op, 0.0)
        elif name == "block":
            if isinstance(value, bool) or not isinstance(value, Integral) or not 1 <= value < 2**31:
                raise InputError(f"{op}: block must be an integer from 1 to {2**31 - 1}, got {value!r}")
        else:
            _arguments.check_number(name, value, op)
    limit = _philox.limit_of(float(values.get("p", 0.0)))
    if noise == "gaussian":
        return Noise(noise, float(values["mean"]), float(values["std"]), 0, 1)
    if noise == "salt_and_pepper":
        return Noise(noise, float(values["low"]), float(values["high"]), limit, 1)
    if noise == "masking":
        return Noise(noise, 0.0, 0.0, limit, int(values["block"]))
    # With p = 1 nothing is left that the scale would apply to.
    p = float(values["p"])
    return Noise(noise, 1.0 / (1.0 - p) if p < 1 else 0.0, 0.0, limit, 1)


def _reference(x: Tensor, seed: Tensor, noise: Noise) -> Tensor:
    if noise.kind == "gaussian":
        wide = _arguments.accumulator(x.dtype)
        values = _philox.normals(seed, x.shape, wide) * noise.second + noise.first
        return (x.to(wide) + values).to(x.dtype)
    if noise.block > 1:
        height, width = (-(-size // noise.block) for size in x.shape[-2:])
        squares = _philox.words(seed, math.prod(x.shape[:-3]) * height * width)
        word = squares.reshape(*x.shape[:-3], 1, height, width)
        word = word.repeat_interleave(noise.block, -2).repeat_interleave(noise.block, -1)
        word = word[..., : x.shape[-2], : x.shape[-1]].expand(x.shape)
    else:
        word = _philox.words(seed, x.numel()).reshape(x.shape)
    replaced = word < noise.limit
    if noise.kind == "salt_and_pepper":
        lows, highs = x.new_full((), noise.first), x.new_full((), noise.second)
        return torch.where(replaced, torch.where(word < noise.limit // 2, lows, highs), x)
    kept = x * noise.first if noise.kind == "dropout" else x
    return torch.where(replaced, x.new_zeros(()), kept)


def reference(
    x: Tensor,
    noise: str,
    *,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    **options: Any,
) -> Tensor:
    """`corrupt` in plain PyTorch."""
    spec = _noise(noise, tuple(options.get(name) for name in OPTIONS), x)
    return _reference(x, _philox.seed_of(seed, generator, x, "corrupt"), spec)


# x contiguous, (N, C, H, W) for blocks above 1 and of any shape else; seed an int64 scalar; the noise as in `Noise`,
# limit at least 1 but for the gaussian. The result is of x's shape, contiguous.
define(
    "corrupt(Tensor x, Tensor seed, str kind, float first, float second, int limit, int block, str backend) -> Tensor"
)


@implement("corrupt")
def _(x, seed, kind, first, second, limit, block, backend):
    return _registry.kernels(backend, "corrupt").corrupt(x, seed, kind, first, second, limit, block)


@torch.library.register_fake("aefast::corrupt", lib=LIBRARY)
def _(x, seed, kind, first, second, limit, block, backend):
    return x.new_empty(x.shape)


class _Corrupt(torch.autograd.Function):
    """`call` is (noise, backend, launchers to call at once or None)."""

    @staticmethod
    def forward(ctx, x, seed, call):
        noise, backend, launchers = call
        ctx.save_for_backward(seed)
        ctx.call = call
        if launchers is not None:
            return launchers.corrupt(x, seed, *noise.arguments)
        with below_autograd():
            return torch.ops.aefast.corrupt.default(x, seed, *noise.arguments, backend)

    @staticmethod
    def backward(ctx, grad):
        noise, backend, _ = ctx.call
        (seed,) = ctx.saved_tensors
        if noise.kind == "gaussian":
            return grad, None, None
        if _registry.wants_reference(grad):
            return _reference(grad, seed, noise.gradient), None, None
        grad = grad.contiguous()
        if _registry.is_direct(backend, grad):
            launch = _registry.kernels(backend, "corrupt").corrupt
            return launch(grad, seed, *noise.gradient.arguments), None, None
        launch = torch.ops.aefast.corrupt.default
        return launch(grad, seed, *noise.gradient.arguments, backend), None, None


_apply = direct_apply(_Corrupt)


@torch.library.impl(LIBRARY, "corrupt", "Autograd")
def _(x, seed, kind, first, second, limit, block, backend):
    noise = Noise(kind, first, second, limit, block)
    if _registry.is_transformed():
        return _reference(x, seed, noise)
    if _registry.needs_gradient(x):
        return _Corrupt.apply(x, seed, (noise, backend, None))
    with below_autograd():
        return torch.ops.aefast.corrupt.default(x, seed, *noise.arguments, backend)


def _noise(noise: Any, options: tuple[Any, ...], x: Tensor) -> Noise:
    if torch.compiler.is_compiling():
        spec = noise_of(noise, dict(zip(OPTIONS, options, strict=True)), "corrupt")
    else:
        try:
            spec = _known_noise(noise, "corrupt", *options)
        except TypeError:
            # What cannot be a key is no option either.
            spec = noise_of(noise, dict(zip(OPTIONS, options, strict=True)), "corrupt")
    largest = torch.finfo(x.dtype).max
    names = [name for name in ("mean", "std", "low", "high") if name in NOISES[spec.kind]]
    if names and max(abs(spec.first), abs(spec.second)) > largest:
        raise InputError(
            f"corrupt: {' and '.join(names)} must be within x's dtype, {str(x.dtype).removeprefix('torch.')}, "
            f"of which the largest number is {largest:g}, got {spec.first:g} and {spec.second:g}"
        )
    if spec.block > 1 and x.dim() >= 3 and not torch.jit.is_tracing():
        # Larger squares than the image are one; but a side of 1 would mean single elements.
        spec = dataclasses.replace(spec, block=min(spec.block, max(2, *x.shape[-2:])))
    return spec


def corrupt(
    x: Tensor,
    noise: str,
    *,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    mean: float | None = None,
    std: float | None = None,
    p: float | None = None,
    low: float | None = None,
    high: float | None = None,
    block: int | None = None,
) -> Tensor:
    """x with noise on it, for a denoising autoencoder (Vincent et al., JMLR 11, 2010, section 3).

    - "gaussian": x + mean + std · eps with eps from N(0, 1); mean 0 and std 0.1 unless given.
    - "salt_and_pepper": each element, with chance p (0.1), becomes low (0) or high (1), at even odds.
    - "masking": each element, with chance p (0.1), becomes 0. With block = s instead each square of s × s elements of
      an image, in all its channels at once; squares begin at the image's upper left corner and are cut at its ends.
    - "dropout": each element, with chance p (0.1), becomes 0, and the others are divided by 1 - p.

    The noise is made in registers by Philox4x32-10 and made again in the backward: no mask is stored. Chances are
    multiples of 2^-32. The same seed gives the same noise on every backend, up to the rounding of a logarithm, a sine
    and a cosine for the gaussian.

    Args:
        x: of any shape, float32, bfloat16, float16 or float64, any strides; (..., C, H, W) for masking with a block.
        noise: one of the names above.
        seed: an int, or an int64 tensor of one element on x's device. None draws one from torch's generator, so that
            ``torch.manual_seed`` makes a run repeatable; captured CUDA graphs draw anew at each replay. Calls with one
            seed draw the same noise, of this op or another: give each its own.
        generator: the generator to draw the seed from instead; not under torch.compile.
        mean, std: of the gaussian; std at least 0.
        p: a chance, from 0 to 1, of the other noises.
        low, high: what salt and pepper set.
        block: side of masking's squares, in elements, at least 1.

    Returns:
        The shape and dtype of x, contiguous. The gradient of x is 0 where an element was replaced.

    Raises:
        InputError: a shape, dtype, name, option or value is not as above; the message names it.
        BackendError: the backend asked for cannot serve the call.
    """
    if has_torch_function_variadic(x, seed) and _arguments.are_stand_ins(x, seed):
        return _arguments.deferred(corrupt, locals())
    _arguments.check_tensor("x", x, "corrupt")
    _arguments.check_floating("x", x, "corrupt")
    _arguments.check_dense("x", x, "corrupt")
    spec = _noise(noise, (mean, std, p, low, high, block), x)
    if spec.block > 1 and x.dim() < 3:
        raise InputError(
            f"corrupt: x must be images (..., C, H, W) for masking with a block, got shape {_arguments.shape_of(x)}"
        )
    seed = _philox.seed_of(seed, generator, x, "corrupt")
    if spec.kind != "gaussian" and spec.limit == 0:
        return x.clone(memory_format=torch.contiguous_format)
    backend = _registry.choose("corrupt", x)
    if backend == "eager":
        return _reference(x, seed, spec).contiguous()
    shape = x.shape
    x = x.contiguous()
    if spec.block > 1:
        if torch.jit.is_tracing():
            # Of the op the tracer would keep squares no larger than this example's images.
            return _reference(x, seed, spec)
        x = x.reshape(math.prod(shape[:-3]), *shape[-3:])
    if _registry.is_direct(backend, x, seed):
        launchers = _registry.kernels(backend, "corrupt")
        if _registry.needs_gradient(x):
            out = _apply(x, seed, (spec, backend, launchers))
        else:
            out = launchers.corrupt(x, seed, *spec.arguments)
    else:
        out = torch.ops.aefast.corrupt.default(x, seed, *spec.arguments, backend)
    return out if out.shape == shape else out.reshape(shape)


def samples(device: torch.device, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """Every noise over shapes and strides: empty, one, prime, more than one vector; and images with squares."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

    noises: list[dict[str, Any]] = [
        {"noise": "gaussian", "mean": 0.25, "std": 0.5},
        {"noise": "salt_and_pepper", "p": 0.3, "low": -1.0, "high": 2.0},
        {"noise": "masking", "p": 0.4},
        {"noise": "dropout", "p": 0.25},
    ]
    for index, noise in enumerate(noises):
        for shape in ((0,), (), (1,), (5, 1), (31, 17), (3, 1031), (2, 3, 5, 7)):
            yield {"x": draw(*shape), "seed": index, **noise}
        yield {"x": draw(18, 66).t()[::2], "seed": 2**40 + index, **noise}
        yield {"x": draw(1, 12).expand(9, 12), "seed": torch.tensor([-index], device=device), **noise}
    for p in (1e-12, 1.0):
        for noise in noises[1:]:
            yield {"x": draw(11, 13), "seed": 5, **noise, "p": p}
    for shape, block in (
        ((2, 3, 8, 12), 4),
        ((3, 2, 7, 9), 3),
        ((2, 5, 6), 2),
        ((1, 1, 3, 3), 8),
        ((2, 0, 4, 4), 2),
    ):
        yield {"x": draw(*shape), "seed": 6, "noise": "masking", "p": 0.5, "block": block}
    images = draw(2, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    yield {"x": images, "seed": 7, "noise": "masking", "p": 0.5, "block": 4}


def cost(backward: bool, x: Tensor, noise: str, **settings: Any) -> _registry.Cost:
    """x is read once and the result written once, and so are their gradients, but for the gaussian's, which is one
    tensor. A normal value takes half of a logarithm, of a sine and of a cosine, which count as exponentials do."""
    is_gaussian = noise == "gaussian"
    elements = 2 * x.numel() * (2 if backward and not is_gaussian else 1)
    return _registry.Cost(elements * x.element_size(), 0, int(1.5 * x.numel()) if is_gaussian else 0)


OP = _registry.register(_registry.Op("corrupt", corrupt, reference, samples, cost))

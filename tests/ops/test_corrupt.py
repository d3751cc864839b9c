import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

import aefast
import aefast.functional as AF
from aefast.errors import InputError
from aefast.ops import _philox, corrupt
from support import numerics

OP = corrupt.OP
NOISES = {
    "gaussian": {"mean": 0.25, "std": 0.5},
    "salt_and_pepper": {"p": 0.3, "low": -1.0, "high": 2.0},
    "masking": {"p": 0.4},
    "dropout": {"p": 0.25},
}


def is_near_share(count, total, p):
    """A count of `total` independent events of chance p lies this near but once in 1.7 million."""
    return abs(count - total * p) < 5 * (total * p * (1 - p)) ** 0.5


@pytest.mark.parametrize("p", [0.5, 0.1, 1e-3])
@pytest.mark.parametrize("noise", ["salt_and_pepper", "masking", "dropout"])
def test_shares(instruction_set, noise, p):
    total = 2_000_000
    x = torch.full((total,), 0.5)
    out = AF.corrupt(x, noise, p=p, seed=3)
    kept = {"dropout": 0.5 / (1 - p)}.get(noise, 0.5)
    replaced = ~torch.isclose(out, torch.tensor(kept))
    assert is_near_share(replaced.sum().item(), total, p)
    if noise == "salt_and_pepper":
        assert is_near_share((out == 0.0).sum().item(), total, p / 2)
        assert is_near_share((out == 1.0).sum().item(), total, p / 2)
        assert ((out == 0.0) | (out == 1.0) | (out == 0.5)).all()
    else:
        assert torch.equal(out[replaced], torch.zeros(int(replaced.sum())))
    # Neighbours are replaced independently of each other.
    for lag in (1, 2, 3, 4, 8):
        assert is_near_share((replaced[lag:] & replaced[:-lag]).sum().item(), total - lag, p * p)


def test_gaussian_is_reparameterize_s_noise():
    numerics.require_backend("cpu", OP.name, "cpu", torch.float32)
    zeros = torch.zeros(1000, 33)
    noise, _ = AF.reparameterize(zeros, zeros, seed=4)
    x = torch.rand(1000, 33)
    assert torch.equal(AF.corrupt(x, "gaussian", std=1.0, seed=4), x + noise)
    torch.testing.assert_close(AF.corrupt(x, "gaussian", mean=2.0, std=0.3, seed=4), x + 2.0 + 0.3 * noise)


def test_every_chance_is_reached():
    """Elements are replaced whose word is below p · 2³²: with p = 1 all of them, and with p = 0 none."""
    numerics.require_backend("cpu", OP.name, "cpu", torch.float32)
    x = torch.rand(100_000) + 1.0
    for noise in ("salt_and_pepper", "masking", "dropout"):
        assert ((out := AF.corrupt(x, noise, p=1.0, seed=1)) != x).all() and (out <= 1.0).all()
        zero = AF.corrupt(x, noise, p=0.0, seed=1)
        assert torch.equal(zero, x) and zero.data_ptr() != x.data_ptr()
        assert torch.equal(AF.corrupt(x, noise, p=1e-12, seed=1), x)
    words = _philox.words(torch.tensor(1), len(x))
    for word in (words.min().item(), words.max().item()):
        for p, is_replaced in ((word / 2**32, False), ((word + 1) / 2**32, True)):
            out = AF.corrupt(x, "masking", p=p, seed=1)
            assert (out[words == word] == 0.0).all() == is_replaced


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    ("height", "width", "block"), [(12, 20, 4), (7, 9, 2), (5, 5, 9), (3, 4100, 2), (2, 2500, 3)]
)
def test_squares(instruction_set, height, width, block, dtype):
    x = torch.rand(6, 3, height, width).add(1.0).to(dtype)
    out = AF.corrupt(x, "masking", p=0.5, block=block, seed=2)
    kept = out != 0
    assert torch.equal(out, torch.where(kept, x, torch.zeros((), dtype=dtype)))
    assert (kept == kept[:, :1]).all()
    down, across = -(-height // block), -(-width // block)
    words = _philox.words(torch.tensor(2), 6 * down * across).reshape(6, down, across)
    for row in range(down):
        for col in range(across):
            square = kept[:, 0, row * block : (row + 1) * block, col * block : (col + 1) * block]
            expected = words[:, row, col] >= 2**31
            assert torch.equal(square, expected[:, None, None].expand(square.shape))
    assert 0 < kept.sum() < kept.numel()


@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_squares_larger_than_the_image(backend):
    """Each image is one square, in all its channels; also where it has a single pixel."""
    numerics.require_backend(backend, OP.name, "cpu", torch.float32)
    for size in (1, 5):
        x = torch.ones(200, 3, size, size)
        with aefast.backend(backend):
            out = AF.corrupt(x, "masking", p=0.5, block=2**31 - 1, seed=2)
        assert set(out.flatten(1).sum(1).tolist()) == {0.0, 3.0 * size * size}


def test_squares_of_any_leading_shape():
    numerics.require_backend("cpu", OP.name, "cpu", torch.float32)
    x = torch.rand(2, 5, 3, 8, 8)
    out = AF.corrupt(x, "masking", p=0.5, block=4, seed=2)
    assert torch.equal(out.flatten(0, 1), AF.corrupt(x.flatten(0, 1), "masking", p=0.5, block=4, seed=2))
    assert torch.equal(AF.corrupt(x[0, 0], "masking", p=0.5, block=4, seed=2), out[0, 0])


@pytest.mark.parametrize("noise", NOISES)
def test_gradient_is_that_of_what_was_kept(noise):
    numerics.require_backend("cpu", OP.name, "cpu", torch.float32)
    x = (torch.rand(50, 37) + 3.0).requires_grad_()
    out = AF.corrupt(x, noise, **NOISES[noise])
    upstream = torch.randn(50, 37)
    (gradient,) = torch.autograd.grad(out, x, upstream)
    if noise == "gaussian":
        assert torch.equal(gradient, upstream)
    else:
        scale = 1 / 0.75 if noise == "dropout" else 1.0
        kept = out.detach() > 2.5
        assert torch.equal(gradient, torch.where(kept, upstream * scale, torch.zeros(())))
        assert 0 < kept.sum() < kept.numel()


@pytest.mark.parametrize("noise", ["gaussian", "salt_and_pepper"])
def test_nothing_of_the_input_is_kept(noise):
    """x may be overwritten before the backward, and no mask is stored: the graph holds the seed alone."""
    numerics.require_backend("cpu", OP.name, "cpu", torch.float32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor
    ):
        out = AF.corrupt(torch.rand(50, 37, requires_grad=True), noise)
    assert [(tensor.dtype, tensor.numel()) for tensor in saved] == [(torch.int64, 1)]
    out.sum().backward()


@pytest.mark.usefixtures("no_kept_memory")
@pytest.mark.parametrize("noise", NOISES)
def test_no_tensor_beyond_output_and_gradient(noise):
    numerics.require_backend("cpu", OP.name, "cpu", torch.float32)
    x, upstream = torch.rand(512, 256, requires_grad=True), torch.rand(512, 256)
    with torch.profiler.profile(profile_memory=True) as profile:
        torch.autograd.grad(AF.corrupt(x, noise), x, upstream)
    allocated = sum(
        event.nbytes()
        for event in profile.profiler.kineto_results.events()
        if event.name() == "[memory]" and event.nbytes() > 0
    )
    # The gaussian's gradient is the upstream one.
    least = (1 if noise == "gaussian" else 2) * x.numel() * 4
    assert least <= allocated <= least + 1024


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("is_compiled", [False, True])
def test_checkpointing_draws_again_what_was_drawn(noise, is_compiled):
    numerics.require_backend("cpu", OP.name, "cpu", torch.float32)
    x = (torch.rand(40, 33) + 3.0).requires_grad_()

    def run(x):
        return checkpoint(lambda x: AF.corrupt(x, noise, **NOISES[noise]).square(), x, use_reentrant=False)

    out = (torch.compile(run, fullgraph=True) if is_compiled else run)(x)
    (gradient,) = torch.autograd.grad(out.sum(), x)
    corrupted = out.detach().sqrt()
    slope = {"gaussian": torch.ones(()), "dropout": (corrupted > 0) / 0.75}.get(noise, corrupted > 2.5)
    torch.testing.assert_close(gradient, 2 * corrupted * slope)


def test_manual_seed_repeats_and_calls_differ():
    numerics.require_backend("cpu", OP.name, "cpu", torch.float32)
    x = torch.rand(50, 37)

    def two(function):
        torch.manual_seed(11)
        return function(x), function(x)

    for noise, options in NOISES.items():

        def once(x, noise=noise, options=options):
            return AF.corrupt(x, noise, **options)

        first, second = two(once)
        assert not torch.equal(first, second)
        for again in (two(once), two(torch.compile(once, fullgraph=True))):
            assert torch.equal(again[0], first) and torch.equal(again[1], second)


def test_the_eager_backend_draws_the_same():
    numerics.require_backend("cpu", OP.name, "cpu", torch.float32)
    x = torch.rand(3, 2, 9, 8)
    for noise, options in [*NOISES.items(), ("masking", {"p": 0.5, "block": 3})]:
        ours = AF.corrupt(x, noise, seed=4, **options)
        with aefast.backend("eager"):
            theirs = AF.corrupt(x, noise, seed=4, **options)
        torch.testing.assert_close(ours, theirs)


def test_a_scale_beyond_the_dtype_is_infinite_as_in_eager():
    numerics.require_backend("cpu", OP.name, "cpu", torch.float16)
    out = AF.corrupt(torch.ones(2_000_000, dtype=torch.float16), "dropout", p=0.99999, seed=1)
    assert set(out.unique().tolist()) == {0.0, float("inf")}


def test_half_precision_and_autocast_keep_their_dtype():
    numerics.require_backend("cpu", OP.name, "cpu", torch.bfloat16)
    for noise, options in NOISES.items():
        with torch.autocast("cpu", torch.bfloat16):
            assert AF.corrupt(torch.rand(9), noise, **options).dtype == torch.float32
            assert AF.corrupt(torch.rand(9).bfloat16(), noise, **options).dtype == torch.bfloat16


def test_numbers_of_numpy_are_numbers():
    numerics.require_backend("cpu", OP.name, "cpu", torch.float32)
    x = torch.rand(2, 3, 4, 4)
    found = AF.corrupt(x, "gaussian", std=np.float32(0.25), seed=np.int64(3))
    assert torch.equal(found, AF.corrupt(x, "gaussian", std=0.25, seed=3))
    found = AF.corrupt(x, "masking", p=np.float64(0.5), block=np.int32(2), seed=3)
    assert torch.equal(found, AF.corrupt(x, "masking", p=0.5, block=2, seed=3))


def test_result_is_contiguous():
    numerics.require_backend("cpu", OP.name, "cpu", torch.float32)
    x = torch.rand(7, 5).t()
    for p in (0.0, 0.5):
        out = AF.corrupt(x, "masking", p=p, seed=1)
        assert out.is_contiguous()
        assert torch.equal(out, AF.corrupt(x.contiguous(), "masking", p=p, seed=1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": [1.0]}, "x must be a torch.Tensor, got list"),
        (
            {"x": torch.ones(3, dtype=torch.int32)},
            "x must be float32, bfloat16, float16 or float64, got int32",
        ),
        ({"x": torch.ones(3, dtype=torch.bool)}, "x must be float32, bfloat16, float16 or float64, got bool"),
        (
            {"noise": "poisson"},
            "noise must be one of gaussian, salt_and_pepper, masking, dropout, got 'poisson'",
        ),
        ({"noise": "gauss"}, r"noise must be one of .*, got 'gauss'; did you mean 'gaussian'\?$"),
        ({"noise": None}, "noise must be one of"),
        ({"std": -0.1}, "std must be a finite number of at least 0, got -0.1"),
        ({"std": float("nan")}, "std must be a finite number of at least 0, got nan"),
        ({"std": "0.1"}, "std must be a finite number of at least 0, got '0.1'"),
        ({"mean": float("inf")}, "mean must be a finite number, got inf"),
        ({"p": 0.5}, "gaussian noise has no p; it takes mean, std"),
        ({"noise": "masking", "std": 0.5}, "masking noise has no std; it takes p, block"),
        ({"noise": "masking", "p": 1.5}, "p must be a number from 0 to 1, got 1.5"),
        ({"noise": "dropout", "p": -0.5}, "p must be a number from 0 to 1, got -0.5"),
        ({"noise": "salt_and_pepper", "p": float("nan")}, "p must be a number from 0 to 1, got nan"),
        ({"noise": "salt_and_pepper", "low": "dark"}, "low must be a finite number, got 'dark'"),
        ({"noise": "masking", "block": 0}, "block must be an integer from 1 to 2147483647, got 0"),
        ({"noise": "masking", "block": 2.0}, "block must be an integer from 1 to 2147483647, got 2.0"),
        (
            {"noise": "masking", "block": 2},
            r"x must be images \(..., C, H, W\) for masking with a block, got shape \(3, 5\)",
        ),
        (
            {"noise": "masking", "block": 2**31},
            "block must be an integer from 1 to 2147483647, got 2147483648",
        ),
        (
            {"std": 1e300},
            "mean and std must be within x's dtype, float32, of which the largest number is 3.40282e",
        ),
        (
            {"x": torch.ones(3).half(), "noise": "salt_and_pepper", "high": 1e6},
            "low and high must be within x's dtype",
        ),
        ({"std": 10**400}, "std must be a finite number of at least 0, got 1000"),
        ({"x": torch.ones(3, 5).to_sparse()}, "x must be a dense tensor, got a sparse_coo one"),
        ({"seed": "7"}, "seed must be an int or an int64 tensor of one element, got '7'"),
    ],
)
def test_bad_input_is_named(arguments, message):
    with pytest.raises(InputError, match=f"corrupt: .*{message}"):
        AF.corrupt(**{"x": torch.ones(3, 5), "noise": "gaussian", **arguments})

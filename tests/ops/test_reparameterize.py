import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch.utils.checkpoint import checkpoint

import aefast
import aefast.functional as AF
from aefast.errors import InputError
from aefast.ops import _philox, reparameterize
from support import numerics, philox

OP = reparameterize.OP
DRAWS = 12_000_000


def noise_of(shape, seed, dtype=torch.float32, **options):
    """What the op draws: z itself, of a standard normal distribution."""
    zeros = torch.zeros(shape, dtype=dtype)
    z, kl = AF.reparameterize(zeros, zeros, seed=seed, **options)
    assert kl.item() == 0.0
    return z


def moments(rows=40, size=24, dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    return tuple(
        torch.randn(rows, size, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for _ in range(2)
    )


@pytest.mark.parametrize("first", [0, 1, 6, 2**34 - 300, 2**34 + 5, 2**36 + 2])
def test_noise_of_each_instruction_set(instruction_set, first):
    """Element 2^34 begins the block whose number no longer fits 32 bits."""
    count, seed = 3001, -(2**40) + 17
    normals, words = torch.empty(count), torch.empty(count, dtype=torch.int32)
    torch.ops.aefast_cpu.noise_(normals, torch.tensor(seed), first)
    torch.ops.aefast_cpu.noise_(words, torch.tensor(seed), first)
    skipped, blocks = first % 4, (first % 4 + count + 3) // 4
    expected = philox.normals(seed % 2**64, 0, first // 4, blocks)[skipped : skipped + count]
    # Radius and sine err by 3 spacings each, and no value is beyond 6.8.
    np.testing.assert_allclose(normals.numpy(), expected, rtol=6 * 2.0**-23, atol=1e-9)
    block = np.arange(blocks, dtype=np.uint64) + np.uint64(first // 4)
    zero = np.zeros(blocks)
    counter = (block & philox.LOW, block >> philox.HALF, zero, zero)
    exact = philox.words(counter, (seed % 2**32, seed % 2**64 >> 32)).T.reshape(-1)[skipped : skipped + count]
    assert np.array_equal(words.numpy().view(np.uint32), exact)


def test_known_answers(instruction_set):
    counter, key, expected = philox.KNOWN_ANSWERS[0]
    assert counter == (0,) * 4 and key == (0, 0)
    words = torch.empty(4, dtype=torch.int32)
    torch.ops.aefast_cpu.noise_(words, torch.tensor(0), 0)
    assert tuple(words.numpy().view(np.uint32).tolist()) == expected


def test_reference_makes_the_same_noise():
    for counter, key, expected in philox.KNOWN_ANSWERS:
        if counter[2:] == (0, 0):
            seed = torch.tensor(key[0] + (key[1] << 32))
            assert tuple(_philox.words(seed, 4).tolist()) == expected
    seed = -(2**63) + 12345
    found = _philox.normals(torch.tensor(seed), torch.Size((4001,)), torch.float64)
    np.testing.assert_allclose(
        found.numpy(), philox.normals(seed % 2**64, 0, 0, 1001)[:4001], rtol=1e-12, atol=1e-12
    )


def test_distribution_of_the_noise():
    numerics.require_backend("cpu", OP.name, "cpu", torch.float32)
    values = noise_of((DRAWS // 1000, 1000), seed=2026).double().numpy().reshape(-1)
    assert stats.kstest(values, "norm").pvalue > 1e-4
    # A mean of n draws of a value with variance v lies within 5 √(v/n) of its expectation but once in 1.7 million.
    for power, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((values**power).mean() - expected) < 5 * (variance / DRAWS) ** 0.5
    for limit in (3.0, 4.0, 5.0, 6.0):
        beyond = np.count_nonzero(np.abs(values) > limit)
        expected = 2 * DRAWS * stats.norm.sf(limit)
        assert stats.poisson.cdf(beyond, expected) > 1e-6 and stats.poisson.sf(beyond - 1, expected) > 1e-6


def test_dtypes_draw_the_same_noise():
    numerics.require_backend("cpu", OP.name, "cpu", torch.float32)
    exact = noise_of((50, 33), 5, torch.float64)
    # Of a logarithm, a root, a sine and a product; and of the result in half precision.
    torch.testing.assert_close(noise_of((50, 33), 5).double(), exact, rtol=6 * 2.0**-23, atol=1e-9)
    for dtype in (torch.bfloat16, torch.float16):
        torch.testing.assert_close(
            noise_of((50, 33), 5, dtype).double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-7
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_forward_and_gradients_given_the_noise(instruction_set, dtype):
    """Against float64 autograd of the textbook's formulae, with the noise the kernel drew."""
    mu, logvar = moments(dtype=dtype)
    noise = noise_of(mu.shape, 9, dtype).double()
    generator = torch.Generator().manual_seed(4)
    grad_z, grad_kl = torch.randn(mu.shape, generator=generator), torch.randn(len(mu), generator=generator)
    grads = grad_z.to(dtype), grad_kl.to(dtype)
    z, kl = AF.reparameterize(mu, logvar, seed=9, reduction="none")
    found = z, kl, *torch.autograd.grad((z, kl), (mu, logvar), grads)
    m, lv = (tensor.detach().double().requires_grad_() for tensor in (mu, logvar))
    exact_z = m + torch.exp(0.5 * lv) * noise
    exact_kl = -0.5 * (1 + lv - m.pow(2) - lv.exp()).sum(1)
    exact = (
        exact_z,
        exact_kl,
        *torch.autograd.grad((exact_z, exact_kl), (m, lv), [grad.double() for grad in grads]),
    )
    # Sums of 24 terms, each of a few roundings.
    tolerance = 16 * torch.finfo(dtype).eps
    for ours, theirs in zip(found, exact, strict=True):
        scale = theirs.abs().max().item()
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=tolerance * scale)


def test_backward_draws_what_forward_drew():
    """The gradient of z by logvar is half of z - mu, upstream being 1."""
    numerics.require_backend("cpu", OP.name, "cpu", torch.float32)
    logvar = torch.zeros(100, 37, requires_grad=True)
    mu = torch.zeros(100, 37)
    z, _ = AF.reparameterize(mu, logvar)
    (gradient,) = torch.autograd.grad(z.sum(), logvar)
    assert torch.equal(gradient, z.detach() / 2)


def skip_where_torch_compiles_no_checkpoint():
    """torch 2.15.0 fails at any checkpoint that ends in a random op."""

    def run(x):
        return checkpoint(lambda x: torch.dropout(x * 1.0, 0.5, True), x, use_reentrant=False)

    try:
        torch.compile(run, fullgraph=True)(torch.zeros(100, 37, requires_grad=True))
    except torch._dynamo.exc.BackendCompilerFailed as error:
        pytest.skip(
            f"torch {torch.__version__} does not compile dropout in a checkpoint: {str(error).splitlines()[0]}"
        )


# torch.compile takes no reentrant checkpoints.
@pytest.mark.parametrize(("use_reentrant", "is_compiled"), [(False, False), (True, False), (False, True)])
def test_checkpointing_draws_again_what_was_drawn(use_reentrant, is_compiled):
    numerics.require_backend("cpu", OP.name, "cpu", torch.float32)
    logvar = torch.zeros(100, 37, requires_grad=True)

    def sample(logvar):
        # The product's result is what the checkpoint does not keep.
        return AF.reparameterize(torch.zeros_like(logvar), logvar * 1.0)[0]

    def run(logvar):
        return checkpoint(sample, logvar, use_reentrant=use_reentrant)

    if is_compiled:
        skip_where_torch_compiles_no_checkpoint()
    z = (torch.compile(run, fullgraph=True) if is_compiled else run)(logvar)
    torch.rand(3)
    z.sum().backward()
    assert torch.equal(logvar.grad, z.detach() / 2) and z.std() > 0.9


def test_manual_seed_repeats_and_calls_differ():
    numerics.require_backend("cpu", OP.name, "cpu", torch.float32)
    mu, logvar = moments()

    def two():
        torch.manual_seed(11)
        return AF.reparameterize(mu, logvar)[0], AF.reparameterize(mu, logvar)[0]

    (a, b), (c, d) = two(), two()
    assert torch.equal(a, c) and torch.equal(b, d)
    assert not torch.equal(a, b)
    compiled = torch.compile(lambda mu, logvar: AF.reparameterize(mu, logvar)[0], fullgraph=True)
    torch.manual_seed(11)
    assert torch.equal(compiled(mu, logvar), a)
    assert torch.equal(compiled(mu, logvar), b)


def test_generators():
    numerics.require_backend("cpu", OP.name, "cpu", torch.float32)
    mu, logvar = moments()
    state = torch.get_rng_state()
    draws = [
        AF.reparameterize(mu, logvar, generator=torch.Generator().manual_seed(seed))[0] for seed in (1, 1, 2)
    ]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    AF.reparameterize(mu, logvar, seed=3)
    assert torch.equal(state, torch.get_rng_state())


def test_seeds_as_numbers_and_tensors():
    numerics.require_backend("cpu", OP.name, "cpu", torch.float32)
    for seed in (0, 5, -1, 2**63 - 1, -(2**63)):
        for tensor in (torch.tensor(seed), torch.tensor([[seed]])):
            assert torch.equal(noise_of((3, 5), seed), noise_of((3, 5), tensor))
    assert not torch.equal(noise_of((3, 5), 1), noise_of((3, 5), 1 + 2**32))


def test_the_eager_backend_draws_the_same():
    numerics.require_backend("cpu", OP.name, "cpu", torch.float32)
    mu, logvar = moments()
    ours = AF.reparameterize(mu, logvar, seed=4)
    with aefast.backend("eager"):
        theirs = AF.reparameterize(mu, logvar, seed=4)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("is_compiled", [False, True])
def test_vmap_asks_for_its_randomness(is_compiled):
    """Where what it maps over is an argument of the draw, and where it is not."""
    mu, logvar = (tensor.detach() for tensor in moments(4, 3))
    stack = mu.expand(2, 4, 3)

    def once(sample, **options):
        torch._dynamo.reset()
        mapped = torch.func.vmap(sample, **options)
        return (torch.compile(mapped, fullgraph=True) if is_compiled else mapped)(stack)

    for sample in (
        lambda one: AF.reparameterize(one, logvar)[0],
        lambda one: one + AF.reparameterize(mu, logvar)[0],
    ):
        with pytest.raises(RuntimeError, match="randomness"):
            once(sample)
        same = once(sample, randomness="same")
        assert torch.equal(same[0], same[1])
        different = once(sample, randomness="different")
        assert not torch.equal(different[0], different[1])


@pytest.mark.parametrize("training", [False, True])
def test_overflow_is_infinite_as_in_eager(training):
    """exp(logvar) overflows from 88.73 on, and exp(logvar / 2) from 177.45 on."""
    numerics.require_backend("cpu", OP.name, "cpu", torch.float32)
    logvar = torch.tensor([[88.0, 88.6], [89.0, 0.0], [170.0, 177.0], [178.0, 1e30]], requires_grad=training)
    mu = torch.ones(4, 2, requires_grad=training)
    z, kl = AF.reparameterize(mu, logvar, seed=1, reduction="none")
    noise = noise_of((4, 2), 1)
    expected_z = mu + torch.exp(0.5 * logvar) * noise
    expected_kl = -0.5 * (1 + logvar - mu.pow(2) - logvar.exp()).sum(1)
    torch.testing.assert_close(z, expected_z, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(kl, expected_kl, rtol=1e-5, atol=1e-5)
    if training:
        found = torch.autograd.grad((z, kl), (mu, logvar), (torch.ones(4, 2), torch.ones(4)))
        expected = torch.autograd.grad(
            (expected_z, expected_kl), (mu, logvar), (torch.ones(4, 2), torch.ones(4))
        )
        # Where both are infinite, with opposite signs, their sum is not a number on either side.
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_underflow_and_nan():
    numerics.require_backend("cpu", OP.name, "cpu", torch.float32)
    mu = torch.tensor([[1.0, 2.0], [float("nan"), 0.0], [0.0, float("nan")]])
    logvar = torch.tensor([[-400.0, -1e30], [0.0, float("nan")], [float("-inf"), 0.0]])
    z, kl = AF.reparameterize(mu, logvar, seed=1, reduction="none")
    assert torch.equal(z[0], mu[0])
    torch.testing.assert_close(kl[0], -0.5 * (2 + logvar[0] - mu[0].square()).sum())
    assert z[1].isnan().all() and kl[1].isnan()
    assert z[2, 0] == 0.0 and z[2, 1].isnan() and kl[2].isnan()


@pytest.mark.parametrize("logvar_range", [None, (-1.0, 1.0)])
@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_nan_has_no_other_gradient(backend, logvar_range):
    numerics.require_backend(backend, OP.name, "cpu", torch.float32)
    mu, logvar = torch.zeros(2, 3, requires_grad=True), torch.zeros(2, 3)
    logvar[1, 2] = float("nan")
    logvar.requires_grad_()
    with aefast.backend(backend):
        z, kl = AF.reparameterize(mu, logvar, seed=1, logvar_range=logvar_range)
        by_mu, by_logvar = torch.autograd.grad(z.sum() + kl, (mu, logvar))
    assert by_mu.isfinite().all()
    assert by_logvar.isnan().nonzero().tolist() == [[1, 2]]


def test_logvar_range_is_a_clamp():
    numerics.require_backend("cpu", OP.name, "cpu", torch.float32)
    mu, logvar = moments(50, 21)
    with torch.no_grad():
        logvar[0, :2] = torch.tensor(
            [-1.0, 0.5]
        )  # the ends have a gradient, which clamp's have in some releases
        logvar[1, :2] = torch.tensor([1e5, -1e5])

    def run(function):
        z, kl = function()
        return z, kl, *torch.autograd.grad(z.sum() + 3 * kl, (mu, logvar))

    found = run(lambda: AF.reparameterize(mu, logvar, seed=2, logvar_range=(-1.0, 0.5)))
    clamped = logvar.masked_fill(logvar < -1.0, -1.0).masked_fill(logvar > 0.5, 0.5)
    expected = run(lambda: AF.reparameterize(mu, clamped, seed=2))
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


def test_logvar_range_may_be_one_number():
    numerics.require_backend("cpu", OP.name, "cpu", torch.float32)
    mu, logvar = moments(5, 3)
    found = AF.reparameterize(mu, logvar, seed=2, logvar_range=(-0.5, -0.5))
    expected = AF.reparameterize(mu, torch.full_like(logvar, -0.5), seed=2)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_shapes_and_reductions(reduction):
    numerics.require_backend("cpu", OP.name, "cpu", torch.float32)
    generator = torch.Generator().manual_seed(3)
    mu, logvar = torch.randn(2, 2, 3, 5, generator=generator)
    for shape in ((2, 3, 5), (6, 5), (30,), (2, 3, 1, 5)):
        z, kl = AF.reparameterize(mu.reshape(shape), logvar.reshape(shape), seed=1, reduction=reduction)
        flat_z, flat_kl = AF.reparameterize(
            mu.reshape(-1, shape[-1]), logvar.reshape(-1, shape[-1]), seed=1, reduction="none"
        )
        assert z.shape == shape and torch.equal(z.reshape(flat_z.shape), flat_z)
        expected = {"mean": flat_kl.mean(), "sum": flat_kl.sum(), "none": flat_kl.reshape(shape[:-1])}
        torch.testing.assert_close(kl, expected[reduction])
        torch.testing.assert_close(
            kl, AF.kl_normal(mu.reshape(shape), logvar.reshape(shape), reduction=reduction)
        )
    empty = torch.zeros(0, 5, requires_grad=True)
    z, kl = AF.reparameterize(empty, empty, reduction=reduction)
    assert z.shape == (0, 5) and (kl.isnan() if reduction == "mean" else kl.sum() == 0)
    assert torch.autograd.grad(z.sum(), empty)[0].shape == (0, 5)


def test_half_precision_keeps_the_divergence_in_float32():
    numerics.require_backend("cpu", OP.name, "cpu", torch.bfloat16)
    mu, logvar = moments(dtype=torch.bfloat16)
    z, kl = AF.reparameterize(mu, logvar)
    assert z.dtype == torch.bfloat16 and kl.dtype == torch.float32
    assert all(gradient.dtype == torch.bfloat16 for gradient in torch.autograd.grad(kl, (mu, logvar)))


@pytest.mark.usefixtures("no_kept_memory")
def test_no_tensor_beyond_outputs_and_gradients():
    """Allocated in a forward and a backward: z, the rows' divergences, two gradients, and numbers."""
    numerics.require_backend("cpu", OP.name, "cpu", torch.float32)
    rows, size = 512, 256
    mu, logvar = moments(rows, size)
    grad = torch.ones(rows, size)
    with torch.profiler.profile(profile_memory=True) as profile:
        z, kl = AF.reparameterize(mu, logvar)
        torch.autograd.grad((z, kl), (mu, logvar), (grad, torch.ones(())))
    allocated = sum(
        event.nbytes()
        for event in profile.profiler.kineto_results.events()
        if event.name() == "[memory]" and event.nbytes() > 0
    )
    least = (3 * rows * size + rows) * 4
    assert least <= allocated <= least + rows * 4 + 1024


def test_tensors_must_not_change_before_the_backward():
    numerics.require_backend("cpu", OP.name, "cpu", torch.float32)
    mu, logvar = moments()
    z, _ = AF.reparameterize(mu, logvar)
    with torch.no_grad():
        logvar.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mu": [[1.0]]}, "mu must be a torch.Tensor, got list"),
        ({"logvar": None}, "logvar must be a torch.Tensor, got NoneType"),
        ({"mu": torch.ones(())}, r"mu must have at least one dimension, \(\*, D\), got a scalar"),
        ({"logvar": torch.ones(3, 1)}, r"logvar must have the shape of mu, \(3, 5\), got \(3, 1\)"),
        (
            {"mu": torch.ones(3, 5, dtype=torch.int64)},
            "mu must be float32, bfloat16, float16 or float64, got int64",
        ),
        ({"logvar": torch.ones(3, 5).double()}, "logvar must have the dtype of mu, float32, got float64"),
        ({"logvar": torch.ones(3, 5, device="meta")}, "logvar must be on the device of mu, cpu, got meta"),
        ({"reduction": "batchmean"}, "reduction must be one of none, mean, sum, got 'batchmean'"),
        ({"seed": 1.5}, "seed must be an int or an int64 tensor of one element, got 1.5"),
        ({"seed": True}, "seed must be an int or an int64 tensor of one element, got True"),
        ({"seed": 2**63}, r"seed must be from -2\*\*63 to 2\*\*63 - 1, got 9223372036854775808"),
        ({"seed": torch.tensor([1, 2])}, "got a torch.int64 tensor of shape"),
        ({"seed": torch.tensor(1.0)}, "got a torch.float32 tensor of shape"),
        ({"seed": torch.tensor(1, device="meta")}, "seed must be on the device of the input, cpu, got meta"),
        ({"seed": 1, "generator": torch.Generator()}, "give either seed or generator, not both"),
        ({"generator": 3}, "generator must be a torch.Generator, got int"),
        ({"logvar_range": 3.0}, r"logvar_range must be a pair \(low, high\) or None, got 3.0"),
        ({"logvar_range": (2.0, 1.0)}, r"logvar_range must be \(low, high\) with low <= high"),
        ({"logvar_range": (0, 10**400)}, r"logvar_range\[1\] must be"),
        ({"logvar_range": (math.nan, 1.0)}, r"logvar_range\[0\] must be"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = {"mu": torch.ones(3, 5), "logvar": torch.ones(3, 5)}
    with pytest.raises(InputError, match=f"reparameterize: .*{message}"):
        AF.reparameterize(**{**arguments, **change})


def test_compiled_generator_is_refused():
    mu, logvar = moments()
    generator = torch.Generator()
    compiled = torch.compile(
        lambda mu: AF.reparameterize(mu, logvar, generator=generator)[0], backend="eager", fullgraph=True
    )
    with pytest.raises(Exception, match="takes no generator"):
        compiled(mu)

"""What only a GPU can show: graphs, streams, sizes beyond 2^31, bitwise repetition."""

import contextvars
import gc
import importlib
import itertools

import pytest
import torch

import aefast
import aefast.functional as AF
from aefast.ops import _pairwise, _philox, gaussian_head, linear_act, mlp, mmd, topk_encode
from support import numerics
from support import selection as rows

pytestmark = pytest.mark.gpu
BACKENDS = ("triton", "cuda")


@pytest.fixture(autouse=True)
def memory_for_other_processes():
    """What a test has allocated the allocator would keep, in each process that takes part."""
    yield
    gc.collect()
    torch.cuda.empty_cache()


def operands(dtype=torch.bfloat16, rows=1000, inputs=384, features=520):
    torch.manual_seed(0)
    x = torch.randn(rows, inputs, device="cuda", dtype=dtype, requires_grad=True)
    weight = (torch.randn(features, inputs, device="cuda", dtype=dtype) * inputs**-0.5).requires_grad_()
    bias = torch.randn(features, device="cuda", dtype=dtype, requires_grad=True)
    return x, weight, bias


def step(x, weight, bias, activation="gelu"):
    out = AF.linear_act(x, weight, bias, activation)
    stack = AF.mlp(out, [weight.t(), weight], [None, bias], [activation, "identity"])
    return [stack, *torch.autograd.grad(stack.float().square().mean(), (x, weight, bias))]


@pytest.mark.smoke
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_bitwise_repeatable(backend, dtype):
    numerics.require_backend(backend, "mlp", "cuda", dtype)
    with aefast.backend(backend):
        first = [tensor.clone() for tensor in step(*operands(dtype))]
        for _ in range(3):
            for ours, theirs in zip(step(*operands(dtype)), first, strict=True):
                assert torch.equal(ours, theirs)


@pytest.mark.smoke
@pytest.mark.parametrize("backend", BACKENDS)
def test_replays_in_a_graph(backend):
    numerics.require_backend(backend, "mlp", "cuda", torch.bfloat16)
    x, weight, bias = operands()
    with aefast.backend(backend):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step(x, weight, bias)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step(x, weight, bias)
        with torch.no_grad():
            x.copy_(torch.randn_like(x))
        graph.replay()
        expected = step(x, weight, bias)
    for ours, theirs in zip(captured, expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_uses_the_current_stream(backend):
    """The inputs are written on a side stream behind a long wait; another stream would read them too early."""
    numerics.require_backend(backend, "mlp", "cuda", torch.float32)
    x, weight, bias = operands(torch.float32)
    with aefast.backend(backend):
        expected = step(x, weight, bias)
        late = torch.zeros_like(x).requires_grad_()
        side = torch.cuda.Stream()
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            torch.cuda._sleep(100_000_000)
            with torch.no_grad():
                late.copy_(x)
            found = step(late, weight, bias)
        torch.cuda.synchronize()
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.alone
@pytest.mark.parametrize("backend", BACKENDS)
def test_more_than_2_to_31_elements(backend):
    """The last rows of an output of 2^31 + 2^20 elements are those of a small call on the last rows alone."""
    numerics.require_backend(backend, "linear_act", "cuda", torch.bfloat16)
    features, rows = 4096, (2**31 + 2**20) // 4096
    x = torch.randn(rows, 16, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(features, 16, device="cuda", dtype=torch.bfloat16)
    bias = torch.randn(features, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    tail = x.detach()[-512:].clone().requires_grad_()
    with aefast.backend(backend):
        out = AF.linear_act(x, weight, bias, "silu")
        expected = AF.linear_act(tail, weight, bias, "silu")
        upstream = torch.zeros_like(out)
        upstream[-512:] = 1
        (found_x, found_bias) = torch.autograd.grad(out, (x, bias), upstream)
        (true_x, true_bias) = torch.autograd.grad(expected, (tail, bias), torch.ones_like(expected))
    # Sums of 16 terms, in whichever order a product of so many rows takes them: rounded to bfloat16, one unit apart.
    torch.testing.assert_close(out[-512:], expected, rtol=2**-7, atol=2**-7)
    torch.testing.assert_close(found_x[-512:], true_x, rtol=0, atol=0.02 * true_x.abs().max().item())
    # The same 512 terms in another order, rounded once to bfloat16.
    torch.testing.assert_close(found_bias, true_bias, rtol=2**-7, atol=2**-7 * true_bias.abs().max().item())


# --- fused products ---------------------------------------------------------------------------------------


@pytest.fixture
def launches(monkeypatch):
    """The grids of the fused kernels that were launched, forward and backward."""
    seen = []

    def noting(module, name):
        kernel = getattr(module, name)

        class Noting:
            def __getitem__(self, grid):
                seen.append(grid)
                return kernel[grid]

        monkeypatch.setattr(module, name, Noting())

    noting(importlib.import_module("aefast.kernels.triton.linear_act"), "gemm_kernel")
    noting(importlib.import_module("aefast.kernels.triton.gaussian_head"), "gaussian_head_kernel")
    return seen


def layer_samples(draw, rows, inputs, features):
    """Of each op a sample, and how many products forward and backward have."""
    x, bias = draw(rows, inputs), draw(features)
    weight = draw(features, inputs) * inputs**-0.5
    yield linear_act.OP, {"x": x, "weight": weight, "bias": bias, "activation": "gelu"}, 3
    widths = (inputs, features, 48, features)
    weights = [draw(n, k) * k**-0.5 for k, n in itertools.pairwise(widths)]
    biases = [draw(n) for n in widths[1:]]
    stack = {"x": x, "weights": weights, "biases": biases, "activations": ["tanh", "gelu", "identity"]}
    yield mlp.OP, stack, 9
    head = {"weight": draw(128, inputs) * 0.5 * inputs**-0.5, "bias": draw(128)}
    yield gaussian_head.OP, {"h": x, **head, "seed": 3, "reduction": "none"}, 3


@pytest.mark.parametrize("sizes", [(300, 384, 520), (257, 67, 131)], ids=["aligned", "odd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_products(launches, monkeypatch, dtype, sizes):
    """With the smallest and the largest tile of each op, through pointers and descriptors."""
    tuning = importlib.import_module("aefast.kernels.triton.tuning")
    device = torch.device("cuda")
    is_aligned = sizes[1] % 8 == 0
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

    for op, sample, products in layer_samples(draw, *sizes):
        numerics.require_backend("triton", op.name, device.type, dtype)
        tiles = tuning.tiles(dtype, "ieee", is_aligned, op.name)
        for tile, descriptors in itertools.product({tiles[0], tiles[-1]}, {False, is_aligned}):
            # Backwards run in threads of autograd's, which do not see what `tuning.force` sets in this one.
            forced = contextvars.ContextVar("forced", default=("fused", tile, descriptors))
            monkeypatch.setattr(tuning, "_forced", forced)
            launches.clear()
            numerics.check(op, "triton", sample, dtype)
            assert len(launches) == products, (op.name, tile, descriptors)


# --- noise ------------------------------------------------------------------------------------------------

NOISES = {
    "gaussian": {"mean": 0.25, "std": 0.5},
    "salt_and_pepper": {"p": 0.3},
    "masking": {"p": 0.4},
    "dropout": {"p": 0.25},
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [16, 257])
def test_reparameterize_draws_the_noise_of_the_cpu(backend, dtype, size):
    numerics.require_backend(backend, "reparameterize", "cuda", dtype)
    zeros = torch.zeros(1000, size, dtype=dtype)
    with aefast.backend(backend):
        found = AF.reparameterize(zeros.cuda(), zeros.cuda(), seed=2**40 + 3)[0]
    expected = AF.reparameterize(zeros, zeros, seed=2**40 + 3)[0]
    tolerance = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(found.cpu(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("noise", NOISES)
def test_corrupt_draws_the_noise_of_the_cpu(noise):
    numerics.require_backend("triton", "corrupt", "cuda", torch.float32)
    x = torch.rand(100, 3, 37, 41) + 2.0
    for options in (NOISES[noise], *([{"p": 0.5, "block": 4}] if noise == "masking" else [])):
        with aefast.backend("triton"):
            found = AF.corrupt(x.cuda(), noise, seed=9, **options)
        torch.testing.assert_close(found.cpu(), AF.corrupt(x, noise, seed=9, **options))


@pytest.mark.smoke
@pytest.mark.parametrize("backend", BACKENDS)
def test_each_replay_draws_fresh_noise(backend):
    """In the forward and, the same again, in the backward: the gradient of z by logvar is half of z - mu."""
    numerics.require_backend(backend, "reparameterize", "cuda", torch.float32)
    mu, logvar = torch.zeros(500, 33, device="cuda"), torch.zeros(500, 33, device="cuda", requires_grad=True)

    def draw():
        z, _ = AF.reparameterize(mu, logvar)
        (gradient,) = torch.autograd.grad(z.sum(), logvar)
        with aefast.backend("triton"):
            return z, gradient, AF.corrupt(mu, "gaussian", std=1.0)

    with aefast.backend(backend):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            draw()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            z, gradient, noisy = draw()
    seen = []
    for _ in range(3):
        graph.replay()
        torch.testing.assert_close(gradient, z / 2, rtol=1e-6, atol=1e-7)
        seen += [z.clone(), noisy.clone()]
    for index, one in enumerate(seen):
        assert 0.9 < one.std() < 1.1
        assert not any(torch.equal(one, other) for other in seen[:index])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [16, 256, 1031, 100_000])
def test_sums_of_rows_repeat_bitwise(backend, size):
    numerics.require_backend(backend, "reparameterize", "cuda", torch.float32)
    mu, logvar = (torch.randn(97, size, device="cuda", requires_grad=True) for _ in range(2))

    def once():
        z, kl = AF.reparameterize(mu, logvar, seed=1, reduction="none")
        return z, kl, *torch.autograd.grad((z, kl), (mu, logvar), (z.detach(), kl.detach()))

    with aefast.backend(backend):
        first = once()
        for ours, theirs in zip(once(), first, strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.alone
def test_noise_of_more_than_two_billion_elements():
    numerics.require_backend("triton", "corrupt", "cuda", torch.bfloat16)
    count = 2**31 + 4096
    x = torch.ones(count, device="cuda", dtype=torch.bfloat16)
    with aefast.backend("triton"):
        out = AF.corrupt(x, "masking", p=0.5, seed=3)
    for first in (0, 2**31 - 2048, count - 4096):
        words = _philox.words(torch.tensor(3), 4096, first)
        assert torch.equal(out[first : first + 4096].cpu() == 0, words < 2**31)


# --- image pyramids ---------------------------------------------------------------------------------------

PYRAMIDS = ("average", "gaussian", "laplacian")
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def images(*shape, dtype, layout="contiguous"):
    generator = torch.Generator().manual_seed(0)
    drawn = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    return [one.contiguous(memory_format=LAYOUTS[layout]) for one in drawn]


def pyramid_loss(input, target, **settings):
    """The loss, for each sample unless `settings` say otherwise, and its gradient."""
    input = input.detach().requires_grad_()
    value = AF.pyramid_loss(input, target, **{"reduction": "none", **settings})
    return value.detach(), *torch.autograd.grad(value.sum(), input)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pyramid", PYRAMIDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_pyramid_loss_repeats_bitwise_and_is_that_of_the_cpu(dtype, pyramid, layout):
    numerics.require_backend("triton", "pyramid_loss", "cuda", dtype)
    for shape, p in (((3, 3, 128, 128), 2), ((2, 5, 61, 75), 1.5), ((4, 1, 28, 28), "charbonnier")):
        input, target = images(*shape, dtype=dtype, layout=layout)
        settings = {"pyramid": pyramid, "p": p, "levels": 4}
        with aefast.backend("triton"):
            found = pyramid_loss(input.cuda(), target.cuda(), **settings)
            again = pyramid_loss(input.cuda(), target.cuda(), **settings)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, again, strict=True))
        expected = pyramid_loss(input, target, **settings)
        for ours, theirs in zip(found, expected, strict=True):
            # Both err by a few roundings, of laplacian gradients in half precision by two on the GPU.
            eps = torch.finfo(theirs.dtype).eps
            largest = theirs.abs().max().item()
            torch.testing.assert_close(ours.cpu(), theirs, rtol=16 * eps, atol=4 * eps * largest)


@pytest.mark.parametrize("pyramid", PYRAMIDS)
def test_pyramid_loss_replays_in_a_graph(pyramid):
    numerics.require_backend("triton", "pyramid_loss", "cuda", torch.float32)
    input, target = (one.cuda() for one in images(4, 3, 64, 96, dtype=torch.float32))
    with aefast.backend("triton"):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            pyramid_loss(input, target, pyramid=pyramid)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = pyramid_loss(input, target, pyramid=pyramid)
        input.copy_(torch.randn_like(input))
        graph.replay()
        expected = pyramid_loss(input, target, pyramid=pyramid)
    for ours, theirs in zip(captured, expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.alone
@pytest.mark.parametrize("pyramid", PYRAMIDS)
@pytest.mark.parametrize(
    ("shape", "layout"),
    [((3, 1, 2**15, 2**15), "contiguous"), ((3, 2, 2**15, 2**14), "channels_last")],
)
def test_pyramid_loss_of_more_than_two_billion_elements(pyramid, shape, layout):
    """The last of three samples begins at element 2^31, and has the numbers of a call on it alone."""
    numerics.require_backend("triton", "pyramid_loss", "cuda", torch.bfloat16)
    input, target = (
        torch.empty(shape, device="cuda", dtype=torch.bfloat16, memory_format=LAYOUTS[layout]).normal_()
        for _ in range(2)
    )
    settings = {"pyramid": pyramid, "p": 2, "levels": 3}
    with aefast.backend("triton"):
        found = pyramid_loss(input, target, **settings)
        expected = pyramid_loss(input[2:], target[2:], **settings)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours[2:], theirs)


@pytest.mark.alone
def test_pyramid_loss_of_one_image_of_more_than_two_billion_pixels():
    numerics.require_backend("triton", "pyramid_loss", "cuda", torch.bfloat16)
    shape = (1, 1, 2**15 + 64, 2**16)
    input, target = (torch.empty(shape, device="cuda", dtype=torch.bfloat16).normal_() for _ in range(2))
    settings = {"p": 2, "levels": 3, "reduction": "sum"}
    with aefast.backend("triton"):
        _, gradient = pyramid_loss(input, target, **settings)
        _, expected = pyramid_loss(input[:, :, -64:], target[:, :, -64:], **settings)
    assert torch.equal(gradient[:, :, -64:], expected)


# --- pairs of points --------------------------------------------------------------------------------------


def mmd_and_gradients(x, y, **settings):
    x, y = (one.detach().requires_grad_() for one in (x, y))
    value = AF.mmd(x, y, **settings)
    return value.detach(), *torch.autograd.grad(value, (x, y))


@pytest.mark.parametrize("dtype", numerics.DTYPES, ids=str)
def test_mmd_samples_on_cuda(dtype):
    numerics.require_backend("cuda", "mmd", "cuda", dtype)
    for index, sample in enumerate(mmd.samples(torch.device("cuda"), dtype)):
        if sample["x"].shape[1] <= mmd.CUDA_DIMENSIONS:
            numerics.check(mmd.OP, "cuda", sample, dtype, expand_grad=index % 2 == 0)


@pytest.mark.parametrize("kernel", _pairwise.KERNELS)
@pytest.mark.parametrize("D", [1, 2, 3, 8, 16])
def test_mmd_is_the_same_in_cuda_and_triton(kernel, D):
    """Tiles and splits of both are many here."""
    for backend in BACKENDS:
        numerics.require_backend(backend, "mmd", "cuda", torch.float32)
    torch.manual_seed(0)
    x, y = torch.randn(3001, D, device="cuda"), 0.9 * torch.randn(2003, D, device="cuda") + 0.25
    found = {}
    for backend in BACKENDS:
        with aefast.backend(backend):
            found[backend] = mmd_and_gradients(x, y, kernel=kernel, alpha=0.7)
    with aefast.backend("eager"):
        truth = mmd_and_gradients(x.double(), y.double(), kernel=kernel, alpha=0.7)
    sizes = mmd.terms(x[:256].double(), y[:256].double(), kernel=kernel, alpha=0.7)
    for backend, results in found.items():
        # 12 float32 spacings of the sums of the terms' magnitudes, which for gradients are as 1 / N.
        for index, (ours, true) in enumerate(zip(results, truth, strict=True)):
            size = sizes[index] * (1.0 if index == 0 else 256 / 2003)
            assert (ours.double() - true).abs().max() <= 12 * 2.0**-24 * size, (backend, index)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("D", [2, 16])
@pytest.mark.parametrize("kernel", ["rbf", "imq", "energy"])
def test_mmd_repeats_bitwise(backend, D, kernel):
    numerics.require_backend(backend, "mmd", "cuda", torch.float32)
    x, y = torch.randn(5000, D, device="cuda"), torch.randn(3000, D, device="cuda") + 0.1
    with aefast.backend(backend):
        first = mmd_and_gradients(x, y, kernel=kernel)
        for _ in range(3):
            for ours, theirs in zip(mmd_and_gradients(x, y, kernel=kernel), first, strict=True):
                assert torch.equal(ours, theirs)


@pytest.mark.smoke
def test_mmd_replays_in_a_graph():
    numerics.require_backend("cuda", "mmd", "cuda", torch.float32)
    x, y = (torch.randn(700, 16, device="cuda", requires_grad=True) for _ in range(2))

    def step():
        value = AF.mmd(x, y, bandwidth=3.0)
        return value.detach(), *torch.autograd.grad(value, (x, y))

    with aefast.backend("cuda"):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        with torch.no_grad():
            x.copy_(torch.randn_like(x))
        graph.replay()
        for ours, theirs in zip(captured, step(), strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("D", [2, 16])
def test_mmd_of_65536_points(D):
    """In several launches of tiles, in memory for a few hundred gradients."""
    numerics.require_backend("cuda", "mmd", "cuda", torch.float32)
    torch.manual_seed(0)
    x, y = torch.randn(65536, D, device="cuda"), torch.randn(65536, D, device="cuda") + 0.1
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with aefast.backend("cuda"):
        value, of_x, of_y = mmd_and_gradients(x, y, bandwidth=2.0 * D**0.5)
    assert torch.cuda.max_memory_allocated() - before < 2**29
    # Moving both samples by the same changes nothing: the gradients' sums are each other's opposites.
    assert value > 0
    torch.testing.assert_close(of_x.sum(0), -of_y.sum(0), rtol=1e-3, atol=1e-3 * of_x.abs().sum().item() / D)
    wide = x[:512].double(), y[:512].double()
    points = torch.cat((x, y)).double()
    u = torch.cdist(wide[0], points).square()
    rate = 1.0 / (8.0 * D)
    slopes = -rate * torch.exp(-rate * u)
    slopes[torch.arange(512), torch.arange(512)] = 0.0
    weights = torch.cat((u.new_full((65536,), 2 / (65536 * 65535)), u.new_full((65536,), -2 / 65536**2)))
    scaled = 2 * slopes * weights
    expected = scaled.sum(1, keepdim=True) * wide[0] - scaled @ points
    sizes = scaled.abs().sum(1, keepdim=True) * wide[0].abs() + scaled.abs() @ points.abs()
    assert ((of_x[:512].double() - expected).abs() <= 24 * 2.0**-24 * sizes.max()).all()


# --- the largest of rows ----------------------------------------------------------------------------------


@pytest.fixture(params=BACKENDS)
def select(request, monkeypatch):
    """The launcher on the kernel of one language."""
    numerics.require_backend("triton", "topk_encode", "cuda", torch.float32)
    if request.param == "cuda":
        numerics.require_backend("cuda", "linear_act", "cuda", torch.float32)
    selection = importlib.import_module("aefast.kernels.triton.selection")
    monkeypatch.setattr(selection, "is_served_by_library", lambda elements: request.param == "cuda")
    monkeypatch.delattr(selection, "largest")
    return selection.select


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_largest_of_rows(select, dtype):
    """Rows of all lengths, aligned and not, and such as have to be looked through again."""

    def is_right(elements, k):
        values = torch.full((len(elements), k), torch.nan, dtype=dtype, device="cuda")
        indices = torch.full((len(elements), k), -7, device="cuda")
        select(elements.cuda(), values, indices)
        rows.check((values.cpu(), indices.cpu()), elements, k)

    for row, k in rows.hard_rows():
        is_right(row.to(dtype).expand(300, -1).contiguous(), k)
    for shape, k in (((1, 1), 1), ((7, 9), 9), ((129, 1031), 40), ((1000, 16384), 32), ((3, 131072), 1024)):
        is_right(rows.draw(*shape, dtype=dtype), k)


def test_topk_encode_of_many_rows(select):
    """In several parts, each on the kernel."""
    N, F = 10_000, 16384
    assert N > 2 * importlib.import_module("aefast.kernels.triton.topk_encode").BYTES // (2 * F)
    x, weight = (rows.draw(*shape, dtype=torch.bfloat16).cuda() for shape in ((N, 64), (F, 64)))
    expected = topk_encode.reference(x, weight, None, 32)[1]
    with aefast.backend("triton"):
        values, indices = AF.topk_encode(x, weight, None, 32)
    # Products in parts may be added up in another order than the whole, and rounding then decides between neighbours.
    assert (indices == expected).float().mean() > 0.99
    assert torch.equal(values, values.sort(1, descending=True).values)

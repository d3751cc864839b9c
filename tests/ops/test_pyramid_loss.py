import functools
import itertools
import math

import hypothesis
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st

import aefast
import aefast.functional as AF
from aefast import nn
from aefast.errors import InputError
from aefast.ops import pyramid_loss
from support import numerics

OP = pyramid_loss.OP
CPU = torch.device("cpu")
BACKENDS = [
    pytest.param("cpu", "cpu", id="cpu"),
    pytest.param("triton", "cuda", id="triton", marks=pytest.mark.gpu),
    pytest.param("cuda", "cuda", id="cuda", marks=pytest.mark.gpu),
]
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
POWERS = (1, 1.5, 2, 3, "charbonnier")


def pair(*shape, dtype=torch.float64, layout=torch.contiguous_format, seed=3, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    drawn = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return [one.to(device, dtype).contiguous(memory_format=layout).detach().requires_grad_() for one in drawn]


def blurred(images):
    """By one convolution of 5 × 5 taps."""
    taps = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0], dtype=images.dtype)
    window = (taps[:, None] * taps / 256).expand(images.shape[1], 1, 5, 5)
    return F.conv2d(F.pad(images, (2, 2, 2, 2), mode="reflect"), window, groups=images.shape[1])


def made_by_hand(images, levels, pyramid):
    found = [images]
    for _ in range(levels - 1):
        fine = found[-1]
        found.append(F.avg_pool2d(fine, 2) if pyramid == "average" else blurred(fine)[:, :, ::2, ::2])
    if pyramid == "laplacian":
        for level, (fine, coarse) in enumerate(itertools.pairwise(found)):
            spread = torch.zeros_like(fine)
            spread[:, :, ::2, ::2] = coarse
            found[level] = fine - 4 * blurred(spread)
    return found


def by_hand(input, target, levels=4, p=1, pyramid="average", weights=None, reduction="mean", eps=1e-3):
    """Each pyramid for itself."""
    total = 0.0
    pyramids = [made_by_hand(one, levels, pyramid) for one in (input, target)]
    for weight, one, other in zip(weights or [1.0] * levels, *pyramids, strict=True):
        residual = one - other
        values = (residual**2 + eps**2).sqrt() if p == "charbonnier" else residual.abs() ** p
        if reduction == "none":
            values = values.flatten(1).mean(1)
        else:
            values = values.sum() if reduction == "sum" else values.mean()
        total = total + weight * values
    return total


def with_gradients(function, tensors, **settings):
    value = function(*tensors, **settings)
    upstream = torch.linspace(0.5, 2.0, max(1, value.numel()), dtype=value.dtype).reshape(value.shape)
    return value, *torch.autograd.grad(value, tensors, upstream)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pyramid", pyramid_loss.PYRAMIDS)
@pytest.mark.parametrize("p", POWERS)
def test_every_number_of_levels(instruction_set, pyramid, p, layout):
    for levels in range(1, 7):
        tensors = pair(2, 2, 33, 47, layout=LAYOUTS[layout])
        settings = {"levels": levels, "p": p, "pyramid": pyramid}
        for reduction, weights in (
            ("mean", None),
            ("sum", None),
            ("none", [0.5 * level for level in range(levels)]),
        ):
            settings |= {"reduction": reduction, "weights": weights}
            found = with_gradients(AF.pyramid_loss, tensors, **settings)
            expected = with_gradients(by_hand, tensors, **settings)
            for ours, theirs in zip(found, expected, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("pyramid", pyramid_loss.PYRAMIDS)
def test_every_small_size(instruction_set, pyramid):
    """With as many levels as there are."""
    least = 1 if pyramid == "average" else 3
    for height, width in itertools.product(range(least, 12), repeat=2):
        tensors = pair(1, 2, height, width, layout=torch.channels_last)
        most = pyramid_loss._most_levels(pyramid, min(height, width))
        settings = {"levels": most, "pyramid": pyramid, "p": 2}
        found = with_gradients(AF.pyramid_loss, tensors, **settings)
        for ours, theirs in zip(found, with_gradients(by_hand, tensors, **settings), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13)
        with pytest.raises(InputError, match=f"levels must be at most {most} for a pyramid of kind"):
            AF.pyramid_loss(*tensors, pyramid=pyramid, levels=most + 1)


@pytest.mark.parametrize("dtype", numerics.DTYPES)
@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_matches_float64_reference(poisoned_memory, backend, device, dtype):
    numerics.require_backend(backend, OP.name, device, dtype)
    for expand_grad in (False, True):
        for sample in OP.samples(torch.device(device), dtype):
            numerics.check(OP, backend, sample, dtype, expand_grad)


@pytest.mark.parametrize("dtype", numerics.DTYPES)
def test_each_instruction_set(poisoned_memory, instruction_set, dtype):
    for sample in OP.samples(CPU, dtype):
        numerics.check(OP, "cpu", sample, dtype)


# The fixture is to hold for all examples.
@hypothesis.settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
@hypothesis.given(
    pyramid=st.sampled_from(pyramid_loss.PYRAMIDS),
    shape=st.tuples(st.integers(0, 3), st.integers(1, 19), st.integers(3, 40), st.integers(3, 70)),
    levels=st.integers(1, 5),
    p=st.sampled_from(POWERS),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    layouts=st.tuples(*[st.sampled_from(["contiguous", "channels_last", "transposed", "sliced"])] * 2),
)
def test_any_shape_and_layout(instruction_set, pyramid, shape, levels, p, reduction, layouts):
    hypothesis.assume(shape[0] > 0 or reduction != "mean")

    def laid_out(images, layout):
        if layout == "transposed":
            return images.transpose(2, 3).contiguous().transpose(2, 3)
        if layout == "sliced":
            return torch.cat((images, images), 3)[..., : images.shape[3]]
        return images.contiguous(memory_format=LAYOUTS[layout])

    levels = min(levels, pyramid_loss._most_levels(pyramid, min(shape[2:])))
    input, target = (one.detach() for one in pair(*shape, dtype=torch.float32, seed=sum(shape)))
    sample = {
        "input": laid_out(input, layouts[0]),
        "target": laid_out(target, layouts[1]),
        "levels": levels,
        "p": p,
        "pyramid": pyramid,
        "reduction": reduction,
        # Charbonnier's derivative has the rounding errors of a residual near 0, divided by eps.
        "eps": 0.25,
    }
    numerics.check(OP, "cpu", sample, torch.float32)


@pytest.mark.parametrize("weight, p, scale", [(1000.0, 2, 1.0), (1e-8, 1, 2.0**16)])
def test_large_and_small_weights_in_float16(weight, p, scale):
    """Gradients that float16 holds, of which what is kept beside the normaliser has to be held too."""
    numerics.require_backend("cpu", OP.name, "cpu", torch.float16)
    input, target = (255 * one.detach() for one in pair(2, 1, 16, 16, dtype=torch.float16))
    for reduction in ("mean", "sum", "none"):
        options = {"levels": 3, "p": p, "weights": [weight, weight / 2, 0.0], "reduction": reduction}
        found, expected = (one.requires_grad_() for one in (input.clone(), input.double()))
        # A sum's gradients have the batch's and the images' sizes more.
        its_scale = scale if reduction == "mean" else scale / (512 if reduction == "sum" else 2)
        (AF.pyramid_loss(found, target, **options).sum() * its_scale).backward()
        (OP.reference(expected, target.double(), **options).sum() * its_scale).backward()
        largest = expected.grad.abs().max().item()
        assert 1e-8 < largest < 60000
        # Rounded to float16 as it is kept, as it is scaled, and below 6e-5 to 2⁻²⁴.
        torch.testing.assert_close(found.grad.double(), expected.grad, rtol=2.0**-9, atol=2.0**-24)


def test_average_is_the_loop_over_avg_pool2d():
    numerics.require_backend("cpu", OP.name, "cpu", torch.float32)
    input, target = pair(4, 3, 50, 38, dtype=torch.float32)
    expected, one, other = 0.0, input, target
    for level in range(4):
        if level > 0:
            one, other = F.avg_pool2d(one, 2), F.avg_pool2d(other, 2)
        expected = expected + F.l1_loss(one, other)
    found = AF.pyramid_loss(input, target)
    torch.testing.assert_close(found, expected)
    for ours, theirs in zip(
        torch.autograd.grad(found, (input, target)),
        torch.autograd.grad(expected, (input, target)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("size", [(64, 64), (37, 50), (5, 3)])
def test_laplacian_levels_make_the_image_again(size):
    image = pair(2, 3, *size, dtype=torch.float32)[0]
    *bands, images = pyramid_loss.levels_of(image, 5 if size[0] > 9 else 2, "laplacian")
    for band in reversed(bands):
        images = band + pyramid_loss.expanded(images, band.shape[-2:])
    torch.testing.assert_close(images, image, rtol=0, atol=1e-5)


@pytest.mark.parametrize("pyramid", pyramid_loss.PYRAMIDS)
def test_levels_are_those_made_by_hand(pyramid):
    image = pair(2, 3, 41, 52)[0]
    found = pyramid_loss.levels_of(image, 5, pyramid)
    assert [tuple(one.shape[-2:]) for one in found] == pyramid_loss.sizes_of(pyramid, 5, 41, 52)
    for ours, theirs in zip(found, made_by_hand(image, 5, pyramid), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("pyramid", pyramid_loss.PYRAMIDS)
def test_a_constant_is_in_the_low_pass_alone(pyramid):
    """Blurring and expanding keep constants, at the borders too."""
    *others, last = pyramid_loss.levels_of(torch.full((1, 1, 19, 30), 3.0), 4, pyramid)
    for one in others:
        torch.testing.assert_close(one, torch.full_like(one, 0.0 if pyramid == "laplacian" else 3.0))
    torch.testing.assert_close(last, torch.full_like(last, 3.0))


@pytest.mark.parametrize("p", [1, 1.5, 2])
@pytest.mark.parametrize("pyramid", pyramid_loss.PYRAMIDS)
def test_no_residual_no_gradient(instruction_set, pyramid, p):
    input, _ = pair(1, 2, 21, 34, dtype=torch.float32)
    value, gradient = with_gradients(
        lambda one: AF.pyramid_loss(one, one.detach(), p=p, pyramid=pyramid), [input]
    )
    assert value.item() == 0.0 and not gradient.any()


@pytest.mark.parametrize("pyramid", pyramid_loss.PYRAMIDS)
@pytest.mark.parametrize("p", POWERS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_scaled_losses_in_half_precision(instruction_set, pyramid, p, reduction):
    """Of a loss times 65536, as a GradScaler has it; gradients of the loss itself are hardly float16 numbers."""
    tensors = pair(4, 3, 64, 64, dtype=torch.float16)
    settings = {"p": p, "pyramid": pyramid, "reduction": reduction}
    value = AF.pyramid_loss(*tensors, **settings)
    assert value.dtype == torch.float32
    found = torch.autograd.grad(65536.0 * value.sum(), tensors)
    exact = [one.detach().double().requires_grad_() for one in tensors]
    expected = torch.autograd.grad(65536.0 * by_hand(*exact, **settings).sum(), exact)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == torch.float16
        # One rounding when the gradient is kept, and one when it is scaled.
        scale = theirs.abs().max().item()
        torch.testing.assert_close(ours.double(), theirs, rtol=2 * 2.0**-11, atol=2.0**-11 * scale)


def test_cubes_beyond_float16_have_gradients():
    """3 r² of a residual of 200 is no float16, but its part of a mean is."""
    numerics.require_backend("cpu", OP.name, "cpu", torch.float16)
    input = torch.full((1, 1, 32, 32), 200.0, dtype=torch.float16, requires_grad=True)
    loss = AF.pyramid_loss(input, torch.zeros_like(input), p=3, levels=1)
    (gradient,) = torch.autograd.grad(loss, input)
    torch.testing.assert_close(gradient, torch.full_like(gradient, 3 * 200.0**2 / 1024))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_have_the_layout_of_the_input(dtype):
    numerics.require_backend("cpu", OP.name, "cpu", dtype)
    for layout in LAYOUTS.values():
        tensors = pair(2, 3, 16, 16, dtype=dtype, layout=layout)
        _, of_input, of_target = with_gradients(AF.pyramid_loss, tensors)
        for gradient in (of_input, of_target):
            assert gradient.dtype == dtype and gradient.is_contiguous(memory_format=layout)
        assert torch.equal(of_input, -of_target)


@pytest.mark.usefixtures("no_kept_memory")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_tensor_beyond_the_gradient(layout):
    """The gradient made in the forward is the one that arrives at the input."""
    numerics.require_backend("cpu", OP.name, "cpu", torch.float32)
    input, target = pair(8, 3, 64, 64, dtype=torch.float32, layout=LAYOUTS[layout])
    target = target.detach()
    with torch.profiler.profile(profile_memory=True) as profile:
        AF.pyramid_loss(input, target).backward()
    allocated = sum(
        event.nbytes()
        for event in profile.profiler.kineto_results.events()
        if event.name() == "[memory]" and event.nbytes() > 0
    )
    assert input.numel() * 4 <= allocated <= input.numel() * 4 + 1024


def test_backward_again_adds_the_same():
    numerics.require_backend("cpu", OP.name, "cpu", torch.float32)
    input, target = pair(2, 3, 16, 16, dtype=torch.float32)
    (expected,) = torch.autograd.grad(by_hand(input, target.detach()), input)
    loss = AF.pyramid_loss(input, target.detach())
    for times in (1, 2, 3):
        loss.backward(retain_graph=True)
        torch.testing.assert_close(input.grad, times * expected)


def test_inputs_that_require_no_gradient_get_none():
    numerics.require_backend("cpu", OP.name, "cpu", torch.float64)
    for needs in ((True, False), (False, True), (True, True)):
        tensors = [
            one.detach().requires_grad_(need) for one, need in zip(pair(2, 1, 9, 9), needs, strict=True)
        ]
        wanted = [one for one in tensors if one.requires_grad]
        found = torch.autograd.grad(AF.pyramid_loss(*tensors, levels=2), wanted)
        expected = torch.autograd.grad(by_hand(*tensors, levels=2), wanted)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs)


def settings_of(pyramid):
    return {"levels": 3, "pyramid": pyramid, "p": 1.5, "weights": (1.0, 0.5, 2.0)}


@pytest.mark.parametrize("pyramid", pyramid_loss.PYRAMIDS)
@pytest.mark.parametrize("p", POWERS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_first_and_second_derivatives(pyramid, p, reduction):
    numerics.require_backend("cpu", OP.name, "cpu", torch.float64)
    function = functools.partial(
        AF.pyramid_loss, levels=2, p=p, pyramid=pyramid, reduction=reduction, eps=0.5
    )
    tensors = pair(2, 1, 3, 3)
    with aefast.backend("cpu"):
        assert torch.autograd.gradcheck(function, tensors)
        assert torch.autograd.gradgradcheck(function, tensors)


@pytest.mark.parametrize("pyramid", pyramid_loss.PYRAMIDS)
def test_gradient_penalty(pyramid):
    numerics.require_backend("cpu", OP.name, "cpu", torch.float64)

    def penalty(function):
        input, target = pair(2, 2, 12, 13)
        loss = function(input, target * (1 + input.mean()), **settings_of(pyramid))
        (gradient,) = torch.autograd.grad(loss, input, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), (input, target))

    with aefast.backend("cpu"):
        found = penalty(AF.pyramid_loss)
    for ours, theirs in zip(found, penalty(by_hand), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("pyramid", pyramid_loss.PYRAMIDS)
@pytest.mark.parametrize(("reduction", "layout"), [("mean", "contiguous"), ("none", "channels_last")])
def test_compiles_whole(pyramid, reduction, layout):
    torch._dynamo.reset()
    numerics.require_backend("cpu", OP.name, "cpu", torch.float32)

    def loss(input, target):
        return AF.pyramid_loss(2 * input, target, reduction=reduction, **settings_of(pyramid)).square().sum()

    compiled = torch.compile(loss, fullgraph=True)
    # The second size is compiled for all sizes.
    for size in ((2, 3, 16, 20), (3, 3, 13, 24), (1, 3, 18, 33)):
        tensors = pair(*size, dtype=torch.float32, layout=LAYOUTS[layout])
        with aefast.backend("cpu"):
            found = compiled(*tensors)
            expected = loss(*tensors)
            found = found, *torch.autograd.grad(found, tensors)
            expected = expected, *torch.autograd.grad(expected, tensors)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_opcheck(backend, device, dtype):
    numerics.require_backend(backend, OP.name, device, dtype)
    reductions = ("none", "mean")
    for layout, pyramid, reduction in itertools.product(LAYOUTS.values(), pyramid_loss.PYRAMIDS, reductions):
        input, target = pair(2, 3, 9, 8, dtype=dtype, layout=layout, device=device)
        settings = (pyramid, "power", 1.5, (0.5, 0.25), reduction)
        op = torch.ops.aefast.pyramid_loss.default
        torch.library.opcheck(op, (input, target, *settings, False, backend))
        for with_gradient in (False, True):
            arguments = (input.detach(), target.detach(), *settings, with_gradient, backend)
            torch.library.opcheck(op, arguments)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pyramid", pyramid_loss.PYRAMIDS)
def test_does_not_depend_on_threads(pyramid, layout):
    numerics.require_backend("cpu", OP.name, "cpu", torch.float32)
    tensors = pair(5, 3, 129, 75, dtype=torch.float32, layout=LAYOUTS[layout])
    threads = torch.get_num_threads()

    def once(count):
        torch.set_num_threads(count)
        try:
            with aefast.backend("cpu"):
                return with_gradients(AF.pyramid_loss, tensors, pyramid=pyramid, reduction="none")
        finally:
            torch.set_num_threads(threads)

    first = once(1)
    for count in (2, 2, 3, 7):
        for ours, theirs in zip(once(count), first, strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("pyramid", pyramid_loss.PYRAMIDS)
def test_torch_func_and_forward_mode_use_the_reference(pyramid):
    tensors = tuple(one.detach() for one in pair(2, 2, 12, 13))
    function = functools.partial(AF.pyramid_loss, **settings_of(pyramid))
    by = functools.partial(by_hand, **settings_of(pyramid))
    torch.testing.assert_close(torch.func.grad(function)(*tensors), torch.func.grad(by)(*tensors))
    torch.testing.assert_close(
        torch.func.jvp(function, tensors, tensors), torch.func.jvp(by, tensors, tensors)
    )
    input, target = tensors
    found = torch.func.vmap(lambda one: function(one, target))(torch.stack((input, 2 * input)))
    torch.testing.assert_close(found, torch.stack((by(input, target), by(2 * input, target))))
    numerics.require_backend("cpu", OP.name, "cpu", torch.float64)
    with aefast.backend("cpu"), pytest.raises(aefast.BackendError, match="forward-mode"):
        torch.func.jvp(function, tensors, tensors)


def test_vectorised_backward():
    numerics.require_backend("cpu", OP.name, "cpu", torch.float32)
    tensors = pair(3, 1, 8, 8, dtype=torch.float32)
    upstream = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
    out = AF.pyramid_loss(*tensors, reduction="none")
    found = torch.autograd.grad(out, tensors, upstream, is_grads_batched=True)
    for index, one in enumerate(upstream):
        expected = torch.autograd.grad(by_hand(*tensors, reduction="none"), tensors, one)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours[index], theirs)


def test_autocast_computes_in_float32():
    numerics.require_backend("cpu", OP.name, "cpu", torch.float32)
    for pyramid in pyramid_loss.PYRAMIDS:
        input, target = pair(2, 3, 16, 16, dtype=torch.float32)
        expected = AF.pyramid_loss(input, target, pyramid=pyramid)
        half = input.bfloat16()
        expected_of_half = AF.pyramid_loss(half.float(), target, pyramid=pyramid)
        for backend in ("cpu", "eager"):
            with aefast.backend(backend), torch.autocast("cpu", torch.bfloat16):
                found = AF.pyramid_loss(input, target, pyramid=pyramid)
                of_half = AF.pyramid_loss(half, target, pyramid=pyramid)
            torch.testing.assert_close(found, expected)
            torch.testing.assert_close(of_half, expected_of_half)
            assert torch.autograd.grad(of_half, half)[0].dtype == torch.bfloat16


def test_means_of_nothing():
    numerics.require_backend("cpu", OP.name, "cpu", torch.float32)
    nothing = torch.ones(0, 3, 8, 8)
    for backend in ("cpu", "eager"):
        with aefast.backend(backend):
            assert math.isnan(AF.pyramid_loss(nothing, nothing).item())
            assert AF.pyramid_loss(nothing, nothing, reduction="sum").item() == 0.0
            assert AF.pyramid_loss(nothing, nothing, reduction="none").shape == (0,)
            assert AF.pyramid_loss(*[torch.ones(2, 0, 8, 8)] * 2, reduction="none").isnan().all()


def test_meta_tensors_and_negative_views():
    input, target = (one.detach() for one in pair(2, 2, 9, 8, dtype=torch.float32))
    expected = AF.pyramid_loss(input, target, reduction="none")
    found = AF.pyramid_loss(input.to("meta"), target.to("meta"), reduction="none")
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    negated = torch.complex(input, -input).conj().imag
    assert negated.is_neg()
    torch.testing.assert_close(AF.pyramid_loss(negated, target, reduction="none"), expected)


def test_numbers_of_numpy_are_numbers():
    numerics.require_backend("cpu", OP.name, "cpu", torch.float32)
    tensors = pair(1, 1, 16, 16, dtype=torch.float32)
    found = AF.pyramid_loss(
        *tensors, levels=np.int64(2), p=np.float64(1.5), weights=[np.float64(0.5), np.int32(1)]
    )
    assert torch.equal(found, AF.pyramid_loss(*tensors, levels=2, p=1.5, weights=[0.5, 1.0]))


@pytest.mark.parametrize("pyramid", pyramid_loss.PYRAMIDS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_module_and_its_twin(pyramid, reduction):
    tensors = pair(2, 3, 17, 26)
    for p in POWERS:
        module = nn.PyramidLoss(3, p, pyramid, (1.0, 2.0, 0.5), reduction)
        assert not module.state_dict() and not list(module.parameters())
        expected = with_gradients(
            by_hand,
            tensors,
            **{"levels": 3, "p": p, "pyramid": pyramid, "weights": (1.0, 2.0, 0.5), "reduction": reduction},
        )
        for one in (module, module.eager()):
            for ours, theirs in zip(with_gradients(one, tensors), expected, strict=True):
                torch.testing.assert_close(ours, theirs)


def test_module_shows_its_options():
    assert repr(nn.PyramidLoss()) == "PyramidLoss(average, levels=4)"
    module = nn.PyramidLoss(2, "charbonnier", "laplacian", [1, 0.5], "sum", eps=0.01)
    shown = "laplacian, levels=2, charbonnier, eps=0.01, weights=1 0.5, sum"
    assert repr(module) == f"PyramidLoss({shown})"
    assert repr(module.eager()) == f"_EagerPyramidLoss({shown})"
    assert nn.PyramidLoss(p=1.5).extra_repr() == "average, levels=4, p=1.5"
    with pytest.raises(InputError, match="PyramidLoss: pyramid must be one of"):
        nn.PyramidLoss(pyramid="wavelet")


IMAGES = torch.ones(2, 3, 16, 16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input": [1.0]}, "input must be a torch.Tensor, got list"),
        ({"target": None}, "target must be a torch.Tensor, got NoneType"),
        ({"input": IMAGES.int()}, "input must be float32, bfloat16, float16 or float64, got int32"),
        ({"target": IMAGES.long()}, "target must be float32, bfloat16, float16 or float64, got int64"),
        (
            {"target": IMAGES[:1]},
            r"target must have the shape of input, \(2, 3, 16, 16\), got \(1, 3, 16, 16\)",
        ),
        ({"input": IMAGES[0], "target": IMAGES[0]}, r"input must be \(B, C, H, W\), got shape \(3, 16, 16\)"),
        (
            {"input": IMAGES[..., :0], "target": IMAGES[..., :0]},
            r"input must have sides of at least 1, got shape \(2, 3, 16, 0\)",
        ),
        ({"pyramid": "wavelet"}, "pyramid must be one of average, gaussian, laplacian, got 'wavelet'"),
        ({"pyramid": None}, "pyramid must be one of average, gaussian, laplacian, got None"),
        ({"levels": 0}, "levels must be an integer of at least 1, got 0"),
        ({"levels": 2.0}, "levels must be an integer of at least 1, got 2.0"),
        ({"levels": True}, "levels must be an integer of at least 1, got True"),
        ({"levels": 10**20}, "levels must be at most 32, got 100000000000000000000"),
        (
            {"levels": 6},
            "levels must be at most 5 for a pyramid of kind 'average' of images of 16 × 16, got 6",
        ),
        ({"levels": 2**40}, "levels must be at most 32, got 1099511627776"),
        (
            {"levels": 6, "pyramid": "gaussian"},
            "levels must be at most 4 for a pyramid of kind 'gaussian' of images of 16 × 16, got 6",
        ),
        ({"pyramid": "laplace"}, r"pyramid must be one of .*, got 'laplace'; did you mean 'laplacian'\?$"),
        ({"p": 0.5}, "p must be a finite number of at least 1, got 0.5"),
        ({"p": float("nan")}, "p must be a finite number of at least 1, got nan"),
        ({"p": float("inf")}, "p must be a finite number of at least 1, got inf"),
        ({"p": "l1"}, "p must be a number of at least 1, or 'charbonnier', got 'l1'"),
        ({"p": None}, "p must be a finite number of at least 1, got None"),
        ({"p": "charbonnier", "eps": -1.0}, "eps must be a finite number of at least 0, got -1.0"),
        ({"weights": (1.0, 1.0)}, r"weights must be a sequence of 4 numbers, one a level, got \(1.0, 1.0\)"),
        ({"weights": 1.0}, "weights must be a sequence of 4 numbers, one a level, got 1.0"),
        ({"weights": (1, 1, 1, -1)}, "each of weights must be a finite number of at least 0, got -1"),
        ({"weights": (1, 1, 1, "1")}, "each of weights must be a finite number of at least 0, got '1'"),
        ({"reduction": "batchmean"}, "reduction must be one of none, mean, sum, got 'batchmean'"),
        ({"input": IMAGES.to_sparse()}, "input must be a dense tensor, got a sparse_coo one"),
    ],
)
def test_bad_input_is_named(change, message):
    with pytest.raises(InputError, match=f"pyramid_loss: .*{message}"):
        AF.pyramid_loss(**{"input": IMAGES, "target": IMAGES, **change})


def test_the_eps_of_charbonnier_changes_nothing_elsewhere():
    target = IMAGES + 0.5
    assert torch.equal(AF.pyramid_loss(IMAGES, target, p=1, eps=-1.0), AF.pyramid_loss(IMAGES, target, p=1))

import functools
import math

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

import aefast
import aefast.functional as AF
from aefast.errors import InputError
from aefast.kernels.jumprelu import NEED_THRESHOLD, NEED_X
from aefast.ops import jumprelu
from support import numerics

OP = jumprelu.OP
CPU = torch.device("cpu")
BACKENDS = [
    pytest.param("cpu", "cpu", id="cpu"),
    pytest.param("triton", "cuda", id="triton", marks=pytest.mark.gpu),
]


def operands(rows=9, size=6, dtype=torch.float64):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(rows, size, generator=generator, dtype=torch.float64)
    threshold = torch.rand(size, generator=generator, dtype=torch.float64) + 0.05
    return x.to(dtype).requires_grad_(), threshold.to(dtype).requires_grad_()


def upstream(rows=9, size=6, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(rows, size, generator=generator, dtype=dtype), torch.randn(
        rows, generator=generator, dtype=dtype
    )


@pytest.mark.parametrize("dtype", numerics.DTYPES)
@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_matches_float64_reference(poisoned_memory, backend, device, dtype):
    numerics.require_backend(backend, OP.name, device, dtype)
    for sample in OP.samples(torch.device(device), dtype):
        numerics.check(OP, backend, sample, dtype)
        numerics.check(OP, backend, sample, dtype, expand_grad=True)


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
    rows=st.integers(0, 150),
    columns=st.one_of(st.integers(0, 70), st.integers(2000, 4200)),
    layout=st.sampled_from(["plain", "transposed", "sliced", "expanded"]),
    bandwidth=st.sampled_from([0.1, 0.5, 3.0]),
)
def test_any_shape_and_stride(instruction_set, rows, columns, layout, bandwidth):
    rows = rows if columns < 2000 else rows % 7
    generator = torch.Generator().manual_seed(rows + 1000 * columns)
    make = functools.partial(torch.randn, generator=generator)
    x = {
        "plain": lambda: make(rows, columns),
        "transposed": lambda: make(columns, rows).t(),
        "sliced": lambda: make(2 * rows + 1, columns + 3)[1::2, 2 : columns + 2],
        "expanded": lambda: make(1, columns).expand(rows, columns),
    }[layout]()
    sample = {"x": x, "threshold": torch.rand(columns, generator=generator), "bandwidth": bandwidth}
    numerics.check(OP, "cpu", sample, torch.float32)


@pytest.mark.parametrize(("backend", "device"), [*BACKENDS, ("eager", "cpu")])
def test_is_what_the_paper_says(backend, device):
    """Its formulae element by element, and nothing is differentiated."""
    numerics.require_backend(backend, OP.name, device, torch.float64)
    epsilon = 0.6
    x, threshold = (tensor.to(device) for tensor in operands(40, 6))
    grad_h, grad_l0 = (tensor.to(device) for tensor in upstream(40, 6))
    with aefast.backend(backend):
        h, l0 = AF.jumprelu(x, threshold, epsilon)
    to_x, to_threshold = torch.autograd.grad((h, l0), (x, threshold), (grad_h, grad_l0))
    active = (x > threshold).double()
    kernel = (((x - threshold) / epsilon).abs() < 0.5).double()
    assert 0 < kernel.mean() < 1 and 0 < active.mean() < 1
    assert torch.equal(h, x * active) and torch.equal(l0, active.sum(1))
    assert torch.equal(to_x, grad_h * active)
    expected = -(threshold / epsilon * kernel * grad_h + kernel / epsilon * grad_l0[:, None]).sum(0)
    torch.testing.assert_close(to_threshold, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(("backend", "device"), [*BACKENDS, ("eager", "cpu")])
def test_edges(backend, device):
    """A pre-activation at its threshold is off, and one at the rectangle's edge has no part in the gradient."""
    numerics.require_backend(backend, OP.name, device, torch.float32)
    x = torch.tensor([[0.5], [0.5 + 2.0**-24], [0.375], [0.625], [0.380]], device=device)
    threshold = torch.tensor([0.5], device=device, requires_grad=True)
    with aefast.backend(backend):
        h, l0 = AF.jumprelu(x, threshold, 0.25)
    assert l0.tolist() == [0.0, 1.0, 0.0, 1.0, 0.0]
    assert h.flatten().tolist() == [0.0, x[1].item(), 0.0, 0.625, 0.0]
    (gradient,) = torch.autograd.grad(l0.sum(), threshold)
    assert gradient.tolist() == [-3 / 0.25]


@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_nan_and_infinity_propagate(backend):
    numerics.require_backend(backend, OP.name, "cpu", torch.float32)
    x = torch.tensor([[math.nan, math.inf, -math.inf, 1.0]] * 9).t().contiguous().requires_grad_()
    threshold = torch.full((9,), 0.5, requires_grad=True)
    with aefast.backend(backend):
        h, l0 = AF.jumprelu(x, threshold)
    assert h[0].isnan().all() and (h[1] == math.inf).all() and not h[2].any() and (h[3] == 1.0).all()
    assert l0[1:].tolist() == [9.0, 0.0, 9.0]
    to_x, to_threshold = torch.autograd.grad(h.sum(), (x, threshold))
    assert (to_x[[1, 3]] == 1.0).all() and not to_x[2].any() and not to_threshold.any()


def test_threshold_of_half_precision_is_compared_in_float32():
    numerics.require_backend("cpu", OP.name, "cpu", torch.bfloat16)
    x = torch.tensor([[1.0, 1.0]], dtype=torch.bfloat16)
    threshold = torch.tensor([1.001, 0.999], requires_grad=True)
    for backend in ("cpu", "eager"):
        with aefast.backend(backend):
            h, l0 = AF.jumprelu(x, threshold)
        assert h.tolist() == [[0.0, 1.0]] and h.dtype == torch.bfloat16
        assert l0.tolist() == [1.0] and l0.dtype == torch.float32


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)])
def test_each_output_alone_and_only_the_gradients_asked_for(backend, device, which, needs):
    numerics.require_backend(backend, OP.name, device, torch.float64)
    tensors = [t.detach().to(device).requires_grad_(need) for t, need in zip(operands(), needs, strict=True)]
    wanted = [tensor for tensor in tensors if tensor.requires_grad]
    grad = upstream()[which].to(device)
    with aefast.backend(backend):
        output = AF.jumprelu(*tensors, 0.5)[which]
    assert output.requires_grad == OP.reference(*tensors, 0.5)[which].requires_grad
    if not output.requires_grad:
        return
    found = torch.autograd.grad(output, wanted, grad, allow_unused=True, materialize_grads=True)
    expected = torch.autograd.grad(
        OP.reference(*tensors, 0.5)[which], wanted, grad, allow_unused=True, materialize_grads=True
    )
    torch.testing.assert_close(found, expected)


def test_gradients_of_any_strides(instruction_set):
    x, threshold = operands(70, 37, torch.float32)
    grads = upstream(70, 37, torch.float32)
    strided = grads[0].t().contiguous().t(), grads[1].repeat_interleave(2)[::2]
    with aefast.backend("cpu"):
        outputs = AF.jumprelu(x, threshold, 0.5)
    expected = torch.autograd.grad(outputs, (x, threshold), grads, retain_graph=True)
    found = torch.autograd.grad(outputs, (x, threshold), strided)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_opcheck(backend, device, dtype):
    numerics.require_backend(backend, OP.name, device, dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x, threshold = (tensor.detach().to(device) for tensor in operands())
    x, threshold = x.to(dtype), threshold.to(wide)
    for needs in ((True, True), (True, False), (False, True), (False, False)):
        tensors = [
            tensor.clone().requires_grad_(need) for tensor, need in zip((x, threshold), needs, strict=True)
        ]
        torch.library.opcheck(torch.ops.aefast.jumprelu.default, (*tensors, 0.5, backend))
    grad_h, grad_l0 = upstream()
    grad_h, grad_l0 = grad_h.to(device, dtype), grad_l0.to(device, wide)
    for grads in ((grad_h, grad_l0), (None, grad_l0), (grad_h, None)):
        for needs in (NEED_X, NEED_THRESHOLD, NEED_X | NEED_THRESHOLD):
            torch.library.opcheck(
                torch.ops.aefast.jumprelu_backward.default, (*grads, x, threshold, 0.5, needs, backend)
            )


@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_second_derivatives(backend):
    """Those of the pseudo-gradient, which is a function of the threshold and of what comes in. The first ones are no
    limits of differences."""
    numerics.require_backend(backend, OP.name, "cpu", torch.float64)
    with aefast.backend(backend):
        assert torch.autograd.gradgradcheck(lambda *t: AF.jumprelu(*t, 0.5), operands())


def test_gradient_penalty():
    """Second derivatives flow through both an input and a threshold that depends on it."""
    numerics.require_backend("cpu", OP.name, "cpu", torch.float64)

    def second(function):
        x, threshold = operands()
        h, l0 = function(x, threshold * (1 + 0.1 * x.mean()), 0.5)
        (gradient,) = torch.autograd.grad(h.square().sum() + l0.square().sum(), x, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), (x, threshold))

    with aefast.backend("cpu"):
        found = second(AF.jumprelu)
    for ours, theirs in zip(found, second(OP.reference), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_compiles_whole():
    numerics.require_backend("cpu", OP.name, "cpu", torch.float32)

    def loss(x, threshold):
        h, l0 = AF.jumprelu(x.view(3, 3, 6), threshold, 0.5)
        return h.square().sum() + l0.square().sum()

    with aefast.backend("cpu"):
        expected = torch.autograd.grad(loss(*(t := operands(dtype=torch.float32))), t)
        compiled = torch.compile(loss, fullgraph=True)
        found = torch.autograd.grad(compiled(*(t := operands(dtype=torch.float32))), t)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(("rows", "size"), [(301, 257), (1000, 3), (130, 5000)])
def test_does_not_depend_on_threads(rows, size):
    numerics.require_backend("cpu", OP.name, "cpu", torch.float32)
    x, threshold = operands(rows, size, torch.float32)
    grads = upstream(rows, size, torch.float32)
    threads = torch.get_num_threads()

    def once(count):
        torch.set_num_threads(count)
        try:
            with aefast.backend("cpu"):
                outputs = AF.jumprelu(x, threshold, 0.5)
            return *outputs, *torch.autograd.grad(outputs, (x, threshold), grads)
        finally:
            torch.set_num_threads(threads)

    first = once(1)
    for count in (1, 2, 2, 3, 7):
        assert all(torch.equal(a, b) for a, b in zip(once(count), first, strict=True))


def test_under_autocast_thresholds_stay_as_they_are():
    numerics.require_backend("cpu", OP.name, "cpu", torch.bfloat16)
    x, threshold = operands(dtype=torch.float32)
    with aefast.backend("cpu"), torch.autocast("cpu", torch.bfloat16):
        pre = torch.nn.functional.linear(x, torch.eye(6))
        h, l0 = AF.jumprelu(pre, threshold, 0.5)
    assert pre.dtype == h.dtype == torch.bfloat16 and l0.dtype == torch.float32
    gradients = torch.autograd.grad(h.float().sum() + l0.sum(), (x, threshold))
    assert all(gradient.dtype == torch.float32 for gradient in gradients)


def test_torch_func_uses_the_reference():
    x, threshold = (tensor.detach() for tensor in operands(dtype=torch.float32))

    def value(function):
        return lambda threshold: sum(out.sum() for out in function(x, threshold, 0.5))

    ours, theirs = value(AF.jumprelu), value(OP.reference)
    torch.testing.assert_close(torch.func.grad(ours)(threshold), torch.func.grad(theirs)(threshold))
    batched = torch.func.vmap(lambda x: AF.jumprelu(x, threshold, 0.5))(x)
    torch.testing.assert_close(batched, AF.jumprelu(x, threshold, 0.5))
    numerics.require_backend("cpu", OP.name, "cpu", torch.float32)
    with aefast.backend("cpu"), pytest.raises(aefast.BackendError, match="forward-mode"):
        torch.func.jvp(ours, (threshold,), (threshold,))


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_a_threshold_that_is_no_number_is_seen(backend, device):
    numerics.require_backend(backend, OP.name, device, torch.float32)
    x, threshold = torch.randn(70, 40), torch.rand(40)
    threshold[7] = float("nan")
    x, threshold = (one.to(device).requires_grad_() for one in (x, threshold))
    with aefast.backend(backend):
        h, count = AF.jumprelu(x, threshold, 0.5)
        (of_threshold,) = torch.autograd.grad((h.sum(), count.sum()), threshold)
    is_wrong = torch.zeros(40, dtype=torch.bool, device=device)
    is_wrong[7] = True
    assert torch.equal(h.isnan(), is_wrong.expand(70, 40)) and count.isnan().all()
    assert torch.equal(of_threshold.isnan(), is_wrong)


def test_vectorised_backward():
    numerics.require_backend("cpu", OP.name, "cpu", torch.float32)
    x, threshold = operands(dtype=torch.float32)
    grads = torch.randn(3, 9, 6), torch.randn(3, 9)
    with aefast.backend("cpu"):
        outputs = AF.jumprelu(x, threshold, 0.5)
    found = torch.autograd.grad(outputs, (x, threshold), grads, is_grads_batched=True)
    expected = [
        torch.autograd.grad(OP.reference(x, threshold, 0.5), (x, threshold), one)
        for one in zip(*grads, strict=True)
    ]
    for ours, theirs in zip(found, zip(*expected, strict=True), strict=True):
        torch.testing.assert_close(ours, torch.stack(theirs))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": [[1.0]]}, "x must be a torch.Tensor, got list"),
        ({"x": torch.ones(())}, r"x must have at least one dimension, \(\*, F\), got a scalar"),
        ({"x": torch.ones(3, 5).int()}, "x must be float32, bfloat16, float16 or float64, got int32"),
        ({"threshold": 0.1}, "threshold must be a torch.Tensor, got float"),
        ({"threshold": torch.ones(5).to_sparse()}, "threshold must be a dense tensor, got a sparse_coo one"),
        (
            {"threshold": torch.ones(4)},
            r"threshold must be \(5,\) to match x of shape \(3, 5\), got shape \(4,\)",
        ),
        (
            {"threshold": torch.ones(5).half()},
            "threshold must have the dtype of x, float32, got float16",
        ),
        ({"threshold": torch.ones(5, device="meta")}, "threshold must be on the device of x, cpu, got meta"),
        ({"bandwidth": 0.0}, "bandwidth must be a finite number above 0, got 0.0"),
        ({"bandwidth": -1.0}, "bandwidth must be a finite number above 0, got -1.0"),
        ({"bandwidth": None}, "bandwidth must be a finite number above 0, got None"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = {"x": torch.ones(3, 5), "threshold": torch.ones(5)}
    with pytest.raises(InputError, match=f"jumprelu: {message}"):
        AF.jumprelu(**{**arguments, **change})

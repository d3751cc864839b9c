"""What holds for all ops that draw noise or measure divergences or losses; test_<op>.py has what is of one alone."""

import functools
import itertools

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch._dynamo.backends.common import aot_autograd

import aefast
import aefast.functional as AF
from aefast.ops import OPS
from aefast.ops._pairwise import KERNELS
from support import numerics

CPU = torch.device("cpu")
NAMES = [
    "reparameterize",
    "kl_normal",
    "kl_discrete",
    "corrupt",
    "gaussian_head",
    "mmd",
    "reconstruction_loss",
    "linear_reconstruction_loss",
]
BACKENDS = [
    pytest.param("cpu", "cpu", id="cpu"),
    pytest.param("triton", "cuda", id="triton", marks=pytest.mark.gpu),
    pytest.param("cuda", "cuda", id="cuda", marks=pytest.mark.gpu),
]
LOSSES = {
    **{kind: {} for kind in ("mse", "rmse", "l1", "bce_with_logits")},
    "huber": {"delta": 0.8},
    "lp": {"p": 2.5, "reduction": "batchmean"},
    "charbonnier": {"eps": 0.3, "reduction": "none"},
    "bce": {"reduction": "sum"},
}
NOISES = {
    "gaussian": {"mean": 0.25, "std": 0.5},
    "salt_and_pepper": {"p": 0.3, "low": -1.0, "high": 2.0},
    "masking": {"p": 0.4},
    "dropout": {"p": 0.25},
}


def draw(*shape, dtype=torch.float64, seed=2):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def probabilities(*shape, dtype=torch.float64, seed=2):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(*shape, generator=generator, dtype=dtype) + 0.05


def calls(dtype=torch.float64, rows=6, size=5):
    """(name, function of its tensors, tensors that require gradients): every op, with a seed where it has one."""

    def leaf(tensor):
        return tensor.to(dtype).requires_grad_()

    mu, logvar = leaf(draw(rows, size)), leaf(draw(rows, size, seed=3))
    yield "reparameterize", functools.partial(AF.reparameterize, seed=7), (mu, logvar)
    yield "kl_normal", AF.kl_normal, (mu, logvar)
    yield (
        "kl_discrete",
        AF.kl_discrete,
        (leaf(probabilities(rows, size)), leaf(probabilities(rows, size, seed=3))),
    )
    for noise, options in NOISES.items():
        yield f"corrupt {noise}", functools.partial(AF.corrupt, noise=noise, seed=7, **options), (mu,)
    for kernel in KERNELS:
        yield f"mmd {kernel}", functools.partial(AF.mmd, kernel=kernel, bandwidth=(0.7, 1.9)), (mu, logvar)
    for kind, options in LOSSES.items():
        # Cross-entropies have targets, and one of them inputs, from 0 to 1; twice theirs, too.
        first = leaf(0.4 * draw(rows, size).sigmoid()) if kind == "bce" else mu
        second = leaf(0.4 * draw(rows, size, seed=3).sigmoid()) if kind.startswith("bce") else logvar
        yield (
            f"reconstruction_loss {kind}",
            functools.partial(AF.reconstruction_loss, kind=kind, **options),
            (first, second),
        )
    for kind, options in {"mse": {"output_activation": "silu"}, "rmse": {}, "bce_with_logits": {}}.items():
        operands = leaf(draw(rows, 4)), leaf(draw(size, 4, seed=3)), leaf(draw(size, seed=4))
        target = leaf(0.4 * draw(rows, size, seed=5).sigmoid())
        function = functools.partial(AF.linear_reconstruction_loss, kind=kind, **options)
        yield f"linear_reconstruction_loss {kind}", function, (*operands, target)
    layer = leaf(draw(2 * size, 4, seed=4)), leaf(draw(2 * size, seed=5))
    yield "gaussian_head", functools.partial(AF.gaussian_head, seed=7), (leaf(draw(rows, 4)), *layer)


CALLS = [name for name, *_ in calls()]


def call_of(name, dtype=torch.float64, **sizes):
    return next((function, tensors) for found, function, tensors in calls(dtype, **sizes) if found == name)


def reference_of(name, function):
    op = OPS[name.split()[0]]
    settings = function.keywords if isinstance(function, functools.partial) else {}
    return functools.partial(op.reference, **settings)


def total(outputs):
    """A scalar that every output has a part in."""
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else outputs
    return sum((1 + index) * (out.to(torch.float64) ** 2).sum() for index, out in enumerate(outputs))


@pytest.mark.parametrize("dtype", numerics.DTYPES)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_matches_float64_reference(poisoned_memory, backend, device, name, dtype):
    numerics.require_backend(backend, name, device, dtype)
    for sample in OPS[name].samples(torch.device(device), dtype):
        numerics.check(OPS[name], backend, sample, dtype)


@pytest.mark.parametrize("dtype", numerics.DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_each_instruction_set(poisoned_memory, instruction_set, name, dtype):
    for sample in OPS[name].samples(CPU, dtype):
        numerics.check(OPS[name], "cpu", sample, dtype)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_expanded_gradient(poisoned_memory, backend, device, name):
    numerics.require_backend(backend, name, device, torch.float32)
    for sample in OPS[name].samples(torch.device(device), torch.float32):
        numerics.check(OPS[name], backend, sample, torch.float32, expand_grad=True)


# The fixture is to hold for all examples.
@hypothesis.settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
@hypothesis.given(
    name=st.sampled_from(["reparameterize", "kl_normal", "kl_discrete", "corrupt"]),
    rows=st.integers(0, 150),
    columns=st.one_of(st.integers(0, 70), st.integers(900, 2200)),
    strides=st.tuples(*[st.sampled_from(["plain", "transposed", "sliced", "expanded"])] * 2),
    noise=st.sampled_from(sorted(NOISES)),
    seed=st.integers(-(2**63), 2**63 - 1),
)
def test_any_shape_and_stride(instruction_set, name, rows, columns, strides, noise, seed):
    rows = rows if columns < 900 else rows % 7
    generator = torch.Generator().manual_seed(rows + 1000 * columns)

    def matrix(layout):
        make = functools.partial(torch.rand if name == "kl_discrete" else torch.randn, generator=generator)
        if layout == "transposed":
            return make(columns, rows).t()
        if layout == "sliced":
            return make(2 * rows + 1, columns + 3)[1::2, 2 : columns + 2]
        if layout == "expanded":
            return make(1, columns).expand(rows, columns)
        return make(rows, columns)

    first, second = (matrix(layout) for layout in strides)
    samples = {
        "reparameterize": {"mu": first, "logvar": second, "seed": seed, "reduction": "none"},
        "kl_normal": {"mu": first, "logvar": second, "reduction": "none"},
        "kl_discrete": {"p": first, "q": second, "reduction": "none"},
        "corrupt": {"x": first, "noise": noise, "seed": seed, **NOISES[noise]},
    }
    numerics.check(OPS[name], "cpu", samples[name], torch.float32)


@pytest.mark.parametrize("name", CALLS)
def test_first_and_second_derivatives(name):
    numerics.require_backend("cpu", name.split()[0], "cpu", torch.float64)
    function, tensors = call_of(name)
    with aefast.backend("cpu"):
        assert torch.autograd.gradcheck(function, tensors)
        assert torch.autograd.gradgradcheck(function, tensors)


@pytest.mark.parametrize("name", CALLS)
def test_gradient_penalty(name):
    """Second derivatives flow through both an input and another that depends on it."""
    numerics.require_backend("cpu", name.split()[0], "cpu", torch.float64)

    def penalty(function, tensors):
        first, *rest = tensors
        mixed = [tensor * (1 + first.mean()) for tensor in rest]
        (gradient,) = torch.autograd.grad(total(function(first, *mixed)), first, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), tensors)

    function, tensors = call_of(name)
    with aefast.backend("cpu"):
        found = penalty(function, tensors)
    expected = penalty(reference_of(name, function), tensors)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", CALLS)
def test_each_output_alone_has_a_gradient(name):
    numerics.require_backend("cpu", name.split()[0], "cpu", torch.float64)
    function, tensors = call_of(name)
    with aefast.backend("cpu"):
        count = len(numerics.outputs_of(function(*tensors)))
    for index in range(count):
        with aefast.backend("cpu"):
            found = torch.autograd.grad(
                numerics.outputs_of(function(*tensors))[index].square().sum(), tensors, allow_unused=True
            )
        reference = reference_of(name, function)
        expected = torch.autograd.grad(
            numerics.outputs_of(reference(*tensors))[index].square().sum(),
            tensors,
            allow_unused=True,
            materialize_grads=True,
        )
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(torch.zeros_like(theirs) if ours is None else ours, theirs)


@pytest.mark.parametrize("name", CALLS)
def test_compiles_whole(name):
    # All of these compile one code object, which the compiler does so many times at most.
    torch._dynamo.reset()
    numerics.require_backend("cpu", name.split()[0], "cpu", torch.float32)
    function, tensors = call_of(name, torch.float32)

    def loss(*tensors):
        return total(function(*tensors))

    with aefast.backend("cpu"):
        expected = loss(*tensors), *torch.autograd.grad(loss(*tensors), tensors)
        value = torch.compile(loss, fullgraph=True)(*tensors)
        found = value, *torch.autograd.grad(value, tensors)
    for ours, theirs in zip(found, expected, strict=True):
        # The total is a float64 number made of float32 ones.
        torch.testing.assert_close(ours.float(), theirs.float())


# Each by itself: a backend has kernels for some of them.
OPCHECKED = (
    *("reparameterize", "kl_normal", "kl_discrete", "corrupt", "mmd"),
    *("reconstruction_loss", "linear_reconstruction_loss", "gaussian_head"),
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPCHECKED)
@pytest.mark.parametrize(("backend", "device"), BACKENDS)
def test_opcheck(backend, device, name, dtype):
    numerics.require_backend(backend, name, device, dtype)
    mu, logvar, h = (draw(6, 5, seed=seed).to(device, dtype) for seed in (1, 2, 3))
    p, q = (probabilities(6, 5, seed=seed).to(device, dtype) for seed in (1, 2))
    grad = draw(6, 5, seed=4).to(device, dtype)
    wide = torch.ones(6, device=device)
    seed = torch.tensor(11, device=device)
    weight, bias = draw(10, 5, seed=6).to(device, dtype), draw(10, seed=7).to(device, dtype)
    ops = torch.ops.aefast
    limits = (-1.0, 1.0)
    noise = ("salt_and_pepper", 0.0, 1.0, 2**30, 1)
    moments = draw(6, 10, seed=8).to(device, dtype)
    cases = {
        "reparameterize": [
            (ops.reparameterize, (mu, logvar, seed, *limits, backend)),
            (ops.reparameterize_backward, (grad, wide, mu, logvar, seed, *limits, backend)),
            (ops.reparameterize_backward, (None, wide, mu, logvar, seed, *limits, backend)),
        ],
        "kl_normal": [
            (ops.kl_normal, (mu, logvar, backend)),
            (ops.kl_normal_backward, (wide, mu, logvar, backend)),
        ],
        "kl_discrete": [
            (ops.kl_discrete, (p, q, backend)),
            (ops.kl_discrete_backward, (wide, p, q, backend)),
        ],
        "corrupt": [(ops.corrupt, (mu, seed, *noise, backend))],
        "mmd": [
            (ops.mmd, (mu, p, None, "rbf", (2.0, 1.0), 1.0, estimator, needs, backend))
            for needs, estimator in enumerate(("biased", "unbiased", "biased", "unbiased"))
        ],
        "reconstruction_loss": [
            *(
                (ops.reconstruction_loss, (p, q, kind, 1.5, 0.5, 7, root, keeps, False, backend))
                for kind, root, keeps in (("mse", True, True), ("lp", False, True), ("huber", False, False))
            ),
            (ops.reconstruction_loss_elements, (mu, q, "bce_with_logits", 0.0, False, backend)),
            (ops.reconstruction_loss_backward, (wide.sum(), mu, logvar, "l1", 0.0, 0.5, 7, backend)),
            (
                ops.reconstruction_loss_backward,
                (grad.float(), mu, logvar, "charbonnier", 0.5, 1.0, 1, backend),
            ),
            (ops.loss_gradient, (grad, wide, 0.5, 7, backend)),
        ],
        "linear_reconstruction_loss": [
            *(
                (
                    ops.linear_reconstruction_loss,
                    (h, weight, bias, moments, activation, "mse", 0.0, 0.5, 7, needs, False, backend),
                )
                for activation, needs in (("silu", 0), ("relu", 7), ("identity", 2))
            ),
            (ops.linear_reconstruction_loss_backward, (weight, wide.sum(), 0.5, 7, 9, backend)),
        ],
        "gaussian_head": [
            (ops.gaussian_head, (h, weight, bias, seed, *limits, backend)),
            (ops.gaussian_head_backward, (grad, wide, None, h, weight, moments, seed, *limits, 5, backend)),
        ],
    }
    for op, arguments in cases[name]:
        # What a backward calls is differentiated through the reference.
        is_forward = not op.__name__.endswith(("backward", "loss_gradient"))
        for want in (False, True) if is_forward else (False,):
            given = [
                value.clone().requires_grad_(want and value.is_floating_point())
                if isinstance(value, torch.Tensor)
                else value
                for value in arguments
            ]
            torch.library.opcheck(op.default, tuple(given))


@pytest.mark.parametrize("name", CALLS)
def test_does_not_depend_on_threads(name):
    numerics.require_backend("cpu", name.split()[0], "cpu", torch.float32)
    # The head's products, as those of other layers, are the BLAS's where they are large.
    sizes = {"rows": 301, "size": 16} if name == "gaussian_head" else {"rows": 301, "size": 257}
    function, tensors = call_of(name, torch.float32, **sizes)
    threads = torch.get_num_threads()

    def once(count):
        torch.set_num_threads(count)
        try:
            with aefast.backend("cpu"):
                outputs = numerics.outputs_of(function(*tensors))
                return [*outputs, *torch.autograd.grad(total(outputs), tensors)]
        finally:
            torch.set_num_threads(threads)

    first = once(1)
    for count in (1, 2, 2, 3, 7):
        for ours, theirs in zip(once(count), first, strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", CALLS)
def test_torch_func_and_forward_mode_use_the_reference(name):
    function, tensors = call_of(name, torch.float32)
    reference = reference_of(name, function)
    tensors = tuple(tensor.detach() for tensor in tensors)

    def loss(call):
        return lambda *tensors: total(call(*tensors))

    torch.testing.assert_close(
        torch.func.grad(loss(function))(*tensors), torch.func.grad(loss(reference))(*tensors)
    )
    found = torch.func.jvp(function, tensors, tensors)
    torch.testing.assert_close(found, torch.func.jvp(reference, tensors, tensors))
    first, *rest = tensors
    stack = torch.stack([first, 2 * first])
    found = torch.func.vmap(lambda one: function(one, *rest))(stack)
    for index, one in enumerate(stack):
        expected = reference(one, *rest)
        for ours, theirs in zip(numerics.outputs_of(found), numerics.outputs_of(expected), strict=True):
            torch.testing.assert_close(ours[index], theirs)
    numerics.require_backend("cpu", name.split()[0], "cpu", torch.float32)
    with aefast.backend("cpu"), pytest.raises(aefast.BackendError, match="forward-mode"):
        torch.func.jvp(function, tensors, tensors)


DRAWING = ["reparameterize", "corrupt gaussian", "corrupt dropout", "gaussian_head"]


@pytest.mark.parametrize("name", DRAWING)
def test_noise_in_compiled_transforms(name):
    """That of a constant seed too, which Inductor would follow through all rounds for each element."""
    function, (first, *rest) = call_of(name, torch.float32)
    first, *rest = (tensor.detach() for tensor in (first, *rest))

    def loss(one):
        return total(function(one, *rest))

    stack = torch.stack([first, 2 * first])
    for transformed, one in (
        (torch.func.grad(loss), first),
        (torch.func.vmap(lambda one: function(one, *rest)), stack),
    ):
        torch._dynamo.reset()
        compiled = torch.compile(transformed, fullgraph=True)
        torch.testing.assert_close(compiled(one), transformed(one))


@pytest.mark.parametrize("name", DRAWING)
def test_noise_of_a_compiled_reference(name):
    function, tensors = call_of(name, torch.float32)
    torch._dynamo.reset()
    with aefast.backend("eager"):
        found = torch.compile(function, fullgraph=True)(*tensors)
        torch.testing.assert_close(found, function(*tensors))


def test_a_seed_for_each_element_of_vmap_compiles_to_one_call():
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph

    def sample(mu):
        return AF.reparameterize(mu, mu)[0]

    backend = aot_autograd(fw_compiler=keep)
    torch._dynamo.reset()
    compiled = torch.compile(torch.func.vmap(sample, randomness="different"), backend=backend, fullgraph=True)
    found = compiled(torch.zeros(5, 3, 2))
    assert len(found.unique()) == 30
    words = torch.ops.aefast.philox_words.default
    assert sum(node.target is words for graph in graphs for node in graph.graph.nodes) == 1


@pytest.mark.parametrize("name", CALLS)
def test_vectorised_backward(name):
    numerics.require_backend("cpu", name.split()[0], "cpu", torch.float32)
    function, tensors = call_of(name, torch.float32)
    with aefast.backend("cpu"):
        out = numerics.outputs_of(function(*tensors))[0]
    upstream = draw(3, *out.shape, dtype=torch.float32)
    found = torch.autograd.grad(out, tensors, upstream, is_grads_batched=True)
    for index, one in enumerate(upstream):
        expected_out = numerics.outputs_of(reference_of(name, function)(*tensors))[0]
        expected = torch.autograd.grad(expected_out, tensors, one)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours[index], theirs)


@pytest.mark.parametrize("name", CALLS)
def test_only_the_gradients_asked_for(name):
    numerics.require_backend("cpu", name.split()[0], "cpu", torch.float64)
    function, tensors = call_of(name)
    for needs in itertools.product((False, True), repeat=len(tensors)):
        if not any(needs):
            continue
        given = [tensor.detach().requires_grad_(need) for tensor, need in zip(tensors, needs, strict=True)]
        wanted = [tensor for tensor in given if tensor.requires_grad]
        with aefast.backend("cpu"):
            found = torch.autograd.grad(total(function(*given)), wanted)
        expected = torch.autograd.grad(total(reference_of(name, function)(*given)), wanted)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", CALLS)
def test_meta_tensors_and_negative_views(name):
    function, tensors = call_of(name, torch.float32)
    expected = numerics.outputs_of(function(*tensors))
    settings = dict(function.keywords) if isinstance(function, functools.partial) else {}
    plain = getattr(AF, name.split()[0])
    found = numerics.outputs_of(plain(*(tensor.detach().to("meta") for tensor in tensors), **settings))
    assert [(one.shape, one.dtype) for one in found] == [(one.shape, one.dtype) for one in expected]
    first, *rest = (tensor.detach() for tensor in tensors)
    negated = torch.complex(first, -first).conj().imag
    assert negated.is_neg()
    for ours, theirs in zip(numerics.outputs_of(function(negated, *rest)), expected, strict=True):
        torch.testing.assert_close(ours, theirs)

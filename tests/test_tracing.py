"""The public functions and modules under the tracers of `torch.jit` and `torch.fx`."""

import copy
import pickle

import pytest
import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

import aefast
import aefast.functional as AF
import aefast.nn as an

WIDTH, LATENTS = 48, 6
IMAGE = (3, 4, 4)
LOSSES = [
    (kind, reduction)
    for kind in ("mse", "rmse", "lp", "bce_with_logits")
    for reduction in ("mean", "sum", "batchmean")
]


def losses(make):
    return [make(kind, {"p": 1.5} if kind == "lp" else {}, reduction) for kind, reduction in LOSSES]


def images(*tensors):
    return [one.unflatten(1, IMAGE) for one in tensors]


# Of x and y (n, WIDTH), y from 0 to 1, a layer's weight (LATENTS, WIDTH) and bias, and indices (n, 2).
CALLS = {
    "batch_topk_encode": lambda x, y, w, b, i: AF.batch_topk_encode(x, w, b, k=3),
    "chamfer": lambda x, y, w, b, i: (AF.chamfer(x, y), AF.chamfer(x.unflatten(1, (16, 3)), y.unflatten(1, (16, 3)))),
    "corrupt": lambda x, y, w, b, i: (
        AF.corrupt(x, "gaussian"),
        AF.corrupt(x, "dropout", seed=3),
        AF.corrupt(x.unflatten(1, IMAGE), "masking", p=0.5, block=2),
    ),
    "gaussian_head": lambda x, y, w, b, i: AF.gaussian_head(x, w, b),
    "jumprelu": lambda x, y, w, b, i: AF.jumprelu(x, w[0].exp()),
    "kl_discrete": lambda x, y, w, b, i: AF.kl_discrete(x.softmax(-1), y.softmax(-1)),
    "kl_normal": lambda x, y, w, b, i: (AF.kl_normal(x, y), AF.kl_normal(x, y, reduction="none")),
    "linear_act": lambda x, y, w, b, i: (AF.linear_act(x, w, b, "gelu"), AF.linear_act(x[:, None], w, None, "elu")),
    "linear_reconstruction_loss": lambda x, y, w, b, i: losses(
        lambda kind, options, reduction: AF.linear_reconstruction_loss(
            *(x, w, b, y[:, :LATENTS].detach(), kind), reduction=reduction, loss_weight=0.5, **options
        )
    ),
    "mlp": lambda x, y, w, b, i: AF.mlp(x, [w, w.t()], [b, None], ["relu", "identity"]),
    "mmd": lambda x, y, w, b, i: (AF.mmd(x, y), AF.mmd(x, y, kernel="energy", estimator="biased")),
    "mmd_to_normal": lambda x, y, w, b, i: (AF.mmd_to_normal(x), AF.mmd_to_normal(x, kernel="imq", estimator="biased")),
    "nearest": lambda x, y, w, b, i: AF.nearest(x, y),
    "penalized_linear_act": lambda x, y, w, b, i: (
        AF.penalized_linear_act(x, w, b),
        AF.penalized_linear_act(x, w, b, "sigmoid", penalty="kl"),
    ),
    "pyramid_loss": lambda x, y, w, b, i: [
        AF.pyramid_loss(*images(x, y), levels=2, pyramid=pyramid, reduction=reduction)
        for pyramid in ("average", "laplacian")
        for reduction in ("mean", "sum", "none")
    ],
    "reconstruction_loss": lambda x, y, w, b, i: [
        *losses(
            lambda kind, options, reduction: AF.reconstruction_loss(
                x, y, kind, reduction=reduction, loss_weight=0.5, **options
            )
        ),
        AF.reconstruction_loss(x, y, reduction="none"),
    ],
    "reparameterize": lambda x, y, w, b, i: AF.reparameterize(x, y),
    "sparse_decode": lambda x, y, w, b, i: AF.sparse_decode(x[:, :2], i, w, y[0]),
    "topk_encode": lambda x, y, w, b, i: AF.topk_encode(x, w, b, k=3),
}  # fmt: skip


def test_every_public_function_is_here():
    assert set(CALLS) == set(AF.__all__)


def operands(rows, dtype=torch.float32):
    return (
        torch.randn(rows, WIDTH, dtype=dtype, requires_grad=True),
        torch.rand(rows, WIDTH, dtype=dtype, requires_grad=True),
        (0.2 * torch.randn(LATENTS, WIDTH, dtype=dtype)).requires_grad_(),
        torch.randn(LATENTS, dtype=dtype, requires_grad=True),
        torch.randint(LATENTS, (rows, 2)),
    )


def results(function, arguments):
    """The outputs, with one seed, and the gradients of the operands."""
    torch.manual_seed(5)
    outputs = pytree.tree_leaves(function(*arguments))
    total = sum(one.mean() for one in outputs if one.requires_grad)
    return outputs, torch.autograd.grad(total, arguments[:4], allow_unused=True)


TOLERANCES = {torch.float32: {"rtol": 1e-4, "atol": 1e-5}, torch.float64: {"rtol": 1e-9, "atol": 1e-9}}


@pytest.mark.parametrize(
    ("backend", "dtype"), [("auto", torch.float32), ("auto", torch.float64), ("eager", torch.float32)]
)
@pytest.mark.parametrize("name", sorted(CALLS.keys() - {"batch_topk_encode"}))
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_jit_trace_serves_batches_of_other_sizes(name, backend, dtype):
    torch.manual_seed(0)
    with aefast.backend(backend):
        traced = torch.jit.trace(CALLS[name], operands(16, dtype), check_trace=False)
        for rows in (16, 7):
            arguments = operands(rows, dtype)
            found, expected = results(traced, arguments), results(CALLS[name], arguments)
            torch.testing.assert_close(found[0], expected[0], **TOLERANCES[dtype])
            torch.testing.assert_close(found[1], expected[1], **TOLERANCES[dtype])


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_a_jit_trace_serves_other_images_and_layouts(backend):
    def masked(x):
        return AF.corrupt(x, "masking", p=0.5, seed=3, block=8)

    def losses(x, y):
        return AF.reconstruction_loss(x, y, reduction="none")

    with aefast.backend(backend):
        traced = torch.jit.trace(masked, torch.ones(2, 3, 3, 3))
        for shape in ((2, 3, 3, 3), (5, 3, 20, 17), (1, 1, 1, 1)):
            x = torch.randn(shape)
            assert torch.equal(traced(x), masked(x))
        traced = torch.jit.trace(losses, (torch.ones(4, 3), torch.ones(4, 3)))
        x, y = torch.randn(3, 7).t(), torch.randn(7, 3)
        torch.testing.assert_close(traced(x, y), losses(x, y))


def test_a_jit_trace_of_a_shape_that_depends_on_the_values_is_an_error():
    with pytest.raises(aefast.InputError, match=r"batch_topk_encode: torch\.jit\.trace"):
        torch.jit.trace(CALLS["batch_topk_encode"], operands(5))


def called(module):
    """The functions that a graph calls."""
    return [node.target for node in module.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("name", sorted(CALLS))
def test_fx_traces_a_function_as_one_call(name):
    torch.manual_seed(0)
    traced = fx.symbolic_trace(CALLS[name])
    assert getattr(AF, name) in called(traced)
    for rows in (16, 7):
        arguments = operands(rows)
        torch.testing.assert_close(
            results(traced, arguments), results(CALLS[name], arguments), rtol=0, atol=0
        )


def test_fx_traces_any_operand():
    """A constant input, and parameters or a seed that are traced."""
    x, w, i = torch.rand(5, WIDTH), torch.rand(LATENTS, WIDTH), torch.randint(LATENTS, (5, 2))
    seed = torch.tensor(3)
    for function, argument in (
        (lambda w: AF.linear_act(x, w), w),
        (lambda w: AF.mlp(x, [w], [None], ["relu"]), w),
        (lambda w: AF.sparse_decode(x[:, :2], i, w), w),
        (lambda seed: AF.corrupt(x, "dropout", seed=seed), seed),
        (lambda seed: AF.reparameterize(x, x, seed=seed), seed),
        (lambda weight: AF.reconstruction_loss(x, x + weight), torch.tensor(0.5)),
    ):
        traced = fx.symbolic_trace(function)
        torch.testing.assert_close(traced(argument), function(argument), rtol=0, atol=0)


class Net(nn.Module):
    def __init__(self, module, call):
        super().__init__()
        self.before = nn.Linear(12, 12)
        self.module = module
        self.call = call

    def forward(self, x):
        return self.call(self.module, self.before(x))


def alone(module, x):
    return module(x)


def beside(module, x):
    return module(x, x * 0.5)


def unpacked(module, x):
    z, kl, mu, logvar = module(x)
    return z + mu, kl, logvar, module.moments(x)


def of_images(module, x):
    shape = (-1, 1, 3, 4)
    return module(x.reshape(shape), x.reshape(shape).cos())


def sparse(module, x):
    values, indices = module[0](x)
    return module[1](values, indices), module[1](x.repeat(1, 2))


def hooked():
    module = an.MLP((12, 8, 3))
    module.layers[0].register_forward_hook(lambda layer, inputs, output: output * 2)
    return module


def topk(**options):
    return nn.ModuleList([an.TopKEncoder(12, 24, 4, **options), an.SparseDecoder(24, 12)])


MODULES = {
    "Corrupt": (lambda: an.Corrupt("salt_and_pepper", p=0.3), alone),
    "GaussianHead": (lambda: an.GaussianHead(12, 3, logvar_range=(-5.0, 5.0)), unpacked),
    "JumpReLU": (lambda: an.JumpReLU(12, 0.1), alone),
    "LinearAct": (lambda: an.LinearAct(12, 5, activation="elu", alpha=0.5), alone),
    "MLP": (lambda: an.MLP((12, 8, 3), "gelu"), alone),
    "MLP with hooks": (hooked, alone),
    "MLP and a loss": (lambda: an.MLP((12, 8, 12)), lambda module, x: module.reconstruction_loss(x, x)),
    "MMDLoss": (lambda: an.MMDLoss("imq", bandwidth=(1.0, 2.0), factor=0.5), beside),
    "PenalizedLinearAct": (lambda: an.PenalizedLinearAct(12, 5), alone),
    "PyramidLoss": (lambda: an.PyramidLoss(2, weights=(1.0, 0.5)), of_images),
    "ReconstructionLoss": (lambda: an.ReconstructionLoss("huber"), beside),
    "Reparameterize": (lambda: an.Reparameterize(), beside),
    "TopKEncoder and SparseDecoder": (topk, sparse),
    "TopKEncoder of a batch": (lambda: topk(of_batch=True), sparse),
}


def test_every_module_is_here():
    assert {word for name in MODULES for word in name.split()} >= set(an.__all__)


@pytest.mark.parametrize("name", MODULES)
def test_fx_traces_a_net_with_a_module(name):
    torch.manual_seed(0)
    make, call = MODULES[name]
    net = Net(make(), call)
    traced = fx.symbolic_trace(net)
    assert any(target.__module__.startswith("aefast.ops") for target in called(traced))
    printed = traced.graph.python_code("self")
    names = dict(printed.globals)
    exec(printed.src, names)
    copies = {
        "traced": traced,
        "copied": copy.deepcopy(traced),
        # Its code is printed, with the imports that it needs, and compiled again.
        "pickled": pickle.loads(pickle.dumps(traced)),
        "printed": lambda x: names["forward"](traced, x),
        "interpreted": fx.Interpreter(traced).run,
        "traced again": fx.symbolic_trace(traced),
    }
    for rows in (5, 9):
        x = torch.rand(rows, 12)
        torch.manual_seed(1)
        expected = net(x)
        for how, function in copies.items():
            torch.manual_seed(1)
            torch.testing.assert_close(
                function(x), expected, rtol=0, atol=0, msg=lambda text, how=how: f"{how}: {text}"
            )


class Recorder:
    """Stands for a tensor, and says what was called with it."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        return function, args, kwargs


class Logged(torch.Tensor):
    seen = ()

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        cls.seen = (*cls.seen, function)
        return super().__torch_function__(function, types, args, kwargs or {})


def test_what_stands_for_a_tensor_is_asked():
    x, y = Recorder(), torch.ones(3)
    function, args, kwargs = AF.reconstruction_loss(y, x, "l1", reduction="sum")
    assert function is AF.reconstruction_loss
    assert args == (y, x, "l1") and kwargs["reduction"] == "sum"
    with torch.device("cpu"), pytest.raises(aefast.InputError, match="x must be a torch"):
        AF.linear_act([1.0], torch.ones(1, 1))


def test_tensor_subclasses_see_what_is_within_a_function():
    x, weight = torch.rand(5, 4), torch.rand(3, 4)
    logged = x.as_subclass(Logged)
    torch.testing.assert_close(
        AF.linear_act(logged, weight).as_subclass(torch.Tensor), AF.linear_act(x, weight), rtol=0, atol=0
    )
    AF.reconstruction_loss(logged, logged)
    assert Logged.seen and not {AF.linear_act, AF.reconstruction_loss} & set(Logged.seen)

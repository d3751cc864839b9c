"""Under torch.compile a graph is made for a size that varies, and not one for each size; and compiled backwards."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import aefast
import aefast.functional as AF
from aefast.models import MODELS
from support import numerics

SIZES = (5, 6, 40)
# Rows are images of 3 × 4 × 4.
WIDTH, LATENT = 48, 6
IMAGE = (3, 4, 4)


def losses(x, y, weight, bias, indices):
    """With a normaliser, a root of it, a gradient that is not kept, and operands with gaps."""
    yield AF.reconstruction_loss(x, y, "huber", loss_weight=0.5)
    yield AF.reconstruction_loss(x, y, "rmse")
    yield AF.reconstruction_loss(x, y, "lp", p=1.5, reduction="batchmean")
    yield AF.reconstruction_loss(x[:, ::2], y[:, ::2], reduction="none")


# Ops of x and y (n, WIDTH), a layer's weight and bias, and indices (n, 2). Of batch_topk_encode the shape of the result
# depends on the values.
OPS = {
    "corrupt": lambda x, y, w, b, i: AF.corrupt(x, "gaussian"),
    "gaussian_head": lambda x, y, w, b, i: AF.gaussian_head(x, w, b),
    "jumprelu": lambda x, y, w, b, i: AF.jumprelu(x, w[0].exp()),
    "kl_discrete": lambda x, y, w, b, i: AF.kl_discrete(x.softmax(-1), y.softmax(-1)),
    "kl_normal": lambda x, y, w, b, i: AF.kl_normal(x, y),
    "linear_act": lambda x, y, w, b, i: AF.linear_act(x, w, b, "gelu"),
    "linear_reconstruction_loss": lambda x, y, w, b, i: AF.linear_reconstruction_loss(x, w, b, y[:, :LATENT].detach()),
    "mlp": lambda x, y, w, b, i: AF.mlp(x, [w], [b], ["relu"]),
    "mmd": lambda x, y, w, b, i: AF.mmd(x, y, kernel="imq"),
    "mmd_to_normal": lambda x, y, w, b, i: AF.mmd_to_normal(x, kernel="energy", estimator="biased"),
    "nearest": lambda x, y, w, b, i: (AF.nearest(x, y), AF.chamfer(x, y)),
    "penalized_linear_act": lambda x, y, w, b, i: AF.penalized_linear_act(x, w, b),
    "pyramid_loss": lambda x, y, w, b, i: AF.pyramid_loss(x.unflatten(1, IMAGE), y.unflatten(1, IMAGE), levels=2),
    "reconstruction_loss": lambda *operands: list(losses(*operands)),
    "reparameterize": lambda x, y, w, b, i: AF.reparameterize(x, y),
    "sparse_decode": lambda x, y, w, b, i: AF.sparse_decode(x[:, :2], i, w, y[0]),
    "topk_encode": lambda x, y, w, b, i: AF.topk_encode(x, w, b, k=3),
}  # fmt: skip
CALLS = [(name, "auto", torch.float32) for name in OPS]
# What losses keep of gradients in half precision has a scale of its own.
CALLS += [(name, "auto", torch.bfloat16) for name in OPS if name.endswith("loss")]
CALLS += [("nearest", "eager", torch.float32)]


def graphs_by(backend):
    torch._dynamo.reset()
    return CompileCounterWithBackend(backend)


@pytest.mark.parametrize(("name", "backend", "dtype"), CALLS)
def test_what_an_op_is_compiled_to_serves_every_size(name, backend, dtype):
    def loss(*operands):
        outputs = numerics.outputs_of(OPS[name](*operands))
        return sum(one.float().sum() for one in outputs if one.is_floating_point())

    graphs = graphs_by("aot_eager")
    compiled = torch.compile(loss, backend=graphs, fullgraph=True, dynamic=True)
    layer = torch.rand(LATENT, WIDTH, dtype=dtype), torch.rand(LATENT, dtype=dtype)
    made = []
    for n in SIZES:
        rows = (torch.rand(n, WIDTH, dtype=dtype, requires_grad=True) for _ in range(2))
        with aefast.backend(backend):
            compiled(*rows, *layer, torch.randint(LATENT, (n, 2))).backward()
        made.append(graphs.frame_count)
    assert made[0] == made[-1]


@pytest.mark.parametrize("name", OPS)
def test_a_backward_that_is_compiled_by_itself(name):
    """What compiled autograd makes of a forward that was not compiled."""
    layer = [torch.rand(LATENT, WIDTH), torch.rand(LATENT)]
    operands = [torch.rand(7, WIDTH) for _ in range(2)] + layer
    indices = torch.randint(LATENT, (7, 2))

    def loss():
        torch.manual_seed(0)
        outputs = numerics.outputs_of(OPS[name](*operands, indices))
        return sum(one.sum() for one in outputs if one.is_floating_point())

    for one in operands:
        one.requires_grad_()
    expected = torch.autograd.grad(loss(), operands, allow_unused=True)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(compiled_autograd=True):
        torch.compile(lambda value: value.backward(), backend="aot_eager")(loss())
    for one, gradient in zip(operands, expected, strict=True):
        assert (one.grad is None) == (gradient is None)
        if gradient is not None:
            torch.testing.assert_close(one.grad, gradient)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_what_a_model_is_compiled_to_serves_every_size(name):
    """From the second size on."""
    options = {"latent": 24, "sparsity": "l1"} if name == "sparse" else {"latent": 4}
    graphs = graphs_by("eager")
    compiled = torch.compile(MODELS[name](input_size=12, **options), backend=graphs, fullgraph=True)
    made = []
    for n in SIZES:
        compiled(torch.rand(n, 12)).loss.backward()
        made.append(graphs.frame_count)
    assert made[1] == made[-1]

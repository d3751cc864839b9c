"""What `torch.utils.flop_counter` counts of the ops, beside what it counts of PyTorch's own."""

import itertools
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import aefast
import aefast.functional as AF
from aefast.models import MODELS
from aefast.ops import OPS
from support import numerics
from support.processes import environment, run

ROWS, WIDTH, LATENTS, K = 5, 12, 6, 2
PRODUCT = 2 * ROWS * WIDTH * LATENTS


def counted(function, operands):
    """Of the forward, and of the backward too if anything has a gradient."""
    with FlopCounterMode(display=False) as counter:
        outputs = numerics.outputs_of(function(*operands))
        forward = counter.get_total_flops()
        differentiated = [one for one in outputs if one.requires_grad]
        if differentiated:
            sum(one.sum() for one in differentiated).backward()
    return forward, counter.get_total_flops()


def layer(*leading):
    """x and two layers, (weight, bias) each."""
    return (
        *(torch.rand(*leading, WIDTH), torch.rand(LATENTS, WIDTH), torch.rand(LATENTS)),
        *(torch.rand(4, LATENTS), torch.rand(4)),
    )


def plain_mlp(x, weight, bias, second, second_bias):
    return F.linear(F.gelu(F.linear(x, weight, bias)), second, second_bias)


def plain_batch_topk(x, weight, bias):
    made = F.linear(x, weight, bias)
    return made.where(made >= made.flatten().topk(K * len(x)).values[-1], 0.0)


def target_of(x):
    return torch.ones(*x.shape[:-1], LATENTS)


# Calls and their eager twins, of x and two layers.
CALLS = {
    "linear_act": (
        lambda x, w, b, *_: AF.linear_act(x, w, b, "silu"),
        lambda x, w, b, *_: F.silu(F.linear(x, w, b)),
    ),
    "without a bias": (lambda x, w, *_: AF.linear_act(x, w), lambda x, w, *_: F.relu(F.linear(x, w))),
    "mlp": (
        lambda x, w, b, v, c: AF.mlp(x, (w, v), (b, c), ("gelu", "identity")),
        plain_mlp,
    ),
    "gaussian_head": (
        lambda x, w, b, *_: AF.gaussian_head(x, w, b),
        lambda x, w, b, *_: OPS["gaussian_head"].reference(x, w, b),
    ),
    "penalized_linear_act": (
        lambda x, w, b, *_: AF.penalized_linear_act(x, w, b, "sigmoid", penalty="kl"),
        lambda x, w, b, *_: OPS["penalized_linear_act"].reference(x, w, b, "sigmoid", penalty="kl"),
    ),
    "linear_reconstruction_loss": (
        lambda x, w, b, *_: AF.linear_reconstruction_loss(x, w, b, target_of(x)),
        lambda x, w, b, *_: F.mse_loss(F.linear(x, w, b), target_of(x)),
    ),
    "topk_encode": (
        lambda x, w, b, *_: AF.topk_encode(x, w, b, K),
        lambda x, w, b, *_: F.linear(x, w, b).topk(K),
    ),
    "batch_topk_encode": (
        lambda x, w, b, *_: AF.batch_topk_encode(x, w, b, K),
        lambda x, w, b, *_: plain_batch_topk(x, w, b),
    ),
}


# The reference of batch_topk_encode makes the pre-activations twice.
CASES = [(name, backend) for name in CALLS for backend in ("auto", "eager")]
CASES.remove(("batch_topk_encode", "eager"))


@pytest.mark.parametrize(("name", "backend"), CASES)
def test_an_op_counts_what_plain_pytorch_counts(name, backend):
    fused, plain = CALLS[name]
    for needs in itertools.product((False, True), repeat=5):
        operands = [one.requires_grad_(need) for one, need in zip(layer(ROWS), needs, strict=True)]
        with aefast.backend(backend):
            found, expected = counted(fused, operands), counted(plain, operands)
        if name == "linear_reconstruction_loss" and backend != "eager":
            # Its gradients come in the forward.
            found, expected = found[1], expected[1]
        assert found == expected
    assert counted(fused, layer(2, ROWS)) == counted(plain, layer(2, ROWS))


def test_a_sparse_decoder_counts_the_entries_of_its_codes():
    indices = torch.randint(LATENTS, (ROWS, K))
    for needs in itertools.product((False, True), repeat=3):
        operands = torch.rand(ROWS, K), torch.rand(LATENTS, WIDTH), torch.rand(WIDTH)
        operands = [one.requires_grad_(need) for one, need in zip(operands, needs, strict=True)]
        product = 2 * ROWS * K * WIDTH
        forward, whole = counted(lambda v, w, b: AF.sparse_decode(v, indices, w, b), operands)
        assert (forward, whole) == (product, product * (1 + needs[0] + needs[1]))


# Plain PyTorch counts no product in the decoding of a sparse code, and the fused op none in the distances of an MMD.
DENSE = [
    (name, {"hidden": (8, 7), "latent": 3}) for name in sorted(MODELS) if name not in ("infovae", "sparse")
]
DENSE += [("sparse", {"latent": 24, "sparsity": sparsity}) for sparsity in ("l1", "kl", "jumprelu")]


@pytest.mark.parametrize(("name", "options"), DENSE)
def test_a_model_counts_what_its_eager_twin_counts(name, options):
    model, x = MODELS[name](input_size=WIDTH, **options), torch.rand(ROWS, WIDTH)
    twin = model.eager_twin()
    _, fused = counted(lambda x: model(x).loss, [x])
    _, eager = counted(lambda x: model.eager_loss(twin, x), [x])
    assert fused == eager > 0


COUNT = """
import sys
if sys.argv[1] == "first":
    import torch.utils.flop_counter
import aefast.functional as AF
import importlib.util
if sys.argv[1] == "last":
    assert "torch.utils.flop_counter" not in sys.modules
    # To ask whether it is there imports nothing.
    assert importlib.util.find_spec("torch.utils.flop_counter") is not None
import torch
from torch.utils.flop_counter import FlopCounterMode
with FlopCounterMode(display=False) as counter:
    AF.linear_act(torch.rand(5, 12), torch.rand(6, 12))
print(counter.get_total_flops())
importlib.reload(torch.utils.flop_counter)
print(torch.ops.aefast.linear_act in torch.utils.flop_counter.flop_registry)
"""


@pytest.mark.parametrize("counter_is", ["first", "last"])
def test_whichever_is_imported_first(counter_is):
    done = run([sys.executable, "-c", COUNT, counter_is], env=environment())
    assert done.stdout.split() == [str(PRODUCT), "True"]

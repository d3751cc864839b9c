import pytest
import torch
from torch.distributions import Normal, kl_divergence

import aefast.functional as AF
from aefast.errors import InputError
from support import numerics


def test_is_the_divergence_of_torch_distributions():
    numerics.require_backend("cpu", "kl_normal", "cpu", torch.float64)
    generator = torch.Generator().manual_seed(1)
    mu, logvar = torch.randn(2, 4, 7, 33, generator=generator, dtype=torch.float64)
    expected = kl_divergence(Normal(mu, (0.5 * logvar).exp()), Normal(0.0, 1.0)).sum(-1)
    torch.testing.assert_close(AF.kl_normal(mu, logvar, reduction="none"), expected)
    torch.testing.assert_close(AF.kl_normal(mu, logvar), expected.mean())
    torch.testing.assert_close(AF.kl_normal(mu, logvar, reduction="sum"), expected.sum())


def test_is_exact_beside_the_prior(instruction_set):
    """Where the variance is nearly 1, exp(logvar) - 1 in float32 would have no digits left."""
    logvar = torch.full((3, 40), 1e-3) * torch.arange(1, 4)[:, None]
    found = AF.kl_normal(torch.zeros_like(logvar), logvar, reduction="none")
    exact = 0.5 * (logvar.double().expm1() - logvar.double()).sum(1)
    # What is left of logvar - logvar is the rounding of its square: 2^-24 / 1e-3.
    torch.testing.assert_close(found.double(), exact, rtol=3e-4, atol=0)
    leaf = logvar.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(AF.kl_normal(torch.zeros_like(leaf), leaf, reduction="sum"), leaf)
    torch.testing.assert_close(gradient.double(), 0.5 * logvar.double().expm1(), rtol=1e-6, atol=0)


def test_rows_longer_than_a_piece(instruction_set):
    generator = torch.Generator().manual_seed(1)
    mu, logvar = torch.randn(2, 3, 100_003, generator=generator)
    found = AF.kl_normal(mu, logvar, reduction="none")
    exact = 0.5 * (mu.double() ** 2 + logvar.double().exp() - 1 - logvar.double()).sum(1)
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mu": 1.0}, "mu must be a torch.Tensor, got float"),
        ({"logvar": torch.ones(3, 5).to_sparse()}, "logvar must be a dense tensor, got a sparse_coo one"),
        ({"logvar": torch.ones(5)}, r"logvar must have the shape of mu, \(3, 5\), got \(5,\)"),
        (
            {"mu": torch.ones(3, 5, dtype=torch.int64)},
            "mu must be float32, bfloat16, float16 or float64, got int64",
        ),
        ({"logvar": torch.ones(3, 5).half()}, "logvar must have the dtype of mu, float32, got float16"),
        ({"reduction": None}, "reduction must be one of none, mean, sum, got None"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = {"mu": torch.ones(3, 5), "logvar": torch.ones(3, 5)}
    with pytest.raises(InputError, match=f"kl_normal: .*{message}"):
        AF.kl_normal(**{**arguments, **change})

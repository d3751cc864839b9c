import pytest
import torch
from torch.nn import functional as F

import aefast
import aefast.functional as AF
from aefast.errors import InputError
from support import numerics


def operands(rows=40, inputs=24, size=16, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    shapes = (rows, inputs), (2 * size, inputs), (2 * size,)
    return tuple(
        (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype).requires_grad_()
        for shape, scale in zip(shapes, (1.0, inputs**-0.5, 1.0), strict=True)
    )


@pytest.mark.parametrize("biased", [False, True])
def test_is_a_layer_and_reparameterize(biased):
    numerics.require_backend("cpu", "gaussian_head", "cpu", torch.float64)
    h, weight, bias = operands(dtype=torch.float64)
    bias = bias if biased else None

    def losses(z, kl, mu, logvar):
        return z.sin().sum() + 3 * kl + (mu * logvar).sum()

    found = AF.gaussian_head(h, weight, bias, seed=5)
    mu, logvar = F.linear(h, weight, bias).chunk(2, -1)
    expected = (*AF.reparameterize(mu, logvar, seed=5), mu, logvar)
    torch.testing.assert_close(found, expected)
    wanted = [tensor for tensor in (h, weight, bias) if tensor is not None]
    torch.testing.assert_close(
        torch.autograd.grad(losses(*found), wanted), torch.autograd.grad(losses(*expected), wanted)
    )


def test_moments_are_the_halves_of_one_tensor_and_not_clamped():
    numerics.require_backend("cpu", "gaussian_head", "cpu", torch.float32)
    h, weight, bias = operands()
    z, kl, mu, logvar = AF.gaussian_head(h, weight, bias, seed=5, logvar_range=(-0.1, 0.1))
    assert mu.shape == logvar.shape == z.shape == (40, 16)
    assert mu.untyped_storage().data_ptr() == logvar.untyped_storage().data_ptr()
    assert logvar.abs().max() > 1.0
    expected = AF.reparameterize(mu, logvar, seed=5, logvar_range=(-0.1, 0.1))
    torch.testing.assert_close((z, kl), expected)


def test_leading_dimensions():
    numerics.require_backend("cpu", "gaussian_head", "cpu", torch.float32)
    h, weight, bias = operands(rows=12)
    flat = AF.gaussian_head(h, weight, bias, seed=1, reduction="none")
    for shape in ((3, 4, 24), (2, 2, 3, 24)):
        found = AF.gaussian_head(h.reshape(shape), weight, bias, seed=1, reduction="none")
        for ours, theirs in zip(found, flat, strict=True):
            assert ours.shape[: len(shape) - 1] == shape[:-1]
            assert torch.equal(ours.reshape(theirs.shape), theirs)


def test_autocast():
    numerics.require_backend("cpu", "gaussian_head", "cpu", torch.bfloat16)
    h, weight, bias = operands()
    with aefast.backend("cpu"), torch.autocast("cpu", torch.bfloat16):
        z, kl, mu, logvar = AF.gaussian_head(h, weight, bias, seed=1)
    assert z.dtype == mu.dtype == logvar.dtype == torch.bfloat16 and kl.dtype == torch.float32
    exact = AF.gaussian_head(h, weight, bias, seed=1)
    for ours, theirs in zip((z, kl, mu, logvar), exact, strict=True):
        # Operands and results are rounded to 8 bits: three roundings, in sums of 24 terms.
        scale = theirs.detach().abs().max().item()
        torch.testing.assert_close(ours.float(), theirs, rtol=0, atol=8 * 2.0**-8 * scale)
    gradients = torch.autograd.grad(z.float().sum() + kl, (h, weight, bias))
    assert all(gradient.dtype == torch.float32 for gradient in gradients)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"h": [[1.0]]}, "h must be a torch.Tensor, got list"),
        ({"h": torch.ones(3, 5).int()}, "h must be float32, bfloat16, float16 or float64, got int32"),
        (
            {"h": torch.ones(3, 6)},
            r"weight must be \(N, 6\) to match h of shape \(3, 6\), got shape \(4, 5\)",
        ),
        (
            {"weight": torch.ones(3, 5), "bias": None},
            r"weight must be \(2 D, 5\), with an even number of rows",
        ),
        ({"weight": torch.ones(4, 5).double()}, "weight must have the dtype of h, float32, got float64"),
        ({"bias": torch.ones(2)}, r"bias must be \(4,\) to match weight, got shape \(2,\)"),
        ({"reduction": 1}, "reduction must be one of none, mean, sum, got 1"),
        ({"seed": 0.5}, "seed must be an int or an int64 tensor of one element, got 0.5"),
        ({"logvar_range": (1.0, -1.0)}, "logvar_range must be"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = {"h": torch.ones(3, 5), "weight": torch.ones(4, 5), "bias": torch.ones(4)}
    with pytest.raises(InputError, match=f"gaussian_head: .*{message}"):
        AF.gaussian_head(**{**arguments, **change})

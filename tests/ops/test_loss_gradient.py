"""Gradients that losses keep: aefast/ops/_loss.py."""

import pytest
import torch

import aefast
from aefast.ops import _loss
from support import numerics

DTYPES = numerics.DTYPES


def normal(*shape, dtype=torch.float32, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def expected(gradient, grad, normalizer):
    """Rounded once."""
    wide = torch.float64 if gradient.dtype == torch.float64 else torch.float32
    factor = (grad.double() * normalizer).to(wide)
    factor = factor.reshape(factor.shape + (1,) * (gradient.dim() - factor.dim()))
    return (gradient.to(wide) * factor).to(gradient.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0,), (), (1,), (31, 17), (3, 4099), (2, 3, 5, 7), (40_003,)])
def test_is_the_product_rounded_once(poisoned_memory, instruction_set, shape, dtype):
    gradient = normal(*shape, dtype=dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for value, factor, count in ((0.3, 1.0, 3), (1.0, 0.125, 1), (-2.0, 5.0, 5)):
        grad = torch.tensor(value, dtype=wide)
        found = _loss.scaled(gradient, grad, factor, count, "cpu")
        assert torch.equal(found, expected(gradient, grad, factor / count))
    if shape and shape[0] > 0:
        for grad in (normal(shape[0], dtype=wide), normal(2 * shape[0], dtype=wide)[::2]):
            found = _loss.scaled(gradient, grad, 0.7, 1, "cpu")
            assert torch.equal(found, expected(gradient, grad, 0.7))


def test_keeps_the_layout(poisoned_memory):
    numerics.require_backend("cpu", "loss_gradient", "cpu", torch.float32)
    gradient = normal(2, 3, 5, 7).contiguous(memory_format=torch.channels_last)
    for grad in (torch.tensor(2.0), normal(2)):
        found = _loss.scaled(gradient, grad, 0.5, 1, "cpu")
        assert found.stride() == gradient.stride()
        assert torch.equal(found, expected(gradient, grad, 0.5))
    transposed = normal(5, 3).t()
    assert torch.equal(_loss.scaled(transposed, torch.tensor(2.0), 0.5, 1, "cpu"), transposed)
    with pytest.raises(RuntimeError, match="outermost"):
        _loss.scaled(transposed, normal(3), 0.5, 1, "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_hands_on_what_is_complete(dtype):
    numerics.require_backend("cpu", "loss_gradient", "cpu", dtype)
    gradient = normal(9, dtype=dtype)
    assert _loss.scaled(gradient, torch.tensor(1.0, dtype=dtype), 1.0, 1, "cpu") is gradient
    assert _loss.scaled(gradient, torch.tensor(1.5, dtype=dtype), 1.0, 1, "cpu") is not gradient


def test_large_gradients_of_half_precision(poisoned_memory):
    """Of a loss that a GradScaler has multiplied: neither factor alone leaves half precision its digits."""
    numerics.require_backend("cpu", "loss_gradient", "cpu", torch.float16)
    gradient = normal(4096, dtype=torch.float16)
    grad, count = torch.tensor(65536.0), 3_211_264
    found = _loss.scaled(gradient, grad, 1.0, count, "cpu")
    exact = gradient.double() * 65536.0 / count
    big = exact.abs() > 1e-4
    assert ((found.double() - exact).abs()[big] <= 2**-11 * exact.abs()[big]).all()


def test_does_not_depend_on_threads():
    numerics.require_backend("cpu", "loss_gradient", "cpu", torch.float32)
    gradient, grad = normal(37, 1031), normal(37)
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2, 3, 7):
        torch.set_num_threads(count)
        try:
            results.append(_loss.scaled(gradient, grad, 0.5, 1, "cpu"))
        finally:
            torch.set_num_threads(threads)
    assert all(torch.equal(results[0], one) for one in results[1:])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_on_a_gpu(dtype):
    numerics.require_backend("triton", "loss_gradient", "cuda", dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    gradient = normal(9, 4099, dtype=dtype).cuda()
    for grad in (torch.tensor(0.3, dtype=wide), normal(9, dtype=wide)):
        with aefast.backend("triton"):
            found = _loss.scaled(gradient, grad.cuda(), 0.7, 1, "triton")
        assert torch.equal(found, expected(gradient, grad.cuda(), 0.7))

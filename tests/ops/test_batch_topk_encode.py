import pytest
import torch
from torch.nn import functional as F

import aefast
import aefast.functional as AF
from aefast.errors import InputError
from aefast.kernels.selection import is_largest
from aefast.ops import batch_topk_encode
from support import numerics

# Where nothing but what surrounds a launcher is tested, and the reference where there is none.
ON_CPU = ["cpu", "eager"]


@pytest.fixture(params=ON_CPU)
def on_cpu(request):
    numerics.require_backend(request.param, "topk_encode", "cpu", torch.float32)
    with aefast.backend(request.param):
        yield request.param


def draw(*shape, dtype=torch.float64, seed=2):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def operands(dtype=torch.float64, rows=7, latents=40, inputs=5):
    return tuple(
        draw(*shape, dtype=dtype, seed=seed).requires_grad_()
        for seed, shape in enumerate(((rows, inputs), (latents, inputs), (latents,)))
    )


def defined(pre, k):
    """The code (N, F) with NaN where it has nothing, by a stable sort of the whole batch."""
    flat = pre.reshape(-1)
    order = flat.sort(descending=True, stable=True).indices[: pre.shape[0] * k]
    return torch.full_like(flat, float("nan")).index_put_((order,), flat[order]).reshape(pre.shape)


def check_is_defined(values, indices, pre, k):
    is_padding = indices < 0
    assert values.shape == indices.shape and (~is_padding).sum() == pre.shape[0] * k
    assert (indices[is_padding] == -1).all() and (values[is_padding] == 0).all()
    if indices.numel():
        assert not is_padding.all(0).any(), "no column is all padding"
        assert (is_padding.long().diff(dim=-1) >= 0).all(), "padding is at the end"
        ordered = values.masked_fill(is_padding, float("-inf"))
        assert (ordered.diff(dim=-1).nan_to_num(0.0, 0.0, 0.0) <= 0).all()
    found = torch.full((pre.shape[0], pre.shape[1] + 1), float("nan"), dtype=pre.dtype)
    found.scatter_(1, torch.where(is_padding, pre.shape[1], indices), values)
    torch.testing.assert_close(found[:, :-1], defined(pre, k), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", numerics.DTYPES)
def test_is_the_definition(on_cpu, dtype):
    """On whole numbers, of which many are equal, and rows of which some have many more than k and some have none."""
    generator = torch.Generator().manual_seed(0)
    for rows, inputs, latents, k in (
        (0, 3, 5, 2),
        (1, 3, 5, 5),
        (9, 4, 70, 3),
        (31, 7, 301, 8),
        (6, 2, 9, 9),
    ):
        x, weight, bias = (
            torch.randint(-2, 3, shape, generator=generator).to(dtype)
            for shape in ((rows, inputs), (latents, inputs), (latents,))
        )
        x[::3] *= 4
        values, indices = AF.batch_topk_encode(x, weight, bias, k)
        assert values.dtype == dtype and indices.dtype == torch.int64
        check_is_defined(values, indices, F.linear(x, weight, bias), k)


def test_all_of_a_row(on_cpu):
    """One row has them all, however many a row was thought to have."""
    x = torch.zeros(8, 1)
    x[5] = 1.0
    weight = torch.arange(1.0, 101.0)[:, None]
    _, indices = AF.batch_topk_encode(x, weight, None, 10)
    assert indices.shape == (8, 80)
    assert indices[5].tolist() == list(range(99, 19, -1)) and (indices[[0, 1, 2, 3, 4, 6, 7]] == -1).all()


def test_of_equals_the_first_rows(on_cpu):
    _, indices = AF.batch_topk_encode(torch.ones(3, 1), torch.zeros(6, 1), None, 2)
    assert indices.tolist() == [[0, 1, 2, 3, 4, 5], [-1] * 6, [-1] * 6]


def test_leading_dimensions(on_cpu):
    x, weight, bias = operands(torch.float32, 12)
    values, indices = AF.batch_topk_encode(x, weight, bias, 3)
    shaped = AF.batch_topk_encode(x.reshape(3, 4, 5), weight, bias, 3)
    for ours, theirs in zip(shaped, (values, indices), strict=True):
        assert torch.equal(ours.flatten(0, 1), theirs) and ours.shape[:2] == (3, 4)
    assert AF.batch_topk_encode(x[0], weight, bias, 3)[1].shape == (3,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mask_of_the_largest(dtype):
    numbers = torch.randint(-3, 4, (200,), generator=torch.Generator().manual_seed(0)).to(dtype)
    numbers[7], numbers[9], numbers[11] = float("nan"), float("inf"), float("-inf")
    for count in (1, 77, 200):
        order = numbers.sort(descending=True, stable=True).indices[:count]
        assert is_largest(numbers, count).nonzero()[:, 0].tolist() == sorted(order.tolist())


def test_first_and_second_derivatives(on_cpu):
    tensors = operands(rows=4, inputs=3)

    def values(x, weight, bias):
        return AF.batch_topk_encode(x, weight, bias, 3)[0]

    assert torch.autograd.gradcheck(values, tensors)
    assert torch.autograd.gradgradcheck(values, tensors)


def test_gradients_and_decoding_are_those_of_the_dense_code(on_cpu):
    x, weight, bias = operands(torch.float32)
    values, indices = AF.batch_topk_encode(x, weight, bias, 3)
    assert not indices.requires_grad
    pre = F.linear(x, weight, bias)
    code = torch.where(defined(pre.detach(), 3).isnan(), 0.0, pre)
    torch.testing.assert_close(AF.sparse_decode(values, indices, weight), code @ weight)
    upstream = draw(*values.shape, dtype=torch.float32)
    of_code = torch.zeros(7, 41).scatter_(1, torch.where(indices < 0, 40, indices), upstream)[:, :-1]
    found = torch.autograd.grad(values, (x, weight, bias), upstream)
    for ours, theirs in zip(found, torch.autograd.grad(code, (x, weight, bias), of_code), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_does_not_depend_on_how_many_are_looked_at_first(on_cpu, monkeypatch):
    x, weight, bias = operands(torch.float32, 50)
    expected = AF.batch_topk_encode(x, weight, bias, 4)
    for first in (1, 2, 10):
        monkeypatch.setattr(batch_topk_encode, "_FIRST", first)
        found = AF.batch_topk_encode(x, weight, bias, 4)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.ones(5, 4)}, r"weight must be \(N, 3\) to match x of shape \(4, 3\)"),
        ({"k": None}, "k must be a whole number from 1 to 5, got None"),
        ({"k": 6}, "k must be a whole number from 1 to 5, got 6"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = {"x": torch.ones(4, 3), "weight": torch.ones(5, 3), "bias": torch.ones(5), "k": 2}
    with pytest.raises(InputError, match=f"batch_topk_encode: {message}"):
        AF.batch_topk_encode(**{**arguments, **change})

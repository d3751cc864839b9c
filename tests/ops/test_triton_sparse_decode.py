"""The Triton kernels of sparse_decode in Triton's interpreter: TRITON_INTERPRET=1 pytest -m interpret.

float32, float16 and float64 only: bfloat16 arithmetic is wrong in the interpreter.
"""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 before triton is imported", allow_module_level=True)
pytest.importorskip("triton")

import aefast
import aefast.functional as AF
from aefast.kernels.triton import latents as kernels
from aefast.kernels.triton import sparse_decode as launchers
from aefast.ops import sparse_decode as op
from support import numerics

pytestmark = [pytest.mark.interpret, pytest.mark.usefixtures("poisoned_memory")]

DTYPES = [torch.float32, torch.float64, torch.float16]


def draw(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def choose(latents, *shape, seed=1):
    return torch.randint(-1, latents, shape, generator=torch.Generator().manual_seed(seed))


def every(values, indices, weight, bias, grad):
    """The result and all gradients."""
    return (
        launchers.sparse_decode(values, indices, weight, bias),
        *launchers.sparse_decode_backward(grad, values, indices, weight, 7),
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_samples(dtype):
    for index, sample in numerics.in_turn(op.samples(torch.device("cpu"), dtype), dtype):
        # The interpreter takes milliseconds for an entry.
        if sample["values"].numel() <= 400:
            numerics.check(op.OP, "triton", sample, dtype, expand_grad=index % 2 == 0)


def test_a_latent_of_many_entries(monkeypatch):
    """Sums of sums, the last of which is not full."""
    monkeypatch.setattr(kernels, "TOGETHER", kernels.tl.constexpr(8))
    values, weight, grad = draw(70, 1), draw(3, 5), draw(70, 5)
    for rows in (1, 7, 8, 9, 70):
        sums, of_values = kernels.latent_sums(values[:rows], torch.ones(rows, 1).long(), grad[:rows], 3, True)
        expected = values[:rows].double().t() @ grad[:rows].double()
        torch.testing.assert_close(sums[1:2].double(), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(of_values[1], values[:rows].sum(), rtol=1e-5, atol=1e-5)
        assert (sums[0] == 0).all() and (sums[2] == 0).all() and of_values[0] == of_values[2] == 0
    assert weight.shape == sums.shape


def test_results_do_not_depend_on_strides():
    values, indices, weight, bias, grad = draw(9, 3), choose(14, 9, 3), draw(14, 21), draw(21), draw(9, 21)
    expected = every(values, indices, weight, bias, grad)

    def transposed(matrix):
        return matrix.t().contiguous().t()

    def sliced(matrix):
        return matrix.repeat_interleave(2, 0)[::2]

    for change in (transposed, sliced):
        found = every(change(values), change(indices), change(weight), sliced(bias), change(grad))
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


def test_rows_do_not_depend_on_the_others():
    values, indices, weight, bias, grad = draw(9, 11), choose(14, 9, 11), draw(14, 21), draw(21), draw(9, 21)
    expected = every(values, indices, weight, bias, grad)
    alone = every(values[4:5], indices[4:5], weight, bias, grad[4:5])
    assert torch.equal(alone[0], expected[0][4:5]) and torch.equal(alone[1], expected[1][4:5])


def test_padding_adds_nothing_whatever_is_beside_it():
    values, indices, weight, grad = draw(4, 3), choose(1, 4, 3), draw(5, 6), draw(4, 6)
    indices[:, 0], indices[:, 1:] = 4, -1
    values[:, 1:], weight[:4] = float("nan"), float("inf")
    out, of_values, of_weight, _ = every(values, indices, weight, None, grad)
    torch.testing.assert_close(out, values[:, :1] * weight[4])
    assert (of_values[:, 1:] == 0).all() and (of_weight[:4] == 0).all()
    grad[2] = float("inf")
    assert (every(values, indices, weight, None, grad)[1][:, 1:] == 0).all()


def test_indices_beyond_the_latents_give_nan():
    values, indices, weight, grad = draw(4, 3), choose(5, 4, 3).clamp(min=0), draw(5, 6), draw(4, 6)
    expected = every(values, indices, weight, None, grad)
    indices[1, 2] = 5
    out, of_values, of_weight, of_bias = every(values, indices, weight, None, grad)
    assert out[1].isnan().all() and torch.equal(out[[0, 2, 3]], expected[0][[0, 2, 3]])
    assert of_values.isnan().nonzero().tolist() == [[1, 2]]
    assert of_weight.isfinite().all() and torch.equal(of_bias, expected[3])


def test_opcheck():
    for wants in (False, True):
        values, weight, bias = (draw(*shape).requires_grad_(wants) for shape in ((4, 3), (7, 5), (5,)))
        arguments = (values, choose(7, 4, 3), weight, bias, "triton")
        torch.library.opcheck(torch.ops.aefast.sparse_decode.default, arguments)
    for needs in range(1, 8):
        arguments = (draw(4, 5), draw(4, 3), choose(7, 4, 3), draw(7, 5), needs, "triton")
        torch.library.opcheck(torch.ops.aefast.sparse_decode_backward.default, arguments)


def test_derivatives():
    inputs = [draw(*shape, dtype=torch.float64).requires_grad_() for shape in ((3, 2), (5, 3), (3,))]

    def decode(values, weight, bias):
        return AF.sparse_decode(values, choose(5, 3, 2), weight, bias)

    with aefast.backend("triton"):
        assert torch.autograd.gradcheck(decode, inputs)
        assert torch.autograd.gradgradcheck(decode, inputs)


def test_compiles_whole():
    values, weight = draw(4, 3).requires_grad_(), draw(7, 5).requires_grad_()
    indices = choose(7, 4, 3)

    def loss(values, weight):
        return AF.sparse_decode(values, indices, weight).square().sum()

    with aefast.backend("triton"):
        expected = loss(values, weight), *torch.autograd.grad(loss(values, weight), (values, weight))
        value = torch.compile(loss, fullgraph=True)(values, weight)
        found = value, *torch.autograd.grad(value, (values, weight))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)

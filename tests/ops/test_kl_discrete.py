import numpy as np
import pytest
import torch
from scipy.special import rel_entr
from torch.nn import functional as F

import aefast.functional as AF
from aefast.errors import InputError
from support import numerics


def distributions(*shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(*shape, generator=generator, dtype=dtype).softmax(-1) for _ in range(2))


def test_is_the_relative_entropy():
    numerics.require_backend("cpu", "kl_discrete", "cpu", torch.float64)
    p, q = distributions(6, 5, 11)
    exact = rel_entr(p.numpy(), q.numpy())
    for dim in (-1, 0, 1, 2):
        found = AF.kl_discrete(p, q, dim=dim, reduction="none")
        np.testing.assert_allclose(found.numpy(), exact.sum(dim), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(
        AF.kl_discrete(p[0], q[0]), F.kl_div(q[0].log(), p[0], reduction="batchmean", log_target=False)
    )


def test_zeros(instruction_set):
    p = torch.tensor([[0.0, 1.0], [0.5, 0.5], [0.0, 0.0], [1.0, 0.0]], requires_grad=True)
    q = torch.tensor([[0.0, 1.0], [0.0, 1.0], [0.0, 0.0], [1.0, 0.0]], requires_grad=True)
    kl = AF.kl_discrete(p, q, reduction="none")
    assert kl.tolist() == [0.0, float("inf"), 0.0, 0.0]
    by_p, by_q = torch.autograd.grad(kl, (p, q), torch.ones(4))
    infinity = float("inf")
    assert by_p[0].tolist() == [0.0, 1.0] and by_q[0].tolist() == [0.0, -1.0]
    assert by_p[1, 0] == infinity and by_q[1, 0] == -infinity
    assert by_p[2].tolist() == by_q[2].tolist() == [0.0, 0.0]


def test_logarithms_of_every_size(instruction_set):
    """Subnormal numbers, the neighbours of 1, and what is no probability: infinity, NaN and what is below 0."""
    p = torch.tensor(
        [1e-45, 1e-40, 1.17e-38, 1e-20, 0.70710677, 0.70710683, 1 - 2**-24, 1.0, 1 + 2**-23, 1.5, 1e36]
    )
    ones = torch.ones_like(p)
    found = AF.kl_discrete(p[:, None], ones[:, None], reduction="none").double()
    exact = p.double() * p.double().log()
    torch.testing.assert_close(found, exact, rtol=4 * 2.0**-23, atol=1e-44)
    odd = torch.tensor([float("inf"), float("nan"), -1.0])[:, None]
    assert AF.kl_discrete(odd, torch.ones(3, 1), reduction="none").isfinite().logical_not().all()
    assert AF.kl_discrete(odd, torch.ones(3, 1), reduction="none")[1:].isnan().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"p": [1.0]}, "p must be a torch.Tensor, got list"),
        ({"p": torch.ones(())}, "p must have at least one dimension, got a scalar"),
        ({"q": torch.ones(3)}, r"q must have the shape of p, \(3, 5\), got \(3,\)"),
        ({"p": torch.ones(3, 5).long()}, "p must be float32, bfloat16, float16 or float64, got int64"),
        ({"q": torch.ones(3, 5).double()}, "q must have the dtype of p, float32, got float64"),
        ({"dim": 2}, "dim must be from -2 to 1, got 2"),
        ({"dim": True}, "dim must be from -2 to 1, got True"),
        ({"reduction": "batchmean"}, "reduction must be one of none, mean, sum, got 'batchmean'"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = {"p": torch.ones(3, 5), "q": torch.ones(3, 5)}
    with pytest.raises(InputError, match=f"kl_discrete: .*{message}"):
        AF.kl_discrete(**{**arguments, **change})

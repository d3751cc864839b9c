"""`mmd` over the ranks of a process group: the discrepancy of all rows, whoever holds them."""

import pytest
import torch

import aefast.functional as AF
from aefast.bench import scaling
from support import mmd_workers as workers


@pytest.mark.parametrize("ranks", sorted(workers.SHARDS))
def test_is_that_of_one_process(ranks):
    found = scaling.launch(workers.values_and_gradients, ranks, timeout=120)
    x, y = (one.double().requires_grad_() for one in workers.samples(ranks))
    for index, settings in enumerate(workers.SETTINGS * len(workers.BACKENDS)):
        value = AF.mmd(x, y, **settings)
        expected = torch.autograd.grad(value, (x, y))
        for results in found:
            assert results[index][0] == pytest.approx(value.item(), rel=1e-5)
        for side, true in enumerate(expected):
            # Each rank's are times the number of ranks.
            rows = [torch.tensor(results[index][1 + side], dtype=torch.float64) for results in found]
            whole = torch.cat([part for part in rows if part.numel()]) / ranks
            assert (whole - true).norm() <= 1e-5 * true.norm()


def test_suits_distributed_data_parallel():
    found = scaling.launch(workers.training_step, 2, timeout=60)
    model = workers.encoder().double()
    x, y = (one.double() for one in workers.samples(2))
    AF.mmd(model(x), y[:, :4]).backward()
    for gradients in found:
        for ours, parameter in zip(gradients, model.parameters(), strict=True):
            error = (torch.tensor(ours, dtype=torch.float64) - parameter.grad).norm()
            assert error <= 1e-5 * parameter.grad.norm()


def test_bad_input_is_an_error_on_every_rank():
    expected = (
        "x and y must have as many dimensions on every rank",
        "x and y must have one dtype on every rank",
        "y must have at least 2 rows for 'unbiased', got 0",
        "x must be finite",
        "no second derivatives",
    )
    for found in scaling.launch(workers.messages, 2, timeout=60):
        assert len(found) == len(expected)
        for message, part in zip(found, expected, strict=True):
            assert part in message

"""Rows of which the largest elements are looked for, and what they are."""

from collections.abc import Iterator

import torch

from aefast.kernels import selection


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def hard_rows() -> Iterator[tuple[torch.Tensor, int]]:
    """Rows of 3,000, and the k for each: what does not fit, as equals or in one group; NaN, infinities, both zeros."""
    columns = 3000
    yield torch.zeros(columns), 20
    yield torch.full((columns,), torch.nan), 20
    yield torch.full((columns,), -torch.inf), 20
    yield torch.full((columns,), torch.inf), 300
    whole = torch.randint(-2, 3, (columns,), generator=torch.Generator().manual_seed(0)).float()
    whole[::7] = -0.0
    whole[[5, 1700]] = torch.nan
    yield from ((whole, k) for k in (1, 33, 600, 1024))
    yield torch.arange(columns).float(), 50
    yield torch.arange(columns, 0, -1).float(), 50
    yield -draw(columns).abs() - 1, 100
    some_nan = draw(columns)
    some_nan[100:1500] = torch.nan
    yield from ((some_nan, k) for k in (100, 1000))
    # More infinities than there is room for, and NaN behind them.
    few_nan = torch.full((columns,), torch.inf)
    few_nan[-5:] = torch.nan
    yield few_nan, 20
    # Equals of which there is one in each eight, and a larger one behind them.
    apart = torch.full((columns,), -1.0)
    apart[::8] = 1.0
    apart[-8] = 2.0
    yield apart, 20
    # Equals below 0.
    below = torch.full((columns,), -5.0)
    below[-10:] = -4.0
    yield below, 20
    late = draw(columns)
    late[-1200:] = 50.0
    late[77] = 60.0
    yield late, 100
    # One group has all of the largest.
    of_one_thread = draw(65536)
    of_one_thread.view(-1, 2048)[:, 8:16] += 100
    of_one_group = draw(2**18)
    of_one_group.view(-1, 2048)[:, 8] += 100
    # And these are equal, with float32's next number below.
    near = torch.ones(2**18)
    near.view(-1, 2048)[:, :10] += torch.finfo(torch.float32).eps
    yield from ((near + shift * torch.finfo(torch.float32).eps, 20) for shift in range(2))
    yield from ((row, k) for row in (of_one_thread, of_one_group) for k in (120, 300))


def check(found: tuple[torch.Tensor, torch.Tensor], elements: torch.Tensor, k: int) -> None:
    """Which, in what order, and their bits, but for those of NaN."""
    values, indices = found
    expected = selection.largest(elements, k)
    assert torch.equal(indices, expected)
    true = elements.gather(1, expected)
    torch.testing.assert_close(values, true, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(values.signbit() & ~true.isnan(), true.signbit() & ~true.isnan())

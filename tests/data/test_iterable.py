"""Batches that something else makes."""

import warnings

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, TensorDataset

from aefast.data import DataError, DataWarning, IterableBatches

CPU = torch.device("cpu")


def samples(count=20):
    return torch.arange(float(4 * count)).reshape(count, 2, 2)


def wrapped(source):
    return IterableBatches(source, 4, CPU)


def all_of(batches, epoch=0, first=0):
    return [batch.clone() for batch in batches.epoch(epoch, first)]


def equal(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


class Letters(IterableDataset):
    """A stream of samples without a length."""

    def __iter__(self):
        return iter(samples())


SOURCES = {
    "list": lambda: list(samples().split(8)),
    "function": lambda: lambda: (part for part in samples().split(8)),
    "tuples": lambda: [(part, torch.zeros(len(part))) for part in samples().split(8)],
    "x": lambda: [{"label": torch.zeros(len(part)), "x": part} for part in samples().split(8)],
    "pixel_values": lambda: [{"pixel_values": part} for part in samples().split(8)],
    "image": lambda: [{"image": part} for part in samples().split(8)],
    "arrays": lambda: [part.numpy() for part in samples().split(8)],
    "halves": lambda: [part.double() for part in samples().split(8)],
    "tensor": lambda: samples()[:16].reshape(2, 8, 2, 2),
    "loader": lambda: DataLoader(TensorDataset(samples()), batch_size=8),
    "stream": lambda: DataLoader(Letters(), batch_size=8),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_batches_of_all_kinds(kind):
    source = SOURCES[kind]()
    batches = wrapped(source)
    expected = samples()[:16] if kind == "tensor" else samples()
    for epoch in range(2):
        got = all_of(batches, epoch)
        assert [len(batch) for batch in got] == ([8, 8] if kind == "tensor" else [8, 8, 4])
        assert torch.equal(torch.cat(got), expected.flatten(1))
        assert got[0].dtype == torch.float32
    assert equal(all_of(batches, 0, first=1), got[1:])
    assert torch.equal(torch.cat(list(batches.in_order())), expected.flatten(1))
    assert torch.equal(batches.spread(10), expected.flatten(1)[:10])
    assert batches.sample_shape == (2, 2)
    if kind in ("function", "stream"):
        with pytest.raises(TypeError):
            len(batches)
        assert "batches" not in batches.fingerprint()
    else:
        assert len(batches) == len(got)
        assert batches.fingerprint() == f"{type(source).__name__} of {len(got)} batches"


def test_bytes_are_scaled_as_load_does():
    source = [np.arange(8, dtype=np.uint8).reshape(2, 4)]
    np.testing.assert_array_equal(
        all_of(wrapped(source))[0].numpy(), source[0].astype(np.float32) * np.float32(1 / 255)
    )


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (
            torch.zeros(3, 5),
            r"dataset: batch 1 of epoch 0: expected shape \(B, \.\.\.\) with 4 values.*got \(3, 5\)",
        ),
        (torch.zeros(4), r"got \(4,\)"),
        (torch.zeros(0, 4), r"B above 0, got \(0, 4\)"),
        (
            torch.zeros(2, 4, dtype=torch.complex64),
            "expected a tensor of real numbers, got dtype torch.complex64",
        ),
        (np.array([["a"] * 4]), "expected a tensor of real numbers, got dtype <U1"),
        ("text", "expected a tensor of real numbers, got str"),
        ([], "expected a tensor of real numbers, got list"),
        ({"y": 1, "z": 2}, "called 'x' or 'image' or 'data' or 'pixel_values', the batch's keys: 'y', 'z'"),
        (
            torch.tensor([[0.0] * 4, [0, 1, torch.nan, 2]]),
            "batch 1 of epoch 0.*row 1, column 2 holds nan",
        ),
    ],
)
def test_bad_batches_are_named(batch, message):
    with pytest.raises(DataError, match=message):
        all_of(wrapped([torch.zeros(2, 4), batch]))


def test_bytes_that_look_like_counts_are_warned_of_once():
    for dtype, shape, largest, count in (
        (np.uint8, (2, 4), 254, 1),
        (np.uint8, (2, 4), 255, 0),
        (np.uint8, (2, 2, 2), 254, 0),
        (np.int32, (2, 4), 254, 0),
    ):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            all_of(wrapped([np.full(shape, largest, dtype)] * 2))
        assert [one.category for one in caught] == [DataWarning] * count
        assert all("0 to 255 as 0 to 1; for counts" in str(one.message) for one in caught)


@pytest.mark.parametrize("form", ["coo", "csr"])
def test_sparse_batches_are_named_with_the_remedy(form):
    dense = torch.eye(4)
    sparse = dense.to_sparse() if form == "coo" else dense.to_sparse_csr()
    for batch in (sparse, (sparse, torch.zeros(4)), {"x": sparse}):
        with pytest.raises(DataError, match=rf"layout torch.sparse_{form}; give batch.to_dense\(\)"):
            all_of(wrapped([batch]))
    scipy = pytest.importorskip("scipy.sparse")
    for make in (getattr(scipy, f"{form}_matrix"), getattr(scipy, f"{form}_array")):
        with pytest.raises(DataError, match=rf"got the sparse {form}_\w+; give batch.toarray\(\)"):
            all_of(wrapped([make(dense.numpy())]))


def test_sources_that_give_no_batches():
    with pytest.raises(DataError, match="dataset=3: expected a Dataset or an iterable of batches"):
        wrapped(3)
    with pytest.raises(DataError, match="got an iterator, which has an end; pass the function that makes it"):
        wrapped(iter([torch.zeros(2, 4)]))
    with pytest.raises(DataError, match="expected at least one batch, epoch 0 has none"):
        all_of(wrapped([]))


def test_samplers_are_told_the_epoch():
    data = TensorDataset(samples())
    sampler = DistributedSampler(data, num_replicas=2, rank=0, shuffle=True)
    batches = wrapped(DataLoader(data, batch_size=4, sampler=sampler))
    first = all_of(batches, 0)
    assert not equal(all_of(batches, 1), first)
    assert equal(all_of(batches, 0), first)


def shuffling(own_generator):
    generator = torch.Generator().manual_seed(3) if own_generator else None
    return wrapped(DataLoader(TensorDataset(samples()), batch_size=4, shuffle=True, generator=generator))


@pytest.mark.parametrize("own_generator", [False, True])
@pytest.mark.parametrize("stop", [1, 3, 5])
def test_a_shuffled_epoch_goes_on(own_generator, stop):
    torch.manual_seed(0)
    batches = shuffling(own_generator)
    expected = []
    for epoch in range(3):
        for number, batch in enumerate(batches.epoch(epoch), 1):
            expected.append((batch, torch.rand(())))
            if epoch == 1 and number == stop:
                state, random = batches.state(), torch.get_rng_state()
    batches = shuffling(own_generator)
    torch.manual_seed(9)
    assert batches.restore(state) is False
    torch.set_rng_state(random)
    rest = [(batch, torch.rand(())) for batch in batches.epoch(1, stop)]
    rest += [(batch, torch.rand(())) for batch in batches.epoch(2)]
    expected = expected[5 + stop :]
    assert len(rest) == len(expected)
    for ours, theirs in zip(rest, expected, strict=True):
        assert torch.equal(ours[0], theirs[0])
        assert ours[1] == theirs[1]


def test_what_is_read_again_is_compared_with_what_was_read():
    def batches(change=0.0):
        return wrapped([part + change for part in samples().split(4)])

    before = batches()
    iterator = before.epoch(0)
    for _ in range(3):
        next(iterator)
    state = before.state()
    for again, count in ((batches(), 0), (batches(1.0), 1), (wrapped([samples()]), 1)):
        told = []
        again.restore(state, told.append)
        # Before anything was read the state is still that of what was read last.
        again.restore(again.state(), told.append)
        list(again.epoch(0, 3))
        assert len(told) == count
        assert all(
            "dataset: the iterable gave other batches than before (batch 2 of epoch 0)" in one for one in told
        )
        list(again.epoch(1))
        assert len(told) == count


def test_generators_are_left_as_they_were():
    batches = shuffling(own_generator=True)
    first = list(batches.in_order())
    assert torch.equal(batches.spread(6), torch.cat(first)[:6])
    assert equal(list(batches.in_order()), first)
    state = batches.generator_state()
    assert equal(all_of(batches), first)
    assert not equal(list(batches.in_order()), first)
    batches.restore_generators(state)
    assert equal(list(batches.in_order()), first)


class Stateful:
    """Goes through 20 samples, four at a time and from another one in each epoch, and can say where it is."""

    def __init__(self, extra=None):
        self.round, self.place, self.read, self.extra = 0, 0, 0, extra

    def __iter__(self):
        for place in range(self.place, 5):
            self.place = place + 1
            self.read += 1
            yield samples().roll(self.round, 0)[4 * place : 4 * place + 4]
        self.round, self.place = self.round + 1, 0

    def state_dict(self):
        return {"round": self.round, "place": torch.tensor(self.place), "extra": self.extra}

    def load_state_dict(self, state):
        self.round, self.place = state["round"], int(state["place"])


@pytest.mark.parametrize("stop", [1, 4, 5])
def test_a_source_that_knows_its_place_reads_nothing_again(stop):
    whole = wrapped(Stateful())
    expected = [all_of(whole, epoch) for epoch in range(3)]
    batches = wrapped(Stateful())
    all_of(batches, 0)
    iterator = batches.epoch(1)
    for _ in range(stop):
        next(iterator)
    state = batches.state()
    source = Stateful()
    batches = wrapped(source)
    assert batches.restore(state) is True
    assert equal(all_of(batches, 1, stop), expected[1][stop:])
    assert source.read == 5 - stop
    assert equal(all_of(batches, 2), expected[2])


def test_a_state_between_epochs():
    batches = wrapped(Stateful())
    all_of(batches, 0)
    expected_source = Stateful()
    expected_source.round = 1
    state = batches.state()
    batches = wrapped(Stateful())
    assert batches.restore(state) is True
    # All of the epoch was read, so nothing of it is left.
    assert all_of(batches, 0, 5) == []
    assert equal(all_of(batches, 1), all_of(wrapped(expected_source), 1))


def test_states_that_are_more_than_plain_values_are_left_out():
    for extra in (Stateful(), lambda: None):
        batches = wrapped(Stateful(extra))
        next(batches.epoch(0))
        state = batches.state()
        assert state["state"].dtype == torch.uint8
        assert wrapped(Stateful()).restore(state) is False


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_go_to_the_gpu():
    batches = IterableBatches(SOURCES["loader"](), 4, torch.device("cuda"))
    got = list(batches.epoch(0))
    assert all(batch.is_cuda for batch in got)
    assert torch.equal(torch.cat(got).cpu(), samples().flatten(1))

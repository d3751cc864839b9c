"""The samplers: densities, draws, files, errors."""

import itertools
import json
import math
import random
import warnings

import numpy as np
import pytest
import safetensors.torch
import sklearn.mixture  # noqa: F401 (it draws from random's generator when it is first imported)
import torch
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal, Normal

from aefast.errors import InputError
from aefast.sampling import SAMPLERS, Flow, FlowSampler, GaussianMixtureSampler, PriorSampler, load_sampler
from aefast.stats import mmd_test

FLOW = {"couplings": 4, "hidden": (16,), "steps": 60, "batch_size": 64}
MAKE = {
    "normal": lambda: PriorSampler(),
    "box": lambda: PriorSampler("box"),
    "gmm": lambda: GaussianMixtureSampler(3),
    "flow": lambda: FlowSampler(**FLOW),
}
every_sampler = pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)


def clusters():
    """Three Gaussians in four dimensions, with correlations, far from the origin."""
    generator = torch.Generator().manual_seed(3)
    means = torch.tensor([[0.0, 0, 0, 0], [4, 0, 1, 0], [0, 5, 0, -3]], dtype=torch.float64) + 10
    factors = torch.randn(3, 4, 4, generator=generator, dtype=torch.float64).tril(-1) * 0.5
    factors += torch.diag_embed(0.3 + torch.rand(3, 4, generator=generator, dtype=torch.float64))
    return MixtureSameFamily(
        Categorical(torch.tensor([0.5, 0.3, 0.2])), MultivariateNormal(means, scale_tril=factors)
    )


def draw(count, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return clusters().sample((count,)).float()


def grid(low, high, steps=201):
    """All points of a square lattice (steps², 2), and the area that each stands for."""
    line = torch.linspace(low, high, steps)
    return torch.cartesian_prod(line, line), (line[1] - line[0]).item() ** 2


@every_sampler
def test_draws_follow_the_seed_and_disturb_no_generator(make):
    codes = draw(200)
    torch.manual_seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    sampler = make()
    assert sampler.fit(codes) is sampler
    first = sampler.sample(50, seed=7)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert random.getstate() == before[2]

    assert (first.shape, first.dtype, sampler.latent) == ((50, 4), torch.float32, 4)
    assert torch.equal(make().fit(codes).sample(50, seed=7), first)
    assert not torch.equal(sampler.sample(50, seed=8), first)
    unseeded = sampler.sample(50)
    assert not torch.equal(sampler.sample(50), unseeded)
    torch.manual_seed(0)
    assert torch.equal(sampler.sample(50), unseeded)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@every_sampler
def test_codes_of_any_dtype(make, dtype):
    sampler = make().fit(draw(100).to(dtype).T.contiguous().T)
    assert sampler.sample(5, seed=0).dtype == torch.float32
    assert sampler.log_prob(draw(5).to(dtype)).shape == (5,)


@pytest.mark.parametrize("name", ["box", "gmm", "flow"])
def test_codes_of_another_size_have_the_same_fit(name):
    """Noise and regularisation are parts of the codes' own deviations. A power of two changes no rounding."""
    codes, factor = draw(200), 2.0**-12
    expected, found = (MAKE[name]().fit(one).sample(50, seed=7) for one in (codes, factor * codes))
    assert torch.equal(found, factor * expected)


def test_the_prior_is_the_standard_normal():
    sampler = PriorSampler().fit(draw(10))
    codes = draw(6)
    expected = Normal(0.0, 1.0).log_prob(codes.double()).sum(1)
    torch.testing.assert_close(sampler.log_prob(codes), expected)
    samples = sampler.sample(20_000, seed=0)
    # Five standard errors of a mean and of a variance.
    assert samples.mean(0).abs().max() < 5 / math.sqrt(20_000)
    assert (samples.var(0) - 1).abs().max() < 5 * math.sqrt(2 / 20_000)


def test_the_box_is_that_of_the_codes():
    codes = draw(300)
    sampler = PriorSampler("box").fit(codes)
    low, high = codes.aminmax(dim=0)
    samples = sampler.sample(20_000, seed=0)
    assert (samples >= low).all() and (samples <= high).all()
    # The standard error of the mean of a uniform distribution is its width / √(12 n).
    off = (samples.mean(0) - (low + high) / 2).abs() / (high - low)
    assert off.max() < 5 / math.sqrt(12 * 20_000)
    inside = sampler.log_prob(codes)
    torch.testing.assert_close(inside, -(high.double() - low).log().sum().expand(300))
    assert (sampler.log_prob(codes[:1].clone().fill_(1e3)) == -math.inf).all()


def test_the_mixture_is_what_scikit_learn_finds():
    from sklearn.mixture import GaussianMixture

    codes = draw(2000)
    sampler = GaussianMixtureSampler(3).fit(codes)
    # Of well separated clusters, both fits end at the same maximum, which does not depend on the scale of codes but
    # for the 1e-6 that covariances get.
    reference = GaussianMixture(3, random_state=0, max_iter=200).fit(codes.double().numpy())
    expected = torch.from_numpy(reference.score_samples(draw(500, 1).double().numpy()))
    torch.testing.assert_close(sampler.log_prob(draw(500, 1)), expected, atol=0.05, rtol=0)


def test_the_seed_of_a_mixture_is_where_its_fit_starts():
    """With more components than there are clusters, every start ends at a maximum of its own."""
    from sklearn.mixture import GaussianMixture

    codes = draw(200)
    deviation, mean = torch.std_mean(codes.double(), 0, correction=0)
    scaled = ((codes.double() - mean) / deviation).numpy()
    fitted = [GaussianMixtureSampler(8, seed=seed).fit(codes) for seed in (0, 1)]
    for sampler in fitted:
        reference = GaussianMixture(8, random_state=sampler.seed, max_iter=200).fit(scaled)
        expected = torch.from_numpy(reference.score_samples(scaled)) - deviation.log().sum()
        torch.testing.assert_close(sampler.log_prob(codes), expected)
    assert not torch.allclose(*(sampler.log_prob(codes) for sampler in fitted))


def test_draws_of_a_mixture_are_its_own():
    sampler = GaussianMixtureSampler(3).fit(draw(4000))
    samples, fresh = sampler.sample(1500, seed=1), draw(1500, 5)
    assert mmd_test(samples, fresh, permutations=200, seed=0).p_value > 0.02
    likelihood = clusters().log_prob(fresh.double()).mean()
    assert sampler.log_prob(fresh).mean() == pytest.approx(likelihood.item(), abs=0.05)
    box = PriorSampler("box").fit(fresh).sample(1500, seed=1)
    assert mmd_test(box, fresh, permutations=200, seed=0).p_value < 0.01


def random_flow(latent, couplings=4, hidden=(12,)):
    """In float64, with weights that leave no part of it the identity."""
    torch.manual_seed(0)
    flow = Flow(latent, couplings, hidden).double()
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.copy_(0.5 * torch.randn_like(parameter) / math.sqrt(parameter.shape[-1]))
        flow.mean.copy_(torch.randn(latent))
        flow.scale.copy_(0.2 + torch.rand(latent))
    return flow


@pytest.mark.parametrize("latent", [2, 3, 5, 8, 17])
def test_a_flow_inverts_exactly_and_its_determinant_is_true(latent):
    flow = random_flow(latent, couplings=2 * (latent - 1).bit_length())
    x = torch.randn(9, latent, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        z, log_det = flow(x)
        # Couplings magnify the rounding errors, near 1e-16, of those before them, by up to exp(2) each.
        torch.testing.assert_close(flow.inverse(z), x, rtol=0, atol=1e-10)
        torch.testing.assert_close(flow(flow.inverse(x))[0], x, rtol=0, atol=1e-10)
        assert (z - x).abs().min() > 0
    for row in range(3):
        jacobian = torch.autograd.functional.jacobian(lambda one: flow(one[None])[0][0], x[row])
        assert log_det[row].item() == pytest.approx(torch.linalg.slogdet(jacobian)[1].item(), abs=1e-9)
    expected = Normal(0.0, 1.0).log_prob(z).sum(1) + log_det
    torch.testing.assert_close(flow.log_prob(x), expected)


def test_a_fitted_flow_inverts_in_float32():
    codes = draw(400)
    flow = FlowSampler(**FLOW).fit(codes).flow
    with torch.no_grad():
        back = flow.inverse(flow(codes)[0])
    # A thousandth of the deviation of codes, where rounding errors are 1e-7 of it and four couplings magnify them.
    assert ((back - codes).abs() / codes.std(0)).max() < 1e-3


@pytest.mark.parametrize("latent", [2, 3, 6, 16, 17])
def test_every_two_latents_are_split_by_some_coupling_and_each_half_changes(latent):
    flow = Flow(latent, 2 * (latent - 1).bit_length(), (4,))
    kept = [set(coupling.first.tolist()) for coupling in flow.couplings]
    for one, other in itertools.combinations(range(latent), 2):
        assert any((one in half) != (other in half) for half in kept)
    for even, odd in zip(kept[::2], kept[1::2], strict=True):
        assert even | odd == set(range(latent)) and not even & odd


@pytest.mark.slow
def test_a_flow_learns_a_density_that_integrates_to_one():
    generator = torch.Generator().manual_seed(2)

    def banana(count):
        x = torch.randn(count, 2, generator=generator)
        return torch.stack([x[:, 0], 0.5 * x[:, 1] + 0.7 * (x[:, 0] ** 2 - 1)], 1)

    sampler = FlowSampler(couplings=6, hidden=(32,), steps=600).fit(banana(4000))
    fresh = banana(2000)
    # log p(x1) + log p(x2 | x1), the entropies of two Gaussians.
    truth = -(1 + math.log(2 * math.pi)) - math.log(0.5)
    gaussian = MultivariateNormal(fresh.mean(0), fresh.T.cov()).log_prob(fresh).mean().item()
    found = sampler.log_prob(fresh).mean().item()
    # A Gaussian misses a third of a nat here; 0.1 is what few steps leave.
    assert gaussian < truth - 0.3
    assert truth - 0.1 < found < truth + 0.1
    points, area = grid(-6, 14, 401)
    assert (sampler.log_prob(points).exp().sum() * area).item() == pytest.approx(1, abs=0.02)
    assert mmd_test(sampler.sample(1500, seed=0), fresh[:1500], permutations=200, seed=0).p_value > 0.02


def test_a_flow_keeps_the_weights_that_suit_codes_it_is_not_trained_on():
    """So many steps on so few codes lead on to weights under which fresh ones lose several nats and more."""
    codes, fresh = torch.randn(1200, 4, generator=torch.Generator().manual_seed(3)).split((200, 1000))
    sampler = FlowSampler(couplings=4, hidden=(32,), steps=400, batch_size=64, lr=2e-2).fit(codes)
    truth = Normal(0.0, 1.0).log_prob(fresh).sum(1).mean()
    # The weights that are kept are off by less than half of this, the last ones by seven times as much.
    assert sampler.log_prob(fresh).mean() > truth - 1.5


def test_the_density_of_codes_on_a_line_is_that_of_slightly_noisy_ones():
    """Of codes without noise it would be infinite, and a flow's grow with every step."""
    x = torch.randn(200, 1, generator=torch.Generator().manual_seed(5))
    codes = 1 + x * torch.tensor([1.0, 2.0, 3.0, 4.0])
    noise = 0.01 * codes.double().std(0)
    noisy = MultivariateNormal(codes.double().mean(0), codes.double().T.cov() + torch.diag(noise.square()))
    limit = noisy.log_prob(codes.double()).mean()
    found = FlowSampler(hidden=(16,), steps=300, batch_size=64, lr=2e-2).fit(codes).log_prob(codes).mean()
    # A nat is what few steps leave.
    assert limit - 1 < found < limit


def test_two_codes_are_enough_for_a_flow():
    """Even one of them to train on has a scale."""
    codes = draw(2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sampler = FlowSampler(**FLOW).fit(codes)
    assert sampler.sample(5, seed=0).isfinite().all() and sampler.log_prob(codes).isfinite().all()


@pytest.mark.parametrize("name", ["box", "gmm", "flow"])
def test_a_latent_that_is_constant_stays_so(name):
    codes = torch.cat([draw(200), torch.full((200, 1), 0.1)], 1)
    sampler = MAKE[name]().fit(codes)
    samples = sampler.sample(100, seed=0)
    assert samples.isfinite().all()
    # The noise and the regularisation that fits get are 0.01 and 0.001 of a deviation, which is 1 here.
    assert (samples[:, 4] - 0.1).abs().max() < 5
    assert samples[:, 4].std() < 2


@every_sampler
def test_a_saved_sampler_loads_without_pickle_and_is_the_same(make, tmp_path):
    sampler = make().fit(draw(150))
    sampler.save(tmp_path / "a" / "b")
    assert sorted(path.name for path in (tmp_path / "a" / "b").iterdir()) == [
        "sampler.json",
        "sampler.safetensors",
    ]
    loaded = load_sampler(tmp_path / "a" / "b")
    assert type(loaded) is type(sampler) and loaded.latent == 4
    for name in sampler.option_names:
        assert getattr(loaded, name) == getattr(sampler, name)
    assert torch.equal(loaded.sample(20, seed=3), sampler.sample(20, seed=3))
    assert torch.equal(loaded.log_prob(draw(20, 1)), sampler.log_prob(draw(20, 1)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "format_version=2 is newer"),
        ({"format_version": 0}, "format_version=0: expected an integer from 1"),
        ({"sampler": "gm"}, r"sampler='gm': expected one of .*did you mean 'gmm'"),
        ({"options": {"componens": 3}}, "unknown option 'componens'.*did you mean 'components'"),
        ({"options": {"components": 0}}, "components=0: expected a positive integer"),
        ({"options": 3}, "options=3: expected options by name"),
        ({"options": {"components": 4}}, "the tensors do not fit sampler.json"),
        ({"latent": "4"}, "latent='4': expected a positive integer"),
        ({"latent": 5}, "the tensors do not fit sampler.json"),
        ({"more": 1}, "expected a JSON object with the keys"),
    ],
)
def test_a_file_that_is_wrong_is_told(tmp_path, change, message):
    GaussianMixtureSampler(3).fit(draw(50)).save(tmp_path)
    path = tmp_path / "sampler.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(InputError, match=message):
        load_sampler(tmp_path)


def test_files_that_are_missing_or_damaged_are_told(tmp_path):
    with pytest.raises(InputError, match=r"sampler\.json is missing, expected a folder with a saved sampler"):
        load_sampler(tmp_path / "nowhere")
    PriorSampler().fit(draw(5)).save(tmp_path)
    tensors = tmp_path / "sampler.safetensors"
    whole = tensors.read_bytes()
    tensors.write_bytes(whole[:-7])
    with pytest.raises(InputError, match="expected a readable safetensors file"):
        load_sampler(tmp_path)
    counts = {"low": torch.ones(4, dtype=torch.int64), "high": torch.ones(4, dtype=torch.int64)}
    safetensors.torch.save_file(counts, tensors)
    with pytest.raises(InputError, match="the tensors do not fit"):
        load_sampler(tmp_path)
    tensors.unlink()
    with pytest.raises(InputError, match=r"sampler\.safetensors is missing"):
        load_sampler(tmp_path)
    (tmp_path / "sampler.json").write_text("{")
    with pytest.raises(InputError, match="expected a readable JSON file"):
        load_sampler(tmp_path)
    with pytest.raises(InputError, match="expected a folder that can be written"):
        PriorSampler().fit(draw(5)).save(tmp_path / "sampler.json")


@every_sampler
def test_nothing_is_drawn_before_the_fit(make, tmp_path):
    for act in (
        lambda sampler: sampler.sample(3),
        lambda sampler: sampler.log_prob(draw(3)),
        lambda sampler: sampler.save(tmp_path),
    ):
        with pytest.raises(InputError, match="is not fitted; call fit"):
            act(make())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        ([[1.0]], r"codes: expected a tensor of shape \(N, latent\), got list"),
        (torch.ones(5), r"codes: expected shape \(N, latent\).*got \(5,\)"),
        (torch.ones(0, 3), r"at least one code, got \(0, 3\)"),
        (torch.ones(3, 3, dtype=torch.int64), "expected a floating-point tensor, got torch.int64"),
        (torch.full((3, 3), math.nan), "expected finite values, got 9 that are not"),
    ],
)
@every_sampler
def test_bad_codes_are_named(make, codes, message):
    with pytest.raises(InputError, match=message):
        make().fit(codes)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: PriorSampler("uniform"), "prior='uniform': expected one of normal, box"),
        (lambda: GaussianMixtureSampler(0), "components=0: expected a positive integer"),
        (lambda: GaussianMixtureSampler(seed=-1), "seed=-1: expected an integer from 0 to"),
        (
            lambda: GaussianMixtureSampler(6).fit(draw(5)),
            "components=6: expected at most as many.*got 5 codes",
        ),
        (lambda: FlowSampler(hidden=5), "hidden=5: expected a sequence"),
        (lambda: FlowSampler(lr=0), "lr=0: expected a finite number above 0"),
        (lambda: FlowSampler(steps=1.5), "steps=1.5: expected a positive integer"),
        (lambda: FlowSampler().fit(draw(9)[:, :1]), "codes: expected at least 2 latents.*got 1"),
        (lambda: FlowSampler().fit(draw(1)), "codes: expected at least 2, some of which"),
        (lambda: PriorSampler().fit(draw(5)).sample(0), "count=0: expected a positive integer"),
        (lambda: PriorSampler().fit(draw(5)).sample(2, seed=1.0), "seed=1.0: expected an integer"),
        (
            lambda: PriorSampler().fit(draw(5)).log_prob(draw(5)[:, :3]),
            r"codes: expected shape \(N, 4\), got \(5, 3\)",
        ),
    ],
)
def test_bad_arguments_are_named(act, message):
    with pytest.raises(InputError, match=message):
        act()


def test_without_scikit_learn_a_mixture_says_what_it_needs(monkeypatch, tmp_path):
    GaussianMixtureSampler(3).fit(draw(50)).save(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "sklearn.mixture", None)
    with pytest.raises(InputError, match=r'needs scikit-learn.*pip install "aefast\[train\]"'):
        GaussianMixtureSampler().fit(draw(50))
    assert load_sampler(tmp_path).sample(3, seed=0).shape == (3, 4)


def test_the_registry_knows_each_name():
    assert {name: kind.name for name, kind in SAMPLERS.items()} == {
        name: name for name in ("prior", "gmm", "flow")
    }

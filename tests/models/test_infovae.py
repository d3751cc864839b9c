"""InfoVAE: its terms and gradients beside formulas written out, its modes, its options, and aefast train."""

import copy
import json
import logging
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed
from torch.distributions import Normal, kl_divergence

import aefast.functional as AF
from aefast import cli
from aefast.data import Dataset
from aefast.errors import InputError
from aefast.models import MODELS, VAE, InfoVAE, InfoVAEConfig, from_pretrained, infovae
from aefast.models.vae import LOGVAR_RANGE
from aefast.ops import _pairwise
from aefast.ops._pairwise import KERNELS
from aefast.train import TrainConfig, Trainer
from aefast.train.step import CapturedStep, EagerStep, make_optimizer
from support.noise import next_normals

SIZES = {"input_size": 12, "hidden": (9, 7), "latent": 3}


def make(**options):
    torch.manual_seed(0)
    model = InfoVAE(**{**SIZES, **options}, dtype=torch.float64)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def data(rows=10):
    return torch.rand(rows, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def noise(monkeypatch):
    """`noise(eps, prior, ...)`: what torch.randn_like gives, and the op that adds Gaussian noise to zeros, in turns, of
    any shape that fits."""

    def settle(*draws):
        left = list(draws)

        def draw(like, kind="gaussian", std=1.0, seed=None):
            assert kind == "gaussian" and std == 1.0
            return left.pop(0).to(like.dtype).reshape(like.shape)

        monkeypatch.setattr(torch, "randn_like", draw)
        monkeypatch.setattr(AF, "corrupt", draw)

    return settle


def prior_draws(rows=10):
    return torch.randn(rows, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(7))


def codes(model, x, eps):
    """mu, and z with its KL divergence in nats, written with torch.distributions."""
    weights = dict(model.named_parameters())
    h = x
    for index in range(len(model.config.hidden)):
        h = torch.relu(h @ weights[f"encoder.{2 * index}.weight"].T + weights[f"encoder.{2 * index}.bias"])
    head = h @ weights["head.weight"].T + weights["head.bias"]
    if not model.config.stochastic:
        return head, head, torch.zeros((), dtype=torch.float64)
    mu, logvar = head.chunk(2, -1)
    q = Normal(mu, torch.exp(logvar.clamp(*LOGVAR_RANGE) / 2))
    return mu, mu + q.stddev * eps, kl_divergence(q, Normal(0.0, 1.0)).sum(-1).mean()


def mmd_of(config, z, y):
    """MMD² by differences and sums over pairs, with the widths that the config's docstring promises."""
    m, bandwidth = 2 * config.latent, config.mmd_bandwidth
    octaves = [m / 4, m / 2, m, 2 * m, 4 * m]
    scales = [m * s for s in (0.1, 0.2, 0.5, 1, 2, 5, 10)]
    if bandwidth is not None:
        given = [one * one for one in (bandwidth if isinstance(bandwidth, tuple) else (bandwidth,))]
        octaves, scales = [2 * one for one in given], given

    def gram(a, b):
        u = (a[:, None] - b[None]).square().sum(-1)
        root = torch.where(u > 0, torch.where(u > 0, u, 1.0).sqrt(), 0.0)
        if config.mmd_kernel == "rbf":
            return sum(torch.exp(-u / two_b2) for two_b2 in octaves)
        if config.mmd_kernel == "laplacian":
            squares = scales if bandwidth is not None else octaves
            return sum(torch.exp(-root / math.sqrt(b2)) for b2 in squares)
        if config.mmd_kernel == "imq":
            return sum(b2 / (b2 + u) for b2 in scales)
        if config.mmd_kernel == "rational_quadratic":
            return sum((1 + u / (config.mmd_alpha * two_b2)) ** -config.mmd_alpha for two_b2 in octaves)
        return -root

    total = -2 * gram(z, y).mean()
    for points in (z, y):
        k, n = gram(points, points), len(points)
        is_biased = config.mmd_estimator == "biased"
        total = total + (k.mean() if is_biased else (k.sum() - k.diagonal().sum()) / (n * (n - 1)))
    return total


OPTIONS = [
    *({"mmd_kernel": kernel} for kernel in KERNELS),
    *({"mmd_kernel": kernel, "mmd_bandwidth": 1.5} for kernel in KERNELS if kernel != "energy"),
    {"mmd_kernel": "rbf", "mmd_bandwidth": (0.5, 2.0), "mmd_estimator": "biased"},
    {"mmd_kernel": "rational_quadratic", "mmd_alpha": 0.5},
    {"kl_weight": 1.0, "mmd_weight": 3.0},
    {"kl_weight": 0.25, "mmd_weight": 0, "hidden": (), "linear_decoder": True},
    {"likelihood": "bernoulli", "kl_weight": 0.5},
    {"likelihood": "gaussian", "kl_weight": 0.5},
    {"stochastic": False},
    {"stochastic": False, "hidden": (), "likelihood": "gaussian"},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("training", [True, False])
def test_loss_terms_and_gradients_are_the_formulas(noise, options, training):
    model, x, prior = make(**options).train(training), data(), prior_draws()
    config = model.config
    eps = next_normals(10, 3)
    noise(prior)
    output = model(x)
    mu, z, kl = codes(model, x, eps)
    # The reconstruction term is VAE's own, whose test holds it to torch.distributions.
    nll = model._reconstruction_term(model.decoder_loss.eager(model.decoder(z), x), model.log_variance)
    expected = {
        "reconstruction": nll,
        "kl": config.kl_weight * kl,
        "mmd": config.mmd_weight * mmd_of(config, z, prior),
    }
    torch.testing.assert_close(output.terms, expected)
    assert torch.equal(sum(output.terms.values()), output.loss)
    torch.testing.assert_close(output.latent, z if training else mu)
    torch.testing.assert_close(output.reconstruction, model.decode(z if training else mu))
    parameters = list(model.parameters())
    ours, true = (
        torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        for loss in (output.loss, sum(expected.values()))
    )
    torch.testing.assert_close(ours, true)


@pytest.mark.parametrize("options", [*OPTIONS, {"kl_weight": 1.0, "kl_warmup_steps": 3}])
def test_the_eager_loss_is_the_same(noise, options):
    model, x = make(**options), data()
    twin = model.eager_twin()
    for step in range(5):
        eps, prior = next_normals(10, 3), prior_draws() + step
        noise(*([eps] if model.config.stochastic else []), prior)
        theirs = model.eager_loss(twin, x)
        noise(prior)
        ours = model(x).loss
        # Distances of the twin come from products, and have lost half of the digits where points are close.
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-7)
        gradients = [
            torch.autograd.grad(loss, list(module.parameters()))
            for loss, module in ((ours, model), (theirs, twin))
        ]
        torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-6)
    if "kl_warmup_steps" in options:
        assert twin.training_steps == model.training_steps == 5


@pytest.mark.parametrize("kernel", ["rbf", "imq", "rational_quadratic", "energy"])
@pytest.mark.parametrize("estimator", ["unbiased", "biased"])
def test_the_closed_form_is_the_mean_over_priors(kernel, estimator):
    model, x = make(mmd_prior="closed_form", mmd_kernel=kernel, mmd_estimator=estimator), data(40)
    sampled = InfoVAE(**{**SIZES, "mmd_kernel": kernel, "mmd_estimator": estimator}, dtype=torch.float64)
    z = model.encode(x).detach()
    torch.manual_seed(3)
    draws = torch.stack([sampled.prior_mmd(z) for _ in range(4000)])
    if estimator == "biased":
        # The samples' own bias: pairs of a draw with itself, of which the closed form has none.
        y = torch.randn(40, 3000, 3, dtype=torch.float64).transpose(0, 1)
        u = (y[:, :1] - y[:, 1:]).square().sum(-1)
        spec_sum = mmd_values(sampled.config, u).mean()
        draws = draws - (mmd_values(sampled.config, torch.zeros(1)).item() - spec_sum) / 40
    error = draws.std() / math.sqrt(len(draws))
    assert abs(draws.mean() - model.prior_mmd(z)) < 5 * error
    assert error < 0.01 * draws.mean()


def mmd_values(config, u):
    """The kernel of squared distances."""
    return _pairwise.kernel_of("test", config.mmd_kernel, config.mmd_bandwidths, config.mmd_alpha).values(u)


def test_the_closed_form_trains_as_its_twin_does(noise):
    model, x = make(mmd_prior="closed_form", kl_weight=0.5), data()
    twin = model.eager_twin()
    eps = next_normals(10, 3)
    noise(eps)
    theirs = model.eager_loss(twin, x)
    ours = model(x)
    z = codes(model, x, eps)[1]
    expected = AF.mmd_to_normal(z, kernel="imq")
    torch.testing.assert_close(ours.terms["mmd"], 10.0 * expected)
    torch.testing.assert_close(ours.loss, theirs)
    gradients = [
        torch.autograd.grad(loss, list(module.parameters()))
        for loss, module in ((ours.loss, model), (theirs, twin))
    ]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("options", OPTIONS)
def test_model_and_twin_exchange_state_dicts(options):
    model, x = make(**options).eval(), data()
    twin = model.eager_twin()
    assert list(twin.state_dict()) == list(model.state_dict())
    other = InfoVAE(model.config, dtype=torch.float64).eval()
    other.load_state_dict(twin.state_dict())
    torch.testing.assert_close(other(x).reconstruction, model(x).reconstruction)
    torch.testing.assert_close(twin(x), model(x).reconstruction)
    with torch.no_grad():
        twin.head.weight.zero_()
    assert model.head.weight.abs().sum() > 0


@pytest.mark.parametrize("stochastic", [True, False])
def test_evaluate_tells_the_mmd_without_its_weight(noise, stochastic):
    model, x, prior = make(mmd_weight=4.0, stochastic=stochastic).eval(), data(), prior_draws()
    eps = next_normals(10, 3)
    noise(prior)
    measures = model.evaluate(x.reshape(10, 3, 4))
    mu, z, kl = codes(model, x, eps)
    assert measures.keys() == {"loss", "reconstruction", "kl", "mse", "mmd"} | (
        {"elbo"} if stochastic else set()
    )
    mmd = mmd_of(model.config, z, prior)
    nll = model._reconstruction_term(model.decoder_loss.eager(model.decoder(z), x), None)
    torch.testing.assert_close(measures["mmd"], mmd)
    torch.testing.assert_close(measures["loss"], nll + 4.0 * mmd)
    torch.testing.assert_close(measures["reconstruction"], nll)
    torch.testing.assert_close(measures["kl"], 0.0 * kl)
    torch.testing.assert_close(measures["mse"], (model.decode(mu) - x).square().mean())
    if stochastic:
        torch.testing.assert_close(measures["elbo"], -nll - kl - 6 * math.log(2 * math.pi))


def test_it_is_a_vae_without_the_mmd():
    model, x = make(kl_weight=0.7, mmd_weight=0.0), data()
    vae = VAE(**SIZES, beta=0.7, dtype=torch.float64)
    vae.load_state_dict(model.state_dict())
    torch.manual_seed(5)
    ours = model(x).loss
    torch.manual_seed(5)
    torch.testing.assert_close(ours, vae(x).loss)
    torch.manual_seed(5)
    bound = model.elbo(x)
    torch.manual_seed(5)
    torch.testing.assert_close(bound, vae.elbo(x))
    assert torch.equal(model.posterior(x)[1], vae.posterior(x)[1])
    samples = (one.sample(6, generator=torch.Generator().manual_seed(2)) for one in (model, vae))
    torch.testing.assert_close(*samples)


def test_points_have_no_noise_and_no_posterior():
    model, x = make(stochastic=False), data()
    first, second = model(x), model(x)
    assert torch.equal(first.latent, second.latent)
    assert torch.equal(first.latent, model.encode(x))
    assert torch.equal(first.reconstruction, model.eval()(x).reconstruction)
    assert not torch.equal(first.terms["mmd"], second.terms["mmd"])
    assert model.head.weight.shape == (3, 7)
    assert model.sample(5).shape == (5, 12)
    for method in (model.posterior, model.elbo):
        with pytest.raises(InputError, match=rf"{method.__name__}: .*points \(stochastic=False\)"):
            method(x)


@pytest.mark.parametrize("options", OPTIONS)
def test_round_trip(tmp_path, options):
    model, x = make(**options), data()
    model.save_pretrained(tmp_path)
    loaded = from_pretrained(tmp_path)
    assert type(loaded) is InfoVAE is MODELS["infovae"]
    assert loaded.config == model.config
    assert loaded.state_dict().keys() == model.state_dict().keys()
    torch.manual_seed(2)
    expected = model.eval()(x)
    torch.manual_seed(2)
    found = loaded(x)
    assert torch.equal(found.loss, expected.loss)
    assert torch.equal(found.reconstruction, expected.reconstruction)


@pytest.mark.parametrize("options", [{}, {"stochastic": False}, {"mmd_prior": "closed_form"}])
def test_a_batch_of_one_sample_has_no_unbiased_mmd(caplog, options):
    infovae._warn_of_few.cache_clear()
    model, x = make(**options), data(1)
    with caplog.at_level(logging.WARNING, logger="aefast"):
        model.eval()(x)
        assert not caplog.records
        model.train()
        outputs = [model(x) for _ in range(2)]
    assert [record.getMessage() for record in caplog.records] == [
        "infovae: a batch of one sample has no unbiased MMD, and its term is 0 there; where all batches are so small, "
        "take larger ones or mmd_estimator='biased'"
    ]
    assert outputs[0].terms["mmd"] == 0
    outputs[0].loss.backward()
    assert model.encoder.layers[0].weight.grad.abs().sum() > 0
    twin = model.eager_twin()
    assert model.eager_loss(twin, x).isfinite()
    biased = make(**options, mmd_estimator="biased")(x)
    assert biased.terms["mmd"] > 0


def test_a_run_with_a_last_batch_of_one_sample_goes_through(tmp_path):
    """33 of 37 samples are trained on in batches of 16, and the 4 held out are fewer than a batch."""
    dataset = Dataset("some", torch.rand(37, 12), (12,))
    training, held_out = dataset.split()
    assert len(training) % 16 == 1, len(training)
    model = InfoVAE(input_size=12, hidden=(8,), latent=2)
    config = TrainConfig(epochs=2, batch_size=16, device="cpu")
    result = Trainer(model, dataset, config, tmp_path / "run").fit(compare=False)
    assert result.step == 2 * 3
    assert math.isfinite(result.held_out["mmd"])
    assert len(held_out) > 1


@pytest.fixture
def group(tmp_path):
    """A process group of this process alone."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield torch.distributed.group.WORLD
    torch.distributed.destroy_process_group()


def test_a_group_is_asked_for_the_mmd(group):
    model, x = make(kl_weight=0.5), data()
    torch.manual_seed(4)
    expected = model(x).loss
    model.mmd.group = group
    torch.manual_seed(4)
    found = model(x).loss
    torch.testing.assert_close(found, expected)
    parameters = list(model.parameters())
    torch.testing.assert_close(*(torch.autograd.grad(loss, parameters) for loss in (found, expected)))
    assert model(data(1)).terms["mmd"] == 0
    assert copy.deepcopy(model).mmd.group is group
    closed = make(mmd_prior="closed_form")
    closed.mmd.group = group
    with pytest.raises(InputError, match=r"mmd\.group: expected None"):
        closed(x)


@pytest.mark.parametrize("ranks", [1, 2])
def test_one_sample_has_an_mmd_where_other_ranks_have_more(monkeypatch, ranks):
    model, x = make(mmd_weight=4.0), data(1)
    model.mmd.group = SimpleNamespace(size=lambda: ranks)
    monkeypatch.setattr(model.mmd, "forward", lambda z, prior: torch.tensor(0.5, dtype=z.dtype))
    assert model(x).terms["mmd"] == (2.0 if ranks > 1 else 0.0)


def test_a_training_step_compiles_whole():
    model = InfoVAE(**SIZES, kl_weight=0.5, kl_warmup_steps=2)
    compiled = InfoVAE(model.config)
    compiled.load_state_dict(model.state_dict())
    x = data().float()
    step = torch.compile(lambda x: compiled(x).loss, fullgraph=True, backend="aot_eager")
    for seed in range(3):
        torch.manual_seed(seed)
        expected = model(x).loss
        torch.manual_seed(seed)
        found = step(x)
        torch.testing.assert_close(found, expected)
        for loss, module in ((expected, model), (found, compiled)):
            module.zero_grad()
            loss.backward()
        for ours, theirs in zip(compiled.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad)
    assert compiled.training_steps == 3


def test_compiled_code_draws_what_eager_draws():
    """With inductor's own random numbers too."""
    model, x = make(kl_weight=0.5), data()
    torch.manual_seed(3)
    expected = model(x).terms
    torch.manual_seed(3)
    found = torch.compile(model, fullgraph=True)(x).terms
    for name, term in expected.items():
        torch.testing.assert_close(found[name], term)


@pytest.mark.parametrize("stochastic", [True, False])
def test_autocast(stochastic, noise):
    torch.manual_seed(0)
    model, x = InfoVAE(**SIZES, stochastic=stochastic), data(200).float()
    # One seed need not give the same numbers in two dtypes.
    prior = torch.randn(len(x), SIZES["latent"])
    noise(prior, prior)
    torch.manual_seed(1)
    expected = model(x)
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(x)
        output.loss.backward()
    assert output.latent.dtype == torch.bfloat16
    assert {term.dtype for term in output.terms.values()} == {torch.float32}
    torch.testing.assert_close(output.loss, expected.loss, rtol=0.02, atol=0)
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 1}, "unknown option 'beta', expected one of .*kl_weight"),
        ({"kl_weight": -1}, "kl_weight=-1: expected a finite number of at least 0"),
        ({"kl_weight": True}, "kl_weight=True: expected"),
        ({"mmd_weight": math.inf}, "mmd_weight=inf: expected a finite number of at least 0"),
        ({"mmd_weight": "1"}, "mmd_weight='1': expected"),
        ({"kl_warmup_steps": 5}, "kl_warmup_steps=5: expected 0, because kl_weight is 0"),
        ({"kl_warmup_steps": -5, "kl_weight": 1}, "kl_warmup_steps=-5: expected an integer of at least 0"),
        ({"likelihood": "gausian"}, "likelihood='gausian': expected one of.*did you mean 'gaussian'"),
        ({"likelihood": "bernoulli", "output_activation": "sigmoid"}, "output_activation='sigmoid'.*logits"),
        ({"stochastic": 1}, "stochastic=1: expected true or false"),
        ({"stochastic": False, "kl_weight": 1}, "kl_weight=1: expected 0, because codes that are points"),
        ({"mmd_kernel": "rfb"}, "mmd_kernel='rfb': expected one of rbf.*did you mean 'rbf'"),
        ({"mmd_kernel": None}, "mmd_kernel=None: expected one of"),
        ({"mmd_estimator": "unbiassed"}, "mmd_estimator='unbiassed': .*did you mean 'unbiased'"),
        ({"mmd_prior": "closed"}, "mmd_prior='closed': expected one of samples, closed_form"),
        ({"mmd_bandwidth": 0}, "mmd_bandwidth=0: bandwidth must be a number above 0"),
        ({"mmd_bandwidth": [1, -2]}, r"mmd_bandwidth=\(1, -2\): bandwidth must be a number above 0"),
        ({"mmd_bandwidth": []}, r"mmd_bandwidth=\(\): bandwidth must have at least one number"),
        ({"mmd_bandwidth": "wide"}, "mmd_bandwidth='wide': bandwidth must be a number above 0"),
        ({"mmd_bandwidth": 1, "mmd_kernel": "energy"}, "mmd_bandwidth=1: the energy kernel has no bandwidth"),
        ({"mmd_alpha": 2}, "mmd_alpha=2: the imq kernel has no alpha"),
        ({"mmd_alpha": 0, "mmd_kernel": "rational_quadratic"}, "mmd_alpha=0: alpha must be a number above 0"),
        (
            {"mmd_prior": "closed_form", "mmd_kernel": "laplacian"},
            "mmd_kernel='laplacian': expected one of rbf, imq, .*mmd_prior='closed_form'",
        ),
        ({"latent": 0}, "latent=0: expected a positive integer"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(InputError, match=message):
        InfoVAE(**{**SIZES, **options})


@pytest.mark.parametrize("options", [{"mmd_kernel": "imq"}, {"mmd_kernel": "rbf"}, {"stochastic": False}])
def test_training_brings_the_codes_to_the_prior(options):
    """Codes that begin far from the prior, all beside (5, 5), end as its draws do, as moments tell."""
    torch.manual_seed(0)
    model = InfoVAE(input_size=4, hidden=(32,), latent=2, mmd_weight=100.0, **options)
    with torch.no_grad():
        model.head.bias[:2] = 5.0
    x = torch.randn(512, 4)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    before = model.eval().evaluate(x)["mmd"]
    model.train()
    for _ in range(300):
        optimizer.zero_grad()
        model(x).loss.backward()
        optimizer.step()
    with torch.no_grad():
        after = model.eval().evaluate(x)["mmd"]
        z = model.train()(x).latent
    assert before > 0.5
    assert after < 0.02 * before
    # The mean and the deviation of 512 draws are uncertain by 0.044 and 0.031, of which these are three and more.
    assert z.mean(0).abs().max() < 0.15
    assert (z.std(0) - 1).abs().max() < 0.15


def run_cli(tmp_path, *arguments, data=None):
    if data is None:
        data = tmp_path / "samples.npy"
        np.save(data, np.random.default_rng(0).random((100, 12), dtype=np.float32))
    common = ("--data", data, "--out", tmp_path / "run", "--hidden", "8", "--latent", "3", "--device", "cpu")
    return cli.main(
        [
            "train",
            *map(str, (*common, "--model", "infovae", "--no-compare", "--epochs", 2, "--batch-size", 16)),
            *map(str, arguments),
        ]
    )


@pytest.fixture
def no_plots(monkeypatch):
    monkeypatch.setattr("aefast.train.Trainer._plot", lambda trainer: None)


def test_options_of_the_command_reach_the_model(no_plots, tmp_path, capsys):
    objective = ("--kl-weight", 0.5, "--kl-warmup", 7, "--mmd-weight", 20, "--likelihood", "gaussian")
    mmd = ("--mmd-kernel", "rbf", "--mmd-bandwidth", "1,2.5", "--mmd-estimator", "biased")
    assert run_cli(tmp_path, *objective, *mmd) == 0
    assert from_pretrained(tmp_path / "run").config == InfoVAEConfig(
        input_size=12,
        hidden=(8,),
        latent=3,
        likelihood="gaussian",
        kl_weight=0.5,
        kl_warmup_steps=7,
        mmd_weight=20.0,
        mmd_kernel="rbf",
        mmd_bandwidth=(1.0, 2.5),
        mmd_estimator="biased",
    )
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    last = json.loads(lines[-1])
    assert {"reconstruction", "kl", "mmd", "val_mmd", "val_elbo", "val_psnr", "val_loss"} <= last.keys()
    told = rf"MMD² to the prior {last['val_mmd']:.2e} · reconstruction {last['val_psnr']:.1f} dB \(held out\)"
    assert re.fullmatch(told, capsys.readouterr().out.splitlines()[-1])
    points = ("--overwrite", "--deterministic", "--mmd-bandwidth", 2, "--mmd-prior", "closed_form")
    assert run_cli(tmp_path, *points) == 0
    config = from_pretrained(tmp_path / "run").config
    assert (config.stochastic, config.mmd_bandwidth, config.mmd_prior) == (False, 2.0, "closed_form")
    assert run_cli(tmp_path, "--resume", *points[1:], "--epochs", 3) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--mmd-weight", "-1"), "model infovae: mmd_weight=-1.0: expected a finite number of at least 0"),
        (("--mmd-weight", "nan"), "mmd_weight=nan: expected a finite number"),
        (("--mmd-bandwidth", "1,wide"), "mmd_bandwidth='1,wide': expected a number above 0, or several"),
        (("--mmd-bandwidth", ""), "mmd_bandwidth='': expected a number above 0"),
        (("--mmd-bandwidth", "0"), "mmd_bandwidth=0.0: bandwidth must be a number above 0"),
        (("--mmd-kernel", "gauss"), "mmd_kernel='gauss': expected one of rbf"),
        (("--kl-warmup", "10"), "kl_warmup_steps=10: expected 0, because kl_weight is 0"),
        (("--deterministic", "--kl-weight", "1"), "kl_weight=1.0: expected 0, because codes that are points"),
        (("--beta", "1"), "model infovae: unknown option 'beta', expected one of"),
        (("--model", "vae", "--mmd-weight", "1"), "model vae: unknown option 'mmd_weight'"),
        (("--model", "vae", "--deterministic"), "model vae: unknown option 'stochastic'"),
    ],
)
def test_bad_flags_end_in_one_line(no_plots, tmp_path, capsys, arguments, message):
    assert run_cli(tmp_path, *arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert re.search(message, line)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("is_eager", [False, True])
def test_both_steps_train_in_half_precision(is_eager):
    torch.manual_seed(0)
    model = InfoVAE(input_size=16, hidden=(32,), latent=4, dtype=torch.bfloat16)
    x = torch.rand(64, 16).bfloat16()
    step = (
        EagerStep(model, 1e-3) if is_eager else CapturedStep(model, make_optimizer(model.parameters(), 1e-3))
    )
    for _ in range(3):
        step(x)
    trained = step.twin if is_eager else model
    assert all(parameter.isfinite().all() for parameter in trained.parameters())

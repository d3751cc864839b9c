"""The variational autoencoder: its bound beside torch.distributions, its warm-up, its modes."""

import math

import pytest
import torch
from torch.distributions import Bernoulli, Normal, kl_divergence
from torch.utils.checkpoint import checkpoint

import aefast.functional as AF
from aefast.errors import InputError
from aefast.models import MODELS, VAE, InfoVAE, ModelOutput, VAEConfig, from_pretrained
from aefast.models.vae import LIKELIHOODS, LOGVAR_RANGE
from support.noise import next_normals

SIZES = {"input_size": 12, "hidden": (9, 7), "latent": 3}


def make(**options):
    torch.manual_seed(0)
    model = VAE(**{**SIZES, **options}, dtype=torch.float64)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def data(rows=10):
    return torch.rand(rows, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def bound(model, x, eps):
    """log p(x|z), the mean over the batch, and the KL divergence, written with torch.distributions; and z and mu."""
    weights = dict(model.named_parameters())
    h = x
    for index in range(len(model.config.hidden)):
        h = torch.relu(h @ weights[f"encoder.{2 * index}.weight"].T + weights[f"encoder.{2 * index}.bias"])
    mu, logvar = (h @ weights["head.weight"].T + weights["head.bias"]).chunk(2, -1)
    q = Normal(mu, torch.exp(logvar.clamp(*LOGVAR_RANGE) / 2))
    z = out = mu + q.stddev * eps
    layers = len(model.config.decoder_widths)
    for index in range(layers + 1):
        out = out @ weights[f"decoder.{2 * index}.weight"].T + weights[f"decoder.{2 * index}.bias"]
        out = torch.relu(out) if index < layers else out
    likelihood = {
        "mse": lambda: Normal(out, 1.0),
        "gaussian": lambda: Normal(
            out, torch.exp(model.log_variance / 2) if model.log_variance is not None else 1
        ),
        "bernoulli": lambda: Bernoulli(logits=out, validate_args=False),
    }[model.config.likelihood]()
    log_likelihood = likelihood.log_prob(x).sum(-1).mean()
    return log_likelihood, kl_divergence(q, Normal(0.0, 1.0)).sum(-1).mean(), z, mu


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("options", [{}, {"hidden": ()}, {"linear_decoder": True, "beta": 0.25}, {"beta": 4}])
def test_loss_and_gradients_are_the_negative_bound(likelihood, options):
    model, x = make(likelihood=likelihood, **options), data()
    eps = next_normals(10, 3)
    output = model(x)
    log_likelihood, kl, z, _ = bound(model, x, eps)
    constant = 6 * math.log(2 * math.pi) if likelihood == "mse" else 0.0
    expected = -log_likelihood - constant + model.config.beta * kl

    torch.testing.assert_close(output.loss, expected)
    torch.testing.assert_close(output.terms["reconstruction"], -log_likelihood - constant)
    torch.testing.assert_close(output.terms["kl"], model.config.beta * kl)
    assert torch.equal(sum(output.terms.values()), output.loss)
    torch.testing.assert_close(output.latent, z)
    torch.testing.assert_close(output.reconstruction, model.decode(z))
    parameters = list(model.parameters())
    ours, true = (torch.autograd.grad(loss, parameters) for loss in (output.loss, expected))
    torch.testing.assert_close(ours, true)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("training", [True, False])
def test_elbo_has_all_constants_and_no_beta(likelihood, training):
    model, x = make(likelihood=likelihood, beta=7.0, kl_warmup_steps=5).train(training), data()
    eps = next_normals(10, 3)
    log_likelihood, kl, *_ = bound(model, x, eps)
    torch.testing.assert_close(model.elbo(x.reshape(10, 3, 2, 2)), log_likelihood - kl)
    assert model.training_steps == 0


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_elbo_of_each_row(likelihood):
    model, x = make(likelihood=likelihood, beta=7.0), data()
    torch.manual_seed(2)
    eps = next_normals(10, 3)
    mean = model.elbo(x)
    torch.manual_seed(2)
    each = model.elbo(x.reshape(10, 3, 2, 2), reduction="none")
    assert each.shape == (10,)
    torch.testing.assert_close(each.mean(), mean)
    torch.testing.assert_close(model.elbo(x, reduction="none", noise=eps), each)
    torch.testing.assert_close(model.elbo(x, noise=eps), mean)
    # A row's is its own, from the sum over features to the divergence.
    for row in range(10):
        alone = model.elbo(x[row : row + 1], noise=eps[row])
        torch.testing.assert_close(alone, each[row])
    with pytest.raises(InputError, match=r"elbo: noise must be of shape \(10, 3\) or \(3,\), got \(10, 2\)"):
        model.elbo(x, noise=eps[:, :2])
    with pytest.raises(InputError, match="reduction='sum': expected one of mean, none"):
        model.elbo(x, reduction="sum")


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_the_eager_loss_is_the_same(likelihood, monkeypatch):
    model, x = make(likelihood=likelihood, beta=0.5, kl_warmup_steps=3), data()
    twin = model.eager_twin()
    for _ in range(5):
        eps = next_normals(10, 3)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "randn_like", lambda like, eps=eps: eps)
            theirs = model.eager_loss(twin, x)
        ours = model(x).loss
        torch.testing.assert_close(ours, theirs)
        gradients = [
            torch.autograd.grad(loss, list(module.parameters()))
            for loss, module in ((ours, model), (theirs, twin))
        ]
        torch.testing.assert_close(*gradients)
    assert twin.training_steps == model.training_steps == 5


@pytest.mark.parametrize("options", [{}, {"hidden": ()}, {"likelihood": "gaussian", "kl_warmup_steps": 4}])
def test_model_and_twin_exchange_state_dicts(options):
    model, x = make(**options), data()
    model(x)
    twin = model.eager_twin()
    assert list(twin.state_dict()) == list(model.state_dict())
    other = VAE(model.config, dtype=torch.float64)
    other.load_state_dict(twin.state_dict())
    torch.testing.assert_close(other.eval()(x).reconstruction, model.eval()(x).reconstruction)
    torch.testing.assert_close(model.eager_twin()(x), model(x).reconstruction)
    with torch.no_grad():
        twin.head.weight.zero_()
    assert model.head.weight.abs().sum() > 0


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_eval_reconstructs_from_the_mean_and_still_samples_its_loss(likelihood):
    model, x = make(likelihood=likelihood, beta=2.0, kl_warmup_steps=100).eval(), data()
    eps = next_normals(10, 3)
    output = model(x)
    log_likelihood, kl, _, mu = bound(model, x, eps)
    constant = 6 * math.log(2 * math.pi) if likelihood == "mse" else 0.0
    torch.testing.assert_close(output.latent, mu)
    torch.testing.assert_close(output.latent, model.encode(x))
    torch.testing.assert_close(output.reconstruction, model.decode(mu))
    torch.testing.assert_close(output.loss, -log_likelihood - constant + 2.0 * kl)
    again = model(x)
    assert torch.equal(again.reconstruction, output.reconstruction)
    assert not torch.equal(again.loss, output.loss)
    assert model.training_steps == 0


def test_training_samples_and_torchs_seed_repeats_it():
    model, x = make(), data()
    torch.manual_seed(5)
    first, second = model(x), model(x)
    assert not torch.equal(first.latent, second.latent)
    torch.manual_seed(5)
    repeated = model(x)
    assert torch.equal(repeated.latent, first.latent)
    assert torch.equal(repeated.loss, first.loss)


def test_evaluate_tells_loss_error_and_bound():
    model, x = make(beta=3.0).eval(), data()
    log_likelihood, kl, _, mu = bound(model, x, next_normals(10, 3))
    measures = model.evaluate(x)
    assert measures.keys() == {"loss", "reconstruction", "kl", "mse", "elbo"}
    torch.testing.assert_close(measures["kl"], 3 * kl)
    torch.testing.assert_close(measures["loss"], measures["reconstruction"] + measures["kl"])
    torch.testing.assert_close(measures["elbo"], log_likelihood - kl)
    torch.testing.assert_close(measures["loss"], -log_likelihood - 6 * math.log(2 * math.pi) + 3 * kl)
    torch.testing.assert_close(measures["mse"], ((model.decode(mu) - x) ** 2).mean())


def test_posterior_is_within_its_range():
    model, x = make(), data()
    with torch.no_grad():
        model.head.bias[3:] = torch.tensor([500.0, -500.0, 0.0])
    mu, logvar = model.posterior(x)
    assert torch.equal(mu, model.encode(x))
    low, high = LOGVAR_RANGE
    assert logvar[:, 0].eq(high).all()
    assert logvar[:, 1].eq(low).all()
    assert logvar[:, 2].abs().max() < high
    output = model(x)
    output.loss.backward()
    assert output.loss.isfinite()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_kl_weight_grows_over_the_warm_up():
    model, x = make(beta=0.5, kl_warmup_steps=4), data()
    kl = bound(model, x, torch.zeros(10, 3, dtype=torch.float64))[1]
    weights = [(model(x).terms["kl"] / kl).item() for _ in range(7)]
    assert weights == pytest.approx([0.0, 0.125, 0.25, 0.375, 0.5, 0.5, 0.5])
    assert model.training_steps == 7
    assert (model.eval()(x).terms["kl"] / kl).item() == pytest.approx(0.5)
    assert model.training_steps == 7


def test_the_warm_up_goes_on_where_it_was(tmp_path):
    model, x = make(kl_warmup_steps=8), data()
    for _ in range(3):
        model(x)
    model.save_pretrained(tmp_path)
    loaded = from_pretrained(tmp_path)
    assert loaded.training_steps == 3
    assert not loaded.training
    torch.manual_seed(1)
    expected = model(x).terms["kl"]
    torch.manual_seed(1)
    torch.testing.assert_close(loaded.train()(x).terms["kl"], expected)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_round_trip(tmp_path, likelihood):
    model, x = make(likelihood=likelihood, beta=1.5), data()
    model.save_pretrained(tmp_path)
    loaded = from_pretrained(tmp_path)
    assert type(loaded) is VAE is MODELS["vae"]
    assert loaded.config == model.config
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert ("log_variance" in loaded.state_dict()) == (likelihood == "gaussian")
    torch.manual_seed(2)
    expected = model.eval()(x)
    torch.manual_seed(2)
    found = loaded(x)
    assert torch.equal(found.loss, expected.loss)
    assert torch.equal(found.reconstruction, expected.reconstruction)


def test_sample_decodes_draws_from_the_prior():
    model = make(likelihood="bernoulli")
    drawn = model.sample(40, generator=torch.Generator().manual_seed(3))
    z = torch.randn(40, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(drawn, model.decode(z))
    assert drawn.min() > 0
    assert drawn.max() < 1
    with pytest.raises(InputError, match="count=0: expected a positive integer"):
        model.sample(0)


@pytest.mark.parametrize("value", [-0.01, 1.01, math.nan, math.inf])
def test_bernoulli_refuses_what_is_no_probability(value):
    model, x = make(likelihood="bernoulli"), data()
    x[4, 2] = value
    with pytest.raises(InputError, match=r"x: expected values in \[0, 1\] for the bernoulli likelihood, got"):
        model(x)
    with pytest.raises(InputError, match="x: expected values"):
        model.elbo(x)
    assert make(likelihood="gaussian")(data() - 5).loss.isfinite()


def test_a_training_step_compiles_whole():
    model = VAE(**SIZES, likelihood="bernoulli", kl_warmup_steps=2)
    compiled = VAE(model.config)
    compiled.load_state_dict(model.state_dict())
    x = data().float()
    step = torch.compile(lambda x: compiled(x).loss, fullgraph=True, backend="aot_eager")
    for seed in range(4):
        # The second batch is the first part of a step, and the third its last.
        model.ends_step = compiled.ends_step = seed != 1
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


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_autocast(likelihood):
    torch.manual_seed(0)
    model, x = VAE(**SIZES, likelihood=likelihood), data(200).float()
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


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_training_raises_the_bound(likelihood):
    torch.manual_seed(0)
    model = VAE(input_size=16, hidden=(32,), latent=4, likelihood=likelihood)
    x = torch.rand(256, 3) @ torch.rand(3, 16) / 3
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    before = model.eval().elbo(x).item()
    model.train()
    for _ in range(60):
        optimizer.zero_grad()
        model(x).loss.backward()
        optimizer.step()
    assert model.eval().elbo(x).item() > before + 0.1


def test_the_learnt_variance_is_the_mean_squared_error():
    """Where its gradient vanishes, that is: Rybkin et al., section 3."""
    model, x = make(likelihood="gaussian"), data()
    torch.manual_seed(1)
    error = ((model(x).reconstruction - x) ** 2).mean()
    with torch.no_grad():
        model.log_variance.copy_(error.log())
    torch.manual_seed(1)
    (gradient,) = torch.autograd.grad(model(x).loss, [model.log_variance])
    assert gradient.abs() < 1e-12


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"likelihood": "bernouli"}, "likelihood='bernouli': expected one of mse.*did you mean 'bernoulli'"),
        ({"likelihood": None}, "likelihood=None: expected one of"),
        ({"likelihood": "bernoulli", "output_activation": "sigmoid"}, "output_activation='sigmoid'.*logits"),
        ({"beta": -1}, "beta=-1: expected a finite number of at least 0"),
        ({"beta": math.inf}, "beta=inf"),
        ({"beta": "1"}, "beta='1'"),
        ({"beta": True}, "beta=True"),
        ({"kl_warmup_steps": -1}, "kl_warmup_steps=-1: expected an integer of at least 0"),
        ({"kl_warmup_steps": 2.0}, "kl_warmup_steps=2.0"),
        ({"kl_warmup_steps": False}, "kl_warmup_steps=False"),
        ({"latent": 0}, "latent=0: expected a positive integer"),
        ({"gamma": 1}, "unknown option 'gamma'"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(InputError, match=message):
        VAE(**{**SIZES, **options})


@pytest.mark.parametrize("ends_step", [True, False])
def test_a_checkpoint_repeats_the_weight_of_its_pass(ends_step):
    """What it computes again in the backward is the pass as it was, and counts once, if at all."""

    def step(run):
        torch.manual_seed(3)
        model = make(kl_warmup_steps=4).train()
        model.training_steps.fill_(1)
        model.ends_step = ends_step
        torch.manual_seed(4)
        loss = run(lambda x: model(x).loss, data())
        loss.backward()
        return loss.detach(), model.training_steps, *(parameter.grad for parameter in model.parameters())

    found = step(lambda loss, x: checkpoint(loss, x, use_reentrant=False))
    for ours, theirs in zip(found, step(lambda loss, x: loss(x)), strict=True):
        assert torch.equal(ours, theirs)
    assert found[1] == (2 if ends_step else 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_no_logvar_makes_anything_infinite(dtype):
    limits = torch.tensor([-1e4, 1e4], dtype=dtype).repeat(64, 32).requires_grad_()
    mu = torch.zeros_like(limits, requires_grad=True)
    inside = torch.full_like(limits, LOGVAR_RANGE[1], requires_grad=True)
    for logvar in (limits, inside):
        z, kl = AF.reparameterize(mu, logvar, seed=0, logvar_range=LOGVAR_RANGE)
        gradients = torch.autograd.grad(z.float().mean() + kl, (mu, logvar))
        assert all(one.isfinite().all() for one in (z, kl, *gradients))


def test_a_config_of_another_model_is_refused():
    with pytest.raises(InputError, match="config: expected AutoencoderConfig, got VAEConfig"):
        MODELS["autoencoder"](VAEConfig(input_size=4))
    with pytest.raises(InputError, match=r"x: expected shape \(B, 12\)"):
        make().elbo(torch.rand(3, 5))


class CountsVAE(VAE):
    """Of a Poisson likelihood, whose rates are exp of what the decoder gives."""

    def forward(self, x):
        z, kl, _, _ = self.head(self.encoder(self.flatten(x)))
        rate = self.decoder(z).exp()
        reconstruction = torch.nn.functional.poisson_nll_loss(
            rate, x, log_input=False, reduction="sum"
        ) / len(x)
        return ModelOutput(rate, z, reconstruction + kl, {"reconstruction": reconstruction, "kl": kl})


@pytest.mark.parametrize("base", [VAE, InfoVAE])
def test_a_loss_of_a_subclass_is_what_is_evaluated(base):
    torch.manual_seed(0)
    model = type("Counts", (CountsVAE, base), {})(**SIZES).eval()
    x = torch.poisson(torch.full((10, 12), 2.0))
    torch.manual_seed(5)
    expected = model(x)
    torch.manual_seed(5)
    measures = model.evaluate(x)
    assert "elbo" not in measures
    torch.testing.assert_close(measures["loss"], expected.loss)
    for name in ("reconstruction", "kl"):
        torch.testing.assert_close(measures[name], expected.terms[name])
    torch.testing.assert_close(measures["mse"], (expected.reconstruction - x).square().mean())


def test_a_subclass_with_other_methods_is_evaluated_as_ever():
    def halved(self, x):
        return self.encode(x) / 2

    assert "elbo" in type("Halved", (VAE,), {"halved": halved})(**SIZES).evaluate(data().float())

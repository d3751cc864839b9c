"""Training with aefast's ops reaches what training in plain PyTorch reaches, on real photographs."""

import copy

import pytest
import torch

from aefast.data import load
from aefast.models import VAE, InfoVAE
from aefast.ops import _philox
from aefast.train.step import CapturedStep, EagerStep, make_optimizer

pytestmark = pytest.mark.slow
EPOCHS, BATCH, RATE = 3, 256, 1e-3


@pytest.fixture(scope="module")
def patches():
    """Training and held-out patches of 16 × 16 pixels, (n, 256) each."""
    dataset = load("patches")
    train, held_out = (dataset.samples[rows].float().flatten(1) for rows in dataset.split())
    return train[:40_000], held_out


def held_out_elbo(model, state, held_out):
    """In nats, with noise that is the same for every state."""
    model.load_state_dict(state)
    with torch.no_grad():
        torch.manual_seed(0)
        return torch.stack([model.elbo(batch) for batch in held_out.split(4000)]).mean().item()


@pytest.mark.parametrize("seed", [0])
def test_a_vae_reaches_the_elbo_of_its_eager_twin(patches, seed):
    """Both sides begin with the same weights and see the same batches; each draws noise of its own."""
    train, held_out = patches
    torch.manual_seed(seed)
    model = VAE(input_size=256, hidden=(512,), latent=16, likelihood="gaussian").train()
    # Near where it ends; from 0 a scalar takes a thousand steps a unit.
    torch.nn.init.constant_(model.log_variance, -4.0)
    start = copy.deepcopy(model)
    begin = held_out_elbo(copy.deepcopy(model), model.state_dict(), held_out)
    fused, eager = CapturedStep(model, make_optimizer(model.parameters(), RATE)), EagerStep(start, RATE)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(train)).split(BATCH):
            fused(train[rows])
            eager(train[rows])
    ours = held_out_elbo(start, model.state_dict(), held_out)
    theirs = held_out_elbo(start, eager.twin.state_dict(), held_out)
    assert theirs > begin + 100
    assert abs(ours - theirs) < 0.01 * abs(theirs), f"{ours:.2f} nats beside {theirs:.2f}"
    print(f"seed {seed}: held-out ELBO {ours:.2f} nats, eager {theirs:.2f}")


def held_out_measures(model, state, held_out):
    """What `evaluate` gives, with noise that is the same for every state."""
    model.load_state_dict(state)
    with torch.no_grad():
        torch.manual_seed(0)
        found = [model.eval().evaluate(batch) for batch in held_out.split(2000)]
    return {name: torch.stack([one[name] for one in found]).mean().item() for name in found[0]}


@pytest.mark.parametrize("options", [{"stochastic": False}, {"likelihood": "gaussian", "kl_weight": 0.5}])
def test_an_infovae_reconstructs_as_well_as_its_eager_twin(patches, monkeypatch, options):
    """Both sides begin with the same weights, and see the same batches, noise and prior samples."""

    def normals(like):
        return _philox.normals(_philox.seed_of(None, None, like, "test"), like.shape, like.dtype)

    monkeypatch.setattr(torch, "randn_like", normals)
    train, held_out = patches[0][:20_000], patches[1]
    torch.manual_seed(0)
    model = InfoVAE(input_size=256, hidden=(512,), latent=16, **options).train()
    if model.log_variance is not None:
        torch.nn.init.constant_(model.log_variance, -4.0)
    start = copy.deepcopy(model)
    begin = held_out_measures(copy.deepcopy(model), model.state_dict(), held_out)
    fused, eager = CapturedStep(model, make_optimizer(model.parameters(), RATE)), EagerStep(start, RATE)
    for epoch in range(EPOCHS):
        # At a constant rate the last few batches would decide a tenth of the error.
        for step in (fused, eager):
            step.optimizer.param_groups[0]["lr"] = RATE if epoch + 1 < EPOCHS else 0.1 * RATE
        for index, rows in enumerate(torch.randperm(len(train)).split(BATCH)):
            for step in (fused, eager):
                torch.manual_seed(1000 * (epoch + 1) + index)
                step(train[rows])
    ours = held_out_measures(start, model.state_dict(), held_out)
    theirs = held_out_measures(start, eager.twin.state_dict(), held_out)
    assert theirs["mse"] < 0.1 * begin["mse"]
    assert abs(ours["mse"] - theirs["mse"]) < 0.02 * theirs["mse"], f"{ours} beside {theirs}"
    assert abs(ours["mmd"] - theirs["mmd"]) < 0.05 * theirs["mmd"], f"{ours} beside {theirs}"
    # Codes with noise are the prior's from the start, where they say nothing of the samples; points are all alike.
    if not model.config.stochastic:
        assert ours["mmd"] < 0.2 * begin["mmd"]
    print(f"held-out {ours}, eager {theirs}, before {begin}")

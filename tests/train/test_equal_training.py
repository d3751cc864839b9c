"""Training with aefast's ops reaches what training in plain PyTorch reaches, on real photographs."""

import copy

import pytest
import torch

from aefast.data import load
from aefast.models import VAE
from aefast.train.step import EagerStep, TrainStep

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


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_vae_reaches_the_elbo_of_its_eager_twin(patches, seed):
    """Both sides begin with the same weights and see the same batches; each draws noise of its own."""
    train, held_out = patches
    torch.manual_seed(seed)
    model = VAE(input_size=256, hidden=(512,), latent=16, likelihood="gaussian").train()
    # Near where it ends; from 0 a scalar takes a thousand steps a unit.
    torch.nn.init.constant_(model.log_variance, -4.0)
    start = copy.deepcopy(model)
    begin = held_out_elbo(copy.deepcopy(model), model.state_dict(), held_out)
    fused, eager = TrainStep(model, RATE), EagerStep(start, RATE)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(train)).split(BATCH):
            fused(train[rows])
            eager(train[rows])
    ours = held_out_elbo(start, model.state_dict(), held_out)
    theirs = held_out_elbo(start, eager.twin.state_dict(), held_out)
    assert theirs > begin + 100
    assert abs(ours - theirs) < 0.01 * abs(theirs), f"{ours:.2f} nats beside {theirs:.2f}"
    print(f"seed {seed}: held-out ELBO {ours:.2f} nats, eager {theirs:.2f}")

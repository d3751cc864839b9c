"""Models of pythae, trained by pythae with and without `aefast.patch`."""

import copy

import pytest
import torch
from torch import nn

import aefast
from aefast.ops import _philox
from aefast.patch import _pythae

pytest.importorskip("pythae", reason="its models are those of pythae, which is not installed")

from pythae.data.datasets import BaseDataset
from pythae.models import (
    AE,
    INFOVAE_MMD,
    VAE,
    WAE_MMD,
    AEConfig,
    BetaVAE,
    BetaVAEConfig,
    INFOVAE_MMD_Config,
    VAEConfig,
    WAE_MMD_Config,
)
from pythae.models.base.base_utils import ModelOutput
from pythae.models.nn import BaseEncoder
from pythae.trainers import BaseTrainer, BaseTrainerConfig

# The weights make the discrepancy as large as the reconstruction's loss, and its gradient as visible.
CASES = [
    (AE, AEConfig, {}),
    (VAE, VAEConfig, {}),
    (VAE, VAEConfig, {"reconstruction_loss": "bce"}),
    (WAE_MMD, WAE_MMD_Config, {"reg_weight": 100.0}),
    (WAE_MMD, WAE_MMD_Config, {"reg_weight": 100.0, "scales": None, "kernel_bandwidth": 0.5}),
    (
        WAE_MMD,
        WAE_MMD_Config,
        {"reg_weight": 100.0, "kernel_choice": "rbf", "reconstruction_loss_scale": 2.0},
    ),
    (INFOVAE_MMD, INFOVAE_MMD_Config, {"alpha": 0.25, "lbd": 100.0}),
    (INFOVAE_MMD, INFOVAE_MMD_Config, {"lbd": 100.0, "kernel_choice": "rbf", "reconstruction_loss": "bce"}),
]
IDS = [" ".join([case[0].__name__, *map(str, case[2].values())]) for case in CASES]


def make(model_class, config_class, options):
    torch.manual_seed(0)
    return model_class(config_class(input_dim=(1, 6, 6), latent_dim=4, **options))


def data(rows=64):
    return torch.rand(rows, 1, 6, 6, generator=torch.Generator().manual_seed(1))


def results(model, x):
    torch.manual_seed(2)
    output = model({"data": x})
    return dict(output), torch.autograd.grad(output.loss, list(model.parameters()))


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_losses_and_gradients_are_pythaes(case):
    model, x = make(*case), data()
    keys, parameters = list(model.state_dict()), list(model.parameters())
    before = results(model, x)
    report = aefast.patch(model, noise="torch")
    assert list(model.state_dict()) == keys
    assert all(new is old for new, old in zip(model.parameters(), parameters, strict=True))
    after = results(model, x)
    assert list(after[0]) == list(before[0])
    # A discrepancy is the difference of means of up to seven kernels of about 1, each rounded.
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
    report.undo()
    again = results(model, x)
    assert all(torch.equal(again[0][key], before[0][key]) for key in before[0])
    assert all(torch.equal(*pair) for pair in zip(again[1], before[1], strict=True))


@pytest.mark.parametrize("case", [CASES[1], CASES[6]], ids=["VAE", "INFOVAE_MMD"])
def test_noise_of_the_fused_op(case, monkeypatch):
    """That pythae's own methods give the same on the noise that the op draws."""

    def normals(like, **options):
        return _philox.normals(_philox.seed_of(None, None, like, "randn_like"), like.shape, like.dtype)

    monkeypatch.setattr(torch, "randn_like", normals)
    model, x = make(*case), data()
    before = results(model, x)
    report = aefast.patch(model)
    assert report.swapped[0].what.startswith(f"{type(model).__name__} → reparameterize, ")
    torch.testing.assert_close(results(model, x), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", [CASES[1], CASES[3], CASES[6]], ids=["VAE", "WAE_MMD", "INFOVAE_MMD"])
def test_trained_by_pythae(case, tmp_path):
    course = {}
    for is_patched in (False, True):
        model = make(*case)
        if is_patched:
            aefast.patch(model, noise="torch")
        folder = tmp_path / str(is_patched)
        config = BaseTrainerConfig(
            output_dir=str(folder),
            num_epochs=3,
            per_device_train_batch_size=32,
            learning_rate=1e-3,
            no_cuda=True,
        )
        labelled = BaseDataset(data(), torch.zeros(64))
        BaseTrainer(model, labelled, training_config=config).train()
        (saved,) = folder.glob("*/final_model")
        # What pythae saved of a patched model is a model of pythae's.
        loaded = case[0].load_from_folder(str(saved))
        assert type(loaded) is case[0]
        course[is_patched] = results(loaded, data())
    start = results(make(*case), data())
    assert course[False][0]["loss"] < start[0]["loss"]
    # Six steps of Adam, whose first are of one size however small a gradient is: roundings grow.
    torch.testing.assert_close(course[True][0]["loss"], course[False][0]["loss"], rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    "name", ["encoder.embedding", "encoder.layers.0.0", "encoder.layers", "decoder.layers.1"]
)
def test_skipped_layers_run_alone(name, monkeypatch):
    model, run_alone = make(*CASES[1]), []
    forward = nn.Linear.forward

    def recorded(self, x):
        run_alone.append(self)
        return forward(self, x)

    monkeypatch.setattr(nn.Linear, "forward", recorded)
    report = aefast.patch(model, skip=[name])
    left = {entry.where: entry.reason for entry in report.left}
    assert left[name] == "it is skipped"
    assert left[name.partition(".")[0]] == "a part of it is skipped, and its layers are taken together"
    model({"data": data()})
    skipped = {one for one in model.get_submodule(name).modules() if isinstance(one, nn.Linear)}
    assert skipped <= set(run_alone)
    # The other of the two networks is one stack.
    other = model.encoder if name.startswith("decoder") else model.decoder
    assert set(run_alone).isdisjoint(other.modules())


class Encoder(BaseEncoder):
    """One of a user's own."""

    def __init__(self):
        super().__init__()
        self.hidden = nn.Linear(36, 16)
        self.embedding = nn.Linear(16, 4)
        self.log_var = nn.Linear(16, 4)

    def forward(self, x):
        h = torch.tanh(self.hidden(x.flatten(1)))
        return ModelOutput(embedding=self.embedding(h), log_covariance=self.log_var(h))


class Mine(VAE):
    def __init__(self, config):
        super().__init__(config, encoder=Encoder())


class Weighted(Mine):
    def loss_function(self, recon_x, x, mu, log_var, z):
        loss, recon_loss, kl = super().loss_function(recon_x, x, mu, log_var, z)
        return loss + 3 * kl, recon_loss, kl


@pytest.mark.parametrize("model_class", [Mine, Weighted])
def test_models_derived_from_pythaes(model_class):
    model, x = make(model_class, VAEConfig, {}), data()
    before = results(model, x)
    report = aefast.patch(model, noise="torch")
    torch.testing.assert_close(results(model, x), before, rtol=1e-4, atol=1e-5)
    found = {entry.where: entry.what for entry in report.swapped}
    assert found["encoder:forward"] == "torch.tanh(self.hidden(x.flatten(1))) → linear_act"
    assert ("" in found) == (model_class is Mine)
    if model_class is Weighted:
        (entry,) = (entry for entry in report.left if entry.where == "")
        assert entry.reason == "Weighted has methods of its own, for which aefast has nothing"


def test_models_without_an_adapter_and_other_versions_are_left(monkeypatch):
    (entry,) = (entry for entry in aefast.patch(make(BetaVAE, BetaVAEConfig, {})).left if entry.where == "")
    assert entry.reason == "BetaVAE has methods of its own, for which aefast has nothing"
    monkeypatch.setattr(_pythae, "VERSION", "0.0.9")
    model = make(*CASES[1])
    (entry,) = (entry for entry in aefast.patch(model).left if entry.where == "")
    assert entry.reason.startswith("aefast knows the methods of pythae 0.0.9, and this is ")
    assert type(model) is VAE


def test_what_the_ops_do_not_take_goes_to_pythae():
    """One sample, of whose code there are no pairs; and a hole in the data."""
    for x in (data(1), torch.full_like(data(4), float("nan"))):
        model = make(*CASES[3])
        expected = results(model, x)[0]
        aefast.patch(model)
        found = results(model, x)[0]
        assert list(found) == list(expected)
        torch.testing.assert_close(found["loss"], expected["loss"], equal_nan=True)
        assert found["mmd_loss"].isnan()


@pytest.mark.parametrize("case", [CASES[0], CASES[1]], ids=["AE", "VAE"])
def test_heads_go_with_the_encoders_layers(case):
    """Unless one of them has got a hook, which is called, or single layers' outputs are asked for."""
    model, x = make(*case), data()
    expected = dict(model.encoder(x, output_layer_levels=[1]))
    report = aefast.patch(model)
    assert not [entry for entry in report.left if entry.where.startswith("encoder")]
    torch.testing.assert_close(dict(model.encoder(x, output_layer_levels=[1])), expected)
    del expected["embedding_layer_1"]
    found = dict(model.encoder(x))
    assert list(found) == list(expected)
    torch.testing.assert_close(found, expected)
    heads = [model.encoder.embedding] + ([model.encoder.log_var] if case[0] is VAE else [])
    for head in heads:
        seen = []
        handle = head.register_forward_hook(lambda module, inputs, out, seen=seen: seen.append(out))
        torch.testing.assert_close(dict(model.encoder(x)), expected)
        handle.remove()
        assert len(seen) == 1


def test_outputs_of_single_layers_and_copies():
    model, x = make(*CASES[1]), data()
    model.eval()
    z = torch.randn(5, 4)
    expected = model.decoder(z, output_layer_levels=[1, -1])
    aefast.patch(model, noise="torch")
    found = copy.deepcopy(model).decoder(z, output_layer_levels=[1, -1])
    assert list(found) == list(expected)
    torch.testing.assert_close(dict(found), dict(expected))
    assert model.reconstruct(x).shape == x.shape

"""Models with convolutions, and with encoders and decoders of one's own."""

import contextlib
import copy
import json
import math
import pickle
import re
import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import aefast
from aefast import cli
from aefast.data import Dataset
from aefast.errors import InputError
from aefast.models import (
    VAE,
    Autoencoder,
    DenoisingAutoencoder,
    InfoVAE,
    SparseAutoencoder,
    StochasticAutoencoder,
    from_pretrained,
)
from aefast.nn import MLP, Corrupt
from aefast.sampling import codes_of
from aefast.train import CapturedStep, TrainConfig, Trainer, make_optimizer

SHAPE = (2, 6, 6)
FEATURES = 72
LATENT = 5
# What the encoder of each model gives for a sample.
GIVES = {
    Autoencoder: LATENT,
    DenoisingAutoencoder: LATENT,
    StochasticAutoencoder: LATENT,
    VAE: 12,
    InfoVAE: 12,
}
MODELS = pytest.mark.parametrize("model_class", GIVES, ids=lambda one: one.__name__)


class Encoder(nn.Sequential):
    def __init__(self, features):
        super().__init__(
            nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, features, 3)
        )


class Decoder(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.Unflatten(1, (LATENT, 1, 1)),
            nn.ConvTranspose2d(LATENT, 4, 3),
            nn.ReLU(),
            nn.ConvTranspose2d(4, 2, 2, stride=2),
        )


def make(model_class, encoder=None, decoder=None, **options):
    gives = GIVES[model_class]
    if model_class in (VAE, InfoVAE):
        options.setdefault("hidden", (gives,))
    return model_class(
        input_size=FEATURES,
        latent=LATENT,
        image_shape=SHAPE,
        encoder=Encoder(gives) if encoder is None else encoder,
        decoder=Decoder() if decoder is None else decoder,
        **options,
    )


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@contextlib.contextmanager
def ops_called():
    """The names of aefast's ops that are called within it."""

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "aefast":
                called.append(func._opname)
            return func(*args, **(kwargs or {}))

    called = []
    with Mode():
        yield called


@MODELS
def test_loss_and_gradients_are_the_twin_s(model_class):
    # Noise that hides none of what is compared.
    options = {DenoisingAutoencoder: {"noise_std": 0.0}, InfoVAE: {"mmd_prior": "closed_form"}}
    model = make(model_class, **options.get(model_class, {}))
    if model_class is StochasticAutoencoder:
        model.noise = Corrupt("gaussian", std=0.0)
    if hasattr(model, "head"):
        with torch.no_grad():
            # Deviations of exp(-15), at which codes are their means.
            model.head.bias[LATENT:] = -30.0
            model.head.weight[LATENT:] = 0.0
    x = torch.rand(9, *SHAPE)
    twin, exact = model.eager_twin(), model.eager_twin().double()
    assert list(twin.state_dict()) == list(model.state_dict())
    model(x).loss.backward()
    losses = []
    for one, data in ((twin, x), (exact, x.double())):
        if model_class is StochasticAutoencoder:
            loss = 0.5 * (one.decoder(one.encoder(data.flatten(1))) - data.flatten(1)).square().sum(1).mean()
        else:
            loss = model.eager_loss(one, data.flatten(1))
        loss.backward()
        losses.append(loss)
    pairs = zip(model.parameters(), twin.parameters(), exact.parameters(), strict=True)
    for (name, _), (ours, plain, true) in zip(model.named_parameters(), pairs, strict=True):
        noise = torch.finfo(torch.float32).eps * true.grad.abs().max()
        # Batch normalization makes the bias before it a matter of rounding alone.
        slack = 2 * noise + 1e-6 * (name == "encoder.0.bias")
        # Codes differ from their means by deviations of 3e-7, at most some four of them.
        slack += 2e-6 * true.grad.abs().max() * hasattr(model, "head")
        assert (ours.grad - true.grad).abs().max() <= 2 * (plain.grad - true.grad).abs().max() + slack, name


def test_networks_see_samples_and_codes_and_their_results_are_flattened():
    seen = {}

    class Seeing(nn.Module):
        def __init__(self, name, gives):
            super().__init__()
            self.name, self.gives = name, gives

        def forward(self, x):
            seen[self.name] = x.clone()
            return self.gives(x)

    encoder = Seeing("encoder", lambda x: x[:, :1, :1, :LATENT, None])
    decoder = Seeing("decoder", lambda z: z.repeat(1, 20)[:, :FEATURES].unflatten(1, SHAPE))
    model = make(Autoencoder, encoder, decoder)
    x = torch.rand(3, *SHAPE)
    for given in (x, x.flatten(1), x.to(memory_format=torch.channels_last)):
        output = model(given)
        assert torch.equal(seen["encoder"], x)
        assert torch.equal(output.latent, x[:, 0, 0, :LATENT]) and torch.equal(seen["decoder"], output.latent)
        assert output.reconstruction.shape == given.shape
    assert model.decode(output.latent).shape == (3, FEATURES)
    plain = Autoencoder(
        input_size=FEATURES, latent=LATENT, encoder=Seeing("encoder", lambda x: x[:, :LATENT])
    )
    plain(x)
    assert torch.equal(seen["encoder"], x.flatten(1))


@pytest.mark.parametrize("name", ["encoder", "decoder"])
def test_one_of_both_can_be_dense(name):
    given = Encoder(12) if name == "encoder" else Decoder()
    model = VAE(input_size=FEATURES, hidden=(12,), latent=LATENT, image_shape=SHAPE, **{name: given})
    assert getattr(model, name) is given
    dense = model.decoder if name == "encoder" else model.encoder
    assert isinstance(dense, MLP)
    twin = model.eager_twin()
    assert list(twin.state_dict()) == list(model.state_dict())
    model.eval(), twin.eval()
    x = torch.rand(4, *SHAPE)
    torch.testing.assert_close(model(x).reconstruction.flatten(1), twin(x.flatten(1)))


@MODELS
def test_training_falls(model_class):
    model = make(model_class)
    step = CapturedStep(model, make_optimizer(model.parameters(), 1e-2))
    x = torch.rand(64, *SHAPE)
    losses = [float(sum(step(x).values())) for _ in range(80)]
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])


def test_the_output_activation_and_the_loss_are_the_model_s():
    model = make(Autoencoder, output_activation="sigmoid", loss="bce")
    x = torch.rand(4, *SHAPE)
    expected = torch.sigmoid(model.decoder(model.encoder(x).flatten(1)))
    model.train()
    output = model(x)
    torch.testing.assert_close(output.reconstruction, expected)
    torch.testing.assert_close(output.loss, F.binary_cross_entropy(expected, x))
    twin = model.eager_twin()
    torch.testing.assert_close(model.eager_loss(twin, x.flatten(1)), output.loss)
    pyramid = make(Autoencoder, loss="pyramid", pyramid_levels=2)
    torch.testing.assert_close(
        pyramid(x).loss, pyramid.eager_loss(pyramid.eager_twin(), x.flatten(1)), rtol=1e-5, atol=0
    )


def test_large_batches_do_without_a_reconstruction_of_dense_decoders_alone(monkeypatch):
    monkeypatch.setattr("aefast.models._reconstruction._LARGE", 1)
    decoder = MLP((LATENT, 8, FEATURES))
    model = make(Autoencoder, decoder=decoder, output_activation="sigmoid")
    x = torch.rand(4, *SHAPE)
    output = model(x)
    assert isinstance(output.made, torch.Tensor)
    torch.testing.assert_close(output.loss, F.mse_loss(torch.sigmoid(decoder(output.latent)), x.flatten(1)))


def test_shared_weights_stay_shared(tmp_path):
    class Tied(nn.Module):
        def __init__(self, weight, transposed):
            super().__init__()
            self.weight, self.transposed = weight, transposed

        def forward(self, x):
            return x @ (self.weight if self.transposed else self.weight.T)

    def made():
        weight = nn.Parameter(0.1 * torch.randn(LATENT, FEATURES))
        networks = {"encoder": Tied(weight, False), "decoder": Tied(weight, True)}
        return Autoencoder(input_size=FEATURES, latent=LATENT, **networks), networks

    model, _ = made()
    assert len(list(model.parameters())) == len(list(model.eager_twin().parameters())) == 1
    model.save_pretrained(tmp_path)
    networks = made()[1]
    loaded = from_pretrained(tmp_path, **networks)
    assert loaded.encoder.weight is loaded.decoder.weight
    assert torch.equal(loaded.encoder.weight, model.encoder.weight)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoder": Encoder}, "encoder: expected a module, got the class Encoder"),
        ({"decoder": "conv"}, "decoder: expected a torch.nn.Module, got str"),
        ({"encoder": nn.LazyLinear(5)}, "encoder: expected parameters of known shapes"),
        ({"hidden": (64,)}, r"hidden=\(64,\): encoder and decoder are given"),
        ({"activation": "gelu"}, "activation='gelu': encoder and decoder are given"),
        ({"decoder_hidden": (8,)}, r"decoder_hidden=\(8,\): the decoder that is given has its own layers"),
        ({"linear_decoder": True}, "linear_decoder=True: the decoder that is given"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(InputError, match=message):
        make(Autoencoder, **options)


@pytest.mark.parametrize("hidden", [(), (12, 12)])
def test_one_size_is_that_of_the_features(hidden):
    with pytest.raises(InputError, match=r"hidden=.*: expected one size, how many features the encoder"):
        make(VAE, hidden=hidden)


def test_state_that_is_no_tensor_is_refused():
    class Stateful(nn.Identity):
        def get_extra_state(self):
            return {"calls": 3}

    with pytest.raises(
        InputError, match=r"decoder: expected tensors in its state dict, got dict as '_extra_state'"
    ):
        make(Autoencoder, decoder=Stateful())


@pytest.mark.parametrize(
    ("model_class", "network", "gives", "message"),
    [
        (
            Autoencoder,
            "encoder",
            lambda x: x,
            r"encoder: .* 5 features a sample, as latent says, got \(3, 2, 6, 6\)",
        ),
        (VAE, "encoder", lambda x: x.flatten(1), r"encoder: .* 12 features .* as hidden says, got \(3, 72\)"),
        (
            VAE,
            "decoder",
            lambda z: z,
            r"decoder: .*\(3, ...\) with 72 features .*input_size says, got \(3, 5\)",
        ),
        (VAE, "decoder", lambda z: z.repeat(1, 30)[:1, :72], r"decoder: .* got \(1, 72\)"),
        (Autoencoder, "encoder", lambda x: (x, x), "encoder: expected it to give a tensor, got tuple"),
    ],
)
def test_results_of_another_shape_are_named(model_class, network, gives, message):
    class Given(nn.Module):
        def forward(self, x):
            return gives(x)

    model = make(model_class, **{network: Given()})
    with pytest.raises(InputError, match=message):
        model(torch.rand(3, *SHAPE))


def test_the_twin_of_a_patched_model_is_plain():
    """So that what is compared with eager PyTorch is not compared with itself."""
    decoder = nn.Sequential(nn.Linear(LATENT, 16), nn.ReLU(), nn.Linear(16, FEATURES))
    model = make(Autoencoder, decoder=decoder)
    report = aefast.patch(model)
    assert [entry.where for entry in report.entries][:1] == ["decoder:0-2"]
    twin = model.eager_twin()
    assert type(twin.decoder) is nn.Sequential and type(model.decoder) is not nn.Sequential
    x = torch.rand(4, *SHAPE)
    with ops_called() as called:
        twin(x.flatten(1))
    assert not called
    with ops_called() as called:
        model(x)
    assert any("mlp" in name for name in called)


@MODELS
def test_an_encoder_that_writes_into_its_input_is_refused(model_class):
    """Reconstructions would be compared with what it has left."""
    encoder = nn.Sequential(nn.LeakyReLU(inplace=True), Encoder(GIVES[model_class]))
    model, x = make(model_class, encoder), torch.randn(3, *SHAPE)
    with pytest.raises(InputError, match="encoder: expected it to leave its input as it is"):
        model(x)
    if model_class is Autoencoder:
        model.eval()
        before = x.clone()
        compiled = torch.compile(lambda x: model(x).loss, fullgraph=True, backend="aot_eager")(x)
        assert torch.equal(x, before)
        model.encoder[0].inplace = False
        torch.testing.assert_close(compiled, model(x).loss)
    model.encoder[0].inplace = False
    assert torch.isfinite(model(x).loss)


def test_channels_that_come_last_are_named(tmp_path):
    model = make(Autoencoder)
    message = r"expected samples of image_shape=\(2, 6, 6\), got \(6, 6, 2\), whose channels are last"
    with pytest.raises(InputError, match=f"x: {message}"):
        model(torch.rand(3, 6, 6, 2))
    options = {"config": TrainConfig(epochs=1, device="cpu"), "console": Console(quiet=True)}
    with pytest.raises(InputError, match=f"dataset: {message}"):
        Trainer(model, Dataset("x", torch.rand(40, FEATURES), (6, 6, 2)), directory=tmp_path / "a", **options)
    right, wrong = [torch.rand(8, FEATURES)], [torch.rand(8, 6, 6, 2)]
    for argument, data in (
        ("dataset", {"dataset": wrong}),
        ("validation", {"dataset": right, "validation": wrong}),
    ):
        trainer = Trainer(model, **data, directory=tmp_path / argument, **options)
        with pytest.raises(InputError, match=f"{argument}: {message}"):
            trainer.fit(compare=False)
    scrambled = Dataset("x", torch.rand(40, FEATURES), (6, 6, 2))
    with pytest.raises(InputError, match=f"validation: {message}"):
        Trainer(model, right, validation=scrambled, directory=tmp_path / "c", **options)
    # Of one channel both orders are the same.
    grey = Autoencoder(input_size=36, image_shape=(1, 6, 6), channels=(4,), latent=LATENT)
    x = torch.rand(3, 6, 6, 1)
    assert torch.equal(grey(x).latent, grey(x.permute(0, 3, 1, 2)).latent)


@pytest.mark.parametrize(
    ("shape", "others"), [((2, 6, 3), ((2, 3, 6), (3, 4, 3))), ((1, 6, 3), ((1, 3, 6), (3, 6), (2, 9, 1)))]
)
def test_images_with_other_sides_are_named(shape, others):
    size = math.prod(shape)
    model = Autoencoder(input_size=size, image_shape=shape, channels=(4,), latent=LATENT)
    for other in others:
        message = rf"x: expected samples of image_shape=\({shape[0]}, 6, 3\), got {re.escape(str(other))}$"
        with pytest.raises(InputError, match=message):
            model(torch.rand(2, *other))
    x = torch.rand(2, size)
    for same in ((size,), (size // 3, 3), shape) if shape[0] > 1 else ((size,), (6, 3), (6, 3, 1), shape):
        assert torch.equal(model(x.reshape(2, *same)).latent, model(x).latent)


# Convolutions by their channels

CHANNELS = [((2, 6, 6), (4, 6), (12,)), ((3, 11, 7), (4, 6), ()), ((1, 5, 4), (3,), (10, 8))]


@MODELS
@pytest.mark.parametrize(("shape", "channels", "hidden"), CHANNELS)
def test_channels_make_convolutions_and_their_mirror(model_class, shape, channels, hidden, tmp_path):
    options = {"input_size": math.prod(shape), "latent": LATENT, "image_shape": shape}
    model = model_class(**options, channels=channels, hidden=hidden, activation="gelu")
    x = torch.rand(7, *shape)
    output = model(x)
    output.loss.backward()
    assert all(one.grad is not None for one in model.parameters())
    assert output.reconstruction.shape == x.shape and output.latent.shape == (7, LATENT)
    twin = model.eager_twin()
    assert list(twin.state_dict()) == list(model.state_dict())
    for one in (model, twin):
        one.eval()
    torch.testing.assert_close(model(x).reconstruction.flatten(1), twin(x.flatten(1)))

    model.save_pretrained(tmp_path)
    loaded = from_pretrained(tmp_path)
    assert loaded.config == model.config and loaded.config.channels == channels
    assert torch.equal(loaded(x).reconstruction, model(x).reconstruction)
    for ours, theirs in zip(loaded.parameters(), model.parameters(), strict=True):
        assert ours.stride() == theirs.stride()


def test_convolutions_are_torch_s():
    """An encoder and a decoder of two, by hand."""
    model = Autoencoder(
        input_size=63,
        image_shape=(1, 9, 7),
        channels=(3, 4),
        hidden=(),
        latent=LATENT,
        output_activation="sigmoid",
    )
    first, _, second, _ = model.encoder.convolutions
    x = torch.rand(5, 1, 9, 7)
    made = F.relu(F.conv2d(x, first.weight, first.bias, stride=2, padding=1))
    made = F.relu(F.conv2d(made, second.weight, second.bias, stride=2, padding=1))
    assert made.shape == (5, 4, 2, 1)
    (dense,) = model.encoder.dense.layers
    code = F.linear(made.permute(0, 2, 3, 1).flatten(1), dense.weight, dense.bias)
    torch.testing.assert_close(model.encode(x), code)

    (dense,) = model.decoder.dense.layers
    first, _, second, _ = model.decoder.convolutions
    made = F.relu(F.linear(code, dense.weight, dense.bias)).unflatten(1, (2, 1, 4)).permute(0, 3, 1, 2)
    made = F.relu(F.conv_transpose2d(made, first.weight, first.bias, 2, 1, (0, 1)))
    assert made.shape == (5, 3, 4, 3)
    made = torch.sigmoid(F.conv_transpose2d(made, second.weight, second.bias, 2, 1, (1, 1)))
    torch.testing.assert_close(model.decode(code), made.flatten(1))


@pytest.mark.parametrize(
    ("model_class", "options", "message"),
    [
        (VAE, {"image_shape": None}, r"channels=\(4, 6\): need image_shape, the \(C, H, W\) of a sample"),
        (
            VAE,
            {"channels": (4, 6, 8)},
            r"channels=\(4, 6, 8\): expected fewer, .* sides of image_shape, \(2, 6, 6\)",
        ),
        (VAE, {"channels": (4, 0)}, r"channels\[1\]=0: expected a positive integer"),
        (VAE, {"channels": 4}, "channels=4: expected a sequence of positive integers"),
        (Autoencoder, {"linear_decoder": True}, r"channels=\(4, 6\): a linear decoder has no convolutions"),
        (Autoencoder, {"encoder": nn.Identity()}, r"channels=\(4, 6\): give either channels or an encoder"),
        (SparseAutoencoder, {"latent": 80}, r"channels=\(4, 6\): a sparse autoencoder has no hidden layers"),
    ],
)
def test_bad_channels_are_named(model_class, options, message):
    options = {"input_size": FEATURES, "image_shape": SHAPE, "channels": (4, 6), **options}
    with pytest.raises(InputError, match=message):
        model_class(**options)


def test_large_batches_of_convolutions_have_a_reconstruction(monkeypatch):
    monkeypatch.setattr("aefast.models._reconstruction._LARGE", 1)
    model = VAE(input_size=FEATURES, image_shape=SHAPE, channels=(4,), latent=LATENT)
    assert isinstance(model(torch.rand(3, FEATURES)).made, torch.Tensor)


def test_a_run_of_convolutions_by_the_command_line(tmp_path, capsys):
    """From training to samples."""
    run = tmp_path / "run"
    options = ["--channels", "4,8", "--hidden", "16", "--latent", "4", "--epochs", "2", "--device", "cpu"]
    arguments = ["--data", "digits", "--model", "infovae", *options, "--out", str(run), "--no-compare"]
    assert cli.main(["train", *arguments]) == 0
    assert cli.main(["train", *arguments, "--resume"]) == 0
    assert "nothing left to train" in capsys.readouterr().out
    model = from_pretrained(run)
    assert model.config.channels == (4, 8) and model.config.image_shape == (1, 8, 8)
    out = tmp_path / "codes.npy"
    assert cli.main(["encode", "--run", str(run), "--data", "digits", "--out", str(out)]) == 0
    assert np.load(out).shape == (1797, 4)
    assert (
        cli.main(["train", "--data", "digits", "--channels", "4,8,8,8", "--out", str(tmp_path / "none")]) == 2
    )
    assert "expected fewer, since each halves the sides" in " ".join(capsys.readouterr().err.split())


# Files


@MODELS
def test_saving_and_loading(model_class, tmp_path):
    model = make(model_class)
    with torch.no_grad():
        model(torch.rand(20, *SHAPE))
    model.eval().save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["networks"] == {
        "encoder": "Encoder",
        "decoder": "Decoder",
    }
    networks = {"encoder": Encoder(GIVES[model_class]), "decoder": Decoder()}
    before = torch.get_rng_state()
    loaded = from_pretrained(tmp_path, **networks)
    assert torch.equal(torch.get_rng_state(), before)
    assert type(loaded) is model_class and not loaded.training and loaded.config == model.config
    assert loaded.networks == model.networks and loaded.encoder is networks["encoder"]
    x = torch.rand(4, *SHAPE)
    assert torch.equal(loaded(x).reconstruction, model(x).reconstruction)
    assert loaded.encoder[1].num_batches_tracked == 1
    loaded.save_pretrained(tmp_path / "again")


def test_loading_keeps_what_is_frozen_and_takes_the_file_s_dtype(tmp_path):
    model = make(Autoencoder).double()
    model.save_pretrained(tmp_path)
    encoder = Encoder(LATENT).requires_grad_(False)
    loaded = from_pretrained(tmp_path, encoder=encoder, decoder=Decoder())
    assert {one.dtype for one in loaded.parameters()} == {torch.float64}
    assert not any(one.requires_grad for one in loaded.encoder.parameters())
    assert all(one.requires_grad for one in loaded.decoder.parameters())
    with torch.device("meta"):
        networks = {"encoder": Encoder(LATENT), "decoder": Decoder()}
    loaded = from_pretrained(tmp_path, dtype=torch.float32, **networks)
    assert {(one.dtype, one.device.type) for one in loaded.parameters()} == {(torch.float32, "cpu")}
    assert torch.equal(loaded.encoder[0].weight, model.encoder[0].weight.float())


def test_loading_asks_for_the_networks_by_name(tmp_path):
    model = make(VAE)
    model.save_pretrained(tmp_path / "own")
    VAE(input_size=FEATURES).save_pretrained(tmp_path / "dense")
    SparseAutoencoder(input_size=FEATURES, latent=80).save_pretrained(tmp_path / "sparse")
    needed = r"the VAE in .*own was made with Encoder as its encoder and Decoder as its decoder, .*encoder=.*, decoder="
    with pytest.raises(InputError, match=f"encoder: {needed}"):
        from_pretrained(tmp_path / "own")
    with pytest.raises(InputError, match=f"decoder: {needed}"):
        VAE.from_pretrained(tmp_path / "own", encoder=Encoder(12))
    for name in ("dense", "sparse"):
        with pytest.raises(InputError, match=r"decoder: the .* in .* was not made with one that is given"):
            from_pretrained(tmp_path / name, decoder=Decoder())
    with pytest.raises(InputError, match=r"encodr: unknown argument, .* did you mean 'encoder'"):
        from_pretrained(tmp_path / "own", encodr=Encoder(12), decoder=Decoder())
    with pytest.raises(
        InputError, match=r"'encoder.3.weight' has shape \(12, 4, 3, 3\), expected \(7, 4, 3, 3\)"
    ):
        from_pretrained(tmp_path / "own", encoder=Encoder(7), decoder=Decoder())
    path = tmp_path / "own" / "config.json"
    for damaged in (["encoder"], {"head": "Linear"}):
        path.write_text(json.dumps({**json.loads(path.read_text()), "networks": damaged}))
        with pytest.raises(
            InputError, match=r"networks=.*: expected the classes of an encoder, a decoder or both"
        ):
            from_pretrained(tmp_path / "own")


def test_a_run_of_such_a_model_is_not_for_the_command_line(tmp_path, capsys):
    make(VAE).save_pretrained(tmp_path)
    assert (
        cli.main(["encode", "--run", str(tmp_path), "--data", "digits", "--out", str(tmp_path / "codes.npy")])
        == 2
    )
    said = " ".join(capsys.readouterr().err.split())
    assert "was made with Encoder as its encoder" in said and "in Python: from_pretrained(" in said


@pytest.mark.parametrize("is_own", [True, False])
def test_copies_and_pickles(is_own):
    model = make(InfoVAE) if is_own else InfoVAE(input_size=FEATURES, image_shape=SHAPE, channels=(4, 6))
    model.eval()
    x = torch.rand(3, *SHAPE)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x).reconstruction, model(x).reconstruction)


# Training and compiling


def test_a_frozen_network_in_eval_mode_stays_in_it(tmp_path):
    """A pretrained one, whose running statistics and dropout are what they were."""
    encoder = Encoder(12).eval().requires_grad_(False)
    encoder.add_module("dropout", nn.Dropout(0.5))
    encoder.dropout.eval()
    model = make(VAE, encoder)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    data = Dataset("images", torch.rand(100, FEATURES), SHAPE)
    config = TrainConfig(epochs=2, batch_size=16, device="cpu")
    Trainer(model, data, config, tmp_path, console=Console(quiet=True)).fit()
    assert not any(one.training for one in model.modules())
    model.train()
    encoder.eval()
    codes_of(model, data.samples)
    assert model.training and model.decoder.training and not any(one.training for one in encoder.modules())
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    twin = model.eager_twin()
    assert twin.training and not any(one.training for one in twin.encoder.modules())
    # A model that was loaded is in eval mode as a whole, and is trained.
    loaded = from_pretrained(tmp_path, encoder=Encoder(12).append(nn.Identity()), decoder=Decoder())
    assert Trainer(
        loaded, data, config, tmp_path / "more", console=Console(quiet=True)
    ).model.encoder.training


def test_a_run_of_what_cannot_be_copied_ends_well(tmp_path, capsys):
    encoder = Encoder(12)
    encoder.lock = threading.Lock()
    data = Dataset("images", torch.rand(100, FEATURES), SHAPE)
    config = TrainConfig(epochs=1, batch_size=16, device="cpu")
    result = Trainer(make(VAE, encoder), data, config, tmp_path, console=Console(width=1000)).fit()
    assert result.comparison is None and result.step == 6
    assert (
        "notice: no comparison with eager PyTorch, since the model cannot be copied"
        in capsys.readouterr().out
    )


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, memory_format):
    data = Dataset("images", torch.rand(200, FEATURES), SHAPE)

    def trainer(folder, epochs):
        torch.manual_seed(3)
        config = TrainConfig(
            epochs=epochs, batch_size=32, drop_last=True, device="cpu", keep_best=True, ema_decay=0.9, lr=1e-2
        )
        model = make(VAE).to(memory_format=memory_format)
        trainer = Trainer(model, data, config, tmp_path / folder, console=Console(quiet=True))
        trainer._plot = lambda: None
        return trainer

    whole = trainer("whole", 4)
    assert whole.fit(compare=False).step == 4 * 5
    trainer("parts", 2).fit(compare=False)
    parts = trainer("parts", 4)
    parts.fit(resume=True, compare=False)
    for (key, ours), theirs in zip(
        parts.model.state_dict().items(), whole.model.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs), key
    for ours, theirs in zip(parts.step.ema, whole.step.ema, strict=True):
        assert torch.equal(ours, theirs)
    networks = {"encoder": Encoder(12), "decoder": Decoder()}
    best = from_pretrained(tmp_path / "whole" / "best", **networks)
    assert torch.isfinite(best(torch.rand(2, *SHAPE)).loss)

    class Other(Encoder):
        pass

    other = make(VAE, Other(12))
    with pytest.raises(InputError, match=r"networks=\{'encoder': 'Other', .*expected \{'encoder': 'Encoder'"):
        Trainer(other, data, parts.config, tmp_path / "parts", console=Console(quiet=True)).fit(resume=True)
    wider = make(VAE, nn.Sequential(Encoder(12)))
    wider.networks = dict(parts.model.networks)
    with pytest.raises(
        InputError, match=r"model: the checkpoints in .* another one: missing 'encoder.0.0.weight'"
    ):
        Trainer(wider, data, parts.config, tmp_path / "parts", console=Console(quiet=True)).fit(resume=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("is_own", [True, False])
def test_captured_steps_are_the_steps(is_own):
    model = (
        make(VAE) if is_own else VAE(input_size=FEATURES, image_shape=SHAPE, channels=(4, 6), latent=LATENT)
    )
    model = model.cuda()
    expected = copy.deepcopy(model)
    data = [torch.rand(16, *SHAPE, device="cuda") for _ in range(12)]
    losses = []
    for one, steps_per_replay in ((model, 4), (expected, 0)):
        torch.manual_seed(0)
        optimizer = make_optimizer(one.parameters(), 1e-3)
        step = CapturedStep(one, optimizer, steps_per_replay=steps_per_replay)
        losses.append(
            torch.cat([step.many(data[index : index + 4])["reconstruction"] for index in (0, 4, 8)])
        )
        assert bool(step._recordings) == (steps_per_replay > 0)
    # cuDNN may take other algorithms while a graph is recorded; their order of summation differs.
    torch.testing.assert_close(*losses, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("is_own", [True, False])
@pytest.mark.parametrize("model_class", [Autoencoder, VAE])
def test_compiled_and_exported(model_class, is_own):
    options = {"input_size": FEATURES, "image_shape": SHAPE, "latent": LATENT, "channels": (4, 6)}
    model = (make(model_class) if is_own else model_class(**options)).eval()
    x = torch.rand(4, *SHAPE)
    compiled = torch.compile(lambda x: model(x).reconstruction, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x).reconstruction)

    class Shipped(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            return self.model.decode(self.model.encode(x))

    program = torch.export.export(
        Shipped().eval(), (torch.rand(2, *SHAPE),), dynamic_shapes=({0: torch.export.Dim("batch")},)
    )
    torch.testing.assert_close(program.module()(x), model.decode(model.encode(x)))

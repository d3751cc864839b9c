"""The folder a model is saved in."""

import json
import os

import pytest
import safetensors.torch
import torch

from aefast.errors import InputError
from aefast.models import MODELS, Autoencoder, AutoencoderConfig, Model, from_pretrained, register
from aefast.models._files import write_atomically


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Autoencoder(input_size=10, hidden=(6, 5), latent=3, activation="elu", decoder_hidden=(4,))


@pytest.fixture
def saved(model, tmp_path):
    model.save_pretrained(tmp_path / "saved", metadata={"note": 1})
    return tmp_path / "saved"


@pytest.mark.parametrize("load", [from_pretrained, Model.from_pretrained, Autoencoder.from_pretrained])
def test_round_trip(model, saved, load):
    loaded = load(saved)
    assert type(loaded) is Autoencoder
    assert loaded.config == model.config
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    for (name, ours), (_, theirs) in zip(
        loaded.state_dict().items(), model.state_dict().items(), strict=True
    ):
        assert torch.equal(ours, theirs), name
    x = torch.rand(4, 10)
    assert torch.equal(loaded(x).reconstruction, model(x).reconstruction)


def test_loading_draws_no_random_numbers(saved):
    before = torch.get_rng_state()
    from_pretrained(saved)
    assert torch.equal(torch.get_rng_state(), before)


def test_dtype_is_kept_or_converted(model, tmp_path):
    model.double().save_pretrained(tmp_path)
    assert next(from_pretrained(tmp_path).parameters()).dtype == torch.float64
    assert next(from_pretrained(tmp_path, dtype=torch.float32).parameters()).dtype == torch.float32


def test_config_file_holds_plain_options(saved):
    content = json.loads((saved / "config.json").read_text())
    assert content["format_version"] == 1
    assert content["model"] == "autoencoder"
    assert content["config"]["hidden"] == [6, 5]
    assert content["metadata"] == {"note": 1}


def edit(saved, change):
    path = saved / "config.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(format_version=2), "format_version=2 is newer"),
        (lambda c: c.update(format_version="1"), "format_version='1': expected an integer"),
        (lambda c: c.update(format_version=True), "format_version=True: expected an integer"),
        (lambda c: c.update(format_version=0), "format_version=0: expected an integer"),
        (lambda c: c.update(model="autoencodr"), "model='autoencodr'.*did you mean 'autoencoder'"),
        (lambda c: c.update(model="os.system"), "model='os.system': expected one of"),
        (lambda c: c.pop("model"), "missing key 'model'"),
        (lambda c: c.update(modle=1), "unknown key 'modle'; did you mean 'model'"),
        (lambda c: c["config"].update(activaton="relu"), "unknown option 'activaton'.*'activation'"),
        (lambda c: c["config"].update(latent=0), "latent=0: expected a positive integer"),
        (lambda c: c["config"].update(latent=4), r"'encoder.4.weight' has shape \(3, 5\), expected \(4, 5\)"),
        (lambda c: c["config"].update(hidden=[6]), "unexpected 'encoder.4.weight'"),
        (lambda c: c["config"].update(hidden=[6, 5, 3]), "missing 'encoder.6.weight'"),
        (
            lambda c: c["config"].update(latent=10**30),
            "latent=10{30}: expected a positive integer of at most",
        ),
        (lambda c: c["config"].update(loss={}), r"loss=\{\}: expected one of mse"),
        (lambda c: c["config"].update(activation={}), r"activation=\{\}: expected one of"),
        (lambda c: c["config"].update(activation="Relu"), "did you mean 'relu'"),
        (lambda c: c["config"].update(LATENT=3), "unknown option 'LATENT'.*did you mean 'latent'"),
        (lambda c: c.update(config=[1]), "expected options by name, got list"),
    ],
)
def test_config_errors_are_clear(saved, change, message):
    edit(saved, change)
    with pytest.raises(InputError, match=message):
        from_pretrained(saved)


def test_missing_files_are_named(saved, tmp_path):
    with pytest.raises(InputError, match=r"nowhere.*found nothing"):
        from_pretrained(tmp_path / "nowhere")
    with pytest.raises(InputError, match="found a file"):
        from_pretrained(saved / "config.json")
    (saved / "model.safetensors").rename(tmp_path / "away")
    with pytest.raises(InputError, match=r"model.safetensors is missing"):
        from_pretrained(saved)
    (saved / "config.json").unlink()
    with pytest.raises(InputError, match=r"config.json is missing"):
        from_pretrained(saved)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_damaged_files_are_named(saved, name):
    content = (saved / name).read_bytes()
    (saved / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=name):
        from_pretrained(saved)


def test_weights_of_another_model_are_refused(saved):
    safetensors.torch.save_file({"something": torch.zeros(2)}, saved / "model.safetensors")
    with pytest.raises(InputError, match=r"missing 'encoder.0.weight'"):
        from_pretrained(saved)


def test_weights_of_whole_numbers_are_refused(saved):
    path = saved / "model.safetensors"
    safetensors.torch.save_file(
        {key: value.long() for key, value in safetensors.torch.load_file(path).items()}, path
    )
    with pytest.raises(InputError, match=r"'encoder.0.weight' has dtype torch.int64, expected torch.float32"):
        from_pretrained(saved)


def test_deeply_nested_config_is_refused(saved):
    (saved / "config.json").write_text("[" * 200_000)
    with pytest.raises(InputError, match=r"config.json: expected a readable JSON file"):
        from_pretrained(saved)


def test_metadata_that_is_not_json_writes_nothing(model, tmp_path):
    with pytest.raises(InputError, match=r"metadata: expected JSON values .*Tensor"):
        model.save_pretrained(tmp_path / "new", metadata={"scale": torch.ones(2)})
    assert not (tmp_path / "new").exists()


def test_saving_over_a_file_is_refused(model, tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(InputError, match="found a file"):
        model.save_pretrained(tmp_path / "taken")


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail(descriptor):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, b"new and longer")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_tied_parameters_are_written_apart(model, tmp_path):
    # Of one storage, one behind the other and one over the other.
    together = torch.rand(10)
    model.decoder.layers[1].bias.data = together
    model.encoder.layers[0].bias.data = together[:6]
    model.encoder.layers[1].bias.data = together[5:]
    model.save_pretrained(tmp_path)
    loaded = from_pretrained(tmp_path)
    for (name, ours), theirs in zip(loaded.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize("change", ["weight_norm", "spectral_norm", "orthogonal"])
def test_parametrized_models_are_refused(model, tmp_path, change):
    layer = model.encoder.layers[0]
    getattr(torch.nn.utils.parametrizations, change)(layer)
    with pytest.raises(
        InputError, match=r"missing 'encoder\.0\.weight'.*unexpected.*have to be removed before"
    ):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    torch.nn.utils.parametrize.remove_parametrizations(layer, "weight")
    model.save_pretrained(tmp_path / "saved")
    x = torch.rand(4, 10)
    torch.testing.assert_close(from_pretrained(tmp_path / "saved")(x).reconstruction, model(x).reconstruction)


def test_a_class_that_would_be_loaded_as_another_is_not_saved(model, tmp_path, monkeypatch):
    class Squared(Autoencoder):
        def encode(self, x):
            return super().encode(x) ** 2

    class Noted(Autoencoder):
        note = "adds to the class, and changes nothing"

    with pytest.raises(
        InputError, match=r"a Squared would be loaded as the Autoencoder .* without its encode; list"
    ):
        Squared(model.config).save_pretrained(tmp_path / "squared")
    assert not (tmp_path / "squared").exists()
    Noted(model.config).save_pretrained(tmp_path / "noted")
    # Not registered any more afterwards.
    monkeypatch.setitem(MODELS, "squared", None)
    del MODELS["squared"]
    own = register("squared")(Squared)(model.config)
    own.save_pretrained(tmp_path / "squared")
    loaded = from_pretrained(tmp_path / "squared")
    assert type(loaded) is Squared
    x = torch.rand(4, 10)
    assert torch.equal(loaded.encode(x), own.encode(x))


def test_a_class_without_a_name_is_not_saved(tmp_path):
    class Nameless(Model):
        config_class = AutoencoderConfig

    with pytest.raises(
        InputError, match=r"a Nameless could not be loaded, since it has no name .*; list the"
    ):
        Nameless(input_size=10).save_pretrained(tmp_path / "saved")

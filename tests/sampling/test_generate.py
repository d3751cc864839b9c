"""Codes, reconstructions and generated samples of whole data sets."""

import pytest
import torch

from aefast.data import Dataset
from aefast.errors import InputError
from aefast.models import MODELS, VAE, Autoencoder, SparseAutoencoder
from aefast.sampling import PriorSampler, codes_of, encode_batches, generate, reconstruct_batches

SAMPLES = torch.rand(23, 3, 4, generator=torch.Generator().manual_seed(0))


def make(name):
    torch.manual_seed(0)
    # The codes of batchtopk depend on the mode, in training also on the batch.
    options = {"k": 3, "sparsity": "batchtopk"} if name == "sparse" else {"hidden": (9,)}
    model = MODELS[name](input_size=12, latent=5, **options)
    model(SAMPLES)
    return model


@pytest.mark.parametrize("name", sorted(MODELS))
def test_batches_are_what_the_model_makes_in_eval_mode(name):
    model = make(name)
    model.eval()
    with torch.no_grad():
        code = model.encode(SAMPLES)
        made = model.decode(code)
        dense = model.dense(code) if name == "sparse" else code
    for training in (True, False):
        model.train(training)
        parts = list(encode_batches(model, SAMPLES, batch_size=10))
        assert [len(part) for part in parts] == [10, 10, 3]
        torch.testing.assert_close(torch.cat(parts), dense)
        torch.testing.assert_close(codes_of(model, SAMPLES), dense)
        remade = torch.cat(list(reconstruct_batches(model, SAMPLES, batch_size=10)))
        torch.testing.assert_close(remade, made)
        assert model.training is training
        assert not remade.requires_grad


@pytest.mark.parametrize("name", sorted(MODELS))
def test_generated_samples_are_decoded_draws(name):
    model = make(name)
    sampler = PriorSampler.of(model).fit(codes_of(model, SAMPLES))
    assert sampler.prior == ("normal" if name in ("vae", "infovae") else "box")
    samples = generate(model, sampler, 25, seed=4, batch_size=10)
    assert samples.shape == (25, 12)
    with torch.no_grad():
        torch.testing.assert_close(samples, model.eval().decode(sampler.sample(25, seed=4)))
    assert torch.equal(generate(model, sampler, 25, seed=4, batch_size=10), samples)


def test_images_with_their_channels_last_are_named():
    model = VAE(input_size=12, image_shape=(3, 2, 2), channels=(4,), hidden=(9,), latent=5)
    images = Dataset("images", SAMPLES.flatten(1), (2, 2, 3))
    for batches in (encode_batches, reconstruct_batches):
        with pytest.raises(InputError, match=r"samples: .*, got \(2, 2, 3\), whose channels are last"):
            next(batches(model, images))


def test_models_of_another_dtype_get_their_own():
    model = Autoencoder(input_size=12, hidden=(9,), latent=5, dtype=torch.float64)
    codes = codes_of(model, SAMPLES)
    assert codes.dtype == torch.float64
    torch.testing.assert_close(codes, model.eval().encode(SAMPLES.double().flatten(1)))
    assert generate(model, PriorSampler("box").fit(codes), 3, seed=0).dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_thresholds_do_not_tell_what_samples_are(dtype):
    """Those of jumprelu are in float32 at least, and the first of the model's parameters."""
    model = SparseAutoencoder(input_size=12, latent=5, sparsity="jumprelu", dtype=dtype)
    parts = list(encode_batches(model, SAMPLES, batch_size=10))
    expected = model.eval().encode(SAMPLES.to(dtype))
    torch.testing.assert_close(torch.cat(parts), expected.detach())
    assert generate(model, PriorSampler("box").fit(torch.rand(9, 5)), 3, seed=0).dtype == dtype


def test_bad_arguments_are_named():
    model = VAE(input_size=12, hidden=(9,), latent=5)
    sampler = PriorSampler().fit(torch.zeros(3, 4))
    with pytest.raises(InputError, match=r"sampler: expected one fitted to codes of 5 latents.*got one of 4"):
        generate(model, sampler, 3)
    with pytest.raises(InputError, match="is not fitted"):
        generate(model, PriorSampler(), 3)
    with pytest.raises(InputError, match="batch_size=0"):
        generate(model, sampler, 3, batch_size=0)
    with pytest.raises(InputError, match="batch_size=0"):
        codes_of(model, SAMPLES, batch_size=0)
    with pytest.raises(InputError, match=r"x: expected shape \(B, 12\)"):
        codes_of(model, SAMPLES[:, :2])

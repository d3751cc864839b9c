"""A whole training step of each model beside the same step in plain PyTorch, and in the libraries that have the model.

Every side updates its parameters by Adam in its fused form, the fastest that PyTorch has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise

import torch
from torch import Tensor

from aefast.bench.case import Learner, TrainingCase, dtypes
from aefast.bench.variants import Rival
from aefast.models import VAE, Autoencoder, DenoisingAutoencoder, Model
from aefast.ops._registry import Cost

BATCHES = (64, 256, 1024, 4096)
QUICK_BATCHES = (256,)
# (inputs, hidden, latent): digits of 28 × 28, and patches of 16 × 16 pixels.
WIDTHS = ((784, 512, 16), (256, 512, 16))


def cases(device: torch.device, quick: bool) -> Iterator[TrainingCase]:
    for dtype in dtypes(device):
        for inputs, hidden, latent in WIDTHS:
            for batch in QUICK_BATCHES if quick else BATCHES:
                yield autoencoder(batch, inputs, hidden, latent, dtype, device)
                yield vae(batch, inputs, hidden, latent, dtype, device)
        for batch in QUICK_BATCHES if quick else BATCHES:
            yield denoising(batch, *WIDTHS[-1], dtype, device)


def autoencoder(
    batch: int, inputs: int, hidden: int, latent: int, dtype: torch.dtype, device: torch.device
) -> TrainingCase:
    def make_model() -> Autoencoder:
        return Autoencoder(
            input_size=inputs,
            hidden=(hidden,),
            latent=latent,
            output_activation="sigmoid",
            device=device,
            dtype=dtype,
        )

    def pythae() -> Callable[[Model], Learner]:
        from pythae.models import AE, AEConfig
        from pythae.models.nn.default_architectures import Decoder_AE_MLP, Encoder_AE_MLP

        def learner(model: Model) -> Learner:
            config = AEConfig(input_dim=(inputs,), latent_dim=latent)
            theirs = AE(config, Encoder_AE_MLP(config), Decoder_AE_MLP(config)).to(device, dtype)
            ordered = [*theirs.encoder.parameters(), *theirs.decoder.parameters()]
            with torch.no_grad():
                for own, given in zip(ordered, model.parameters(), strict=True):
                    own.copy_(given)

            # Its loss is the sum over the features, averaged over the batch.
            def loss(batch: Tensor) -> Tensor:
                return theirs({"data": batch}).loss / inputs

            return Learner.of_loss(ordered, loss)

        return learner

    return TrainingCase(
        "train",
        "autoencoder",
        f"{inputs}-{hidden}-{latent}-b{batch}",
        {"batch": batch, "inputs": inputs, "features": inputs},
        dtype,
        device,
        make_model=make_model,
        features=inputs,
        cost=lambda model: step_cost(
            batch, pairwise((inputs, hidden, latent, hidden, inputs)), dtype, inputs
        ),
        is_compiled=batch in QUICK_BATCHES,
        # The hidden layers of its default networks have this size.
        rivals={"pythae": Rival("pythae", pythae, ("step",))} if hidden == 512 else {},
    )


def vae(
    batch: int, inputs: int, hidden: int, latent: int, dtype: torch.dtype, device: torch.device
) -> TrainingCase:
    def make_model() -> VAE:
        return VAE(input_size=inputs, hidden=(hidden,), latent=latent, device=device, dtype=dtype)

    def pythae() -> Callable[[Model], Learner]:
        from pythae.models import VAE as TheirVAE
        from pythae.models import VAEConfig
        from pythae.models.nn.default_architectures import Decoder_AE_MLP, Encoder_VAE_MLP

        def learner(model: Model) -> Learner:
            config = VAEConfig(input_dim=(inputs,), latent_dim=latent, reconstruction_loss="mse")
            theirs = TheirVAE(config, Encoder_VAE_MLP(config), Decoder_AE_MLP(config)).to(device, dtype)
            # Its decoder ends in a sigmoid, its head is two layers.
            theirs.decoder.layers[-1] = theirs.decoder.layers[-1][0]
            encoder, decoder = theirs.encoder, theirs.decoder
            heads = encoder.embedding, encoder.log_var
            ordered = [
                *encoder.layers.parameters(),
                *(head.weight for head in heads),
                *(head.bias for head in heads),
                *decoder.parameters(),
            ]
            first, rest = ordered[:2], ordered[6:]
            own = [*first, *(torch.cat(pair) for pair in (ordered[2:4], ordered[4:6])), *rest]
            with torch.no_grad():
                given = [parameter.detach() for parameter in model.parameters()]
                for target, source in zip((*first, *rest), (*given[:2], *given[4:]), strict=True):
                    target.copy_(source)
                for pair, source in zip((ordered[2:4], ordered[4:6]), given[2:4], strict=True):
                    for target, half in zip(pair, source.chunk(2), strict=True):
                        target.copy_(half)
            if [one.shape for one in own] != [one.shape for one in given]:
                raise RuntimeError("its networks have other layers")

            def arranged(gradients: list[Tensor]) -> list[Tensor]:
                joined = torch.cat(gradients[2:4]), torch.cat(gradients[4:6])
                return [*gradients[:2], *joined, *gradients[6:]]

            return Learner.of_loss(ordered, lambda data: theirs({"data": data}).loss, arranged)

        return learner

    def cost(model: Model) -> Cost:
        layers = [*pairwise((inputs, hidden, 2 * latent)), *pairwise((latent, hidden, inputs))]
        # Of each latent an exponential, and half of a logarithm, a sine and a cosine; and as much in the backward.
        return step_cost(batch, layers, dtype, 5 * latent)

    return TrainingCase(
        "train",
        "vae",
        f"{inputs}-{hidden}-{latent}-b{batch}",
        {"batch": batch, "inputs": inputs, "features": inputs},
        dtype,
        device,
        make_model=make_model,
        features=inputs,
        cost=cost,
        is_compiled=batch in QUICK_BATCHES,
        rivals={"pythae": Rival("pythae", pythae, ("step",))} if hidden == 512 else {},
    )


def denoising(
    batch: int, inputs: int, hidden: int, latent: int, dtype: torch.dtype, device: torch.device
) -> TrainingCase:
    def make_model() -> DenoisingAutoencoder:
        return DenoisingAutoencoder(
            input_size=inputs,
            hidden=(hidden,),
            latent=latent,
            output_activation="sigmoid",
            noise="gaussian",
            noise_std=0.2,
            device=device,
            dtype=dtype,
        )

    return TrainingCase(
        "train",
        "denoising",
        f"{inputs}-{hidden}-{latent}-b{batch}",
        {"batch": batch, "inputs": inputs, "features": inputs},
        dtype,
        device,
        make_model=make_model,
        features=inputs,
        # Of each input half of a logarithm, a sine and a cosine.
        cost=lambda model: step_cost(
            batch, pairwise((inputs, hidden, latent, hidden, inputs)), dtype, 5 * inputs // 2
        ),
    )


def step_cost(batch: int, layers: Iterable[tuple[int, int]], dtype: torch.dtype, exps: int) -> Cost:
    """Of the step of dense layers, each (inputs, outputs), and so many exponentials a sample.

    The batch is read by the first layer and by its weight's gradient, each layer's output is written and read once, and
    a parameter is read forward and backward and its gradient written; Adam reads it, its gradient and both moments, and
    writes all of them but the gradient.
    """
    layers = list(layers)
    parameters = sum(n * k + n for k, n in layers)
    products = sum(n * k for k, n in layers)
    # No gradient of the batch is needed.
    flops = 2 * batch * (3 * products - layers[0][0] * layers[0][1])
    outputs = batch * sum(n for _, n in layers)
    elements = 2 * batch * layers[0][0] + 2 * outputs + (2 + 1 + 7) * parameters
    return Cost(elements * dtype.itemsize, flops, batch * exps)

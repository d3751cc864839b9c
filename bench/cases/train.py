"""A whole training step of each model beside the same step in plain PyTorch, and in the libraries that have the model.

Every side updates its parameters by Adam in its fused form, the fastest that PyTorch has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
from torch import Tensor

from aefast.bench.case import Learner, TrainingCase, dtypes
from aefast.bench.variants import Rival
from aefast.models import Autoencoder, Model
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
        cost=lambda model: step_cost(batch, (inputs, hidden, latent, hidden, inputs), dtype),
        is_compiled=batch in QUICK_BATCHES,
        # The hidden layers of its default networks have this size.
        rivals={"pythae": Rival("pythae", pythae, ("step",))} if hidden == 512 else {},
    )


def step_cost(batch: int, widths: tuple[int, ...], dtype: torch.dtype) -> Cost:
    """Of a dense stack's step with relu between its layers and a sigmoid at its end.

    The batch is read by the first layer and by its weight's gradient, each layer's output is written and read once, and
    a parameter is read forward and backward and its gradient written; Adam reads it, its gradient and both moments, and
    writes all of them but the gradient.
    """
    parameters = sum(n * k + n for k, n in pairwise(widths))
    products = sum(n * k for k, n in pairwise(widths))
    # No gradient of the batch is needed.
    flops = 2 * batch * (3 * products - widths[0] * widths[1])
    hidden = batch * sum(widths[1:])
    elements = 2 * batch * widths[0] + 2 * hidden + (2 + 1 + 7) * parameters
    return Cost(elements * dtype.itemsize, flops, batch * widths[-1])

"""A whole training step of each model beside the same step in plain PyTorch, and in the libraries that have the model.

Every side updates its parameters by Adam in its fused form, the fastest that PyTorch has.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise

import torch
from torch import Tensor, nn

from aefast.bench.case import KINK_WIDTH, Learner, TrainingCase, dtypes
from aefast.bench.variants import Rival
from aefast.models import VAE, Autoencoder, DenoisingAutoencoder, InfoVAE, Model, SparseAutoencoder
from aefast.ops._registry import OPS, Cost

BATCHES = (64, 256, 1024, 4096)
QUICK_BATCHES = (256,)
# (inputs, hidden, latent): digits of 28 × 28, and patches of 16 × 16 pixels.
WIDTHS = ((784, 512, 16), (256, 512, 16))
# (model, batch, whether torch.compile takes part) of the first of these widths, in the order of their measurement on
# CUDA: torch.compile takes minutes, and comes once all that the targets name stands beside eager. At 65536 rows InfoVAE
# has no eager code to compare with: autograd would keep 17 GB for each of 7 kernels in each of 3 sums over pairs.
TARGETS = (
    ("vae", 256, False),
    ("infovae", 4096, False),
    ("vae", 65536, False),
    ("vae", 256, True),
    ("infovae", 256, False),
    ("vae", 4096, False),
    ("infovae", 4096, True),
)
# (batch, inputs, latents, k): activations of a language model, and patches.
SPARSE = ((4096, 512, 8192, 32), (1024, 256, 1024, 16))
# Small photographs, (C, H, W); channels of two convolutions, each of which halves the sides; features; latents.
CONVOLUTIONAL = ((3, 32, 32), (32, 64), 256, 64)
CONVOLUTIONAL_BATCHES = (256, 1024)


def cases(device: torch.device, quick: bool) -> Iterator[TrainingCase]:
    """On CUDA the targets come first, and of quick cases torch.compile takes part in them alone."""
    if device.type != "cuda":
        yield from _every(device, quick)
        return
    named = {case.id: case for case in targets(device)}
    yield from named.values()
    for case in _every(device, quick):
        if case.id not in named:
            yield dataclasses.replace(case, is_compiled=case.is_compiled and not quick)


def targets(device: torch.device) -> Iterator[TrainingCase]:
    """The steps of `TARGETS`, on the CPU those of a quick batch. Some come twice, without torch.compile and with it."""
    for model, batch, is_compiled in TARGETS:
        for dtype in dtypes(device):
            if device.type == "cuda" or batch in QUICK_BATCHES:
                make = {"vae": vae, "infovae": infovae}[model]
                case = make(batch, *WIDTHS[0], dtype, device)
                yield dataclasses.replace(case, is_compiled=is_compiled)


def _every(device: torch.device, quick: bool) -> Iterator[TrainingCase]:
    for dtype in dtypes(device):
        for sizes in WIDTHS:
            for batch in QUICK_BATCHES if quick else BATCHES:
                yield autoencoder(batch, *sizes, dtype, device)
                yield vae(batch, *sizes, dtype, device)
                yield infovae(batch, *sizes, dtype, device)
        for batch in QUICK_BATCHES if quick else BATCHES:
            yield denoising(batch, *WIDTHS[-1], dtype, device)
        for batch in QUICK_BATCHES if quick else CONVOLUTIONAL_BATCHES:
            yield convolutional(batch, *CONVOLUTIONAL, dtype, device)
        for shape in SPARSE[-1:] if quick else SPARSE:
            yield sparse(*shape, dtype, device)


def autoencoder(
    batch: int, inputs: int, hidden: int, latent: int, dtype: torch.dtype, device: torch.device
) -> TrainingCase:
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

    return _case(
        Autoencoder,
        (batch, inputs, hidden, latent),
        dtype,
        device,
        lambda: dense_cost(batch, inputs, hidden, latent, dtype, inputs),
        pythae,
        output_activation="sigmoid",
    )


def vae(
    batch: int, inputs: int, hidden: int, latent: int, dtype: torch.dtype, device: torch.device
) -> TrainingCase:
    def pythae() -> Callable[[Model], Learner]:
        from pythae.models import VAE as TheirVAE
        from pythae.models import VAEConfig

        config = VAEConfig(input_dim=(inputs,), latent_dim=latent, reconstruction_loss="mse")
        return functools.partial(_pythae_vae, TheirVAE, config)

    return _case(
        VAE,
        (batch, inputs, hidden, latent),
        dtype,
        device,
        lambda: gaussian_cost(batch, inputs, hidden, latent, dtype),
        pythae,
    )


def infovae(
    batch: int, inputs: int, hidden: int, latent: int, dtype: torch.dtype, device: torch.device
) -> TrainingCase:
    kl_weight, mmd_weight = 0.5, 10.0

    def pythae() -> Callable[[Model], Learner]:
        from pythae.models import INFOVAE_MMD, INFOVAE_MMD_Config

        # Its kernels are those of InfoVAE's defaults.
        config = INFOVAE_MMD_Config(
            input_dim=(inputs,),
            latent_dim=latent,
            reconstruction_loss="mse",
            alpha=1.0 - kl_weight,
            lbd=kl_weight + mmd_weight,
        )
        return functools.partial(_pythae_vae, INFOVAE_MMD, config)

    def cost() -> Cost:
        return with_mmd(gaussian_cost(batch, inputs, hidden, latent, dtype), batch, latent, dtype)

    def refuses(device: torch.device, dtype: torch.dtype) -> str | None:
        # For each of its three sums over pairs, their differences with gradients, and three numbers a kernel.
        nbytes = 3 * batch * batch * (2 * latent + 3 * 7) * dtype.itemsize
        most = torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else 2 << 30
        return f"pythae would take {nbytes / 2**30:.1f} GiB" if nbytes > most else None

    return _case(
        InfoVAE,
        (batch, inputs, hidden, latent),
        dtype,
        device,
        cost,
        pythae,
        refuses,
        kl_weight=kl_weight,
        mmd_weight=mmd_weight,
    )


def denoising(
    batch: int, inputs: int, hidden: int, latent: int, dtype: torch.dtype, device: torch.device
) -> TrainingCase:
    return _case(
        DenoisingAutoencoder,
        (batch, inputs, hidden, latent),
        dtype,
        device,
        # Of each input half of a logarithm, a sine and a cosine.
        lambda: dense_cost(batch, inputs, hidden, latent, dtype, 5 * inputs // 2),
        is_compiled=False,
        output_activation="sigmoid",
        noise="gaussian",
        noise_std=0.2,
    )


def convolutional(
    batch: int,
    shape: tuple[int, int, int],
    channels: tuple[int, int],
    features: int,
    latent: int,
    dtype: torch.dtype,
    device: torch.device,
) -> TrainingCase:
    """An `InfoVAE` with convolutions, which are PyTorch's on all sides."""
    colours, height, width = shape
    first, second = channels
    inputs, sides = math.prod(shape), (height // 4, width // 4)
    flat = second * math.prod(sides)

    def make_model() -> Model:
        return InfoVAE(
            input_size=inputs,
            image_shape=shape,
            channels=channels,
            hidden=(features,),
            latent=latent,
            # It has no kink, at which rounding would decide what the gradient is.
            activation="gelu",
            device=device,
            dtype=dtype,
        )

    def cost(model: Model) -> Cost:
        """As `step_cost`, where each weight of a convolution counts at every place of the smaller of its two images."""
        middle = 4 * first * math.prod(sides)
        outer, inner = 16 * colours * middle, 16 * first * flat
        products = 2 * (outer + inner + flat * features) + 3 * latent * features
        hidden = 2 * (middle + flat + features)
        parameters = sum(one.numel() for one in model.parameters())
        flops = 2 * batch * (3 * products - outer)
        elements = batch * 2 * (inputs + hidden + 2 * latent + inputs) + (2 + 1 + 7) * parameters
        # An error function of each hidden element, and the exponential of its derivative.
        exps = batch * (2 * hidden + 5 * latent)
        return with_mmd(Cost(elements * dtype.itemsize, flops, exps), batch, latent, dtype)

    return TrainingCase(
        "train",
        "convolutional",
        f"{'x'.join(map(str, shape))}-{first}-{second}-{features}-{latent}-b{batch}",
        {"batch": batch, "inputs": inputs, "features": inputs},
        dtype,
        device,
        make_model=make_model,
        features=inputs,
        cost=cost,
        is_compiled=batch in QUICK_BATCHES,
    )


def sparse(
    batch: int, inputs: int, latents: int, k: int, dtype: torch.dtype, device: torch.device
) -> TrainingCase:
    def cost(model: Model) -> Cost:
        # The pre-activations, and of each entry of a code a row of either weight, forward and backward.
        flops = 2 * batch * latents * inputs + 4 * 2 * batch * k * inputs
        parameters = sum(parameter.numel() for parameter in model.parameters())
        elements = 5 * batch * inputs + (2 + 1 + 7) * parameters
        return Cost(elements * dtype.itemsize, flops, 0)

    def is_undecided(twin: nn.Module, data: Tensor) -> Tensor:
        """Whether one more latent is about as large as the last that is kept."""
        first = twin.encoder(data - twin.decoder.bias).topk(k + 1).values
        return first[:, -2] - first[:, -1] < KINK_WIDTH

    return TrainingCase(
        "train",
        "sparse",
        f"{inputs}-{latents}-k{k}-b{batch}",
        {"batch": batch, "inputs": inputs, "features": inputs},
        dtype,
        device,
        make_model=lambda: SparseAutoencoder(
            input_size=inputs, latent=latents, k=k, device=device, dtype=dtype
        ),
        features=inputs,
        cost=cost,
        is_undecided=is_undecided,
    )


def _case(
    model_class: type[Model],
    sizes: tuple[int, int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    cost: Callable[[], Cost],
    pythae: Callable[[], Callable[[Model], Learner]] | None = None,
    refuses: Callable[[torch.device, torch.dtype], str | None] = lambda device, dtype: None,
    is_compiled: bool = True,
    **options: object,
) -> TrainingCase:
    """The step of a model at sizes (batch, inputs, hidden, latent), with options of its own.

    `pythae` and `refuses` are those of a `Rival`. `is_compiled`: whether torch.compile takes part in quick cases.
    """
    batch, inputs, hidden, latent = sizes

    def make_model() -> Model:
        widths = {"input_size": inputs, "hidden": (hidden,), "latent": latent}
        return model_class(**widths, **options, device=device, dtype=dtype)

    rivals = {}
    # The hidden layers of its default networks have this size.
    if pythae is not None and hidden == 512:
        rivals["pythae"] = Rival("pythae", pythae, ("step",), refuses)
    return TrainingCase(
        "train",
        model_class.name,
        f"{inputs}-{hidden}-{latent}-b{batch}",
        {"batch": batch, "inputs": inputs, "features": inputs},
        dtype,
        device,
        make_model=make_model,
        features=inputs,
        cost=lambda model: cost(),
        is_compiled=is_compiled and batch in QUICK_BATCHES,
        rivals=rivals,
    )


def _pythae_vae(model_class: type[nn.Module], config: object, model: Model) -> Learner:
    """Of `pythae_twin`."""
    theirs, ordered = pythae_twin(model_class, config, model)

    def arranged(gradients: list[Tensor]) -> list[Tensor]:
        joined = torch.cat(gradients[2:4]), torch.cat(gradients[4:6])
        return [*gradients[:2], *joined, *gradients[6:]]

    return Learner.of_loss(ordered, lambda data: theirs({"data": data}).loss, arranged)


def pythae_twin(
    model_class: type[nn.Module], config: object, model: Model
) -> tuple[nn.Module, list[nn.Parameter]]:
    """pythae's VAE or a model derived from it, with the weights of `model`, of one hidden layer; and its parameters in
    that order, but that the two heads' weights and then their biases lie between encoder and decoder."""
    from pythae.models.nn.default_architectures import Decoder_AE_MLP, Encoder_VAE_MLP

    given = [parameter.detach() for parameter in model.parameters()]
    theirs = model_class(config, Encoder_VAE_MLP(config), Decoder_AE_MLP(config))
    theirs = theirs.to(given[0].device, given[0].dtype)
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
    if [one.shape for one in own] != [one.shape for one in given]:
        raise RuntimeError("its networks have other layers")
    with torch.no_grad():
        for target, source in zip((*first, *rest), (*given[:2], *given[4:]), strict=True):
            target.copy_(source)
        for pair, source in zip((ordered[2:4], ordered[4:6]), given[2:4], strict=True):
            for target, half in zip(pair, source.chunk(2), strict=True):
                target.copy_(half)
    return theirs, ordered


def dense_cost(batch: int, inputs: int, hidden: int, latent: int, dtype: torch.dtype, exps: int) -> Cost:
    """`step_cost` of an encoder and a decoder of one hidden layer each."""
    return step_cost(batch, pairwise((inputs, hidden, latent, hidden, inputs)), dtype, exps)


def gaussian_cost(batch: int, inputs: int, hidden: int, latent: int, dtype: torch.dtype) -> Cost:
    """`step_cost` of the same with a Gaussian head, which draws its codes."""
    layers = [*pairwise((inputs, hidden, 2 * latent)), *pairwise((latent, hidden, inputs))]
    # Of each latent an exponential, and half of a logarithm, a sine and a cosine; and as much in the backward.
    return step_cost(batch, layers, dtype, 5 * latent)


def with_mmd(cost: Cost, batch: int, latent: int, dtype: torch.dtype) -> Cost:
    """A step's cost with that of the MMD of its codes to as many draws from the prior."""
    codes = torch.empty(batch, latent, dtype=dtype, device="meta")
    pairs = OPS["mmd"].cost(True, codes, codes, kernel="imq")
    return Cost(cost.bytes + pairs.bytes, cost.flops + pairs.flops, cost.exps + pairs.exps)


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

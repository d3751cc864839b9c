"""The ``aefast`` command.

Errors that a user can act on become one line on standard error and exit code 2; set ``AEFAST_DEBUG=1`` for
their traceback. An interrupted command exits with 128 + the number of the signal.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import shlex
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO

import typer

from aefast import __version__
from aefast.bench.cli import bench
from aefast.errors import AefastError, InputError

if TYPE_CHECKING:
    import numpy as np
    from rich.console import Console
    from torch import Tensor
    from yaml import MappingNode

    from aefast.data import Dataset
    from aefast.models import Model, ModelConfig, SparseCode

# typer exports the leaves of click's exceptions only; this is the base of all that concern the command line.
_CommandLineError = typer.BadParameter.__mro__[2]

app = typer.Typer(
    name="aefast",
    help="Fused kernels that make autoencoder training fast.",
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("bench")(bench)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"aefast {__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    pass


_PATCH_SIZE = "Side of the patches of --data patches, in pixels."
_DATA_DTYPE = "bfloat16: 16-bit integers in files of --data are the bits of such numbers."
_DATA_KEY = "Which array of files of several. \\[default: x, data, or the only one]"
_SAMPLE_DIMS = (
    "How many of the last dimensions of an array make a sample, such as 1 for activations of shape (sequences, "
    "positions, d). \\[default: all but the first]"
)
_RUN = "Run"
_OPTIMISATION = "Optimisation"
_MODEL = "Model (options not given take the model's default)"
_LIKELIHOOD = "Of --model vae and infovae"
_VAE = "Of --model vae"
_INFOVAE = "Of --model infovae"
_NOISE = "Of --model denoising"
_SPARSE = "Of --model sparse"


def _read_options(context: typer.Context, file: str | None) -> str | None:
    """Options from a YAML file become the command's defaults."""
    if file is None:
        return None
    try:
        import yaml
    except ImportError as error:
        raise InputError(
            f'config={file!r}: needs PyYAML ({error}); install it with: pip install "aefast[train]"'
        ) from None
    try:
        with open(file, encoding="utf-8") as text:
            loader = yaml.SafeLoader(text)
            node = loader.get_single_node()
            if isinstance(node, yaml.MappingNode):
                _check_given_once(node, file)
            options = None if node is None else loader.construct_document(node)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"config={file!r}: expected a readable YAML file ({reason})") from None
    if not isinstance(options, dict):
        raise InputError(
            f"config={file!r}: expected lines such as 'epochs: 20', got {type(options).__name__}"
        )
    parameters = {parameter.name: parameter for parameter in context.command.params}
    names = parameters.keys() - {"config_file", "help"}
    defaults = {}
    for name, value in options.items():
        known = str(name).replace("-", "_")
        if known not in names:
            from aefast.ops._arguments import did_you_mean

            raise InputError(f"config={file!r}: unknown option {name!r}{did_you_mean(known, names)}")
        if isinstance(value, bool) and not parameters[known].is_flag:
            raise InputError(f"config={file!r}: expected a value for {name!r}, got {str(value).lower()}")
        # A list is what the command line has with commas between.
        defaults[known] = ",".join(map(str, value)) if isinstance(value, list) else value
    context.default_map = {**(context.default_map or {}), **defaults}
    return file


def _check_given_once(options: MappingNode, file: str) -> None:
    """That no option of a YAML file is there twice, of which the last would count without a word."""
    lines: dict[str, int] = {}
    for key, _ in options.value:
        name, line = str(key.value).replace("-", "_"), key.start_mark.line + 1
        first = lines.setdefault(name, line)
        if first != line:
            raise InputError(
                f"config={file!r}: expected every option once, got {key.value!r} in line {first} and in line {line}"
            )


_TRAIN_EPILOG = """
[bold]Examples[/bold]

aefast train --data digits --out runs/digits

aefast train --data patches --hidden 512,128 --latent 32 --epochs 5 --out runs/patches

aefast train --data samples.npy --linear-decoder --activation gelu --out runs/mine

aefast train --data shards/ --hidden 512,128 --latent 16 --out runs/large

aefast train --data digits --model vae --likelihood bernoulli --latent 8 --epochs 50 --out runs/vae

aefast train --data patches --model infovae --mmd-weight 30 --latent 16 --out runs/infovae

aefast train --data patches --model denoising --noise gaussian --noise-std 0.2 --latent 64 --out runs/denoiser

aefast train --data patches --schedule cosine --warmup-steps 100 --patience 5 --keep-best --out runs/patches

aefast train --config digits.yaml --lr 3e-4 --out runs/digits

torchrun --nproc-per-node 2 -m aefast train --data patches --batch-size 512 --out runs/two

aefast train --data patches --epochs 20 --out runs/patches --resume
"""


@app.command(epilog=_TRAIN_EPILOG)
def train(
    data: Annotated[
        str,
        typer.Option(
            metavar="FILE|FOLDER|NAME",
            help="What to train on: [cyan]digits[/cyan], [cyan]patches[/cyan] (both come with "
            '"aefast\\[train]", no download), a .npy, .npz, .pt or .safetensors array of shape (N, ...), or a '
            "folder of .npy, .safetensors or .pt arrays, in the order of their names, or of images of one size. uint8 "
            "and images are scaled to \\[0, 1]. Arrays and folders may be larger than memory.",
            rich_help_panel=_RUN,
        ),
    ],
    out: Annotated[
        # Not a Path, to which an empty string is the current folder.
        str,
        typer.Option(
            metavar="DIR",
            help="Folder that receives config.json, model.safetensors, metrics.jsonl, checkpoints/, plots/.",
            rich_help_panel=_RUN,
        ),
    ],
    validation: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|FOLDER|NAME",
            help="Held-out samples to validate on, read as --data is. \\[default: a part of --data]",
            rich_help_panel=_RUN,
        ),
    ] = None,
    model: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Which model to train: autoencoder, denoising, infovae, sparse, stochastic, vae.",
            rich_help_panel=_RUN,
        ),
    ] = "autoencoder",
    config_file: Annotated[
        str | None,
        typer.Option(
            "--config",
            metavar="FILE",
            is_eager=True,
            callback=_read_options,
            help="A YAML file of options, by their names here, such as batch_size: 512. Options of the command line "
            "go before it.",
            rich_help_panel=_RUN,
        ),
    ] = None,
    epochs: Annotated[int, typer.Option(help="Passes over the training samples.", rich_help_panel=_RUN)] = 10,
    steps: Annotated[
        int | None, typer.Option(help="End after so many steps instead.", rich_help_panel=_RUN)
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Samples of a step.", rich_help_panel=_RUN)] = 256,
    drop_last: Annotated[
        bool,
        typer.Option(
            "--drop-last", help="Leave out what is less than a batch at an epoch's end.", rich_help_panel=_RUN
        ),
    ] = False,
    lr: Annotated[float, typer.Option(help="Learning rate of Adam.", rich_help_panel=_OPTIMISATION)] = 1e-3,
    schedule: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="How the learning rate goes to 0 over the run: constant (it stays), linear or cosine.",
            rich_help_panel=_OPTIMISATION,
        ),
    ] = "constant",
    warmup_steps: Annotated[
        int,
        typer.Option(help="Steps over which it grows to --lr at first.", rich_help_panel=_OPTIMISATION),
    ] = 0,
    precision: Annotated[
        str,
        typer.Option(
            metavar="fp32|bf16|fp16",
            help="What matrix products are formed in. bf16 is for GPUs, and for processors with AMX or AMD's with "
            "AVX512-BF16; on others aefast's products stay in float32.",
            rich_help_panel=_OPTIMISATION,
        ),
    ] = "fp32",
    clip_norm: Annotated[
        float | None,
        typer.Option(
            help="Scale gradients down to this norm if theirs is larger.", rich_help_panel=_OPTIMISATION
        ),
    ] = None,
    accumulate: Annotated[
        int,
        typer.Option(
            help="Cut a batch into so many parts, one after the other, to save memory.",
            rich_help_panel=_OPTIMISATION,
        ),
    ] = 1,
    ema_decay: Annotated[
        float | None,
        typer.Option(
            help="Validate and keep a moving average of the weights that decays so, such as 0.999.",
            rich_help_panel=_OPTIMISATION,
        ),
    ] = None,
    validate_every: Annotated[
        int | None,
        typer.Option(
            help="Steps between two validations on held-out samples within an epoch. \\[default: at its end alone]",
            rich_help_panel=_RUN,
        ),
    ] = None,
    patience: Annotated[
        int | None,
        typer.Option(
            help="End once so many epochs, or validations with --validate-every, have not lowered the loss on held-out "
            "samples.",
            rich_help_panel=_OPTIMISATION,
        ),
    ] = None,
    keep_last: Annotated[int, typer.Option(help="Checkpoints that stay.", rich_help_panel=_RUN)] = 2,
    keep_best: Annotated[
        bool,
        typer.Option(
            "--keep-best",
            help="Keep the model with the lowest loss on held-out samples in --out/best.",
            rich_help_panel=_RUN,
        ),
    ] = False,
    tensorboard: Annotated[
        bool,
        typer.Option("--tensorboard", help="Write metrics to --out/tensorboard too.", rich_help_panel=_RUN),
    ] = False,
    seed: Annotated[
        int,
        typer.Option(
            help="Seed of the initial weights, of the samples' order and of noise.", rich_help_panel=_RUN
        ),
    ] = 0,
    device: Annotated[
        str,
        typer.Option(
            metavar="cpu|cuda|auto",
            help="Where to train; auto takes CUDA where it is.",
            rich_help_panel=_RUN,
        ),
    ] = "auto",
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on from the newest checkpoint in --out, bit for bit; the other options must be those of "
            "the run, but for --epochs, --steps and --patience, which may grow, and for what is logged and kept. "
            "Without a checkpoint there, start afresh.",
            rich_help_panel=_RUN,
        ),
    ] = False,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite",
            help="Start afresh even if --out holds a run, which is deleted once the new one has something to write. "
            "Without this or --resume such a folder is an error.",
            rich_help_panel=_RUN,
        ),
    ] = False,
    no_compare: Annotated[
        bool,
        typer.Option(
            "--no-compare",
            help="Leave out the closing measurement of the same model in eager PyTorch.",
            rich_help_panel=_RUN,
        ),
    ] = False,
    log_every: Annotated[
        int, typer.Option(help="Steps between two lines of metrics.jsonl.", rich_help_panel=_RUN)
    ] = 50,
    patch_size: Annotated[int, typer.Option(help=_PATCH_SIZE, rich_help_panel=_RUN)] = 16,
    data_dtype: Annotated[
        str | None, typer.Option(metavar="NAME", help=_DATA_DTYPE, rich_help_panel=_RUN)
    ] = None,
    data_key: Annotated[
        str | None, typer.Option(metavar="NAME", help=_DATA_KEY, rich_help_panel=_RUN)
    ] = None,
    sample_dims: Annotated[int | None, typer.Option(help=_SAMPLE_DIMS, rich_help_panel=_RUN)] = None,
    channels: Annotated[
        str | None,
        typer.Option(
            metavar="N[,N...]",
            help="For images: channels of convolutions in front of the hidden layers, each of which halves the sides, "
            "such as 32,64; the decoder mirrors them. \\[default: none]",
            rich_help_panel=_MODEL,
        ),
    ] = None,
    hidden: Annotated[
        str | None,
        typer.Option(
            metavar="N[,N...]|none",
            help="Widths of the encoder's hidden layers, such as 512 or 512,128. \\[default: 512]",
            rich_help_panel=_MODEL,
        ),
    ] = None,
    latent: Annotated[
        int | None,
        typer.Option(
            help="Latent size; more than the data's features is an overcomplete model. \\[default: 16, sparse: 1024]",
            rich_help_panel=_MODEL,
        ),
    ] = None,
    activation: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Activation of the hidden layers: identity, relu, leaky_relu, elu, selu, silu, gelu, "
            "gelu_tanh, tanh, sigmoid, softplus. \\[default: relu]",
            rich_help_panel=_MODEL,
        ),
    ] = None,
    decoder_hidden: Annotated[
        str | None,
        typer.Option(
            metavar="N[,N...]|none",
            help="Widths of the decoder's hidden layers. \\[default: the encoder's in reverse]",
            rich_help_panel=_MODEL,
        ),
    ] = None,
    linear_decoder: Annotated[
        bool,
        typer.Option("--linear-decoder", help="Make the decoder one linear layer.", rich_help_panel=_MODEL),
    ] = False,
    output_activation: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Activation of the reconstruction, such as sigmoid for data in \\[0, 1]. "
            "\\[default: identity]",
            rich_help_panel=_MODEL,
        ),
    ] = None,
    loss: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Between samples and reconstructions: mse, rmse, l1, huber, lp, charbonnier, bce, bce_with_logits, or "
            "pyramid, of images at several resolutions. \\[default: mse, or what the model's likelihood says]",
            rich_help_panel=_MODEL,
        ),
    ] = None,
    loss_p: Annotated[
        float | None,
        typer.Option(help="Power of lp, and of pyramid. \\[default of pyramid: 1]", rich_help_panel=_MODEL),
    ] = None,
    loss_eps: Annotated[
        float | None,
        typer.Option(
            help="Eps of charbonnier; given with pyramid, its levels are compared as charbonnier does. "
            "\\[default of charbonnier: 0.001]",
            rich_help_panel=_MODEL,
        ),
    ] = None,
    loss_delta: Annotated[
        float | None, typer.Option(help="Delta of huber. \\[default: 1]", rich_help_panel=_MODEL)
    ] = None,
    pyramid: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="average, gaussian or laplacian. \\[default: average]",
            rich_help_panel=_MODEL,
        ),
    ] = None,
    pyramid_levels: Annotated[
        int | None,
        typer.Option(help="Resolutions that pyramid compares. \\[default: 4]", rich_help_panel=_MODEL),
    ] = None,
    pyramid_weights: Annotated[
        str | None,
        typer.Option(
            metavar="X[,X...]",
            help="Their weights, that of the finest first. \\[default: 1 each]",
            rich_help_panel=_MODEL,
        ),
    ] = None,
    likelihood: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="What a sample is given its latent: mse, a Gaussian of variance 1; gaussian, one whose variance is "
            "learnt; bernoulli, for data in \\[0, 1]. \\[default: mse]",
            rich_help_panel=_LIKELIHOOD,
        ),
    ] = None,
    kl_warmup_steps: Annotated[
        int | None,
        typer.Option(
            "--kl-warmup-steps",
            "--kl-warmup",
            help="Steps over which the weight of the KL divergence grows from 0. \\[default: 0]",
            rich_help_panel=_LIKELIHOOD,
        ),
    ] = None,
    beta: Annotated[
        float | None,
        typer.Option(help="Weight of the KL divergence. \\[default: 1]", rich_help_panel=_VAE),
    ] = None,
    kl_weight: Annotated[
        float | None,
        typer.Option(
            help="Weight of the KL divergence of each sample's codes to the prior. \\[default: 0]",
            rich_help_panel=_INFOVAE,
        ),
    ] = None,
    mmd_weight: Annotated[
        float | None,
        typer.Option(
            help="Weight of the MMD between all codes and the prior. \\[default: 10]",
            rich_help_panel=_INFOVAE,
        ),
    ] = None,
    mmd_kernel: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="rbf, laplacian, imq, rational_quadratic or energy. \\[default: imq]",
            rich_help_panel=_INFOVAE,
        ),
    ] = None,
    mmd_bandwidth: Annotated[
        str | None,
        typer.Option(
            metavar="X[,X...]",
            help="Width of the kernel, or widths of kernels that are summed. \\[default: multiples of the prior's]",
            rich_help_panel=_INFOVAE,
        ),
    ] = None,
    mmd_alpha: Annotated[
        float | None,
        typer.Option(help="Alpha of rational_quadratic. \\[default: 1]", rich_help_panel=_INFOVAE),
    ] = None,
    mmd_estimator: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="unbiased or biased. \\[default: unbiased]", rich_help_panel=_INFOVAE
        ),
    ] = None,
    mmd_prior: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="What codes are compared with: samples of the prior, or closed_form, the prior itself. "
            "\\[default: samples]",
            rich_help_panel=_INFOVAE,
        ),
    ] = None,
    deterministic: Annotated[
        bool,
        typer.Option(
            "--deterministic",
            help="Make codes points without noise, as in a Wasserstein autoencoder.",
            rich_help_panel=_INFOVAE,
        ),
    ] = False,
    noise: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="gaussian, salt_and_pepper, masking or dropout. \\[default: gaussian]",
            rich_help_panel=_NOISE,
        ),
    ] = None,
    noise_mean: Annotated[
        float | None, typer.Option(help="Mean of the gaussian. \\[default: 0]", rich_help_panel=_NOISE)
    ] = None,
    noise_std: Annotated[
        float | None,
        typer.Option(help="Standard deviation of the gaussian. \\[default: 0.1]", rich_help_panel=_NOISE),
    ] = None,
    noise_p: Annotated[
        float | None,
        typer.Option(
            help="Chance of a value to be hit by the other noises. \\[default: 0.1]", rich_help_panel=_NOISE
        ),
    ] = None,
    noise_low: Annotated[
        float | None,
        typer.Option(help="What pepper sets a value to. \\[default: 0]", rich_help_panel=_NOISE),
    ] = None,
    noise_high: Annotated[
        float | None,
        typer.Option(help="What salt sets a value to. \\[default: 1]", rich_help_panel=_NOISE),
    ] = None,
    noise_block: Annotated[
        int | None,
        typer.Option(
            help="Side of the squares that masking sets to 0, in pixels. \\[default: 1]",
            rich_help_panel=_NOISE,
        ),
    ] = None,
    sparsity: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="topk, batchtopk, l1, kl or jumprelu. \\[default: topk]",
            rich_help_panel=_SPARSE,
        ),
    ] = None,
    k: Annotated[
        int | None,
        typer.Option(
            "--k",
            help="Latents that topk leaves a sample, and batchtopk on average. \\[default: 32]",
            rich_help_panel=_SPARSE,
        ),
    ] = None,
    sparsity_weight: Annotated[
        float | None,
        typer.Option(
            help="Weight of the penalty of l1, kl and jumprelu. \\[default: 0.0003, 0.0001 and 0.00001]",
            rich_help_panel=_SPARSE,
        ),
    ] = None,
    sparsity_warmup_steps: Annotated[
        int | None,
        typer.Option(
            help="Steps over which the weight of the penalty grows from 0. \\[default: 0]",
            rich_help_panel=_SPARSE,
        ),
    ] = None,
    rate: Annotated[
        float | None,
        typer.Option(
            help="Mean activity that kl holds latents to. \\[default: 0.05]", rich_help_panel=_SPARSE
        ),
    ] = None,
    bandwidth: Annotated[
        float | None,
        typer.Option(
            help="Width in which jumprelu's thresholds get a gradient. \\[default: 0.001]",
            rich_help_panel=_SPARSE,
        ),
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(help="What they begin with. \\[default: 0.001]", rich_help_panel=_SPARSE),
    ] = None,
    tied: Annotated[
        bool,
        typer.Option("--tied", help="Give the decoder the encoder's weight.", rich_help_panel=_SPARSE),
    ] = False,
    no_pre_bias: Annotated[
        bool,
        typer.Option(
            "--no-pre-bias",
            help="Encode samples as they are, not without the decoder's bias.",
            rich_help_panel=_SPARSE,
        ),
    ] = False,
    no_unit_norm: Annotated[
        bool,
        typer.Option(
            "--no-unit-norm", help="Let the decoder's directions have any length.", rich_help_panel=_SPARSE
        ),
    ] = False,
    aux_weight: Annotated[
        float | None,
        typer.Option(
            help="Weight of the loss that brings dead latents back; 0 for none. \\[default: 1/32]",
            rich_help_panel=_SPARSE,
        ),
    ] = None,
    aux_k: Annotated[
        int | None,
        typer.Option(
            help="Dead latents that a sample uses in it. \\[default: half of the features]",
            rich_help_panel=_SPARSE,
        ),
    ] = None,
    dead_after: Annotated[
        int | None,
        typer.Option(
            help="Samples without which a latent counts as dead. \\[default: 1,000,000]",
            rich_help_panel=_SPARSE,
        ),
    ] = None,
    image_shape: Annotated[
        str | None,
        typer.Option(
            metavar="C,H,W",
            help="Shape of a sample, for channels, such squares and pyramid. \\[default: the data's]",
            rich_help_panel=_MODEL,
        ),
    ] = None,
) -> int:
    """Train an autoencoder on real data and keep everything about it in one folder.

    Ctrl-C finishes the current step and writes a checkpoint that --resume goes on from.
    """
    # Imported here so that help and the other commands need not wait for it.
    import torch
    from rich.console import Console

    from aefast.data.load import holds_arrays
    from aefast.models import find_model
    from aefast.train import TensorBoard, TrainConfig, Trainer
    from aefast.train.processes import Processes, process_group
    from aefast.train.trainer import TENSORBOARD_FOLDER

    model_class = find_model(model)
    config = TrainConfig(
        epochs=epochs,
        steps=steps,
        batch_size=batch_size,
        drop_last=drop_last,
        lr=lr,
        schedule=schedule,
        warmup_steps=warmup_steps,
        precision=precision,
        clip_norm=clip_norm,
        accumulate=accumulate,
        ema_decay=ema_decay,
        validate_every=validate_every,
        patience=patience,
        keep_last=keep_last,
        keep_best=keep_best,
        seed=seed,
        device=device,
        log_every=log_every,
    )
    if resume and overwrite:
        raise InputError("overwrite: give either --resume or --overwrite, not both")
    options = {
        "channels": _widths(channels, "channels"),
        "hidden": _widths(hidden, "hidden"),
        "latent": latent,
        "activation": activation,
        "decoder_hidden": _widths(decoder_hidden, "decoder_hidden"),
        "linear_decoder": linear_decoder or None,
        "output_activation": output_activation,
        "loss": loss,
        "loss_p": loss_p,
        "loss_eps": loss_eps,
        "loss_delta": loss_delta,
        "pyramid": pyramid,
        "pyramid_levels": pyramid_levels,
        "pyramid_weights": _numbers(pyramid_weights, "pyramid_weights"),
        "likelihood": likelihood,
        "beta": beta,
        "kl_warmup_steps": kl_warmup_steps,
        "kl_weight": kl_weight,
        "mmd_weight": mmd_weight,
        "mmd_kernel": mmd_kernel,
        "mmd_bandwidth": _bandwidths(mmd_bandwidth),
        "mmd_alpha": mmd_alpha,
        "mmd_estimator": mmd_estimator,
        "mmd_prior": mmd_prior,
        "stochastic": False if deterministic else None,
        "noise": noise,
        "noise_mean": noise_mean,
        "noise_std": noise_std,
        "noise_p": noise_p,
        "noise_low": noise_low,
        "noise_high": noise_high,
        "noise_block": noise_block,
        "sparsity": sparsity,
        "k": k,
        "sparsity_weight": sparsity_weight,
        "sparsity_warmup_steps": sparsity_warmup_steps,
        "rate": rate,
        "bandwidth": bandwidth,
        "threshold": threshold,
        "tied": tied or None,
        "pre_bias": False if no_pre_bias else None,
        "unit_norm": False if no_unit_norm else None,
        "aux_weight": aux_weight,
        "aux_k": aux_k,
        "dead_after": dead_after,
        "image_shape": _widths(image_shape, "image_shape"),
    }
    given = {name: value for name, value in options.items() if value is not None}
    # The options are checked before the data is read, for which any shape will do that has levels enough.
    _model_config(model_class, given, given.get("image_shape") or (1, 1024, 1024))

    def run() -> int:
        console = Console(quiet=not Processes().is_first)
        say = _teller(console)
        reading = {"patch_size": patch_size, "dtype": data_dtype, "key": data_key, "sample_dims": sample_dims}
        dataset = _load(data, say, **reading)
        held_out = None if validation is None else _load(validation, say, "validation", least=1, **reading)
        torch.manual_seed(seed)
        network = model_class(_model_config(model_class, given, dataset.sample_shape))
        callbacks = [TensorBoard(os.path.join(out, TENSORBOARD_FOLDER))] if tensorboard else []
        trainer = Trainer(
            network, dataset, config, out, validation=held_out, callbacks=callbacks, console=console
        )
        parameters = sum(parameter.numel() for parameter in network.parameters())
        say(
            f"{model_class.name}: {parameters:,} parameters on {trainer.device} · "
            f"{dataset.name}: {len(trainer.batches.rows):,} samples of {dataset.features} features, "
            f"{len(trainer.held_out.rows):,} held out{'' if held_out is None else f', of {held_out.name}'}"
        )
        # Whoever asks for what is done to images knows.
        is_image = getattr(network.config, "image_shape", None) is not None
        if sample_dims is None and len(dataset.sample_shape) > 1 and not is_image and holds_arrays(data):
            say(
                f"notice: a sample is all of {dataset.sample_shape}, every dimension of the data but the first; "
                "--sample-dims 1 would take the last alone"
            )
        result = trainer.fit(resume=resume, overwrite=overwrite, compare=not no_compare)

        if result.interrupted is not None:
            say(
                f"interrupted by {result.interrupted.name} at epoch {trainer.epoch_of_run()}, step "
                f"{result.step:,}; checkpoint: {trainer.store.paths()[-1]}"
            )
            say(_how_to_resume())
            return 128 + result.interrupted
        say(f"model, metrics and plots: {result.directory}")
        say(_held_out_line(result.held_out))
        if result.comparison is not None:
            say(str(result.comparison))
        return 0

    with process_group(device):
        return run()


def _model_config(
    model_class: type[Model], options: dict[str, Any], sample_shape: tuple[int, ...]
) -> ModelConfig:
    """The config of a model of that class for samples of that shape, from the options given."""
    options = {"input_size": math.prod(sample_shape), **options}
    needs_images = "channels" in options or options.get("loss") == "pyramid"
    if (needs_images or "noise_block" in options) and "image_shape" not in options:
        # Other images have their channels last, or where they have them cannot be told.
        if len(sample_shape) == 2:
            options["image_shape"] = (1, *sample_shape)
        elif len(sample_shape) == 3 and sample_shape[0] in (1, 3):
            options["image_shape"] = sample_shape
        elif (
            len(sample_shape) == 3
            and sample_shape[0] != 4
            and sample_shape[2] in (1, 3, 4)
            and (needs_images or options["noise_block"] > 1)
        ):
            shape = ",".join(map(str, sample_shape))
            raise InputError(
                f"data: expected images (C, H, W), got {sample_shape}, which looks like (H, W, C); save "
                f"x.transpose(0, 3, 1, 2) instead, or confirm the order with --image-shape {shape}"
            )
    return model_class.config_class.from_dict(options, f"model {model_class.name}")


def _held_out_line(measures: dict[str, float]) -> str:
    """What a finished run says of the held-out samples."""
    psnr = f"{measures['psnr']:.1f} dB" if "psnr" in measures else "exact"
    if "noisy_psnr" in measures:
        return f"noisy input {measures['noisy_psnr']:.1f} dB -> denoised {psnr} (held out)"
    if "mmd" in measures:
        return f"MMD² to the prior {measures['mmd']:.2e} · reconstruction {psnr} (held out)"
    if "elbo" in measures:
        return f"ELBO {measures['elbo']:,.2f} nats a sample · reconstruction {psnr} (held out)"
    if "l0" in measures:
        # Samples that are all equal have no variance to explain.
        explained = measures.get("explained_variance")
        told = [] if explained is None else [f"explained variance {explained:.4f}"]
        told.append(f"L0 {measures['l0']:,.1f}")
        if "dead" in measures:
            told.append(f"dead {measures['dead']:.1%}")
        return f"{' · '.join(told)} · reconstruction {psnr} (held out)"
    return f"reconstruction {psnr} (held out)"


# Training samples that a sampler is fitted to and that new ones are compared with; the help tells it too.
_MOST_COMPARED = 200_000

_RUN_FOLDER = "Folder of a trained model, the --out of [cyan]aefast train[/cyan]."
_SAMPLES = (
    "Samples like those that the model was trained on: [cyan]digits[/cyan], [cyan]patches[/cyan], a .npy, .npz, .pt or "
    ".safetensors array of shape (N, ...), or a folder of .npy, .safetensors or .pt files, or of images."
)
_DEVICE = "Where to compute; auto takes CUDA where it is."
_REPLACE = "Replace --out if it is there already, which is an error without this."

_SAMPLE_EPILOG = """
[bold]Examples[/bold]

aefast sample --run runs/vae --data digits --out samples.npy

aefast sample --run runs/digits --data digits --sampler gmm --components 20 --count 500 --out samples.npy
"""


@app.command(epilog=_SAMPLE_EPILOG)
def sample(
    run: Annotated[str, typer.Option(metavar="DIR", help=_RUN_FOLDER)],
    data: Annotated[
        str,
        typer.Option(
            metavar="PATH|NAME",
            help="What the model was trained on, for its codes and for the comparison: [cyan]digits[/cyan], "
            "[cyan]patches[/cyan], a .npy, .npz, .pt or .safetensors array of shape (N, ...), or a folder of .npy, "
            ".safetensors or .pt files, or of images. Of more than 200,000 training samples, so many are taken.",
        ),
    ],
    out: Annotated[
        str,
        typer.Option(
            metavar="FILE.npy",
            help="Where the samples go, float32 of shape (count, ...). A picture of some goes beside it, FILE.png.",
        ),
    ],
    validation: Annotated[
        str | None,
        typer.Option(
            metavar="PATH|NAME",
            help="The held-out samples to compare with, read as --data is, where the run had --validation. "
            "\\[default: the part of --data that training held out]",
        ),
    ] = None,
    sampler: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Where codes are drawn from. [cyan]prior[/cyan]: N(0, I) for vae and infovae; for other models, which "
            "have no prior, the box that the codes of training samples lie in. [cyan]gmm[/cyan]: a mixture of "
            "Gaussians fitted to these codes. [cyan]flow[/cyan]: a normalising flow fitted to them.",
        ),
    ] = "prior",
    components: Annotated[
        int | None, typer.Option(help="Gaussians of --sampler gmm. \\[default: 10]")
    ] = None,
    count: Annotated[int, typer.Option(help="How many samples, at least 2.")] = 1000,
    seed: Annotated[int, typer.Option(help="Seed of the fit and of the draws.")] = 0,
    save_sampler: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="Keep the fitted sampler in this folder, for aefast.sampling.load_sampler.",
        ),
    ] = None,
    patch_size: Annotated[int, typer.Option(help=_PATCH_SIZE)] = 16,
    data_dtype: Annotated[str | None, typer.Option(metavar="NAME", help=_DATA_DTYPE)] = None,
    data_key: Annotated[str | None, typer.Option(metavar="NAME", help=_DATA_KEY)] = None,
    sample_dims: Annotated[int | None, typer.Option(help=_SAMPLE_DIMS)] = None,
    device: Annotated[str, typer.Option(metavar="cpu|cuda|auto", help=_DEVICE)] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help=_REPLACE)] = False,
) -> None:
    """Draw new samples from a trained model and compare them with data that it has not seen.

    The report gives the MMD² of the samples to held-out data, with a two-sample test, and says whether they are copies
    of training data.
    """
    from aefast.data import Batches
    from aefast.models._base import check_choice
    from aefast.sampling import SAMPLERS, PriorSampler, codes_of, generate, quality
    from aefast.sampling._base import check_seed

    check_choice(sampler, "sampler", SAMPLERS)
    if components is not None and sampler != "gmm":
        raise InputError(f"components={components!r}: sampler {sampler!r} has no components, only 'gmm' has")
    if count < 2:
        raise InputError(f"count={count!r}: expected an integer of at least 2")
    check_seed(seed)
    if save_sampler == "":
        raise InputError("save_sampler='': expected a folder")
    options = {} if sampler == "prior" else {"seed": seed}
    if components is not None:
        options["components"] = components
    density = SAMPLERS[sampler](**options)
    path = _new_file(out, data, overwrite)
    picture = path.with_suffix(".png")
    if os.path.exists(picture) and not overwrite:
        raise InputError(
            f"out={out!r}: its picture {picture} is there already; add --overwrite to replace it, or choose another "
            "file"
        )
    reading = {"patch_size": patch_size, "dtype": data_dtype, "key": data_key, "sample_dims": sample_dims}
    model, dataset = _trained(run, data, device, **reading)
    source = sampler
    if sampler == "prior":
        density = PriorSampler.of(model)
        source = "N(0, I)" if density.prior == "normal" else "the box of its codes"

    say = _teller()
    if validation is not None:
        others = _load_for(model, run, validation, "validation", **reading)
        parts = (dataset, dataset.rows()), (others, others.rows())
    else:
        parts = [(dataset, rows) for rows in dataset.split()]
        others = _validation_of(run)
        if others is not None:
            say(
                f"notice: the run was trained on all of --data and validated on {others}; without --validation, what "
                "is called held out here are samples that it was trained on"
            )
    training, held_out = (
        Batches(one.samples, rows, batch_size=1, seed=0).spread(_MOST_COMPARED) for one, rows in parts
    )
    say(
        f"{model.name} of {run} · {dataset.name}: {len(training):,} training samples · codes drawn from {source}"
    )
    with _waiting(f"fitting {sampler}"):
        density.fit(codes_of(model, training))
    if save_sampler is not None:
        density.save(save_sampler)
        say(f"sampler: {save_sampler}")
    samples = generate(model, density, count, seed=seed).float()
    _write_array(path, (count, *dataset.sample_shape), [samples])
    say(f"{count:,} samples: {path}")
    try:
        title = f"{model.name} on {dataset.name}, codes drawn from {source}"
        _draw_samples(held_out, samples, dataset.sample_shape, title, picture)
        say(f"picture: {picture}")
    except ImportError as error:
        say(f'notice: no picture ({error}); for pictures: pip install "aefast[train]"')
    with _waiting("comparing with real data"):
        report = quality(samples, held_out, training, seed=seed)
    say(str(report))


@app.command()
def encode(
    run: Annotated[str, typer.Option(metavar="DIR", help=_RUN_FOLDER)],
    data: Annotated[str, typer.Option(metavar="PATH|NAME", help=_SAMPLES)],
    out: Annotated[
        str,
        typer.Option(
            metavar="FILE",
            help="Where the codes go: a .npy file, float32 of shape (N, latent); with --sparse a .safetensors file.",
        ),
    ],
    sparse: Annotated[
        bool,
        typer.Option(
            "--sparse",
            help="Of a sparse model, write what is not 0: values, float32, and indices, int32, both (N, k) for the "
            "most latents k that a sample uses; where it uses fewer, the value is 0 and the index -1.",
        ),
    ] = False,
    batch_size: Annotated[int, typer.Option(help="Samples that are encoded at a time.")] = 4096,
    patch_size: Annotated[int, typer.Option(help=_PATCH_SIZE)] = 16,
    data_dtype: Annotated[str | None, typer.Option(metavar="NAME", help=_DATA_DTYPE)] = None,
    data_key: Annotated[str | None, typer.Option(metavar="NAME", help=_DATA_KEY)] = None,
    sample_dims: Annotated[int | None, typer.Option(help=_SAMPLE_DIMS)] = None,
    device: Annotated[str, typer.Option(metavar="cpu|cuda|auto", help=_DEVICE)] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help=_REPLACE)] = False,
) -> None:
    """Write the codes of all samples, in their order, with a trained model.

    Of vae and infovae they are the means of the posterior. Memory does not grow with the number of samples that
    lie in files.
    """
    from aefast.sampling import encode_batches, encode_sparse_batches

    _check_batch_size(batch_size)
    path = _new_file(out, data, overwrite, ".safetensors" if sparse else ".npy")
    reading = {"patch_size": patch_size, "dtype": data_dtype, "key": data_key, "sample_dims": sample_dims}
    model, dataset = _trained(run, data, device, least=1, **reading)
    count, latent = len(dataset), model.config.latent
    if sparse:
        codes = encode_sparse_batches(model, dataset, batch_size=batch_size)
        most = _write_sparse(path, count, latent, codes, "encoding")
        _teller()(f"{count:,} codes of size {latent}, of which at most {most:,} are not 0: {path}")
        return
    _write_array(path, (count, latent), encode_batches(model, dataset, batch_size=batch_size), "encoding")
    _teller()(f"{count:,} codes of size {latent}: {path}")


@app.command()
def reconstruct(
    run: Annotated[str, typer.Option(metavar="DIR", help=_RUN_FOLDER)],
    data: Annotated[str, typer.Option(metavar="PATH|NAME", help=_SAMPLES)],
    out: Annotated[
        str,
        typer.Option(
            metavar="FILE.npy", help="Where the reconstructions go, float32 of the shape of the samples."
        ),
    ],
    batch_size: Annotated[int, typer.Option(help="Samples that are reconstructed at a time.")] = 4096,
    patch_size: Annotated[int, typer.Option(help=_PATCH_SIZE)] = 16,
    data_dtype: Annotated[str | None, typer.Option(metavar="NAME", help=_DATA_DTYPE)] = None,
    data_key: Annotated[str | None, typer.Option(metavar="NAME", help=_DATA_KEY)] = None,
    sample_dims: Annotated[int | None, typer.Option(help=_SAMPLE_DIMS)] = None,
    device: Annotated[str, typer.Option(metavar="cpu|cuda|auto", help=_DEVICE)] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help=_REPLACE)] = False,
) -> None:
    """Write what a trained model makes of all samples, in their order; a denoising model removes their noise.

    Memory does not grow with the number of samples that lie in files.
    """
    from aefast.sampling import reconstruct_batches

    _check_batch_size(batch_size)
    path = _new_file(out, data, overwrite)
    reading = {"patch_size": patch_size, "dtype": data_dtype, "key": data_key, "sample_dims": sample_dims}
    model, dataset = _trained(run, data, device, least=1, **reading)
    made = reconstruct_batches(model, dataset, batch_size=batch_size)
    _write_array(path, (len(dataset), *dataset.sample_shape), made, "reconstructing")
    _teller()(f"{len(dataset):,} reconstructions: {path}")


def _check_batch_size(batch_size: int) -> None:
    from aefast.nn.linear_act import check_positive_int

    check_positive_int(batch_size, "batch_size")


def _teller(console: Console | None = None) -> Callable[[str], None]:
    """Prints lines as they are, however wide the terminal is; on standard output by default."""
    if console is None:
        from rich.console import Console

        console = Console()
    return lambda text: console.print(text, highlight=False, markup=False, soft_wrap=True)


def _waiting(what: str) -> contextlib.AbstractContextManager[Any]:
    """Within it a terminal shows what it is that takes its time, in characters that every terminal has."""
    from rich.console import Console

    return Console().status(what, spinner="line")


def _load(data: str, say: Callable[[str], None], argument: str = "data", **reading: Any) -> Dataset:
    """What `aefast.data.load` makes of `data`, and what it warns of as notices; both name the `argument`."""
    from aefast.data import DataError, DataWarning, load

    def named(message: object) -> str:
        return str(message).replace("data=", f"{argument}=", 1)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", DataWarning)
        try:
            dataset = load(data, **reading)
        except DataError as error:
            raise DataError(named(error)) from error
    for warning in caught:
        if issubclass(warning.category, DataWarning):
            say(f"notice: {named(warning.message)}")
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    return dataset


def _trained(run: str, data: str, device: str, **reading: Any) -> tuple[Model, Dataset]:
    """The model of a run, on the device, and samples that it fits, as options of `aefast.data.load` say."""
    from aefast.models import from_pretrained
    from aefast.train import TrainConfig

    place = TrainConfig(device=device).resolve_device()
    if run == "":
        raise InputError("run='': expected a folder with a saved model")
    try:
        model = from_pretrained(run, device=place)
    except InputError as error:
        raise InputError(str(error).replace("directory=", "run=", 1)) from None
    return model, _load_for(model, run, data, **reading)


def _load_for(model: Model, run: str, data: str, argument: str = "data", **reading: Any) -> Dataset:
    """Samples for the model of a run."""
    dataset = _load(data, _teller(), argument, **reading)
    size, shape = model.config.input_size, dataset.sample_shape
    if dataset.features != size:
        fitting = (dims for dims in range(1, len(shape)) if math.prod(shape[-dims:]) == size)
        hint = "".join(f"; --sample-dims {dims} takes such of it" for dims in fitting)
        raise InputError(
            f"{argument}={data!r}: expected {size} features a sample, those of the model in {run}, got "
            f"{dataset.features}{hint}"
        )
    model.check_order(shape, f"{argument}={data!r}")
    return dataset


def _validation_of(run: str) -> str | None:
    """What a run was validated on, if that was no part of what it was trained on."""
    from aefast.models._base import CONFIG_FILE

    metadata = json.loads(Path(run, CONFIG_FILE).read_text(encoding="utf-8")).get("metadata")
    training = metadata.get("training") if isinstance(metadata, dict) else None
    return training.get("validation") if isinstance(training, dict) else None


def _new_file(out: str, data: str, overwrite: bool, suffix: str = ".npy") -> Path:
    """The checked path of a file to write."""
    path = Path(out)
    if path.suffix.lower() != suffix:
        raise InputError(f"out={out!r}: expected the name of a {suffix} file")
    # Not by methods of the path, which raise what the system says of a name that is too long.
    if os.path.isdir(path):
        raise InputError(f"out={out!r}: expected a file, found a folder")
    if os.path.isdir(data) and os.path.exists(path.parent) and path.parent.samefile(data):
        raise InputError(f"out={out!r}: expected a file outside of --data, whose files are all samples")
    if os.path.exists(path):
        if os.path.exists(data) and path.samefile(data):
            raise InputError(f"out={out!r}: expected another file than --data, which would be lost")
        if not overwrite:
            raise InputError(
                f"out={out!r}: is there already; add --overwrite to replace it, or choose another file"
            )
    return path


def _write_array(
    path: Path, shape: tuple[int, ...], batches: Iterable[Tensor], what: str | None = None
) -> None:
    """Write batches (n, ...) as one float32 array of `shape`, which appears whole or not at all.

    One batch at a time is in memory.
    """
    import numpy as np

    header = {"descr": "<f4", "fortran_order": False, "shape": shape}
    with _writing(path, shape[0], what) as (file, advance):
        np.lib.format.write_array_header_1_0(file, header)
        for batch in batches:
            file.write(_little_endian(batch, "<f4").data)
            advance(len(batch))


def _write_sparse(path: Path, count: int, latent: int, batches: Iterable[SparseCode], what: str) -> int:
    """Write `count` codes as values and indices (count, k), which appear whole or not at all; k, what the widest has.

    One batch at a time is in memory; which is the widest is known at last, so that other files keep them until then.
    """
    sizes: list[tuple[int, int]] = []
    with _writing(path, count, what) as (file, advance), contextlib.ExitStack() as stack:
        parts = [stack.enter_context(tempfile.TemporaryFile(dir=path.parent)) for _ in range(2)]
        for code in batches:
            for part, tensor, kind in zip(parts, code, ("<f4", "<i4"), strict=True):
                part.write(_little_endian(tensor, kind).data)
            sizes.append(tuple(code.values.shape))
            advance(len(code.values))
        most = max(width for _, width in sizes)
        size = 4 * count * most
        header = {
            "__metadata__": {"latent": str(latent)},
            "values": {"dtype": "F32", "shape": [count, most], "data_offsets": [0, size]},
            "indices": {"dtype": "I32", "shape": [count, most], "data_offsets": [size, 2 * size]},
        }
        text = json.dumps(header).encode()
        # The format's own padding, by which numbers are where processors like to read them.
        text += b" " * (-len(text) % 8)
        file.write(len(text).to_bytes(8, "little") + text)
        for part, padding in zip(parts, (0, -1), strict=True):
            part.seek(0)
            for rows, width in sizes:
                _copy_rows(part, file, (rows, width), most, padding)
    return most


def _copy_rows(source: BinaryIO, target: BinaryIO, shape: tuple[int, int], width: int, padding: int) -> None:
    """Copy rows of 4-byte numbers, padded to `width`; as bytes -1 is the same in every place, and so is 0."""
    import numpy as np

    rows = np.frombuffer(source.read(4 * shape[0] * shape[1]), "<i4").reshape(shape)
    target.write(np.pad(rows, ((0, 0), (0, width - shape[1])), constant_values=padding).data)


def _little_endian(tensor: Tensor, kind: str) -> np.ndarray:
    """The numbers of a tensor on the CPU as numpy's type `kind`."""
    # numpy has no bfloat16.
    tensor = tensor.float() if tensor.is_floating_point() else tensor
    return tensor.contiguous().numpy().astype(kind, copy=False)


@contextlib.contextmanager
def _writing(path: Path, total: int, what: str | None) -> Iterator[tuple[BinaryIO, Callable[[int], None]]]:
    """A file that becomes `path` at the end, or nothing, and what is to be called with how many rows are done.

    Its folder is made if missing. With `what` for a headline, a terminal shows how far it is.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with (
            Progress(*columns, console=console, disable=what is None or not console.is_terminal) as progress,
            open(temporary, "wb") as file,
        ):
            task = progress.add_task(what or "", total=total)
            yield file, functools.partial(progress.advance, task)
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"out={str(path)!r}: cannot be written ({error.strerror or error})") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


_DRAWN = 30


def _draw_samples(
    held_out: Tensor, samples: Tensor, sample_shape: tuple[int, ...], title: str, path: Path
) -> None:
    """Draw some new samples below some that are real."""
    from aefast.train.plots import plot_samples

    count = min(_DRAWN, len(held_out), len(samples))
    rows = [index * len(held_out) // count for index in range(count)]
    try:
        plot_samples({"held out": held_out[rows], "drawn": samples[:count]}, sample_shape, title, path)
    except OSError as error:
        raise InputError(f"out: the picture {path} cannot be written ({error.strerror or error})") from None


@app.command()
def info() -> None:
    """Show versions, devices, and which backend serves each op and why."""
    import aefast.info

    aefast.info.main()


_LAYERS = "Layer widths with commas between them, input first: 784,512,16."


@app.command()
def tune(
    layers: Annotated[str, typer.Option(metavar="WIDTHS", help=_LAYERS)] = "784,512,16,512,784",
    batch_size: Annotated[int, typer.Option(help="Rows of a batch.")] = 4096,
    dtype: Annotated[str, typer.Option(metavar="NAME", help="bfloat16, float16 or float32.")] = "bfloat16",
) -> None:
    """Measure which kernel and tile is fastest here, and keep the answer in your own table.

    Results never depend on it, only speed does. Needs a CUDA device; nothing else tunes itself.
    """
    widths, batch, kind = _gpu_layers("tune", layers, batch_size, dtype)
    from itertools import pairwise

    from aefast.kernels.triton import tuning
    from aefast.ops import _registry

    path = tuning.tune([(batch, k, n) for k, n in pairwise(widths)], (kind,))
    print(f"written: {path}")
    if _registry.refusal("cuda", "linear_act", "cuda", kind) is None:
        print(
            "linear_act and mlp run on the CUDA library here, which reads no table: of these rows they use none unless "
            "AEFAST_BACKEND=triton; gaussian_head uses its own"
        )


@app.command()
def warmup(
    layers: Annotated[str, typer.Option(metavar="WIDTHS", help=_LAYERS)] = "784,512,16,512,784",
    batch_size: Annotated[int, typer.Option(help="Rows of a batch.")] = 4096,
    dtype: Annotated[str, typer.Option(metavar="NAME", help="bfloat16, float16 or float32.")] = "bfloat16",
    activation: Annotated[str, typer.Option(metavar="NAME", help="Activation of the layers.")] = "relu",
) -> None:
    """Compile the kernels that such layers need, so that the first training step does not wait for it."""
    widths, batch, kind = _gpu_layers("warmup", layers, batch_size, dtype)
    import time
    from itertools import pairwise

    import torch

    import aefast.functional as AF

    start = time.perf_counter()
    x = torch.randn(batch, widths[0], device="cuda", dtype=kind, requires_grad=True)
    weights = [torch.randn(n, k, device="cuda", dtype=kind, requires_grad=True) for k, n in pairwise(widths)]
    biases = [torch.zeros(n, device="cuda", dtype=kind, requires_grad=True) for n in widths[1:]]
    activations = [activation] * (len(weights) - 1) + ["identity"]
    AF.mlp(x, weights, biases, activations).sum().backward()
    for weight, bias in zip(weights, biases, strict=True):
        inputs = torch.randn(batch, weight.shape[1], device="cuda", dtype=kind, requires_grad=True)
        AF.linear_act(inputs, weight, bias, activation).sum().backward()
    torch.cuda.synchronize()
    print(f"kernels for {layers} in {dtype}: ready after {time.perf_counter() - start:.1f} s")


def _gpu_layers(command: str, layers: str, batch_size: int, dtype: str):
    """The checked (widths, batch size, torch dtype) of a command that needs a CUDA device."""
    import torch

    widths = _widths(layers, "layers")
    if widths is None or len(widths) < 2 or min(widths) < 1:
        raise InputError(f"{command}: --layers must be two or more positive widths, got {layers!r}")
    if batch_size < 1:
        raise InputError(f"{command}: --batch-size must be at least 1, got {batch_size}")
    kinds = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    if dtype not in kinds:
        raise InputError(f"{command}: --dtype must be one of {', '.join(kinds)}, got {dtype!r}")
    if not torch.cuda.is_available():
        raise InputError(f"{command}: needs a CUDA device, and torch finds none")
    return widths, batch_size, kinds[dtype]


def _widths(text: str | None, argument: str) -> tuple[int, ...] | None:
    """``"512,128"`` as (512, 128) and ``"none"`` as (); None stays None."""
    if text is None:
        return None
    if text.strip().lower() in ("", "none"):
        return ()
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise InputError(
            f"{argument}={text!r}: expected positive integers with commas between them, such as 512,128, "
            "or none"
        ) from None


def _bandwidths(text: str | None) -> float | tuple[float, ...] | None:
    """``"2"`` as 2.0 and ``"1,2,4"`` as (1.0, 2.0, 4.0); None stays None."""
    values = _numbers(text, "mmd_bandwidth", " above 0")
    return values[0] if values is not None and len(values) == 1 else values


def _numbers(text: str | None, argument: str, condition: str = "") -> tuple[float, ...] | None:
    """``"1,2,4"`` as (1.0, 2.0, 4.0); None stays None."""
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise InputError(
            f"{argument}={text!r}: expected a number{condition}, or several with commas between them, such as 1,2,4"
        ) from None


_arguments: list[str] = []


def _how_to_resume() -> str:
    """What goes on with the run of this command line, in as many processes."""
    command, processes = ["aefast"], os.environ.get("WORLD_SIZE", "1")
    if int(processes) > 1:
        # torchrun sets it. How processes of several machines, or of another launcher, were started is not known here.
        if os.environ.get("LOCAL_WORLD_SIZE") != processes:
            return "to resume, start it again as before, with --resume"
        command = ["torchrun", "--nproc-per-node", processes, "-m", "aefast"]
    kept = [argument for argument in _arguments if argument not in ("--resume", "--overwrite")]
    return f"resume with: {shlex.join([*command, *kept, '--resume'])}"


def _origin(error: Exception) -> str:
    """Names the file of --config where an option that `error` refuses comes from there."""
    context, parameter = getattr(error, "ctx", None), getattr(error, "param", None)
    if context is None or parameter is None:
        return ""
    source = context.get_parameter_source(parameter.name)
    return (
        f" (from --config {context.params['config_file']})"
        if getattr(source, "name", "") == "DEFAULT_MAP"
        else ""
    )


def _fail(message: str) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line `arguments`, those of the process by default; the exit code.

    Errors in the input end in one line on standard error and 2. Other exceptions are bugs and pass.
    """
    for stream in (sys.stdout, sys.stderr):
        # Not every terminal has a × or the name of every file; the rest of a text is worth more than an error.
        if getattr(stream, "errors", None) in ("strict", "surrogateescape") and hasattr(
            stream, "reconfigure"
        ):
            stream.reconfigure(errors="replace")
    _arguments[:] = sys.argv[1:] if arguments is None else arguments
    debug = os.environ.get("AEFAST_DEBUG", "") not in ("", "0")
    try:
        code = app(args=_arguments or ["--help"], prog_name="aefast", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except _CommandLineError as error:
        return _fail(error.format_message() + _origin(error))
    except AefastError as error:
        if debug:
            raise
        return _fail(str(error))
    except (KeyboardInterrupt, typer.Abort):
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())

"""Sparse autoencoders as other libraries save them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from aefast.errors import InputError
from aefast.models._files import make_directory, write_atomically
from aefast.models.sparse import SparseAutoencoder, _weights
from aefast.ops import _arguments

CONFIG_FILE = "cfg.json"
SPARSIFY_WEIGHTS = "sae.safetensors"
SAELENS_WEIGHTS = "sae_weights.safetensors"

# What SAELens's architectures make of pre-activations, by the names that its configs have for it.
_ACTIVATIONS = {"standard": ("relu",), "topk": ("topk",), "jumprelu": ("relu", "jumprelu")}


def load_sparsify(directory: str | Path, *, device: torch.device | str | None = None) -> SparseAutoencoder:
    """A sparse autoencoder that EleutherAI's sparsify has saved: ``cfg.json`` and ``sae.safetensors``.

    Args:
        directory: the folder of one sparse coder.
        device: where the parameters go.

    Returns:
        A "topk" model in eval mode, in the dtype of the file.

    Raises:
        InputError: a file is missing or unreadable, lacks a weight, has one of another shape or one that is not known,
            or is of a kind that `SparseAutoencoder` is not: a transcoder, a skip connection, another activation than
            topk, or codes with a sign.
    """
    options, weights = _read(Path(directory), SPARSIFY_WEIGHTS)
    origin = str(Path(directory) / CONFIG_FILE)
    for name, plain in (
        ("activation", "topk"),
        ("transcode", False),
        ("skip_connection", False),
        ("embed_skip", False),
        ("gram_lookup", False),
        ("signed", False),
    ):
        if options.get(name, plain) != plain:
            raise InputError(f"{origin}: {name}={options[name]!r}: expected {plain!r}")
    features = _size(options, "d_in", origin)
    latents = options.get("num_latents") or features * options.get("expansion_factor", 32)
    return _model(
        {
            "sparsity": "topk",
            "k": options.get("k", 32),
            "unit_norm": bool(options.get("normalize_decoder", True)),
        },
        features,
        latents,
        {
            "encoder.weight": ("encoder.weight", False),
            "encoder.bias": ("encoder.bias", False),
            "decoder.weight": ("W_dec", False),
            "decoder.bias": ("b_dec", False),
        },
        weights,
        str(Path(directory) / SPARSIFY_WEIGHTS),
        device,
    )


def load_saelens(directory: str | Path, *, device: torch.device | str | None = None) -> SparseAutoencoder:
    """A sparse autoencoder that SAELens has saved: ``cfg.json`` and ``sae_weights.safetensors``.

    Args:
        directory: the folder of one autoencoder.
        device: where the parameters go.

    Returns:
        A model in eval mode, in the dtype of the file, its thresholds in float32 at least: "topk", "jumprelu" (as which
        SAELens saves batchtopk, too), or "l1" for the architecture "standard". A scaling factor from finetuning, by
        which codes are multiplied before they are decoded, is in its decoder's weight.

    Raises:
        InputError: a file is missing or unreadable, lacks a weight, has one of another shape or one that is not known,
            or is of a kind that `SparseAutoencoder` is not: another architecture, another activation than that of the
            architecture, activations that are normalised or reshaped, or a threshold below 0.
    """
    options, weights = _read(Path(directory), SAELENS_WEIGHTS)
    origin = str(Path(directory) / CONFIG_FILE)
    for name in ("normalize_activations", "reshape_activations"):
        if options.get(name, "none") not in ("none", False, None):
            raise InputError(f"{origin}: {name}={options[name]!r}: expected 'none'")
    architecture = options.get("architecture", "standard")
    if (
        architecture == "standard"
        and options.get("activation_fn_str", options.get("activation_fn")) == "topk"
    ):
        architecture = "topk"
    features, latents = _size(options, "d_in", origin), _size(options, "d_sae", origin)
    names = {
        "encoder.weight": ("W_enc", True),
        "encoder.bias": ("b_enc", False),
        "decoder.weight": ("W_dec", False),
        "decoder.bias": ("b_dec", False),
    }
    made: dict[str, Any] = {"unit_norm": False, "pre_bias": bool(options.get("apply_b_dec_to_input", True))}
    if architecture == "topk":
        k = options.get("k", (options.get("activation_fn_kwargs") or {}).get("k"))
        if k is None:
            raise InputError(f"{origin}: missing option 'k'")
        made |= {"sparsity": "topk", "k": k}
    elif architecture == "jumprelu":
        made |= {"sparsity": "jumprelu"}
        names["log_threshold"] = ("threshold", False)
        threshold = weights.get("threshold")
        if threshold is not None and not (threshold >= 0).all():
            raise InputError(
                f"{Path(directory) / SAELENS_WEIGHTS}: threshold: expected numbers of at least 0, "
                f"got {threshold.min().item():g}"
            )
    elif architecture == "standard":
        made |= {"sparsity": "l1"}
    else:
        raise InputError(f"{origin}: architecture={architecture!r}: expected one of standard, topk, jumprelu")
    for name in ("activation_fn_str", "activation_fn"):
        value, known = options.get(name), _ACTIVATIONS[architecture]
        if value is not None and value not in known:
            raise InputError(
                f"{origin}: {name}={value!r}: expected {' or '.join(map(repr, known))} of architecture "
                f"{architecture!r}"
            )
    factor = _scaling_factor(options, weights, latents, directory)
    if options.get("rescale_acts_by_decoder_norm", False) and {"W_enc", "b_enc", "W_dec"} <= weights.keys():
        # Codes are compared and decoded as if directions had length 1: which they can have.
        norms = weights["W_dec"].norm(dim=-1)
        weights["W_enc"] = weights["W_enc"] * norms
        weights["b_enc"] = weights["b_enc"] * norms
        weights["W_dec"] = weights["W_dec"] / norms[:, None]
    if factor is not None and "W_dec" in weights:
        weights["W_dec"] = weights["W_dec"] * factor[:, None]
    return _model(made, features, latents, names, weights, str(Path(directory) / SAELENS_WEIGHTS), device)


def _scaling_factor(
    options: Mapping[str, Any], weights: dict[str, torch.Tensor], latents: int, directory: str | Path
) -> torch.Tensor | None:
    """By what SAELens multiplies codes (latents,) before it decodes them, taken out of `weights`; None for 1.

    Files of some of its versions have it, all ones, without any finetuning.
    """
    origin = Path(directory) / CONFIG_FILE
    flags = ("finetuning_scaling_factor", "uses_scaling_factor")
    flag = next((name for name in flags if options.get(name)), None)
    found = [name for name in ("scaling_factor", "finetuning_scaling_factor") if name in weights]
    if not found:
        if flag is not None:
            raise InputError(
                f"{origin}: {flag}={options[flag]!r}: expected scaling_factor in {SAELENS_WEIGHTS}, found none"
            )
        return None
    factors = [weights.pop(name) for name in found]
    if all((one == 1).all() for one in factors):
        return None
    if flag is None or len(factors) > 1:
        got = "two of them" if flag is not None else "numbers other than 1"
        raise InputError(
            f"{Path(directory) / SAELENS_WEIGHTS}: {found[0]}: expected one, and finetuning_scaling_factor true in "
            f"{CONFIG_FILE}, got {got}"
        )
    if tuple(factors[0].shape) != (latents,):
        raise InputError(
            f"{Path(directory) / SAELENS_WEIGHTS}: {found[0]}: expected shape {(latents,)}, "
            f"got {tuple(factors[0].shape)}"
        )
    return factors[0]


@torch.no_grad()
def save_sparsify(model: SparseAutoencoder, directory: str | Path) -> None:
    """Write a "topk" model as EleutherAI's sparsify saves one: ``cfg.json`` and ``sae.safetensors``.

    ``SparseCoder.load_from_disk(directory)`` is the same function of its samples, up to rounding. That subtracts the
    decoder's bias from them; what a model without `pre_bias` does not goes into the encoder's bias.

    Args:
        model: of sparsity "topk", with output_activation "identity". Its directions are normalised as by ``eval()``.
        directory: where to write; made if missing.

    Raises:
        InputError: the model is another, or `directory` is a file.
    """
    weights = _weights_of(model, ("topk",), "save_sparsify")
    config = model.config
    bias = weights["encoder.bias"]
    if not config.pre_bias:
        bias = bias + weights["encoder.weight"] @ weights["decoder.bias"]
    options = {
        "activation": "topk",
        "normalize_decoder": config.unit_norm,
        "num_latents": config.latent,
        "k": config.option("k"),
        "d_in": config.input_size,
    }
    saved = {
        "encoder.weight": weights["encoder.weight"],
        "encoder.bias": bias,
        "W_dec": weights["decoder.weight"],
        "b_dec": weights["decoder.bias"],
    }
    _write(Path(directory), options, saved, SPARSIFY_WEIGHTS)


@torch.no_grad()
def save_saelens(
    model: SparseAutoencoder, directory: str | Path, *, metadata: Mapping[str, Any] | None = None
) -> None:
    """Write a model as SAELens saves one: ``cfg.json`` and ``sae_weights.safetensors``.

    ``SAE.load_from_disk(directory)`` is the same function of its samples as the model in eval mode, up to rounding: of
    the architecture "topk", of "jumprelu" for jumprelu and, with the threshold of eval mode, for batchtopk, as SAELens
    does it too, or of "standard" for l1. Thresholds are in float32 at least, as the model has them.

    Args:
        model: of sparsity "topk", "batchtopk", "jumprelu" or "l1", with output_activation "identity". Its directions
            are normalised as by ``eval()``.
        directory: where to write; made if missing.
        metadata: what SAELens knows of an autoencoder besides, such as ``model_name`` and ``hook_name``: JSON values.

    Raises:
        InputError: the model is another, `metadata` holds something that is not a JSON value, or `directory` is a file.
    """
    weights = _weights_of(model, ("topk", "batchtopk", "jumprelu", "l1"), "save_saelens")
    config = model.config
    architectures = {"topk": "topk", "l1": "standard"}
    options: dict[str, Any] = {
        "architecture": architectures.get(config.sparsity, "jumprelu"),
        "d_in": config.input_size,
        "d_sae": config.latent,
        "dtype": str(weights["encoder.weight"].dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": config.pre_bias,
        "normalize_activations": "none",
        "reshape_activations": "none",
        # The version that the format is of: SAELens takes a file without one for an older format's.
        "metadata": {"sae_lens_version": "6.0.0", **(metadata or {})},
    }
    saved = {
        "W_enc": weights["encoder.weight"].t(),
        "b_enc": weights["encoder.bias"],
        "W_dec": weights["decoder.weight"],
        "b_dec": weights["decoder.bias"],
    }
    if config.sparsity == "topk":
        options |= {"k": config.option("k"), "rescale_acts_by_decoder_norm": False}
    elif config.sparsity == "jumprelu":
        saved["threshold"] = model.log_threshold.exp()
    elif config.sparsity == "batchtopk":
        saved["threshold"] = model.kept_above.expand(config.latent)
    _write(Path(directory), options, saved, SAELENS_WEIGHTS)


def _weights_of(
    model: SparseAutoencoder, sparsities: tuple[str, ...], function: str
) -> dict[str, torch.Tensor]:
    """Both layers by their names, of a model that is one of `sparsities`."""
    if not isinstance(model, SparseAutoencoder):
        raise InputError(f"{function}: model must be a SparseAutoencoder, got {type(model).__name__}")
    config = model.config
    if config.sparsity not in sparsities:
        raise InputError(f"{function}: sparsity={config.sparsity!r}: expected one of {', '.join(sparsities)}")
    if config.output_activation != "identity":
        raise InputError(
            f"{function}: output_activation={config.output_activation!r}: expected 'identity', as the format has none"
        )
    if config.unit_norm:
        model.normalize()
    encoder_weight, decoder_weight = _weights(model, config)
    return {
        "encoder.weight": encoder_weight,
        "encoder.bias": model.encoder.bias,
        "decoder.weight": decoder_weight,
        "decoder.bias": model.decoder.bias,
    }


def _write(
    directory: Path, options: Mapping[str, Any], weights: Mapping[str, torch.Tensor], weights_file: str
) -> None:
    try:
        text = json.dumps(options, indent=2) + "\n"
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"metadata: expected JSON values ({error})") from None
    # Tensors that share no memory, which the file would have once.
    copies = {name: value.detach().cpu().contiguous().clone() for name, value in weights.items()}
    make_directory(directory)
    write_atomically(directory / weights_file, safetensors.torch.save(copies))
    write_atomically(directory / CONFIG_FILE, text.encode())


def _read(directory: Path, weights_file: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    path = directory / CONFIG_FILE
    try:
        options = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"directory={str(directory)!r}: expected a readable {CONFIG_FILE} ({error})"
        ) from None
    if not isinstance(options, Mapping):
        raise InputError(f"{path}: expected options by name, got {type(options).__name__}")
    try:
        weights = safetensors.torch.load_file(directory / weights_file)
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(
            f"directory={str(directory)!r}: expected a readable {weights_file} ({error})"
        ) from None
    return dict(options), weights


def _size(options: Mapping[str, Any], name: str, origin: str) -> int:
    value = options.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f"{origin}: {name}={value!r}: expected a positive integer")
    return value


def _model(
    options: dict[str, Any],
    features: int,
    latents: int,
    names: dict[str, tuple[str, bool]],
    weights: dict[str, torch.Tensor],
    origin: str,
    device: torch.device | str | None,
) -> SparseAutoencoder:
    """`names` has, by the names of this library, those of the file, and whether they are transposed there."""
    missing = [theirs for theirs, _ in names.values() if theirs not in weights]
    if missing:
        raise InputError(f"{origin}: missing {', '.join(missing)}; the file has {', '.join(sorted(weights))}")
    unknown = weights.keys() - {theirs for theirs, _ in names.values()}
    if unknown:
        raise InputError(
            f"{origin}: {', '.join(sorted(unknown))}: expected {', '.join(theirs for theirs, _ in names.values())} "
            "alone, of which the model is made"
        )
    expected = {
        "encoder.weight": (latents, features),
        "encoder.bias": (latents,),
        "decoder.weight": (latents, features),
        "decoder.bias": (features,),
        "log_threshold": (latents,),
    }
    state = {}
    for ours, (theirs, is_transposed) in names.items():
        value = weights[theirs]
        shape = expected[ours][::-1] if is_transposed else expected[ours]
        if tuple(value.shape) != shape:
            raise InputError(f"{origin}: {theirs}: expected shape {shape}, got {tuple(value.shape)}")
        state[ours] = value.t() if is_transposed else value
    if "log_threshold" in state:
        # The logarithm of what no pre-activation but 0 itself is below stays finite.
        threshold = state["log_threshold"]
        threshold = threshold.to(_arguments.accumulator(threshold.dtype))
        state["log_threshold"] = threshold.clamp_min(torch.finfo(threshold.dtype).tiny).log()
    dtype = state["encoder.weight"].dtype
    model = SparseAutoencoder(input_size=features, latent=latents, device=device, dtype=dtype, **options)
    model.load_state_dict(state, strict=False)
    return model.eval()

"""Sparse autoencoders that other libraries have saved."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from aefast.errors import InputError
from aefast.models.sparse import SparseAutoencoder
from aefast.ops import _arguments

CONFIG_FILE = "cfg.json"
SPARSIFY_WEIGHTS = "sae.safetensors"
SAELENS_WEIGHTS = "sae_weights.safetensors"


def load_sparsify(directory: str | Path, *, device: torch.device | str | None = None) -> SparseAutoencoder:
    """A sparse autoencoder that EleutherAI's sparsify has saved: ``cfg.json`` and ``sae.safetensors``.

    Args:
        directory: the folder of one sparse coder.
        device: where the parameters go.

    Returns:
        A "topk" model in eval mode, in the dtype of the file.

    Raises:
        InputError: a file is missing or unreadable, lacks a weight or has one of another shape, or is of a kind that
            `SparseAutoencoder` is not: a transcoder, a skip connection, or another activation than topk.
    """
    options, weights = _read(Path(directory), SPARSIFY_WEIGHTS)
    origin = str(Path(directory) / CONFIG_FILE)
    for name, plain in (
        ("activation", "topk"),
        ("transcode", False),
        ("skip_connection", False),
        ("embed_skip", False),
        ("gram_lookup", False),
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
        SAELens saves batchtopk, too), or "l1" for the architecture "standard".

    Raises:
        InputError: a file is missing or unreadable, lacks a weight or has one of another shape, or is of a kind that
            `SparseAutoencoder` is not: another architecture, activations that are normalised or reshaped, or a
            threshold below 0.
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
    if options.get("rescale_acts_by_decoder_norm", False) and {"W_enc", "b_enc", "W_dec"} <= weights.keys():
        # Codes are compared and decoded as if directions had length 1: which they can have.
        norms = weights["W_dec"].norm(dim=-1)
        weights["W_enc"] = weights["W_enc"] * norms
        weights["b_enc"] = weights["b_enc"] * norms
        weights["W_dec"] = weights["W_dec"] / norms[:, None]
    return _model(made, features, latents, names, weights, str(Path(directory) / SAELENS_WEIGHTS), device)


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

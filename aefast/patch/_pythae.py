"""What takes the place of the methods of pythae's models, whose losses are patterns that aefast has ops for."""

from __future__ import annotations

import importlib.metadata
import math
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import aefast.functional as AF
from aefast.errors import InputError
from aefast.patch import _dense
from aefast.patch._classes import Methods
from aefast.patch._losses import fused_loss

# Whose formulas these are. Methods of another version are left as they are.
VERSION = "0.1.2"
NOISES = ("fused", "torch")
# The last layers of its encoders.
_HEADS = ("embedding", "log_var")


@dataclass(frozen=True)
class Adapter:
    """`methods` stand for those of the same names of `model_class`, and take its layers `heads` along; `what` tells
    what they do, and `takes_layers` whether they evaluate the layers below, and not those themselves."""

    model_class: type[nn.Module]
    methods: Methods
    what: str
    heads: tuple[str, ...] = ()
    takes_layers: bool = False


def adapter_of(module: nn.Module, noise: str) -> Adapter | str | None:
    """What fits `module`; or why nothing does, or None where it is nothing of pythae's."""
    if "pythae.models" not in sys.modules:
        return None
    known = _adapters(noise)
    if not isinstance(module, (sys.modules["pythae.models"].BaseAE, *(one.model_class for one in known))):
        return None
    try:
        found = importlib.metadata.version("pythae")
    except importlib.metadata.PackageNotFoundError:
        found = "one without a version"
    if found != VERSION:
        return f"aefast knows the methods of pythae {VERSION}, and this is {found}"
    for adapter in known:
        names = {"forward", "loss_function", "_sample_gauss", "rbf_kernel", "imq_kernel"}
        own = {name: getattr(type(module), name, None) for name in names}
        if all(method is getattr(adapter.model_class, name, None) for name, method in own.items()):
            return adapter
    return f"{type(module).__name__} has methods of its own, for which aefast has nothing"


def _adapters(noise: str) -> tuple[Adapter, ...]:
    from pythae.models import AE, INFOVAE_MMD, VAE, WAE_MMD
    from pythae.models.nn.default_architectures import Decoder_AE_MLP, Encoder_AE_MLP, Encoder_VAE_MLP

    sampled = "reparameterize" if noise == "fused" else "kl_normal"
    drawn = {"aefast_noise": noise}
    encoder = {"forward": _encoder_forward}
    return (
        Adapter(VAE, {"forward": _vae_forward, **drawn}, f"{sampled}, reconstruction_loss"),
        Adapter(INFOVAE_MMD, {"forward": _infovae_forward, **drawn}, f"{sampled}, mmd, reconstruction_loss"),
        Adapter(WAE_MMD, {"loss_function": _wae_loss}, "mmd, reconstruction_loss"),
        Adapter(AE, {"loss_function": _ae_loss}, "reconstruction_loss"),
        Adapter(Encoder_AE_MLP, encoder, "its layers → mlp", _HEADS[:1], takes_layers=True),
        Adapter(Encoder_VAE_MLP, encoder, "its layers → mlp, both heads as one", _HEADS, takes_layers=True),
        Adapter(Decoder_AE_MLP, {"forward": _decoder_forward}, "its layers → mlp", takes_layers=True),
    )


def _vae_forward(self: Any, inputs: Any, **kwargs: Any) -> Any:
    x, mu, log_var, z, kl, recon_x = _passed(self, inputs)
    recon_loss = _negative_log_likelihood(self, recon_x, x)
    if kl is None or recon_loss is None:
        loss, recon_loss, kl = self.loss_function(recon_x, x, mu, log_var, z)
    else:
        loss = recon_loss + kl
    return _output(recon_loss=recon_loss, reg_loss=kl, loss=loss, recon_x=recon_x, z=z)


def _infovae_forward(self: Any, inputs: Any, **kwargs: Any) -> Any:
    x, mu, log_var, z, kl, recon_x = _passed(self, inputs)
    z_prior = torch.randn_like(z)
    recon_loss = _negative_log_likelihood(self, recon_x, x)
    mmd = _mmd(self, z, z_prior)
    if kl is None or recon_loss is None or mmd is None:
        loss, recon_loss, kl, mmd = self.loss_function(recon_x, x, z, z_prior, mu, log_var)
    else:
        loss = recon_loss + (1 - self.alpha) * kl + (self.alpha + self.lbd - 1) * mmd
    return _output(loss=loss, recon_loss=recon_loss, reg_loss=kl, mmd_loss=mmd, recon_x=recon_x, z=z)


def _wae_loss(self: Any, recon_x: Tensor, x: Tensor, z: Tensor, z_prior: Tensor) -> tuple[Tensor, ...]:
    recon_loss = _reconstruction(recon_x, x, "mse", self.reconstruction_loss_scale)
    mmd = _mmd(self, z, z_prior)
    if recon_loss is None or mmd is None:
        return self.aefast_original.loss_function(self, recon_x, x, z, z_prior)
    return recon_loss + self.model_config.reg_weight * mmd, recon_loss, mmd


def _ae_loss(self: Any, recon_x: Tensor, x: Tensor) -> Tensor:
    value = _reconstruction(recon_x, x, "mse")
    return self.aefast_original.loss_function(self, recon_x, x) if value is None else value


def _encoder_forward(self: Any, x: Tensor, output_layer_levels: Any = None) -> Any:
    """Its layers and heads as one stack, unless the outputs of single layers are asked for."""
    stack = _whole_stack(self) if output_layer_levels is None else None
    if stack is not None:
        heads = [self._modules[name] for name in _HEADS if name in self._modules]
        out = _dense.through_heads(stack, heads, x.reshape(-1, math.prod(self.input_dim)))
        if out is not None:
            return _output(**dict(zip(("embedding", "log_covariance"), out, strict=False)))
    return self.aefast_original.forward(self, x, output_layer_levels)


def _decoder_forward(self: Any, z: Tensor, output_layer_levels: Any = None) -> Any:
    """Its layers as one stack, unless the outputs of single ones are asked for."""
    stack = _whole_stack(self) if output_layer_levels is None else None
    if stack is None:
        return self.aefast_original.forward(self, z, output_layer_levels)
    out = _dense.through(stack, z)
    return _output(reconstruction=out.reshape((z.shape[0], *self.input_dim)))


def _whole_stack(self: Any) -> list[nn.Module] | None:
    """The layers of all its Sequentials, one after the other; None where calling those does something else."""
    stacks = list(self.layers._modules.values())[: self.depth]
    if len(stacks) < self.depth or not all(map(_dense.is_sequential, stacks)):
        return None
    return [layer for stack in stacks for layer in stack._modules.values()]


def _passed(self: Any, inputs: Any) -> tuple[Any, ...]:
    """x, mu, log_var, z, the KL divergence's mean over the batch, and the reconstruction of z; no divergence where
    there is not one code (B, D) a sample."""
    x = inputs["data"]
    encoded = self.encoder(x)
    mu, log_var = encoded.embedding, encoded.log_covariance
    is_plain = mu.dim() == 2 and mu.shape == log_var.shape
    if is_plain and self.aefast_noise == "fused":
        z, kl = AF.reparameterize(mu, log_var)
    else:
        z, _ = self._sample_gauss(mu, torch.exp(0.5 * log_var))
        kl = AF.kl_normal(mu, log_var) if is_plain else None
    return x, mu, log_var, z, kl, self.decoder(z)["reconstruction"]


def _negative_log_likelihood(self: Any, recon_x: Tensor, x: Tensor) -> Tensor | None:
    kind = self.model_config.reconstruction_loss
    return _reconstruction(recon_x, x, kind, 1.0 if kind == "bce" else 0.5)


def _reconstruction(recon_x: Tensor, x: Tensor, kind: str, weight: float = 1.0) -> Tensor | None:
    """Summed over features, averaged over the batch, times `weight`; None where the fused loss does not serve."""
    rows = x.shape[0]
    return fused_loss(recon_x.reshape(rows, -1), x.reshape(rows, -1), kind, "batchmean", loss_weight=weight)


def _mmd(self: Any, z: Tensor, z_prior: Tensor) -> Tensor | None:
    """pythae's kernels have C = 2 latent_dim kernel_bandwidth²: exp(-u / C), and s C / (s C + u) summed over the scales
    s."""
    config = self.model_config
    scales = (0.5,) if self.kernel_choice == "rbf" else self.scales
    bandwidths = [config.kernel_bandwidth * math.sqrt(2.0 * config.latent_dim * scale) for scale in scales]
    try:
        return AF.mmd(
            z, z_prior, kernel="rbf" if self.kernel_choice == "rbf" else "imq", bandwidth=bandwidths
        )
    except InputError:
        return None


def _output(**fields: Any) -> Any:
    from pythae.models.base.base_utils import ModelOutput

    return ModelOutput(**fields)

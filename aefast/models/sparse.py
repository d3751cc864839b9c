"""The sparse autoencoder: many latents, of which a sample uses few."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import sys
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

import aefast.functional as AF
from aefast.errors import InputError
from aefast.models._base import Model, ModelOutput, check_choice, register, several
from aefast.models._reconstruction import LOSSES, LossConfig, does_without
from aefast.models._warmup import steps_taken, warmed_up
from aefast.nn import SparseDecoder
from aefast.nn._hooks import has_hooks
from aefast.nn.linear_act import DenseParameters, check_positive_int
from aefast.ops import _arguments, _registry
from aefast.ops import jumprelu as jumprelu_op
from aefast.ops import penalized_linear_act as penalized_op
from aefast.ops._library import direct_apply

SPARSITIES = ("l1", "kl", "topk", "batchtopk", "jumprelu")
# The default weights of the penalties, for samples in [0, 1] and the mean squared error.
_WEIGHTS = {"l1": 3e-4, "kl": 1e-4, "jumprelu": 1e-5}
# The options that a kind of sparsity takes beside those of all.
_TAKES = {
    "l1": ("sparsity_weight", "sparsity_warmup_steps", "dead_after"),
    "kl": ("sparsity_weight", "sparsity_warmup_steps", "rate"),
    "topk": ("k", "aux_weight", "aux_k", "dead_after"),
    "batchtopk": ("k", "aux_weight", "aux_k", "dead_after"),
    "jumprelu": ("sparsity_weight", "sparsity_warmup_steps", "bandwidth", "threshold", "dead_after"),
}
_DEFAULTS = {
    "k": 32,
    "sparsity_warmup_steps": 0,
    "rate": 0.05,
    "bandwidth": 1e-3,
    "threshold": 1e-3,
    "aux_weight": 1 / 32,
    "dead_after": 1_000_000,
}
# Of the new value in the running mean of the smallest values that batches keep.
_THRESHOLD_RATE = 0.01


@dataclasses.dataclass(frozen=True)
class SparseConfig(LossConfig):
    """Options of `SparseAutoencoder`: those of `LossConfig`, with "mse" as the loss, and the sparsity.

    Encoder and decoder are one layer each, so that `hidden`, `decoder_hidden`, `linear_decoder` and `activation` stay
    as they are. None leaves an option to its default, and is all that a kind of sparsity takes that has no such option.

    Attributes:
        latent: how many latents there are, mostly more than features.
        sparsity: what keeps the codes sparse: "topk", "batchtopk", "l1", "kl" or "jumprelu".
        k: of topk, how many latents a sample uses; of batchtopk, how many on average. 32 by default.
        sparsity_weight: of l1, kl and jumprelu, the penalty's weight. What is enough depends on the scale of the data.
        sparsity_warmup_steps: of l1, kl and jumprelu, the training steps over which that weight grows linearly from 0,
            so that latents find something to stand for before they are held down (Conerly et al., Update on How We
            Train SAEs, Transformer Circuits Thread, April 2024); 0, the default, for none.
        rate: of kl, the mean activity that latents are held to. 0.05 by default.
        bandwidth: of jumprelu, the width in which a threshold gets a gradient. 0.001 by default.
        threshold: of jumprelu, what all thresholds begin with. 0.001 by default.
        tied: whether the decoder has the encoder's weight.
        pre_bias: whether the decoder's bias is subtracted from the samples first.
        unit_norm: whether the directions of the decoder are kept at length 1, and their gradients across them.
        aux_weight: of topk and batchtopk, the weight of the auxiliary loss that brings dead latents back; 0 for none.
            1/32 by default.
        aux_k: how many dead latents a sample uses in it. Half of the features by default.
        dead_after: of all but kl, whose codes are never 0, the samples that a latent has not been used for when it
            counts as dead. 1,000,000 by default.
    """

    hidden: tuple[int, ...] = ()
    latent: int = 1024
    loss: str = "mse"
    sparsity: str = "topk"
    k: int | None = None
    sparsity_weight: float | None = None
    sparsity_warmup_steps: int | None = None
    rate: float | None = None
    bandwidth: float | None = None
    threshold: float | None = None
    tied: bool = False
    pre_bias: bool = True
    unit_norm: bool = True
    aux_weight: float | None = None
    aux_k: int | None = None
    dead_after: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss is None:
            raise InputError(f"loss=None: expected one of {', '.join(LOSSES)}")
        for name in ("channels", "hidden", "decoder_hidden", "linear_decoder"):
            if getattr(self, name):
                raise InputError(f"{name}={getattr(self, name)!r}: a sparse autoencoder has no hidden layers")
        if self.activation != "relu":
            raise InputError(f"activation={self.activation!r}: the activation is that of the sparsity")
        if self.output_activation not in ("identity", "sigmoid"):
            raise InputError(f"output_activation={self.output_activation!r}: expected identity or sigmoid")
        check_choice(self.sparsity, "sparsity", SPARSITIES)
        for name in ("tied", "pre_bias", "unit_norm"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"{name}={getattr(self, name)!r}: expected true or false")
        takes = _TAKES[self.sparsity]
        for name in dict.fromkeys(option for options in _TAKES.values() for option in options):
            value = getattr(self, name)
            if value is not None and name not in takes:
                raise InputError(
                    f"{name}={value!r}: sparsity {self.sparsity!r} has no such option; it takes {', '.join(takes)}"
                )
        self._check_numbers()

    def _check_numbers(self) -> None:
        for name in ("k", "aux_k", "dead_after"):
            value = getattr(self, name)
            if value is None:
                continue
            check_positive_int(value, name)
            if name != "dead_after" and value > self.latent:
                raise InputError(f"{name}={value!r}: expected at most latent, {self.latent}")
        steps = self.sparsity_warmup_steps
        if steps is not None:
            if not isinstance(steps, int) or isinstance(steps, bool) or steps < 0:
                raise InputError(f"sparsity_warmup_steps={steps!r}: expected an integer of at least 0")
            if steps > 0:
                check_positive_int(steps, "sparsity_warmup_steps")
        for name in ("sparsity_weight", "aux_weight", "rate", "bandwidth", "threshold"):
            value = getattr(self, name)
            if value is None:
                continue
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not is_number or not 0 <= value < math.inf:
                raise InputError(f"{name}={value!r}: expected a finite number of at least 0")
            if value == 0 and not name.endswith("weight"):
                raise InputError(f"{name}={value!r}: expected a number above 0")
        if self.rate is not None and self.rate >= 1:
            raise InputError(f"rate={self.rate!r}: expected a number between 0 and 1")

    def option(self, name: str) -> Any:
        """The value of an option that this kind of sparsity takes, or else its default."""
        value = getattr(self, name)
        if value is not None:
            return value
        if name == "sparsity_weight":
            return _WEIGHTS[self.sparsity]
        if name == "k":
            return min(_DEFAULTS["k"], self.latent)
        if name == "aux_k":
            return min(max(1, self.input_size // 2), self.latent)
        return _DEFAULTS[name]

    @property
    def is_sparse(self) -> bool:
        """Whether codes are kept as values and indices."""
        return self.sparsity in ("topk", "batchtopk")

    @property
    def has_unused(self) -> bool:
        """Whether there are latents that a sample does not use."""
        return self.sparsity != "kl"


class SparseCode(NamedTuple):
    """A batch of codes by what is not 0.

    Attributes:
        values: (B, k), at least 0.
        indices: (B, k), int64: which latents they are of; -1 with the value 0 where a sample has fewer.
    """

    values: torch.Tensor
    indices: torch.Tensor

    def dense(self, latents: int) -> torch.Tensor:
        """The same as a matrix (B, latents)."""
        rows = self.values.new_zeros(*self.values.shape[:-1], latents)
        return rows.scatter_add(-1, self.indices.clamp_min(0), self.values)


@register("sparse")
class SparseAutoencoder(Model):
    """Sparse autoencoder: one layer to many latents, few of which a sample uses, and one layer back.

    With a = x - b_dec, or x without `pre_bias`, and p = W_enc a + b_enc, the code h and the loss are, by `sparsity`:

    - "topk": h = relu of the k largest of p (Gao et al., Scaling and evaluating sparse autoencoders, arXiv:2406.04093).
    - "batchtopk": h = relu of the k B largest of a batch of B samples (Bussmann, Leask, Nanda, BatchTopK Sparse
      Autoencoders, arXiv:2412.06410). In eval mode h has all of p that is above the running mean of the smallest values
      that batches kept, so that a sample's code is its own.
    - "l1": h = relu(p), with sparsity_weight · Σ_f |h_f| added, a mean over samples.
    - "kl": h = sigmoid(p), with sparsity_weight · Σ_f KL(rate ‖ mean h_f) added (Ng, Sparse autoencoder, CS294A).
    - "jumprelu": h = p where p is above a learnt threshold, else 0, with sparsity_weight times how many are not 0 added
      (Rajamanoharan et al., Jumping Ahead: Improving Reconstruction Fidelity with JumpReLU Sparse Autoencoders,
      arXiv:2407.14435).

    The reconstruction is W_decᵀ h + b_dec. For topk and batchtopk, latents that no sample has used for `dead_after`
    samples are dead; aux_weight times the mean squared error with which the aux_k largest of them make what the
    reconstruction leaves is added (AuxK, of Gao et al.). The terms are that of the loss by its name, "sparsity" and
    "aux", with their weights.

    Args:
        config: the options; or give them by name: ``SparseAutoencoder(input_size=768, latent=16384, k=32)``.
        device: where the parameters live.
        dtype: their floating-point type.

    Shape:
        input (B, ...) with input_size features a sample; latent a `SparseCode` for topk and batchtopk, else
        (B, latent); reconstruction as the input.

    Attributes:
        encoder: weight W_enc (latent, input_size) and bias.
        decoder: weight W_dec (latent, input_size), None if it is tied, and bias.
        log_threshold: (latent,), of jumprelu, in float32 at least, whatever the dtype of the others.
        unused: (latent,) int64, of all but kl: for how many samples a latent has not been used. Passes of
            `forward` and `encode` in training mode, with gradients enabled, count it on in place, but not within
            `torch.func`'s transforms. Passes that activation checkpointing repeats do not count, and have the dead
            latents of the first; under torch.compile they count. Where a state dict or a file lacks it, it is 0. On a
            GPU what is written there past torch's operations on it, as through `.data` or by `torch.distributed`, may
            be heeded up to `dead_after` samples late.
        training_steps: of a warm-up, forward passes taken in training mode that end a step, as in `aefast.models.VAE`.
    """

    config_class = SparseConfig
    config: SparseConfig
    may_lack = frozenset({"unused"})

    def __init__(
        self,
        config: SparseConfig | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__(config, **options)
        config = self.config
        sizes = f"input_size={config.input_size}, latent={config.latent}"
        self.encoder = DenseParameters(config.input_size, config.latent, True, sizes, device, dtype)
        self.decoder = SparseDecoder(config.latent, config.input_size, device=device, dtype=dtype)
        with torch.no_grad():
            # The encoder begins as the decoder's transpose: what a latent stands for is what it looks for.
            self.encoder.weight.copy_(self.decoder.weight)
            self.encoder.bias.zero_()
        if config.tied:
            self.decoder.weight = None
        _add_state(self, config, self.encoder.weight)
        self.decoder_loss = config.decoder_loss("mean")

    @property
    def can_be_captured(self) -> bool:
        """False where shapes depend on the data: those of batchtopk's codes, of the auxiliary loss's dead latents."""
        config = self.config
        return config.sparsity != "batchtopk" and not (
            config.sparsity == "topk" and config.option("aux_weight") > 0
        )

    def encode(self, x: torch.Tensor) -> SparseCode | torch.Tensor:
        """The codes of a batch: x (B, ...) to a `SparseCode` for topk and batchtopk, else (B, latent).

        In training mode, with gradients enabled, it is a pass that counts which latents are used, as `forward` is one:
        losses of one's own call either of the two, once for each batch.
        """
        flat, config = self.flatten(x), self.config
        weight = self.encoder.weight
        if config.tied:
            self._normalize_for_training()
            weight = _directions(self, config)
        code = _code_of(self, config, _FUSED, _seen(self, config, flat), weight)[0]
        if _counts(self, config) and not _dead_of_pass(self, config, False)[1]:
            _note_use(self, config, code)
        return code

    def _typical_parameter(self) -> torch.Tensor:
        # The thresholds of jumprelu may be wider.
        return self.encoder.bias

    def dense(self, code: SparseCode | torch.Tensor) -> torch.Tensor:
        """Codes, of any kind, as a matrix (B, latent)."""
        return code.dense(self.config.latent) if isinstance(code, tuple) else code

    def decode(self, latent: SparseCode | torch.Tensor) -> torch.Tensor:
        """The reconstructions of codes as `encode` gives them, or of a dense matrix (B, latent) of any of them.

        In training mode, with gradients enabled, it makes directions of length 1 first, as `forward` does.
        """
        self._normalize_for_training()
        directions = _directions(self, self.config)
        return self.decoder_loss.mean_of(_decoded(self, self.config, _FUSED, latent, directions))

    def reset_parameters(self) -> None:
        """Set what is no layer's to what it begins with."""
        if self.config.sparsity == "jumprelu":
            nn.init.constant_(self.log_threshold, math.log(self.config.option("threshold")))
        for buffer in self.buffers(recurse=False):
            buffer.zero_()

    @property
    def awaits_samples(self) -> bool:
        """Whether the decoder's bias is subtracted from samples and added to what is decoded, nothing else, and both
        biases are 0 and learn, as in a new model: what was trained before keeps its own."""
        config, biases = self.config, (self.encoder.bias, self.decoder.bias)
        return (
            config.pre_bias
            and config.output_activation == "identity"
            and config.loss != "bce_with_logits"
            and all(bias.requires_grad for bias in biases)
            and not any(bias.any() for bias in biases)
        )

    @torch.no_grad()
    def initialize(self, samples: torch.Tensor) -> None:
        """Set the decoder's bias to the mean of samples (B, ...), before the first step.

        Codes then are of what distinguishes samples, from the first step on. Where a few features have means far from
        0, as activations of language models do, the way there is too long for the bias to go in training. So the mean
        or the geometric median is where SAELens, sparsify and dictionary_learning begin too (Bricken et al., Towards
        Monosemanticity, 2023; Gao et al., arXiv:2406.04093, A.1). `aefast.train.Trainer` calls it with the first batch
        of a run if the model is as new (`awaits_samples`).

        Raises:
            InputError: samples of another size or dtype, or none.
        """
        flat = self.flatten(samples)
        if flat.shape[0] == 0:
            raise InputError("samples: expected at least one, got none")
        self.decoder.bias.copy_(flat.mean(0, dtype=torch.float64))

    @torch.no_grad()
    def normalize(self) -> None:
        """Make the directions of the decoder of length 1, as training does before each step, and `eval`.

        Codes stay as they are, so that the function does not: `fold_decoder_norms` is for weights from elsewhere.
        What `torch.nn.utils.parametrize` makes anew at each use is left to that: with `unit_norm` the model divides it
        by its lengths then.
        """
        layer = self.encoder if self.config.tied else self.decoder
        if is_parametrized(layer, "weight"):
            return
        weight = layer.weight
        norms = weight.norm(dim=1, keepdim=True)
        info = torch.finfo(weight.dtype)
        # What is of length 1 up to rounding stays as it is, so that it does not matter how often this is done.
        is_one = (norms - 1.0).abs() <= 4 * info.eps
        # Behind autograd, for which even a division by 1 would spoil a forward whose backward is to come.
        weight.data.div_(torch.where(is_one, 1.0, norms.clamp_min(info.tiny)))

    @torch.no_grad()
    def fold_decoder_norms(self) -> None:
        """Make the directions of the decoder of length 1 with the function left as it is: codes take up the lengths.

        It is for weights from elsewhere, whose directions have other lengths, and comes before `eval` and training,
        which make them of length 1 without that. W_enc, b_enc and the threshold of latent f are multiplied by |w_f|,
        as SAELens's `fold_W_dec_norm` does it; directions of length 0 stay.

        Raises:
            InputError: the model is not of sparsity "l1" or "jumprelu", or is tied. Scaled pre-activations are not
                scaled codes there: topk and batchtopk would choose other latents, kl has a sigmoid. With
                unit_norm=False such a model takes the weights as they are. Or a layer's weight or bias is parametrized,
                and would be made anew.
        """
        config = self.config
        if config.sparsity not in ("l1", "jumprelu"):
            raise InputError(
                f"fold_decoder_norms: sparsity={config.sparsity!r}: expected l1 or jumprelu, whose codes scale with "
                "their pre-activations; make the model with unit_norm=False, which leaves lengths as they are"
            )
        if config.tied:
            raise InputError(
                "fold_decoder_norms: tied=True: expected an encoder of its own to take up the lengths; make the model "
                "with unit_norm=False, which leaves them as they are"
            )
        if is_parametrized(self.encoder) or is_parametrized(self.decoder):
            raise InputError(
                "fold_decoder_norms: expected weights and biases of the layers' own, got parametrized ones; remove the "
                "parametrizations first"
            )
        norms = self.decoder.weight.norm(dim=1)
        norms = torch.where(norms > 0, norms, 1.0)
        self.encoder.weight.mul_(norms[:, None])
        self.encoder.bias.mul_(norms)
        self.decoder.weight.div_(norms[:, None])
        if config.sparsity == "jumprelu":
            self.log_threshold.add_(norms.to(self.log_threshold.dtype).log())

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        if "unused" in self._buffers and f"{prefix}unused" not in state_dict:
            # Weights from elsewhere say nothing of it.
            device = "cpu" if self.unused.is_meta else None
            state_dict[f"{prefix}unused"] = torch.zeros_like(self.unused, device=device)
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> SparseAutoencoder:
        is_learnt = self.config.sparsity == "jumprelu"
        wide = (self.log_threshold, self.log_threshold.grad) if is_learnt else ()

        def apply(one: torch.Tensor) -> torch.Tensor:
            made = fn(one)
            dtype = _arguments.accumulator(made.dtype)
            if made.dtype == dtype or not any(one is other for other in wide):
                return made
            # A logarithm in half precision would move its threshold by a hundredth.
            return one.to(made.device, dtype)

        super()._apply(apply, recurse)
        if "kept_above" in self._buffers:
            # Half precision would round away the steps of a mean that moves by a hundredth.
            self.kept_above = self.kept_above.float()
        return self

    def train(self, mode: bool = True) -> SparseAutoencoder:
        if not mode and self.config.unit_norm:
            self.normalize()
        return super().train(mode)

    def _normalize_for_training(self) -> None:
        """What training uses has length 1. Within one graph it is done once: what has length 1 stays as it is."""
        if not (self.config.unit_norm and self.training and torch.is_grad_enabled()):
            return
        if _is_sharded(self):
            raise InputError(
                "unit_norm=True: within fully_shard a forward has copies of the weights alone, which it cannot "
                "normalize; make the model with unit_norm=False, and call its normalize() before each step for "
                "directions of length 1"
            )
        self.normalize()

    def forward(self, x: torch.Tensor) -> ModelOutput:
        self._normalize_for_training()
        flat = self.flatten(x)
        terms, code, made = _terms(self, self.config, _FUSED, self.decoder_loss, flat, x.shape)
        return ModelOutput(made, code, sum(terms.values()), terms)

    def evaluate(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Beside what `Model.evaluate` tells: "l0", how many latents a sample uses; "explained_variance", 1 - mse / the
        variance of the batch; and of all but kl "dead", the part of the latents that counts as dead."""
        flat = self.flatten(x)
        output = self(flat)
        values = output.latent.values if self.config.is_sparse else output.latent
        mse = F.mse_loss(output.reconstruction, flat)
        measures = {
            "loss": output.loss,
            **several(output.terms),
            "mse": mse,
            "l0": (values > 0).sum(-1).to(mse.dtype).mean(),
            "explained_variance": 1.0 - mse / (flat - flat.mean(0)).square().mean(),
        }
        if self.config.has_unused:
            measures["dead"] = self.dead.to(mse.dtype).mean()
        return measures

    @property
    def dead(self) -> torch.Tensor:
        """(latent,) bool, of all but kl: the latents that count as dead."""
        return self.unused >= self.config.option("dead_after")

    def eager_twin(self) -> nn.Module:
        twin = _EagerSparse(self)
        twin.load_state_dict(self.state_dict())
        return twin.train(self.training)

    def eager_loss(self, twin: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return sum(twin.terms(x).values())


def _is_sharded(module: nn.Module) -> bool:
    """Whether `torch.distributed.fsdp.fully_shard` has taken the module, without an import of it."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


class _EagerSparse(nn.Module):
    """`SparseAutoencoder` in plain PyTorch, with the pre-activations of all latents."""

    ends_step = True

    def __init__(self, model: SparseAutoencoder) -> None:
        super().__init__()
        config = model.config
        weight = model.encoder.weight
        made = {"device": weight.device, "dtype": weight.dtype}
        self.config = config
        self.encoder = nn.Linear(config.input_size, config.latent, **made)
        self.decoder = SparseDecoder(config.latent, config.input_size, **made)
        if config.tied:
            self.decoder.weight = None
        _add_state(self, config, weight)
        self.decoder_loss = model.decoder_loss

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        encoder_weight, decoder_weight = _weights(self, self.config)
        code, _ = _code_of(self, self.config, _EAGER, _seen(self, self.config, x), encoder_weight)
        return self.decoder_loss.mean_of(_decoded(self, self.config, _EAGER, code, decoder_weight))

    def terms(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        if self.config.unit_norm:
            SparseAutoencoder.normalize(self)
        return _terms(self, self.config, _EAGER, self.decoder_loss.eager, x, x.shape)[0]


class _Functions(NamedTuple):
    """What a sparse autoencoder is made of, fused or in plain PyTorch."""

    topk_encode: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    batch_topk_encode: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    sparse_decode: Callable[..., torch.Tensor]
    penalized_linear_act: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    jumprelu: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    linear: Callable[..., torch.Tensor]


def _eager_topk(x, weight, bias, k):
    return F.linear(x, weight, bias).topk(k)


def _eager_batch_topk(x, weight, bias, k):
    made = F.linear(x, weight, bias)
    kept = made.new_zeros(made.numel(), dtype=torch.bool)
    kept[made.flatten().topk(k * len(x)).indices] = True
    kept = kept.view_as(made)
    values, indices = torch.where(kept, made, -math.inf).topk(int(kept.sum(1).max()))
    is_kept = values > -math.inf
    return torch.where(is_kept, values, 0.0), torch.where(is_kept, indices, -1)


def _eager_decode(values, indices, weight, bias=None):
    # Unused places have the value 0.
    values = values.to(weight.dtype)
    decoded = F.embedding_bag(indices.clamp_min(0), weight, per_sample_weights=values, mode="sum")
    return decoded if bias is None else decoded + bias


_FUSED = _Functions(
    AF.topk_encode,
    AF.batch_topk_encode,
    AF.sparse_decode,
    AF.penalized_linear_act,
    AF.jumprelu,
    functools.partial(AF.linear_act, activation="identity"),
)
_EAGER = _Functions(
    _eager_topk,
    _eager_batch_topk,
    _eager_decode,
    penalized_op.reference,
    jumprelu_op.reference,
    F.linear,
)


class _LastLayer(NamedTuple):
    """The decoder of dense codes, for a loss that does without the whole reconstruction."""

    weight: torch.Tensor
    bias: torch.Tensor
    activation: str

    def __call__(self, code: torch.Tensor) -> torch.Tensor:
        return AF.linear_act(code, self.weight, self.bias, self.activation)

    def reconstruction_loss(
        self, code: torch.Tensor, x: torch.Tensor, kind: str, **options: Any
    ) -> torch.Tensor:
        return AF.linear_reconstruction_loss(
            code, self.weight, self.bias, x, kind, output_activation=self.activation, **options
        )


class _Tangent(torch.autograd.Function):
    """Rows of length 1 as they are, whose gradients lose what is along the row."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight):
        return weight.view_as(weight)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        (weight,) = ctx.saved_tensors
        return torch.addcmul(grad, weight, (grad * weight).sum(1, keepdim=True), value=-1.0)


_tangent = direct_apply(_Tangent)


def _add_state(module: nn.Module, config: SparseConfig, like: torch.Tensor) -> None:
    """What a model keeps beside its two layers."""
    if config.sparsity == "jumprelu":
        threshold = math.log(config.option("threshold"))
        dtype = _arguments.accumulator(like.dtype)
        module.log_threshold = nn.Parameter(torch.full_like(like[:, 0].detach(), threshold, dtype=dtype))
    if config.sparsity_warmup_steps:
        module.register_buffer("training_steps", steps_taken(config.sparsity_warmup_steps, like.device))
    if config.has_unused:
        module.register_buffer("unused", torch.zeros(config.latent, dtype=torch.int64, device=like.device))
    if config.sparsity == "batchtopk":
        module.register_buffer("kept_above", torch.zeros((), dtype=torch.float32, device=like.device))


def _weights(module: nn.Module, config: SparseConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """The weights of encoder and decoder, with the gradients of directions across them."""
    directions = _directions(module, config)
    return directions if config.tied else module.encoder.weight, directions


def _directions(module: nn.Module, config: SparseConfig) -> torch.Tensor:
    """The weight of the decoder, with gradients across its rows where they are kept at length 1."""
    layer = module.encoder if config.tied else module.decoder
    directions = layer.weight
    if config.unit_norm and is_parametrized(layer, "weight"):
        # `normalize` has nothing there that would stay.
        directions = F.normalize(directions, dim=1)
    elif config.unit_norm and module.training and torch.is_grad_enabled():
        directions = (_Tangent.apply if _registry.is_watched() else _tangent)(directions)
    return directions


def _seen(module: nn.Module, config: SparseConfig, flat: torch.Tensor) -> torch.Tensor:
    """What the encoder gets of samples (B, input_size)."""
    if not torch.compiler.is_compiling() and (has_hooks(module.encoder) or has_hooks(module.decoder)):
        _warn_of_hooks()
    return flat - module.decoder.bias if config.pre_bias else flat


def _code_of(
    module: nn.Module,
    config: SparseConfig,
    functions: _Functions,
    seen: torch.Tensor,
    weight: torch.Tensor,
) -> tuple[SparseCode | torch.Tensor, torch.Tensor | None]:
    """The codes by the encoder's weight, and the penalty without its weight."""
    bias = module.encoder.bias
    if config.sparsity == "topk":
        values, indices = functions.topk_encode(seen, weight, bias, k=config.option("k"))
        return SparseCode(values.relu(), indices), None
    if config.sparsity == "batchtopk":
        if not module.training:
            return _above(functions.linear(seen, weight, bias), module.kept_above), None
        values, indices = functions.batch_topk_encode(seen, weight, bias, k=config.option("k"))
        return SparseCode(values.relu(), indices), None
    if config.sparsity == "jumprelu":
        code, count = functions.jumprelu(
            functions.linear(seen, weight, bias),
            module.log_threshold.exp(),
            bandwidth=config.option("bandwidth"),
        )
        return code, count.mean()
    options = {"penalty": config.sparsity}
    if config.sparsity == "kl":
        options["rate"] = config.option("rate")
    activation = "sigmoid" if config.sparsity == "kl" else "relu"
    return functions.penalized_linear_act(seen, weight, bias, activation, **options)


def _above(made: torch.Tensor, threshold: torch.Tensor) -> SparseCode:
    """What is above the threshold, which is at least 0, by samples."""
    kept = torch.where(made > threshold, made, 0.0)
    # int and max would want the number itself, of which torch.export has but a symbol.
    most = torch.sym_max((kept > 0).sum(1).max().item(), 1) if made.shape[0] else 1
    values, indices = kept.topk(most)
    return SparseCode(values, torch.where(values > 0, indices, -1))


def _decoded(
    module: nn.Module,
    config: SparseConfig,
    functions: _Functions,
    code: SparseCode | torch.Tensor,
    weight: torch.Tensor,
) -> torch.Tensor:
    """What the decoder gives, its output activation included."""
    bias = module.decoder.bias
    if isinstance(code, tuple):
        decoded = functions.sparse_decode(*code, weight, bias)
    else:
        decoded = functions.linear(code, weight.t(), bias)
    return decoded.sigmoid() if config.output_activation == "sigmoid" else decoded


def _terms(
    module: nn.Module,
    config: SparseConfig,
    functions: _Functions,
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    flat: torch.Tensor,
    shape: torch.Size,
) -> tuple[dict[str, torch.Tensor], SparseCode | torch.Tensor, torch.Tensor | Callable[[], torch.Tensor]]:
    """The loss's terms with their weights, the codes, and the reconstruction or what makes it."""
    weights = _weights(module, config)
    seen = _seen(module, config, flat)
    code, penalty = _code_of(module, config, functions, seen, weights[0])
    if penalty is not None and functions is _FUSED and does_without(module, flat.shape[0]):
        layer = _LastLayer(weights[1].t(), module.decoder.bias, config.output_activation)
        terms = {config.loss: module.decoder_loss.of_latent(layer, code, flat)}
        made = functools.partial(module._decoded, code, shape)
    else:
        output = _decoded(module, config, functions, code, weights[1])
        terms = {config.loss: loss(output, flat)}
        made = module.decoder_loss.mean_of(output).reshape(shape)
    if penalty is not None:
        weight, steps = config.option("sparsity_weight"), config.sparsity_warmup_steps or 0
        terms["sparsity"] = warmed_up(module, penalty, weight, steps)
    if _counts(module, config):
        has_aux = config.is_sparse and config.option("aux_weight") > 0
        dead, is_repeated = _dead_of_pass(module, config, has_aux)
        if dead is not None:
            terms["aux"] = config.option("aux_weight") * _aux(
                module, config, functions, seen, (flat, made.detach().reshape(flat.shape)), weights, dead
            )
        if not is_repeated:
            _note_use(module, config, code)
    return terms, code, made


# Of each activation checkpoint that lives, and each model in it, what `_dead_of_pass` gave, in the order of the passes.
_IN_CHECKPOINTS: WeakKeyDictionary[Any, WeakKeyDictionary[nn.Module, deque[Any]]] = WeakKeyDictionary()


def _counts(module: nn.Module, config: SparseConfig) -> bool:
    """Whether this is a pass that counts the use of latents."""
    return config.has_unused and module.training and torch.is_grad_enabled()


def _dead_of_pass(
    module: nn.Module, config: SparseConfig, is_asked: bool
) -> tuple[torch.Tensor | None, bool]:
    """The dead latents (n,) of this pass, None unless they are asked for; and whether it is one that a checkpoint
    computes again in the backward, with those of the first time."""
    checkpoint, is_repeated = _checkpoint()
    passes = None if checkpoint is None else _IN_CHECKPOINTS.setdefault(checkpoint, WeakKeyDictionary())
    if is_repeated and module in passes:
        dead = passes[module].popleft()
    else:
        is_repeated, dead = False, None
        if is_asked:
            dead = _dead(module, config.option("dead_after"))
    if passes is not None:
        # A graph that is kept may be gone through once more.
        passes.setdefault(module, deque()).append(dead)
    return dead, is_repeated


class _Bound(NamedTuple):
    """That none of a model's `unused` is above `most`, known without a look at the device.

    It holds as long as nobody else writes there, which the tensor's version tells.
    """

    unused: torch.Tensor
    address: int
    version: int
    most: float

    def holds(self, unused: torch.Tensor) -> bool:
        known = self.unused, self.address, self.version
        return unused is known[0] and (unused.data_ptr(), unused._version) == known[1:]


# Not in the models: copies have none, and neither compilers nor recorded steps see an attribute that changes.
_BOUNDS: WeakKeyDictionary[nn.Module, _Bound] = WeakKeyDictionary()


def _dead(module: nn.Module, dead_after: int) -> torch.Tensor:
    """The indices (n,) of dead latents.

    To list them, or to ask for the largest count, the host waits for the device. With a largest count there is nothing
    to wait for until so many samples have been counted that a latent can be dead.
    """
    unused = module.unused
    # What is traced or recorded is for later samples too.
    if _registry.is_watched() or not _is_waited_for(unused) or _is_capturing(unused):
        return _listed(unused, dead_after)
    bound = _BOUNDS.get(module)
    if bound is None or (bound.most < dead_after and not bound.holds(unused)):
        # The version is that of before: what others write meanwhile makes it another one.
        bound = _BOUNDS[module] = _Bound(unused, unused.data_ptr(), unused._version, _largest(unused))
    if bound.most < dead_after:
        return unused.new_empty(0)
    dead = _listed(unused, dead_after)
    if len(dead) == 0 and bound.most < math.inf:
        # The next pass asks for the largest count.
        _BOUNDS.pop(module, None)
    return dead


def _listed(unused: torch.Tensor, dead_after: int) -> torch.Tensor:
    return (unused >= dead_after).nonzero().squeeze(1)


def _largest(unused: torch.Tensor) -> int:
    return int(unused.max())


def _is_waited_for(unused: torch.Tensor) -> bool:
    """Whether the host waits for its values, and hears of all that is written there."""
    return not unused.is_cpu and type(unused) is torch.Tensor and not unused.is_inference()


def _is_capturing(one: torch.Tensor) -> bool:
    return one.is_cuda and torch.cuda.is_current_stream_capturing()


def _count_on(module: nn.Module, count: int, is_used: torch.Tensor) -> None:
    """Makes `unused` that of `count` more samples, which have used some latents, (latent,) bool."""
    unused = module.unused
    bound = None if torch.compiler.is_compiling() else _BOUNDS.get(module)
    is_known = bound is not None and bound.holds(unused)
    unused.add_(count).masked_fill_(is_used, 0)
    if torch.compiler.is_compiling():
        return
    if _is_capturing(unused):
        # A graph leaves the version as it is.
        _BOUNDS[module] = _Bound(unused, unused.data_ptr(), -1, math.inf)
    elif is_known and unused._version == bound.version + 2:
        _BOUNDS[module] = bound._replace(version=unused._version, most=bound.most + count)


def _checkpoint() -> tuple[Any | None, bool]:
    """The checkpoint that is not reentrant within which this is, or None, and whether it computes again what it has.

    Torch tells by the hooks alone by which it packs what is saved. A checkpoint that is reentrant makes its first pass
    without gradients, which counts nothing, and the second for all.
    """
    if torch.compiler.is_compiling():
        return None, False
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    if hooks is None:
        return None, False
    pack = inspect.unwrap(hooks[0])
    if getattr(pack, "__module__", None) != "torch.utils.checkpoint":
        return None, False
    known = inspect.getclosurevars(pack).nonlocals
    if "target_frame_ref" in known:
        return known["target_frame_ref"](), True
    return known.get("frame"), False


def _aux(
    module: nn.Module,
    config: SparseConfig,
    functions: _Functions,
    seen: torch.Tensor,
    left: tuple[torch.Tensor, torch.Tensor],
    weights: tuple[torch.Tensor, torch.Tensor],
    dead: torch.Tensor,
) -> torch.Tensor:
    """The mean squared error with which dead latents (n,) make the difference that the others leave, less where they
    are few."""
    if len(dead) == 0:
        return left[0].new_zeros(())
    aux_k = config.option("aux_k")
    k = min(aux_k, len(dead))
    values, indices = functions.topk_encode(seen, weights[0][dead], module.encoder.bias[dead], k=k)
    made = functions.sparse_decode(values.relu(), dead[indices], weights[1])
    return k / aux_k * F.mse_loss(made, left[0] - left[1])


@functools.cache
def _warn_of_hooks() -> None:
    _registry.logger.warning(
        "sparse: hooks of the modules encoder and decoder are not called, as those of pruning: the model reads their "
        "weights and does not call them; torch.nn.utils.parametrize and hooks of the model work"
    )


@torch.no_grad()
def _note_use(module: nn.Module, config: SparseConfig, code: SparseCode | torch.Tensor) -> None:
    """Which latents a batch has used, and from what value on."""
    if not torch.compiler.is_compiling() and _registry.is_transformed():
        # What a transform has stays within it.
        return
    if not config.is_sparse:
        # None is below 0. On the CPU the BLAS sums columns in a quarter of the time of torch's reductions.
        is_used = torch.mv(code.t(), code.new_ones(code.shape[0])) > 0
        _count_on(module, code.shape[0], is_used)
        return
    is_used = code.values > 0
    used = torch.zeros(config.latent + 1, dtype=torch.bool, device=code.values.device)
    # Entries that are 0 go to a place of their own.
    # By name, since what is assigned to an index is copied to the device, which is waited for.
    used.index_fill_(0, torch.where(is_used, code.indices, config.latent).flatten(), True)
    _count_on(module, code.values.shape[0], used[:-1])
    if config.sparsity == "batchtopk":
        kept = module.kept_above
        values = torch.where(is_used, code.values, math.inf).to(kept.dtype)
        least = values.min() if values.numel() > 0 else torch.full_like(kept, math.inf)
        new = torch.where(kept > 0, torch.lerp(kept, least, _THRESHOLD_RATE), least)
        kept.copy_(torch.where(least.isfinite(), new, kept))

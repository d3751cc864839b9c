"""What a reconstruction costs: the losses that models take by name."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch

import aefast.functional as AF
from aefast.errors import InputError
from aefast.models._base import check_choice
from aefast.models._convolutional import halved
from aefast.models._networks import DenseConfig, check_sizes
from aefast.nn import MLP, PyramidLoss, ReconstructionLoss
from aefast.ops import _loss, _registry

LOSSES = (*_loss.KINDS, "pyramid")

# The options that a loss takes; those not listed take none.
_TAKES = {
    "huber": ("loss_delta",),
    "lp": ("loss_p",),
    "charbonnier": ("loss_eps",),
    "pyramid": ("loss_p", "loss_eps", "pyramid", "pyramid_levels", "pyramid_weights"),
}
_OPTIONS = ("loss_p", "loss_eps", "loss_delta", "pyramid", "pyramid_levels", "pyramid_weights")


@dataclasses.dataclass(frozen=True)
class LossConfig(DenseConfig):
    """Options of a dense encoder and decoder, and of the loss between samples and their reconstructions.

    Attributes:
        loss: "mse", "rmse", "l1", "huber", "lp", "charbonnier", "bce" or "bce_with_logits", of
            `aefast.functional.reconstruction_loss`, or "pyramid", `aefast.functional.pyramid_loss` of samples that are
            images. The decoder of "bce_with_logits" gives logits, and the reconstruction is their sigmoid.
        loss_p: the power of lp, or of the pyramid, whose default is 1.
        loss_eps: of charbonnier; given for "pyramid", its levels are compared as charbonnier does.
        loss_delta: of huber.
        pyramid: "average", which is the default, "gaussian" or "laplacian".
        pyramid_levels: 4 by default.
        pyramid_weights: of the levels, the finest first; 1 by default.
        image_shape: (C, H, W) of a sample, the order in which its features are flattened; "pyramid" and channels need
            it, and an encoder that is given gets samples of it.
    """

    loss: str | None = None
    loss_p: float | None = None
    loss_eps: float | None = None
    loss_delta: float | None = None
    pyramid: str | None = None
    pyramid_levels: int | None = None
    pyramid_weights: tuple[float, ...] | None = None
    image_shape: tuple[int, int, int] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        # The dataclass is frozen; a list given for a tuple is settled here once.
        if isinstance(self.pyramid_weights, list):
            object.__setattr__(self, "pyramid_weights", tuple(self.pyramid_weights))
        if self.image_shape is not None:
            shape = check_sizes(self.image_shape, "image_shape")
            object.__setattr__(self, "image_shape", shape)
            if len(shape) != 3 or math.prod(shape) != self.input_size:
                raise InputError(
                    f"image_shape={shape!r}: expected (C, H, W) with a product of {self.input_size}, the input_size"
                )
        if self.channels is not None:
            if self.image_shape is None:
                raise InputError(f"channels={self.channels!r}: need image_shape, the (C, H, W) of a sample")
            if 0 in halved(self.image_shape, self.channels)[-1]:
                raise InputError(
                    f"channels={self.channels!r}: expected fewer, since each halves the sides of image_shape, "
                    f"{self.image_shape!r}"
                )
        takes = _TAKES.get(self.loss, ()) if isinstance(self.loss, str) else ()
        for name in _OPTIONS:
            value = getattr(self, name)
            if value is not None and name not in takes:
                known = f"it takes {', '.join(takes)}" if takes else "it takes none"
                raise InputError(f"{name}={value!r}: loss {self.loss!r} has no such option; {known}")
        if self.loss is None:
            return
        check_choice(self.loss, "loss", LOSSES)
        expected = {"bce": "sigmoid", "bce_with_logits": "identity"}.get(self.loss, self.output_activation)
        if self.output_activation != expected:
            why = "logits, whose sigmoid is the reconstruction" if expected == "identity" else "probabilities"
            raise InputError(
                f"output_activation={self.output_activation!r}: expected {expected!r}, because loss {self.loss!r} "
                f"is of {why}"
            )
        if self.loss == "pyramid" and self.image_shape is None:
            raise InputError("loss='pyramid': needs image_shape, the (C, H, W) of a sample")
        # An option out of its range is an error of this, whatever backend is asked for.
        empty = torch.empty(0, self.input_size)
        with _registry.backend("eager"):
            self.decoder_loss("sum")(empty, empty)

    def decoder_loss(self, reduction: str, kind: str | None = None, **options: float) -> DecoderLoss:
        """The loss that the options name, or that of a likelihood, called `kind`, with `options` of its own."""
        if self.loss is None:
            return DecoderLoss(kind, options, None, reduction)
        names = ("loss_p", "loss_eps", "loss_delta")
        given = {name.removeprefix("loss_"): getattr(self, name) for name in names}
        if self.loss == "pyramid":
            given |= {
                "pyramid": self.pyramid,
                "levels": self.pyramid_levels,
                "weights": self.pyramid_weights,
            }
            if self.loss_eps is not None:
                if self.loss_p is not None:
                    raise InputError(
                        f"loss_eps={self.loss_eps!r}: give either loss_p or loss_eps of a pyramid, not both"
                    )
                given["p"] = "charbonnier"
        options = {name: value for name, value in given.items() if value is not None}
        return DecoderLoss(self.loss, options, self.image_shape, reduction)


@dataclasses.dataclass(frozen=True)
class DecoderLoss:
    """A loss between what a decoder gives and samples, (B, features) each; a scalar.

    `kind` is one of `LOSSES`, `options` are those of its function. `reduction` is "mean" over all elements;
    "batchmean", a sum over features and a mean over samples; or "sum".
    """

    kind: str
    options: dict[str, Any]
    image_shape: tuple[int, int, int] | None
    reduction: str

    @property
    def is_of_elements(self) -> bool:
        """Whether it needs no more than an element at a time of the output, and so none of it as a whole."""
        return self.kind != "pyramid"

    def __call__(self, output: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling():
            return self._of_output(output, x)
        try:
            return self._of_output(output, x)
        except InputError:
            return self._not_finite(output, x)

    def of_latent(self, decoder: MLP, latent: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """The same of ``decoder(latent)``, which never exists as a whole, if `is_of_elements`."""
        try:
            return decoder.reconstruction_loss(latent, x, self.kind, reduction=self.reduction, **self.options)
        except InputError:
            return self._not_finite(decoder(latent), x)

    def _of_output(self, output: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        if self.is_of_elements:
            return AF.reconstruction_loss(output, x, self.kind, reduction=self.reduction, **self.options)
        images = (one.unflatten(1, self.image_shape) for one in (output, x))
        return self._of_samples(AF.pyramid_loss(*images, reduction=self._of_images, **self.options), x)

    def _not_finite(self, output: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """No finite number, for numbers that an op has refused since they are none: whoever trains the model tells that
        its loss no longer is one, and what to do about it. Within the handler of the error, which goes on if it is of
        something else."""
        if output.isfinite().all() and x.isfinite().all():
            raise
        return output.sum() - x.sum()

    def mean_of(self, output: torch.Tensor) -> torch.Tensor:
        """The reconstruction, of what the decoder gives."""
        return torch.sigmoid(output) if self.kind == "bce_with_logits" else output

    def eager(self, output: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """The same in plain PyTorch."""
        if self.is_of_elements:
            return ReconstructionLoss(self.kind, reduction=self.reduction, **self.options).eager()(output, x)
        images = (one.unflatten(1, self.image_shape) for one in (output, x))
        return self._of_samples(PyramidLoss(reduction=self._of_images, **self.options).eager()(*images), x)

    @property
    def _of_images(self) -> str:
        return "mean" if self.reduction == "mean" else "sum"

    def _of_samples(self, value: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return value / x.shape[0] if self.reduction == "batchmean" else value


# Elements from which a reconstruction is better left out. Fewer fit the last-level cache, where the decoder as one op
# is faster: measured on two cores with 512 hidden units, 0.95 of its speed at 2^23 elements, 1.05 at 2^24.
_LARGE = 1 << 24


def does_without(model: Any, samples: int) -> bool:
    """Whether `model` computes its loss of so many samples without the whole reconstruction in this pass.

    A compiler gets the plain path: it makes what is returned in any case.
    """
    if torch.compiler.is_compiling():
        return False
    is_large = samples * model.config.input_size >= _LARGE
    is_training = model.training and torch.is_grad_enabled()
    is_dense = model.config.channels is None and "decoder" not in model.networks
    return is_large and is_training and model.decoder_loss.is_of_elements and is_dense

"""A trained model at work on many samples: codes, reconstructions, and decoded draws of a sampler."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from aefast.data import Batches, Dataset
from aefast.errors import InputError
from aefast.models import Model, SparseAutoencoder, SparseCode
from aefast.models._base import evaluating
from aefast.nn.linear_act import check_positive_int
from aefast.sampling._base import Sampler

BATCH_SIZE = 4096


def encode_batches(
    model: Model, samples: Tensor | Dataset, *, batch_size: int = BATCH_SIZE
) -> Iterator[Tensor]:
    """The codes of samples (N, ...), in their order and in eval mode, (batch_size, latent) at a time on the CPU.

    A data set may be larger than memory, of which a batch at a time is taken.
    Of models with a posterior they are its means, and of sparse ones dense rows.
    """
    for batch in _batches(model, samples, batch_size):
        with _evaluating(model):
            codes = _dense_codes(model, batch).cpu()
        yield codes


def encode_sparse_batches(
    model: SparseAutoencoder, samples: Tensor | Dataset, *, batch_size: int = BATCH_SIZE
) -> Iterator[SparseCode]:
    """The same codes of a sparse model by what is not 0: values and indices (batch_size, k) at a time on the CPU.

    k is that of topk, and of the other kinds of sparsity as many latents as a sample of the batch uses at most. Indices
    are -1 where a sample uses fewer.

    Raises:
        InputError: a model whose codes have no zeros, which are all but those of topk, batchtopk, l1 and jumprelu.
    """
    if not isinstance(model, SparseAutoencoder) or model.config.sparsity == "kl":
        kind = f"{model.name} of sparsity kl" if isinstance(model, SparseAutoencoder) else model.name
        raise InputError(
            f"model: expected a sparse one of sparsity topk, batchtopk, l1 or jumprelu, whose codes are mostly 0, "
            f"got {kind}"
        )
    return _sparse_batches(model, samples, batch_size)


def _sparse_batches(
    model: SparseAutoencoder, samples: Tensor | Dataset, batch_size: int
) -> Iterator[SparseCode]:
    for batch in _batches(model, samples, batch_size):
        with _evaluating(model):
            code = model.encode(batch)
            if isinstance(code, Tensor):
                most = max(1, int((code > 0).sum(1).max()))
                code = SparseCode(*code.topk(most))
            values, indices = code.values.cpu(), code.indices.cpu()
        yield SparseCode(values, torch.where(values > 0, indices, -1))


def reconstruct_batches(
    model: Model, samples: Tensor | Dataset, *, batch_size: int = BATCH_SIZE
) -> Iterator[Tensor]:
    """What the model makes of samples (N, ...), likewise: (batch_size, input_size) at a time on the CPU.

    A denoising model gets the samples as they are, without noise of its own.
    """
    for batch in _batches(model, samples, batch_size):
        with _evaluating(model):
            made = model.decode(model.encode(batch)).cpu()
        yield made


def codes_of(model: Model, samples: Tensor | Dataset, *, batch_size: int = BATCH_SIZE) -> Tensor:
    """The codes of all samples (N, ...) as `encode_batches` gives them: (N, latent) on the CPU."""
    return torch.cat(list(encode_batches(model, samples, batch_size=batch_size)))


def generate(
    model: Model, sampler: Sampler, count: int, *, seed: int | None = None, batch_size: int = BATCH_SIZE
) -> Tensor:
    """`count` new samples, decoded from codes that `sampler` draws: (count, input_size) on the CPU.

    Args:
        model: the trained model, in any mode, on any device.
        sampler: fitted to codes of this model.
        count: how many.
        seed: of the draws; None takes torch's generator.
        batch_size: codes that are decoded at a time.

    Raises:
        InputError: a sampler that is not fitted, or to codes of another size, or a count that is not positive.
    """
    check_positive_int(batch_size, "batch_size")
    codes = sampler.sample(count, seed)
    if codes.shape[1] != model.config.latent:
        raise InputError(
            f"sampler: expected one fitted to codes of {model.config.latent} latents, the model's, "
            f"got one of {codes.shape[1]}"
        )
    place, dtype = _place(model)
    with _evaluating(model):
        return torch.cat([model.decode(part.to(place, dtype)).cpu() for part in codes.split(batch_size)])


def _dense_codes(model: Model, batch: Tensor) -> Tensor:
    code = model.encode(batch)
    return model.dense(code) if isinstance(model, SparseAutoencoder) else code


def _batches(model: Model, samples: Tensor | Dataset, batch_size: int) -> Iterator[Tensor]:
    """Batches (≤ batch_size, input_size) in the order of `samples`, on the device and in the dtype of the model."""
    check_positive_int(batch_size, "batch_size")
    if isinstance(samples, Dataset):
        rows, shape, samples = samples.rows(), samples.sample_shape, samples.samples
        if samples.shape[1] != model.config.input_size:
            raise InputError(
                f"samples: expected a data set of {model.config.input_size} features a sample, got {samples.shape[1]}"
            )
        model.check_order(shape, "samples")
    else:
        samples = model.flatten(samples, any_dtype=True)
        rows = torch.arange(len(samples))
    place, dtype = _place(model)
    for batch in Batches(samples, rows, batch_size=batch_size, seed=0, device=place).in_order():
        yield batch.to(dtype)


def _place(model: Model) -> tuple[torch.device, torch.dtype]:
    """Where the model is, and the dtype that it takes."""
    one = next(model.parameters())
    return one.device, one.dtype if model.sample_dtype is None else model.sample_dtype


@contextlib.contextmanager
def _evaluating(model: Model) -> Iterator[None]:
    """The model in eval mode and without gradients, within; afterwards in the mode that it was in."""
    with evaluating(model), torch.no_grad():
        yield

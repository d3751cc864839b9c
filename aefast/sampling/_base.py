"""What every sampler shares: the interface, the registry, and the files a fitted one is kept in."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from aefast.errors import InputError
from aefast.models._base import check_choice, listed
from aefast.models._files import write_atomically
from aefast.nn.linear_act import check_positive_int
from aefast.ops._arguments import did_you_mean

FORMAT_VERSION = 1
OPTIONS_FILE = "sampler.json"
TENSORS_FILE = "sampler.safetensors"

SAMPLERS: dict[str, type[Sampler]] = {}
"""The samplers by the name that files and the command line call them."""

SamplerType = TypeVar("SamplerType", bound="type[Sampler]")
Self = TypeVar("Self", bound="Sampler")


def register(name: str) -> Callable[[SamplerType], SamplerType]:
    """Class decorator: list a sampler in `SAMPLERS` as `name`."""
    return listed(SAMPLERS, name, "sampler")


class Sampler:
    """A distribution of codes: fitted to those of real data, then drawn from.

    A subclass is registered with `register`. Its options are the arguments of its initialiser and attributes of the
    same names, plain values that go through JSON; what it learns are tensors, which `_shapes` describes.

    Attributes:
        latent: size of the codes it was fitted to; None before.
    """

    name: ClassVar[str]
    option_names: ClassVar[tuple[str, ...]] = ()
    latent: int | None = None

    def fit(self: Self, codes: Tensor) -> Self:
        """Learn the distribution of codes (N, latent) of any floating-point type, on any device; returns itself.

        Raises:
            InputError: another shape or type, no codes, or some that are not finite.
        """
        codes = _check_codes(codes)
        self._fit(codes)
        self.latent = codes.shape[1]
        return self

    def sample(self, count: int, seed: int | None = None) -> Tensor:
        """`count` new codes (count, latent), float32 on the CPU.

        Args:
            count: how many.
            seed: the same gives the same codes; None draws them from torch's generator.
        """
        self._check_fitted("sample")
        check_positive_int(count, "count")
        with torch.no_grad():
            return self._sample(count, _generator(seed))

    def log_prob(self, codes: Tensor) -> Tensor:
        """The log of the density at codes (N, latent): (N,) on the CPU, in nats.

        Comparable between samplers that were fitted to codes of one model, and not beyond.
        """
        latent = self._check_fitted("log_prob")
        codes = _check_codes(codes)
        if codes.shape[1] != latent:
            raise InputError(f"codes: expected shape (N, {latent}), got {tuple(codes.shape)}")
        with torch.no_grad():
            return self._log_prob(codes.cpu())

    def save(self, directory: str | Path) -> None:
        """Write ``sampler.json`` and ``sampler.safetensors`` into `directory`, which is made if missing.

        Each file appears whole or not at all. They may share the folder of the model.

        Raises:
            InputError: there is nothing to write before `fit`, or `directory` cannot be written.
        """
        latent = self._check_fitted("save")
        directory = Path(directory)
        options = {name: getattr(self, name) for name in self.option_names}
        content = {
            "format_version": FORMAT_VERSION,
            "sampler": self.name,
            "latent": latent,
            "options": options,
        }
        tensors = {name: tensor.contiguous() for name, tensor in self._state().items()}
        try:
            directory.mkdir(parents=True, exist_ok=True)
            write_atomically(directory / TENSORS_FILE, safetensors.torch.save(tensors))
            write_atomically(directory / OPTIONS_FILE, (json.dumps(content, indent=2) + "\n").encode())
        except OSError as error:
            raise InputError(
                f"directory={str(directory)!r}: expected a folder that can be written ({error.strerror or error})"
            ) from None

    def _fit(self, codes: Tensor) -> None:
        raise NotImplementedError

    def _sample(self, count: int, generator: torch.Generator | None) -> Tensor:
        raise NotImplementedError

    def _log_prob(self, codes: Tensor) -> Tensor:
        raise NotImplementedError

    def _state(self) -> dict[str, Tensor]:
        """What was learnt: tensors on the CPU by name."""
        raise NotImplementedError

    def _shapes(self, latent: int) -> dict[str, tuple[int, ...]]:
        """The shapes of `_state` by name, for codes of that size."""
        raise NotImplementedError

    def _restore(self, state: dict[str, Tensor], latent: int) -> None:
        """Become the sampler whose `_state` this is; names and shapes are right."""
        raise NotImplementedError

    def _check_fitted(self, what: str) -> int:
        if self.latent is None:
            raise InputError(f"{what}: this {type(self).__name__} is not fitted; call fit(codes) first")
        return self.latent


def load_sampler(directory: str | Path) -> Sampler:
    """The fitted sampler that `Sampler.save` wrote into `directory`.

    Raises:
        InputError: a missing folder or file, an unknown sampler or option, a newer file format, or tensors that are
            damaged or do not fit the options.
    """
    directory = Path(directory)
    content = _read_options(directory / OPTIONS_FILE)
    sampler_class = SAMPLERS[content["sampler"]]
    where = f"{directory / OPTIONS_FILE}"
    for key in content["options"]:
        if key not in sampler_class.option_names:
            raise InputError(
                f"{where}: unknown option {key!r}{did_you_mean(key, sampler_class.option_names)}"
            )
    options = {
        key: tuple(value) if isinstance(value, list) else value for key, value in content["options"].items()
    }
    try:
        sampler = sampler_class(**options)
        latent = check_positive_int(content["latent"], "latent")
        shapes = sampler._shapes(latent)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    sampler._restore(_read_tensors(directory / TENSORS_FILE, shapes), latent)
    sampler.latent = latent
    return sampler


def _read_options(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(
            f"directory={str(path.parent)!r}: {path.name} is missing, expected a folder with a saved sampler"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: expected a readable JSON file ({error})") from None
    known = ("format_version", "sampler", "latent", "options")
    if not isinstance(content, dict) or set(content) != set(known):
        raise InputError(f"{path}: expected a JSON object with the keys {', '.join(known)}")
    version = content["format_version"]
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise InputError(
            f"{path}: format_version={version!r}: expected an integer from 1 to {FORMAT_VERSION}"
        )
    if version > FORMAT_VERSION:
        raise InputError(
            f"{path}: format_version={version} is newer than this aefast reads (up to {FORMAT_VERSION}); "
            "upgrade aefast to load it"
        )
    check_choice(content["sampler"], f"{path}: sampler", SAMPLERS)
    if not isinstance(content["options"], Mapping):
        raise InputError(f"{path}: options={content['options']!r}: expected options by name")
    return content


def _read_tensors(path: Path, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    if not path.is_file():
        raise InputError(f"directory={str(path.parent)!r}: {path.name} is missing, expected a saved sampler")
    try:
        tensors = safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(f"{path}: expected a readable safetensors file ({error})") from None
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found != shapes or not all(tensor.is_floating_point() for tensor in tensors.values()):
        raise InputError(f"{path}: the tensors do not fit {OPTIONS_FILE}: expected {shapes}, found {found}")
    return tensors


def _check_codes(codes: Any) -> Tensor:
    if not isinstance(codes, Tensor):
        raise InputError(f"codes: expected a tensor of shape (N, latent), got {type(codes).__name__}")
    if codes.dim() != 2 or 0 in codes.shape:
        raise InputError(
            f"codes: expected shape (N, latent) with at least one code, got {tuple(codes.shape)}"
        )
    if not codes.is_floating_point():
        raise InputError(f"codes: expected a floating-point tensor, got {codes.dtype}")
    codes = codes.detach()
    if not codes.isfinite().all():
        count = int((~codes.isfinite()).sum())
        raise InputError(f"codes: expected finite values, got {count} that are not")
    return codes


def _generator(seed: Any) -> torch.Generator | None:
    if seed is None:
        return None
    return torch.Generator().manual_seed(check_seed(seed))


def check_seed(seed: Any) -> int:
    """Return `seed` if it is an int that all generators take; raise `InputError` otherwise."""
    # scikit-learn's takes 32 bits.
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**32:
        raise InputError(f"seed={seed!r}: expected an integer from 0 to 2**32 - 1")
    return seed


def check_positive(value: Any, argument: str) -> float:
    """Return `value` if it is a finite number above 0; raise `InputError` naming `argument` otherwise."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise InputError(f"{argument}={value!r}: expected a finite number above 0")
    return value


def standard_scale(codes: Tensor) -> tuple[Tensor, Tensor]:
    """The mean and the deviation of each column; 1 for the deviation of a column that is constant."""
    deviation, mean = torch.std_mean(codes, 0, correction=0)
    # Of equal numbers the mean may be off by a rounding error, which is no deviation to divide by.
    is_constant = codes.amax(0) == codes.amin(0)
    return mean, torch.where(is_constant, torch.ones_like(deviation), deviation)

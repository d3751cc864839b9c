"""What every model shares: config, output, registry, and the folder a model is kept in."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn

from aefast.errors import InputError
from aefast.models._files import make_directory, write_atomically
from aefast.ops import _registry
from aefast.ops._arguments import did_you_mean

FORMAT_VERSION = 1
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"

MODELS: dict[str, type[Model]] = {}
"""The models by the name that config files and the command line call them."""

ClassType = TypeVar("ClassType", bound=type)
ModelType = TypeVar("ModelType", bound="type[Model]")


def check_choice(value: object, argument: str, known: Iterable[str]) -> str:
    """Return `value` if it is one of `known`; raise `InputError` naming `argument` otherwise."""
    known = list(known)
    if isinstance(value, str) and value in known:
        return value
    raise InputError(f"{argument}={value!r}: expected one of {', '.join(known)}{did_you_mean(value, known)}")


def listed(registry: dict[str, Any], name: str, kind: str) -> Callable[[ClassType], ClassType]:
    """Class decorator: list the class, a `kind`, in `registry` as `name`, and give it that `name`."""

    def add(listed_class: ClassType) -> ClassType:
        if name in registry:
            raise ValueError(f"a {kind} named {name!r} is registered already")
        listed_class.name = name
        registry[name] = listed_class
        return listed_class

    return add


def register(name: str) -> Callable[[ModelType], ModelType]:
    """Class decorator: list a model in `MODELS` as `name`.

    A class that overrides a model's methods is registered by a name of its own before it is trained by
    `aefast.train.Trainer` or saved, so that files of it are loaded as one. Where they are loaded the class has to be
    registered too.
    """
    return listed(MODELS, name, "model")


def find_model(name: object, argument: str = "model") -> type[Model]:
    """The model class registered as `name`, whatever its case; `InputError` lists the names otherwise."""
    model_class = MODELS.get(name.lower()) if isinstance(name, str) else None
    if model_class is None:
        raise InputError(
            f"{argument}={name!r}: expected one of {', '.join(sorted(MODELS))}{did_you_mean(name, MODELS)}"
        )
    return model_class


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Options of a model: plain values only, so that they go through JSON and back unchanged."""

    def to_dict(self) -> dict[str, Any]:
        """The options as JSON values (tuples become lists)."""
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in dataclasses.asdict(self).items()
        }

    @classmethod
    def from_dict(cls, options: Mapping[str, Any], origin: str = "config") -> ModelConfig:
        """The config of `options`; `origin` is what an error calls their source.

        Raises:
            InputError: an option that is unknown, missing, or out of its range.
        """
        fields = {field.name: field for field in dataclasses.fields(cls)}
        if not isinstance(options, Mapping):
            raise InputError(f"{origin}: expected options by name, got {type(options).__name__}")
        for key in options:
            if key not in fields:
                owners = [
                    name for name, one in MODELS.items() if key in one.config_class.__dataclass_fields__
                ]
                hint = f"; {key} is an option of {', '.join(owners)}" if owners else did_you_mean(key, fields)
                raise InputError(
                    f"{origin}: unknown option {key!r}, expected one of {', '.join(fields)}{hint}"
                )
        missing = [
            name
            for name, field in fields.items()
            if name not in options
            and field.default is dataclasses.MISSING
            and field.default_factory is dataclasses.MISSING
        ]
        if missing:
            raise InputError(f"{origin}: missing option {', '.join(map(repr, missing))}")
        values = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
        try:
            return cls(**values)
        except InputError as error:
            raise InputError(f"{origin}: {error}") from None


@dataclasses.dataclass
class ModelOutput:
    """What a model returns for a batch of B samples.

    Attributes:
        made: the reconstruction, or what makes it.
        latent: (B, latent).
        loss: scalar, the sum of `terms`, to call ``backward()`` on.
        terms: the scalars that add up to the loss, by name.
    """

    made: torch.Tensor | Callable[[], torch.Tensor]
    latent: torch.Tensor
    loss: torch.Tensor
    terms: dict[str, torch.Tensor]

    @property
    def reconstruction(self) -> torch.Tensor:
        """The shape of the input.

        In training mode the loss of a large batch does without it. Then it is made when it is first asked for, from the
        latent and from the parameters of that moment, and gradients flow through it.
        """
        if not isinstance(self.made, torch.Tensor):
            self.made = self.made()
        return self.made


# So that torch.export takes a model in eval mode.
torch.export.register_dataclass(ModelOutput, serialized_type_name="aefast.models.ModelOutput")


class Model(nn.Module):
    """Base of all models: `encode`, `decode`, `forward`, and the folder a model is saved in.

    A subclass sets `config_class`, is registered with `register`, and implements `encode`, `decode`,
    `forward`, `eager_twin` and `eager_loss`.

    Args:
        config: the options; or give them by name.

    Attributes:
        ends_step: whether a forward pass in training mode is the last of its training step. Who trains on a batch in
            parts sets it to False for all parts but the last, backward included, as `aefast.train.CapturedStep` does.
        networks: of the modules that were given in the place of the model's own, the names of their classes, by
            "encoder" and "decoder". Whoever loads the model has to give such modules again.
        may_lack: names of the state dict that one to be loaded may lack, whose values then are those of a new model.
    """

    name: ClassVar[str]
    config_class: ClassVar[type[ModelConfig]]
    may_lack: ClassVar[frozenset[str]] = frozenset()
    ends_step = True

    def __init__(self, config: ModelConfig | None = None, **options: Any) -> None:
        super().__init__()
        self.networks: dict[str, str] = {}
        if config is None:
            config = self.config_class.from_dict(options, type(self).__name__)
        elif options:
            raise InputError(f"{next(iter(options))}: give either a config or options by name, not both")
        # A subclass's options would be written into a file that this class cannot read.
        if type(config) is not self.config_class:
            raise InputError(
                f"config: expected {self.config_class.__name__}, got {type(config).__name__} ({config!r})"
            )
        self.config = config

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """The latents of a batch: x (B, ...) to (B, latent)."""
        raise NotImplementedError

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        """The reconstructions of a batch of latents: (B, latent) to (B, input_size)."""
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> ModelOutput:
        """Reconstruct a batch x (B, ...) and say what that costs."""
        raise NotImplementedError

    @property
    def can_be_captured(self) -> bool:
        """Whether a training step can be part of a CUDA graph: nothing in it waits for what the device computes."""
        return True

    @property
    def awaits_samples(self) -> bool:
        """Whether the model is as new and begins with something that samples tell: a run calls ``initialize(samples)``
        with its first batch then."""
        return False

    def evaluate(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """What held-out samples say of the model in eval mode: scalars by name, means over the batch x (B, ...).

        "loss" is what training minimises; where it has several terms these are told too. A name that ends in "mse" is a
        mean squared error over all elements, "mse" itself that of the reconstruction. A model may add measures of its
        own; "explained_variance", 1 - mse / the variance of the batch, is told of all held-out samples as of one batch.
        """
        output = self(x)
        return {"loss": output.loss, **several(output.terms), "mse": F.mse_loss(output.reconstruction, x)}

    def illustrate(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """What to show of the model's work on samples x (B, ...) in eval mode: batches of x's shape by name."""
        return {"original": x, "reconstruction": self(x).reconstruction}

    def _decoded(self, latent: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """The reconstructions of latents in the shape of the samples."""
        return self.decode(latent).reshape(shape)

    def eager_twin(self) -> nn.Module:
        """The same architecture in plain PyTorch, with copied weights and the same state dict keys.

        Maps a batch (B, input_size) to its reconstruction (B, input_size). Noise comes from torch's generator.
        """
        raise NotImplementedError

    def eager_loss(self, twin: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """The loss of `eager_twin` on a batch (B, input_size), in plain PyTorch."""
        raise NotImplementedError

    def check_samples(self, x: torch.Tensor) -> None:
        """That the values of a batch are such as the model's loss is for, where the loss does not see to it itself."""

    def flatten(self, x: torch.Tensor, *, any_dtype: bool = False) -> torch.Tensor:
        """x (B, ...) as (B, input_size); `InputError` if its features are not the model's, or its dtype, unless any
        will do."""
        size = self.config.input_size
        if not isinstance(x, torch.Tensor):
            raise InputError(f"x: expected a tensor of shape (B, {size}), got {type(x).__name__}")
        if x.dim() < 2 or x.shape[1:].numel() != size:
            raise InputError(
                f"x: expected shape (B, {size}) or (B, ...) with {size} features a sample, "
                f"got {tuple(x.shape)}"
            )
        if x.layout != torch.strided and not x.is_nested:
            raise InputError(f"x: expected a dense tensor, got layout {x.layout}; give x.to_dense()")
        if x.dim() > 2:
            self.check_order(x.shape[1:], "x")
        dtype = None if any_dtype else self.sample_dtype
        if dtype is not None and x.dtype != dtype and not _is_autocast(x.device.type):
            expected, got = (str(one).removeprefix("torch.") for one in (dtype, x.dtype))
            raise InputError(f"x: expected dtype {expected}, as the model's parameters have it, got {got}")
        return x.flatten(1)

    @property
    def sample_dtype(self) -> torch.dtype | None:
        """The dtype that samples have, but under autocast; None where networks of others may take what they like, and
        where a parameter does not tell: one that is sharded is cast to another dtype before it is used, and one that is
        quantised has none."""
        one = None if self.networks else self._typical_parameter()
        if one is None or type(one) not in _registry.PLAIN or getattr(one, "_is_flat_param", False):
            return None
        return one.dtype if one.dtype.is_floating_point else None

    def _typical_parameter(self) -> torch.Tensor | None:
        return _first_parameter(self)

    def check_order(self, shape: Sequence[int], argument: str) -> None:
        """That samples of such a shape are no images whose channels or sides are others than those of the model's."""
        expected, shape = getattr(self.config, "image_shape", None), tuple(shape)
        if expected is None or shape == expected:
            return
        # Where a side of 1 stands changes nothing. Of another number of sides it is another way to lay out a sample.
        sides, given = ([side for side in one if side != 1] for one in (expected, shape))
        if given == sides or len(given) != len(sides):
            return
        hint = ""
        if shape == (*expected[1:], expected[0]):
            hint = ", whose channels are last; pass x.permute(0, 3, 1, 2)"
        raise InputError(f"{argument}: expected samples of image_shape={expected!r}, got {shape!r}{hint}")

    def save_pretrained(self, directory: str | Path, *, metadata: Mapping[str, Any] | None = None) -> None:
        """Write ``config.json`` and ``model.safetensors`` into `directory`, which is made if missing.

        Each file appears whole or not at all.

        Args:
            directory: where to write.
            metadata: JSON values kept in ``config.json`` beside the options; loading ignores them.

        Raises:
            InputError: `directory` is a file, `metadata` holds something that is not a JSON value, the model is of a
                class that overrides what is listed by its `name` and is not listed itself (`register`), or it has
                parameters of other names than its class gives them, as `torch.nn.utils.parametrize` makes them.
        """
        directory = Path(directory)
        self.check_class()
        self.check_names()
        content = {"format_version": FORMAT_VERSION, "model": self.name, "config": self.config.to_dict()}
        if self.networks:
            content["networks"] = self.networks
        if metadata is not None:
            content["metadata"] = dict(metadata)
        try:
            text = json.dumps(content, indent=2) + "\n"
        except (TypeError, ValueError, RecursionError) as error:
            raise InputError(f"metadata: expected JSON values ({error})") from None
        make_directory(directory)
        write_atomically(directory / WEIGHTS_FILE, safetensors.torch.save(self.cpu_state()))
        write_atomically(directory / CONFIG_FILE, text.encode())

    def cpu_state(self) -> dict[str, torch.Tensor]:
        """The state dict as contiguous CPU tensors, none of which shares memory with another."""
        state, storages = {}, set()
        for key, value in self.state_dict().items():
            value = value.detach().cpu().contiguous()
            storage = value.untyped_storage().data_ptr()
            state[key] = value.clone() if storage in storages else value
            storages.add(storage)
        return state

    def _blank(self) -> Model:
        """A new model of the same config."""
        return type(self)(self.config)

    def check_class(self) -> None:
        """That the model is loaded as what it is; `InputError` if its class is not listed, but one that it changes."""
        own = type(self).__name__
        hint = "list the class by @aefast.models.register('another_name')"
        listed_class = MODELS.get(getattr(self, "name", None))
        if listed_class is None:
            raise InputError(
                f"model: a {own} could not be loaded, since it has no name in aefast.models.MODELS; {hint}"
            )
        parents = listed_class.__mro__
        methods = {name for one in parents if issubclass(one, Model) for name in vars(one)}
        # Classes such as those that shard a model add methods of their own.
        added = {name for one in type(self).__mro__ if one not in parents for name in vars(one)}
        changed = sorted(name for name in methods & added if not name.startswith("__"))
        if changed:
            raise InputError(
                f"model: a {own} would be loaded as the {listed_class.__name__} that its name, {self.name!r}, stands "
                f"for, without its {', '.join(changed[:3])}; {hint}"
            )

    def check_names(self) -> None:
        """That the state dict has the keys of a new model of the same config; `InputError` if not."""
        with torch.device("meta"):
            expected = self._blank().state_dict().keys()
        found = self.state_dict().keys()
        if found != expected:
            names = [*(f"missing {key!r}" for key in expected - found)]
            names += [f"unexpected {key!r}" for key in found - expected]
            raise InputError(
                f"model: expected the parameters of a {type(self).__name__} by their names, or a file of it could not "
                f"be loaded: {', '.join(sorted(names)[:4])}; parametrizations have to be removed before"
            )

    def has_own(self, *methods: str) -> bool:
        """Whether a subclass from outside of aefast has one of these methods of its own."""
        known = next(one for one in type(self).__mro__ if one.__module__.startswith("aefast."))
        return any(getattr(type(self), name) is not getattr(known, name) for name in methods)

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **networks: nn.Module,
    ) -> Model:
        """Load the model that `save_pretrained` wrote into `directory`, in eval mode.

        Args:
            directory: folder holding ``config.json`` and ``model.safetensors``.
            device: where the model goes; the CPU by default.
            dtype: floating-point type to convert to; that of the file by default.
            networks: ``encoder=``, ``decoder=`` or both, of a model that was made with modules in their place:
                modules of the same architecture, which become part of the model and take their weights from the file.

        Raises:
            InputError: a missing folder or file, an unknown model or option, a newer file format, weights
                that are damaged or do not fit the config, networks that are missing or too many, or a model of another
                class than this one.
        """
        directory = Path(directory)
        model_class, config, own = _read_config(directory)
        if not issubclass(model_class, cls):
            raise InputError(
                f"directory={str(directory)!r}: holds a {model_class.__name__}, expected {cls.__name__}"
            )
        _check_networks(networks, own, f"the {model_class.__name__} in {directory}")
        with torch.device("meta"):
            model = model_class(config, **networks)
        _fill(model, _read_weights(directory / WEIGHTS_FILE), directory / WEIGHTS_FILE)
        return model.to(device=device, dtype=dtype).eval()


def several(terms: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The terms of a loss that has several, by name, but for names that `Model.evaluate` has for what it tells."""
    if len(terms) == 1:
        return {}
    return {name: term for name, term in terms.items() if name != "loss" and not name.endswith("mse")}


def _first_parameter(module: nn.Module) -> nn.Parameter | None:
    """``next(module.parameters(), None)`` in a part of its time, which each pass takes."""
    for one in module._parameters.values():
        if one is not None:
            return one
    for child in module._modules.values():
        found = None if child is None else _first_parameter(child)
        if found is not None:
            return found
    return None


def _is_autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode, within; afterwards each of its modules in the mode that it was in."""
    modes = [(one, one.training) for one in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for one, mode in modes:
            one.training = mode


def from_pretrained(
    directory: str | Path,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **networks: nn.Module,
) -> Model:
    """Load whichever model `directory` holds; see `Model.from_pretrained`."""
    return Model.from_pretrained(directory, device=device, dtype=dtype, **networks)


def _check_networks(given: Mapping[str, object], own: Mapping[str, str], what: str) -> None:
    """That `given` are the networks that a model was made with, whose classes `own` names."""
    for name in given:
        if name not in ("encoder", "decoder"):
            known = ("device", "dtype", "encoder", "decoder")
            raise InputError(
                f"{name}: unknown argument, expected one of {', '.join(known)}{did_you_mean(name, known)}"
            )
        if name not in own:
            raise InputError(f"{name}: {what} was not made with one that is given")
    missing = [name for name in own if name not in given]
    if missing:
        classes = " and ".join(f"{own[name]} as its {name}" for name in own)
        arguments = ", ".join(f"{name}=..." for name in own)
        raise InputError(
            f"{missing[0]}: {what} was made with {classes}, which its files do not hold; give modules of the same "
            f"architecture, in Python: from_pretrained(directory, {arguments})"
        )


def _read_config(directory: Path) -> tuple[type[Model], ModelConfig, dict[str, str]]:
    """The class of the model, its config, and the classes of the networks that it was made with."""
    if not os.path.isdir(directory):
        found = "a file" if os.path.exists(directory) else "nothing"
        raise InputError(f"directory={str(directory)!r}: expected a folder with a saved model, found {found}")
    path = directory / CONFIG_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(
            f"directory={str(directory)!r}: {CONFIG_FILE} is missing, expected a folder with a saved model"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: expected a readable JSON file ({error})") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a JSON object, got {type(content).__name__}")

    known = ("format_version", "model", "config", "metadata", "networks")
    for key in content:
        if key not in known:
            raise InputError(f"{path}: unknown key {key!r}{did_you_mean(key, known)}")
    for key in known[:3]:
        if key not in content:
            raise InputError(f"{path}: missing key {key!r}")
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
    model_class = find_model(content["model"], f"{path}: model")
    networks = content.get("networks", {})
    if not isinstance(networks, dict) or not all(name in ("encoder", "decoder") for name in networks):
        raise InputError(
            f"{path}: networks={networks!r}: expected the classes of an encoder, a decoder or both"
        )
    return model_class, model_class.config_class.from_dict(content["config"], origin=str(path)), networks


def _read_weights(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise InputError(f"directory={str(path.parent)!r}: {path.name} is missing, expected a saved model")
    try:
        return safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(f"{path}: expected a readable safetensors file ({error})") from None


def check_fit(model: Model, weights: Mapping[str, torch.Tensor], what: str) -> None:
    """That `weights` have the names, shapes and kinds of the model's state dict; `what` is how an error begins."""
    expected = model.state_dict()
    problems = [f"missing {key!r}" for key in expected if key not in weights and key not in model.may_lack]
    problems += [f"unexpected {key!r}" for key in weights if key not in expected]
    problems += [
        f"{key!r} has shape {tuple(weights[key].shape)}, expected {tuple(tensor.shape)}"
        for key, tensor in expected.items()
        if key in weights and weights[key].shape != tensor.shape
    ]
    problems += [
        f"{key!r} has dtype {weights[key].dtype}, expected {tensor.dtype}"
        for key, tensor in expected.items()
        if key in weights and weights[key].is_floating_point() != tensor.is_floating_point()
    ]
    if problems:
        shown = "; ".join(problems[:4]) + (f"; and {len(problems) - 4} more" if len(problems) > 4 else "")
        raise InputError(f"{what}: {shown}")


def laid_out_as(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A tensor with its elements in memory as those of one of its shape; files have them in the order of indices."""
    if value.stride() == like.stride():
        return value
    return torch.empty_like(like, dtype=value.dtype, device=value.device).copy_(value)


def _fill(model: Model, weights: dict[str, torch.Tensor], path: Path) -> None:
    """Give `model`, which may be on the meta device, the tensors read from `path`, each as the model's own lies."""
    check_fit(model, weights, f"{path}: the tensors do not fit {CONFIG_FILE}")
    weights = {
        key: laid_out_as(weights[key], own) for key, own in model.state_dict().items() if key in weights
    }
    for name in model.networks:
        _fill_network(getattr(model, name), weights, f"{name}.")
    model.load_state_dict(weights, assign=True, strict=not model.networks)


def _fill_network(network: nn.Module, weights: dict[str, torch.Tensor], prefix: str) -> None:
    """Give a module those of the tensors whose names begin with `prefix`, as whose type it counts from then on."""
    own = {key.removeprefix(prefix): weights.pop(key) for key in list(weights) if key.startswith(prefix)}
    types = {value.dtype for value in own.values() if value.is_floating_point()}
    if len(types) == 1:
        network.to(dtype=types.pop())
    # Tensors that it uses in several places stay one, unless they are to be replaced.
    network.load_state_dict(own, assign=any(one.is_meta for one in network.parameters()))

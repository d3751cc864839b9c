"""Checkpoints: everything a run needs to go on exactly where it was, in one file each."""

from __future__ import annotations

import dataclasses
import json
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from aefast.errors import AefastError, InputError
from aefast.models._files import write_atomically

FORMAT_VERSION = 2

_NAME = re.compile(r"step-(\d+)\.safetensors")


class CheckpointError(AefastError):
    """Checkpoints are there, but none of them can be read."""


@dataclasses.dataclass
class Checkpoint:
    """The state of a run between two steps.

    Attributes:
        step: steps taken.
        tensors: all tensors, on the CPU, by group and name: "model", "optimizer", "rng".
        state: everything else, as JSON values.
    """

    step: int
    tensors: dict[str, dict[str, torch.Tensor]]
    state: dict[str, Any]


class CheckpointStore:
    """The folder with a run's checkpoints; the newest `kept` stay.

    A checkpoint is one safetensors file ``step-<step>.safetensors`` that appears whole or not at all. Its
    header holds the state as JSON and a checksum over state and tensors, so that damage is noticed.
    """

    def __init__(self, directory: Path, kept: int = 2) -> None:
        self.directory = directory
        self.kept = kept

    def paths(self) -> list[Path]:
        """The checkpoint files, oldest first."""
        if not self.directory.is_dir():
            return []
        found = ((_NAME.fullmatch(path.name), path) for path in self.directory.iterdir())
        return [path for _, path in sorted((int(match[1]), path) for match, path in found if match)]

    def save(self, checkpoint: Checkpoint) -> Path:
        """Write a checkpoint, then delete all but the newest `kept`."""
        self.directory.mkdir(parents=True, exist_ok=True)
        flat = {
            f"{group}/{name}": tensor.contiguous()
            for group, tensors in checkpoint.tensors.items()
            for name, tensor in tensors.items()
        }
        state = json.dumps({"step": checkpoint.step, **checkpoint.state})
        header = {
            "format_version": str(FORMAT_VERSION),
            "state": state,
            "checksum": _checksum(state, flat),
        }
        path = self.directory / f"step-{checkpoint.step:010d}.safetensors"
        write_atomically(path, safetensors.torch.save(flat, metadata=header))
        for old in self.paths()[: -self.kept]:
            old.unlink(missing_ok=True)
        return path

    def load_newest(self, warn: Callable[[str], None]) -> Checkpoint | None:
        """The newest checkpoint that can be read, or None if there is no checkpoint at all.

        A damaged one is renamed to ``….damaged`` and named to `warn` when an older one takes its place.

        Raises:
            CheckpointError: there are checkpoints, but all are damaged.
            InputError: the newest is in a format of another version of aefast.
        """
        damaged: list[tuple[Path, str]] = []
        for path in reversed(self.paths()):
            try:
                checkpoint = _read(path)
            except _DamagedError as damage:
                damaged.append((path, str(damage)))
                continue
            for bad, reason in damaged:
                warn(f"{bad} is damaged ({reason}); going on from {path.name}")
                bad.rename(bad.with_name(bad.name + ".damaged"))
            return checkpoint
        if damaged:
            path, reason = damaged[0]
            raise CheckpointError(
                f"{path}: expected a readable checkpoint, found a damaged one ({reason}) and no older "
                "one that is whole"
            )
        return None


class _DamagedError(Exception):
    """A checkpoint file that is not what was written; the message says how."""


def _read(path: Path) -> Checkpoint:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            flat = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        version = int(header["format_version"])
        if version > FORMAT_VERSION:
            raise InputError(
                f"{path}: format_version={version} is newer than this aefast reads ({FORMAT_VERSION}); "
                "upgrade aefast to resume"
            )
        if version < FORMAT_VERSION:
            raise InputError(
                f"{path}: format_version={version} is older than this aefast reads ({FORMAT_VERSION}); go on with the "
                "aefast that wrote it, or start afresh"
            )
        if header["checksum"] != _checksum(header["state"], flat):
            raise _DamagedError("its checksum does not match")
        state = json.loads(header["state"])
    except InputError:
        raise
    except (OSError, safetensors.SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise _DamagedError(" ".join(f"{type(error).__name__}: {error}".split())) from None
    tensors: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in flat.items():
        group, _, name = key.partition("/")
        tensors.setdefault(group, {})[name] = tensor
    return Checkpoint(state.pop("step"), tensors, state)


def _checksum(state: str, tensors: dict[str, torch.Tensor]) -> str:
    """CRC-32 over the state and, in the order of their names, the bytes of the tensors."""
    value = zlib.crc32(state.encode())
    for name in sorted(tensors):
        value = zlib.crc32(name.encode(), value)
        value = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy(), value)
    return f"{value:08x}"

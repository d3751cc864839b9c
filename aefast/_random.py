"""Random numbers that leave no trace, and states of the generators that others draw from."""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch


@contextlib.contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Generators of the CPU and of `device` start from a seed within, and go on as if nothing had been drawn."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        # torch.manual_seed would also reach devices whose state is not put back.
        torch.default_generator.manual_seed(seed)
        for one in devices:
            with torch.cuda.device(one):
                torch.cuda.manual_seed(seed)
        yield


def other_states() -> dict[str, torch.Tensor]:
    """The states of the global generators of numpy and of Python's `random`, each (n,) uint8, by their names."""
    states = {"numpy": np.random.get_state(legacy=False), "python": random.getstate()}
    return {name: _to_bytes(state) for name, state in states.items()}


def set_other_states(states: dict[str, torch.Tensor]) -> None:
    """Put the generators where `states` was taken, those that it has.

    One of numpy that is of another kind since stays as it is.
    """
    if "numpy" in states:
        state = _from_bytes(states["numpy"])
        if state["bit_generator"] == np.random.get_state(legacy=False)["bit_generator"]:
            np.random.set_state(state)
    if "python" in states:
        version, words, gauss = _from_bytes(states["python"])
        random.setstate((version, tuple(words), gauss))


def _to_bytes(state: object) -> torch.Tensor:
    text = json.dumps(state, default=lambda array: array.tolist())
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def _from_bytes(state: torch.Tensor) -> Any:
    return json.loads(state.numpy().tobytes())

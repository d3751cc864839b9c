"""What training on 10⁹ samples over many GPUs costs: formulae, evaluated for assumed hardware.

W ranks, B samples a rank and step, P parameters, d latent size, N samples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from aefast.errors import InputError
from aefast.nn.linear_act import check_positive_int


def _check(**values: int) -> None:
    for name, value in values.items():
        check_positive_int(value, name)


def bytes_per_epoch(samples: int, features: int, value_bytes: int) -> int:
    """N·features·bytes: what one pass over the data reads."""
    _check(samples=samples, features=features, value_bytes=value_bytes)
    return samples * features * value_bytes


def step_count(samples: int, epochs: int, world: int, batch: int) -> int:
    """epochs·⌈N / (W·B)⌉."""
    _check(samples=samples, epochs=epochs, world=world, batch=batch)
    return epochs * -(-samples // (world * batch))


def step_flops(parameters: int, batch: int) -> int:
    """6·P·B of dense layers: 2 a weight and sample forward, 4 backward.

    That counts the gradient of the first layer's input too, which no step computes.
    """
    _check(parameters=parameters, batch=batch)
    return 6 * parameters * batch


def all_reduce_bytes(world: int, nbytes: int) -> float:
    """2·(W−1)/W·bytes: what a rank sends, and receives, in an all-reduce of `nbytes` bytes.

    Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations", 2009.
    """
    _check(world=world)
    return 2 * (world - 1) / world * nbytes


def all_gather_bytes(world: int, nbytes: int) -> int:
    """(W−1)·bytes: what a rank receives where each of W contributes `nbytes`."""
    _check(world=world)
    return (world - 1) * nbytes


def mmd_pairs(world: int, batch: int, blocks: int) -> int:
    """blocks·B·(W·B): pairs that a rank evaluates, its own rows against everybody's columns.

    `blocks` are 3 with samples of the prior: codes × codes, codes × prior, prior × prior. Its closed form leaves the
    first.
    """
    _check(world=world, batch=batch)
    return blocks * batch * world * batch


def transfer_seconds(messages: int, nbytes: float, latency: float, bandwidth: float) -> float:
    """latency·messages + bytes/bandwidth."""
    return messages * latency + nbytes / bandwidth


# What the projection is made for.


def _figure(value: float, unit: str, source: str) -> Any:
    return field(default=value, metadata={"unit": unit, "source": source})


@dataclass(frozen=True)
class Hardware:
    """A GPU, its node, and the network between nodes. Every field knows its unit and where its value comes from."""

    flops: float = _figure(
        790e12, "FLOP/s", "bfloat16 product: assumption, 80 % of the H200 datasheet's dense rate"
    )
    bandwidth: float = _figure(
        4.3e12, "B/s", "copy, bytes read and written: assumption, 90 % of the H200 datasheet's rate"
    )
    pair_flops: float = _figure(
        494e12 / 3, "FLOP/s", "TF32 without sparsity, H200 datasheet, in three passes for float32's accuracy"
    )
    exps: float = _figure(
        16 * 132 * 1.98e9,
        "1/s",
        "16 a clock and multiprocessor (CUDA C++ Programming Guide), 132 at 1.98 GHz",
    )
    memory: float = _figure(141e9, "B", "H200 datasheet")
    efficiency: float = _figure(0.6, "", "share of these ceilings that kernels reach: assumption")
    host: float = _figure(400e-6, "s", "launching a step's kernels one by one from Python: assumption")
    gpus: int = _figure(8, "", "GPUs of a node (HGX H200)")
    nvlink: float = _figure(450e9, "B/s", "900 GB/s in both directions together, H200 datasheet")
    network: float = _figure(50e9, "B/s", "a GPU's own InfiniBand NDR port of 400 Gb/s, datasheet")
    latency: float = _figure(5e-6, "s", "of a message, inside a node and between nodes: assumption")
    pcie: float = _figure(64e9, "B/s", "PCIe 5.0 ×16, one direction, a GPU, H200 datasheet")
    storage: float = _figure(10e9, "B/s", "read by a node: assumption")


H200 = Hardware()


@dataclass(frozen=True)
class Network:
    """A dense autoencoder with a mirrored decoder.

    Attributes:
        encoder: widths from the input to the latent.
        heads: values that the encoder gives for each latent: 2 for mean and log-variance.
        blocks: of pairs in its MMD term, as in `mmd_pairs`; 0 without one.
    """

    name: str
    encoder: tuple[int, ...]
    heads: int = 1
    blocks: int = 0

    @property
    def label(self) -> str:
        return f"{self.name} {'-'.join(map(str, self.encoder))}"

    @property
    def features(self) -> int:
        return self.encoder[0]

    @property
    def latent(self) -> int:
        return self.encoder[-1]

    @property
    def layers(self) -> list[tuple[int, int]]:
        """(inputs, outputs) of each layer."""
        encoder = list(pairwise((*self.encoder[:-1], self.heads * self.latent)))
        return encoder + list(pairwise(self.encoder[::-1]))

    @property
    def parameters(self) -> int:
        """P: weights and biases."""
        return sum(inputs * outputs + outputs for inputs, outputs in self.layers)

    @property
    def activations(self) -> int:
        """Values of a sample that forward stores for backward: the input and each layer's output."""
        return self.features + sum(outputs for _, outputs in self.layers)


SMALL, LARGE = (784, 512, 16), (784, 4096, 4096, 64)
NETWORKS = (
    Network("autoencoder", SMALL),
    Network("VAE", SMALL, heads=2),
    Network("InfoVAE", SMALL, heads=2, blocks=3),
    Network("autoencoder", LARGE),
    Network("InfoVAE", LARGE, heads=2, blocks=3),
    Network("InfoVAE, closed-form prior,", LARGE, heads=2, blocks=1),
)

# bfloat16 products and activations, float32 parameters, gradients and moments.
ACTIVATION_BYTES, PARAMETER_BYTES = 2, 4
# Forward writes an activation and reads it; backward reads it for the weight's gradient and for its own derivative, and
# writes and reads its gradient.
ACTIVATION_PASSES = 6
# Backward writes the gradient; Adam reads it, parameter and two moments and writes these three: 8 × 4 bytes. The
# bfloat16 copy of the parameter is written once and read by forward and backward: 3 × 2.
UPDATE_BYTES = 8 * PARAMETER_BYTES + 3 * ACTIVATION_BYTES
# Parameter, gradient, two moments, and the bfloat16 copy.
STATE_BYTES = 4 * PARAMETER_BYTES + ACTIVATION_BYTES
# Of a dense step: the time behind which a bucketed all-reduce can hide.
BACKWARD_SHARE = 4 / 6


def nodes(world: int, hardware: Hardware = H200) -> tuple[int, int]:
    """Ranks of a node, and nodes.

    Raises:
        InputError: more ranks than a node has GPUs, and no multiple of that.
    """
    _check(world=world)
    local = min(world, hardware.gpus)
    if world % local:
        raise InputError(
            f"world={world}: expected at most {hardware.gpus}, the GPUs of a node, or a multiple of them"
        )
    return local, world // local


def all_reduce_seconds(world: int, nbytes: int, hardware: Hardware = H200) -> float:
    """Reduce-scatter inside each node, a ring all-reduce of each GPU's part between nodes, all-gather inside.

    With g GPUs on each of n nodes a rank sends 2·(g−1)/g·bytes by NVLink and 2·(n−1)/n·bytes/g by the network,
    together 2·(W−1)/W·bytes, in 2·(g−1) + 2·(n−1) messages.
    """
    local, count = nodes(world, hardware)
    inside = transfer_seconds(
        2 * (local - 1), all_reduce_bytes(local, nbytes), hardware.latency, hardware.nvlink
    )
    between = transfer_seconds(
        2 * (count - 1), all_reduce_bytes(count, nbytes) / local, hardware.latency, hardware.network
    )
    return inside + between


def all_gather_seconds(world: int, nbytes: int, hardware: Hardware = H200) -> float:
    """Between nodes among GPUs of the same place, then inside each node: (n−1)·bytes by the network and
    (g−1)·n·bytes by NVLink, together (W−1)·bytes."""
    local, count = nodes(world, hardware)
    between = transfer_seconds(count - 1, all_gather_bytes(count, nbytes), hardware.latency, hardware.network)
    inside = transfer_seconds(
        local - 1, all_gather_bytes(local, count * nbytes), hardware.latency, hardware.nvlink
    )
    return between + inside


def dense_seconds(network: Network, batch: int, hardware: Hardware = H200) -> float:
    """Products or the traffic of activations, whichever takes longer; both are proportional to B."""
    traffic = ACTIVATION_PASSES * ACTIVATION_BYTES * network.activations * batch
    longest = max(step_flops(network.parameters, batch) / hardware.flops, traffic / hardware.bandwidth)
    return longest / hardware.efficiency


def update_seconds(network: Network, hardware: Hardware = H200) -> float:
    """Traffic of parameters, gradients and moments."""
    return UPDATE_BYTES * network.parameters / hardware.bandwidth / hardware.efficiency


def pair_seconds(latent: int, hardware: Hardware = H200) -> float:
    """A pair of codes, value and gradient: 4·d FLOP (inner product, and its weight times a code) or an exponential."""
    return max(4 * latent / hardware.pair_flops, 1 / hardware.exps) / hardware.efficiency


def input_seconds(world: int, batch: int, sample_bytes: int, hardware: Hardware = H200) -> float:
    """Until a node has read the batches of its GPUs from storage, or a GPU has got its own by PCIe."""
    local, _ = nodes(world, hardware)
    nbytes = batch * sample_bytes
    return max(local * nbytes / hardware.storage, nbytes / hardware.pcie)


@dataclass(frozen=True)
class Step:
    """Seconds of a rank's step by what takes them; reading the data is not among them."""

    host: float
    dense: float
    update: float
    mmd: float
    gather: float
    reduce: float

    @property
    def device(self) -> float:
        return self.dense + self.update + self.mmd

    @property
    def communication(self) -> float:
        return self.gather + self.reduce

    @property
    def exposed(self) -> float:
        """What is left of the all-reduce where the backward hides as much of it as it can."""
        return max(0.0, self.reduce - BACKWARD_SHARE * self.dense)

    @property
    def serial(self) -> float:
        """The step, one thing after another on the device; the host launches ahead."""
        return max(self.host, self.device + self.communication)

    @property
    def overlapped(self) -> float:
        """The step with gradients reduced in buckets during the backward. Codes are gathered before the loss."""
        return max(self.host, self.device + self.gather + self.exposed)

    @property
    def bound(self) -> str:
        """What takes most of the overlapped step."""
        if self.overlapped <= self.host:
            return "host"
        parts = {
            "dense": self.dense,
            "update": self.update,
            "MMD": self.mmd,
            "all-gather": self.gather,
            "all-reduce": self.exposed,
        }
        return max(parts, key=parts.__getitem__)


def project(
    network: Network,
    world: int,
    batch: int,
    hardware: Hardware = H200,
    gradient_bytes: int = PARAMETER_BYTES,
) -> Step:
    """A step of `batch` samples a rank on `world` ranks, with gradients sent in `gradient_bytes` bytes a value."""
    mmd = mmd_pairs(world, batch, network.blocks) * pair_seconds(network.latent, hardware)
    codes = batch * network.latent * 4 if network.blocks else 0
    return Step(
        host=hardware.host,
        dense=dense_seconds(network, batch, hardware),
        update=update_seconds(network, hardware),
        mmd=mmd,
        gather=all_gather_seconds(world, codes, hardware) if codes else 0.0,
        reduce=all_reduce_seconds(world, gradient_bytes * network.parameters, hardware),
    )


def rank_bytes(network: Network, world: int, batch: int) -> dict[str, int]:
    """Bytes of a rank's memory: parameters with gradients and moments; activations with the gradients of the two widest
    layers beside each other; gathered codes, and as many samples of the prior where they are drawn."""
    widest = max(network.features, *(outputs for _, outputs in network.layers))
    copies = {0: 0, 1: 1}.get(network.blocks, 2)
    return {
        "state": STATE_BYTES * network.parameters,
        "activations": ACTIVATION_BYTES * batch * (network.activations + 2 * widest),
        "codes": copies * world * batch * network.latent * 4,
    }


# Where one thing overtakes another.

MOST = 1 << 24


def smallest(holds: Callable[[int], bool], most: int = MOST) -> int | None:
    """The smallest of 1, …, `most` for which `holds`, which must hold for all larger ones then; None without one."""
    low, high = 0, 1
    while not holds(high):
        if high >= most:
            return None
        low, high = high, min(2 * high, most)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def _nth_world(number: int, hardware: Hardware) -> int:
    """1, 2, …, all GPUs of a node, then of two nodes, of three, …"""
    return number if number <= hardware.gpus else (number - hardware.gpus + 1) * hardware.gpus


def bound_world(network: Network, batch: int, hardware: Hardware = H200) -> int | None:
    """The smallest world whose communication takes longer than the dense step and its update; neither depends on W."""

    def is_bound(number: int) -> bool:
        step = project(network, _nth_world(number, hardware), batch, hardware)
        return step.communication > step.dense + step.update

    number = smallest(is_bound)
    return None if number is None else _nth_world(number, hardware)


def hiding_batch(
    network: Network, world: int, hardware: Hardware = H200, gradient_bytes: int = PARAMETER_BYTES
) -> int | None:
    """The smallest batch of a rank whose backward takes at least as long as the all-reduce.

    In one node, where products bind and latency does not: (W−1)/W · bytes of a value/2 · efficiency · FLOP/s /
    bandwidth, whatever the model.
    """
    reduce = all_reduce_seconds(world, gradient_bytes * network.parameters, hardware)
    return smallest(lambda batch: BACKWARD_SHARE * dense_seconds(network, batch, hardware) >= reduce)


def mmd_global_batch(network: Network, hardware: Hardware = H200) -> float | None:
    """W·B from which on the MMD term takes longer than the dense step: dense seconds a sample / (blocks·pair seconds).

    Both grow with a rank's B, so that only the product W·B counts.
    """
    if not network.blocks:
        return None
    return dense_seconds(network, 1, hardware) / (network.blocks * pair_seconds(network.latent, hardware))


def gather_world(network: Network, batch: int, hardware: Hardware = H200) -> int | None:
    """The smallest world whose all-gather of codes takes longer than the dense step."""
    if not network.blocks:
        return None
    dense = dense_seconds(network, batch, hardware)
    nbytes = batch * network.latent * 4
    number = smallest(
        lambda number: all_gather_seconds(_nth_world(number, hardware), nbytes, hardware) > dense
    )
    return None if number is None else _nth_world(number, hardware)

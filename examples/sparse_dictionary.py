"""A dictionary of patches of photographs: TopK sparse autoencoders beside those with an L1 penalty.

Both are trained on patches without their means, TopK with several numbers of latents a patch, L1 with several weights
of the penalty. What they explain of the held-out patches' variance is compared at the same number of latents in use,
for which the line through the L1 models is read off.

    python examples/sparse_dictionary.py --out runs/dictionary

prints the comparison, and draws it and the directions of a TopK model that are used most into OUT/dictionary.png. Takes
two minutes on two cores.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from aefast.data.bundled import patches
from aefast.models import SparseAutoencoder
from aefast.train.step import CapturedStep, make_optimizer

SIZE = 16
BATCH = 512
USED = (8, 16, 32)  # latents a patch, of TopK
WEIGHTS = (4e-4, 8e-4, 1.6e-3, 4e-3)  # of the L1 penalty
GRID = (8, 16)  # rows and columns of directions that are shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/dictionary"), help="folder of the figure")
    parser.add_argument("--epochs", type=int, default=6, help="of each model, at least 1")
    parser.add_argument("--patches", type=int, default=40_000, help="how many, held-out ones included")
    parser.add_argument("--latent", type=int, default=1024, help="latents of a model")
    parser.add_argument("--seed", type=int, default=0, help="of weights and order")
    arguments = parser.parse_args()

    dataset = patches(SIZE, arguments.patches)
    samples = dataset.samples - dataset.samples.mean(1, keepdim=True)
    training, held_out = samples[: -dataset.held_out], samples[-dataset.held_out :]

    found: dict[str, list[tuple[float, float]]] = {"topk": [], "l1": []}
    shown = None
    for k in USED:
        # A latent that no patch has used for an epoch is dead.
        model = train(arguments, training, sparsity="topk", k=k, dead_after=len(training))
        used, explained = measure(model, held_out)
        found["topk"].append((used, explained))
        dead = unused_part(model, training)
        print(f"topk k={k:<8} L0 {used:6.1f} · explained variance {explained:.4f} · dead latents {dead:.1%}")
        if k == USED[1]:
            shown = model
    for weight in WEIGHTS:
        model = train(arguments, training, sparsity="l1", sparsity_weight=weight)
        used, explained = measure(model, held_out)
        found["l1"].append((used, explained))
        dead = unused_part(model, training)
        print(
            f"l1 {weight:<12g} L0 {used:6.1f} · explained variance {explained:.4f} · dead latents {dead:.1%}"
        )
    for used, explained in found["topk"]:
        other = read_off(found["l1"], used)
        if other is not None:
            print(f"at L0 {used:6.1f}: explained variance of topk {explained:.4f}, of l1 {other:.4f}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "dictionary.png"
    draw(found, directions(shown, training), path)
    print(f"figure: {path}")


def train(arguments: argparse.Namespace, training: Tensor, **options: object) -> SparseAutoencoder:
    torch.manual_seed(arguments.seed)
    model = SparseAutoencoder(input_size=SIZE * SIZE, latent=arguments.latent, **options)
    step = CapturedStep(model, make_optimizer(model.parameters(), 1e-3))
    for batch in batches(training, arguments.epochs, arguments.seed):
        step(batch)
    return model.eval()


def batches(samples: Tensor, epochs: int, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        order = torch.randperm(len(samples), generator=generator)
        for first in range(0, len(order) - BATCH + 1, BATCH):
            yield samples[order[first : first + BATCH]]


@torch.no_grad()
def measure(model: SparseAutoencoder, samples: Tensor) -> tuple[float, float]:
    """How many latents a sample uses, and the part of the variance that is explained."""
    measures = model.evaluate(samples)
    return measures["l0"].item(), measures["explained_variance"].item()


@torch.no_grad()
def use_of(model: SparseAutoencoder, samples: Tensor) -> Tensor:
    """(latent,): how many samples use a latent."""
    counts = [(model.dense(model.encode(part)) > 0).sum(0) for part in samples.split(4096)]
    return torch.stack(counts).sum(0)


def unused_part(model: SparseAutoencoder, samples: Tensor) -> float:
    return (use_of(model, samples) == 0).double().mean().item()


def read_off(line: list[tuple[float, float]], used: float) -> float | None:
    """The explained variance at L0 `used`, on the line through points in the logarithm of L0; None beyond its ends."""
    points = sorted(line)
    for (low, at_low), (high, at_high) in itertools.pairwise(points):
        if low <= used <= high:
            part = math.log(used / low) / math.log(high / low) if high > low else 0.0
            return at_low + part * (at_high - at_low)
    return None


def directions(model: SparseAutoencoder, samples: Tensor) -> Tensor:
    """The directions (n, SIZE²) that most samples use, the most used one first."""
    order = use_of(model, samples).argsort(descending=True)[: math.prod(GRID)]
    return model.decoder.weight.detach()[order]


def draw(found: dict[str, list[tuple[float, float]]], shown: Tensor, path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure = pyplot.figure(figsize=(12, 4.6), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 2))
    axis = left.subplots()
    for name, points in found.items():
        used, explained = zip(*sorted(points), strict=True)
        axis.plot(used, explained, marker="o", label=name)
    axis.set_xscale("log")
    axis.set_xlabel("latents in use (L0)")
    axis.set_ylabel("explained variance of held-out patches")
    axis.grid(alpha=0.3)
    axis.legend()
    right.suptitle(f"directions of topk, k={USED[1]}, that most patches use", fontsize=10)
    for axis in (axes := right.subplots(*GRID)).flat:
        axis.set_axis_off()
    for axis, direction in zip(axes.flat, shown, strict=False):
        bound = direction.abs().max().item()
        axis.imshow(direction.reshape(SIZE, SIZE), cmap="gray", vmin=-bound, vmax=bound)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()

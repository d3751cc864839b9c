"""Moving digits: a recurrent autoencoder remembers the frames it saw and predicts those to come.

Two handwritten digits bounce in each film. One recurrent net reads the past frames; from its last state a second one
gives them back, the latest first, and a third one goes on into the future: Srivastava, Mansimov and Salakhutdinov,
Unsupervised learning of video representations using LSTMs, 2015. The digits of the held-out films were never seen in
training. The baselines repeat the last frame, or the mean of the past ones, or show the mean of all training frames.

    python examples/video.py --out runs/video

prints the mean squared errors of the predicted frames, and draws films beside what is made of them into OUT/video.png.
Takes a minute.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

import aefast.functional as AF
from aefast.data import load
from aefast.nn import MLP
from aefast.train import CapturedStep, Schedule, make_optimizer

SIDE = 16  # of a frame, in pixels
DIGIT = 8  # of a digit
PACE = (0.5, 1.2)  # of a digit along each side, in pixels a frame
PAST, FUTURE = 6, 6  # frames
BATCH = 32
STATE = 192
SHOWN = 3  # films in the figure


class Film(nn.Module):
    """Past frames (B, PAST, SIDE²) to the logits of these and of those to come, (B, PAST + FUTURE, SIDE²).

    Args:
        mean: (SIDE²,), of the training frames: what differs from film to film is small beside it.
    """

    def __init__(self, mean: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.look = nn.Sequential(MLP((SIDE * SIDE, 256, 128), activation="silu"), nn.LayerNorm(128))
        self.watch = nn.GRU(128, STATE, batch_first=True)
        self.remember = nn.GRUCell(128, STATE)
        self.foresee = nn.GRUCell(128, STATE)
        self.paint = nn.Sequential(nn.LayerNorm(STATE), MLP((STATE, 256, SIDE * SIDE)))

    def forward(self, past: Tensor) -> Tensor:
        seen = self.seen(past)
        _, (state,) = self.watch(seen)
        remembered = self.unrolled(self.remember, state, torch.zeros_like(seen[:, 0]), PAST)
        foreseen = self.unrolled(self.foresee, state, seen[:, -1], FUTURE)
        return torch.stack(remembered[::-1] + foreseen, 1)

    def seen(self, frames: Tensor) -> Tensor:
        return self.look(4 * (frames - self.mean))  # of a deviation near 1

    def unrolled(self, cell: nn.GRUCell, state: Tensor, seen: Tensor, length: int) -> list[Tensor]:
        """The logits (B, SIDE²) of as many frames, each of which the cell looks at before it makes the next."""
        found = []
        for _ in range(length):
            state = cell(seen, state)
            found.append(self.paint(state) + self.mean.clamp(0.01, 0.99).logit())
            seen = self.seen(found[-1].sigmoid())
        return found

    def loss(self, frames: Tensor) -> Tensor:
        return AF.reconstruction_loss(self(frames[:, :PAST]), frames, "bce_with_logits")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/video"), help="folder of the figure")
    parser.add_argument("--steps", type=int, default=1000, help="of training, at least 1")
    parser.add_argument("--films", type=int, default=500, help="held-out films, at least 3")
    parser.add_argument("--seed", type=int, default=0, help="of weights and films")
    arguments = parser.parse_args()
    # Ops of less than a millisecond: a second thread brings little, and costs much where its core is busy.
    torch.set_num_threads(1)

    dataset = load("digits")
    training, held_out = (dataset.samples[rows].reshape(-1, DIGIT, DIGIT) for rows in dataset.split(0.2))
    generator = torch.Generator().manual_seed(arguments.seed)
    frames = films(held_out, arguments.films, generator)
    past, future = frames[:, :PAST], frames[:, PAST:]
    mean = films(training, 1000, generator).mean((0, 1))

    torch.manual_seed(arguments.seed)
    model = Film(mean)
    step = CapturedStep(
        model,
        make_optimizer(model.parameters(), 2e-3),
        loss=Film.loss,
        clip_norm=1.0,
        schedule=Schedule("cosine", warmup_steps=min(20, arguments.steps - 1), total_steps=arguments.steps),
    )
    for _ in range(arguments.steps):
        step(films(training, BATCH, generator))
    with torch.no_grad():
        made = model(past).sigmoid()

    predictions = {
        "autoencoder": made[:, PAST:],
        "last frame": past[:, -1:].expand_as(future),
        "mean of past frames": past.mean(1, keepdim=True).expand_as(future),
        "mean of training": mean.expand_as(future),
    }
    for name, predicted in predictions.items():
        errors = (predicted - future).square().mean((0, 2))
        print(
            f"{name:20} error of predicted frames {errors.mean():.4f} · "
            f"of the first {errors[0]:.4f} · of the last {errors[-1]:.4f}"
        )
    error, plain = ((guess - past).square().mean() for guess in (made[:, :PAST], mean))
    print(f"error of reconstructed frames {error:.4f}, of the mean of training {plain:.4f}")

    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "video.png"
    draw(frames, made, path)
    print(f"figure: {path}")


def films(digits: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """(count, PAST + FUTURE, SIDE²): two of the digits (N, DIGIT, DIGIT) each, which bounce off the edges."""
    room = SIDE - DIGIT
    slow, fast = PACE
    start = torch.rand(count, 2, 1, 2, generator=generator) * 2 * room
    pace = slow + (fast - slow) * torch.rand(count, 2, 1, 2, generator=generator)
    time = torch.arange(PAST + FUTURE)[:, None]
    # A path folded at the edges; start's second half moves backwards.
    at = (room - ((start + pace * time) % (2 * room) - room).abs()).round().long()
    frames = torch.zeros(count, PAST + FUTURE, SIDE, SIDE)
    pixels = torch.arange(DIGIT)
    film, frame = torch.arange(count)[:, None, None, None], torch.arange(PAST + FUTURE)[:, None, None]
    for each in range(2):
        shown = digits[torch.randint(len(digits), (count,), generator=generator)][:, None]
        rows = (at[:, each, :, 0, None] + pixels)[..., :, None]
        columns = (at[:, each, :, 1, None] + pixels)[..., None, :]
        place = (film, frame, rows, columns)
        frames[place] = torch.maximum(frames[place], shown)
    return frames.flatten(2)


def draw(frames: Tensor, made: Tensor, path: Path) -> None:
    """A strip of each film above that of what the model makes of its first half."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    length = PAST + FUTURE
    # Low rows between the films keep them apart.
    figure, axes = pyplot.subplots(
        3 * SHOWN - 1,
        length,
        figsize=(0.86 * length, 2 * SHOWN),
        gridspec_kw={"wspace": 0.06, "hspace": 0.06, "height_ratios": ([1, 1, 0.12] * SHOWN)[:-1]},
    )
    for row, line in enumerate(axes):
        film, kind = divmod(row, 3)
        for column, axis in enumerate(line):
            axis.set_xticks([])
            axis.set_yticks([])
            if kind == 2:
                axis.set_axis_off()
                continue
            axis.imshow(
                (made if kind else frames)[film, column].reshape(SIDE, SIDE), cmap="gray", vmin=0, vmax=1
            )
            colour = "#2171b5" if column < PAST else "#d94801"
            for spine in axis.spines.values():
                spine.set(color=colour, linewidth=2 if kind else 0)
            if row == 0:
                axis.set_title(
                    f"{column - PAST + 1:+d}" if column >= PAST else f"{column - PAST + 1}", fontsize=9
                )
        if kind < 2:
            line[0].set_ylabel("model" if kind else "film", fontsize=9)
    figure.suptitle(
        "Films of unseen digits: the model reads frames up to 0, remembers them (blue), and predicts the next (orange)",
        fontsize=10,
        y=0.95,
    )
    figure.savefig(path, dpi=100, bbox_inches="tight")


if __name__ == "__main__":
    main()

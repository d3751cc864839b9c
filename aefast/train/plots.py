"""The pictures a run leaves behind. Matplotlib is optional and imported when one is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from aefast.models._files import named_errors

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_INK = "#333333"
_TRAIN = "#9ecae1"
_HELD_OUT = "#d94801"
_ORIGINAL = {"color": "#2171b5", "linewidth": 1.4}
_BETWEEN = {"color": "#bdbdbd", "linewidth": 0.9}
_RESULT = {"color": "#d94801", "linewidth": 1.1, "linestyle": "--"}
# Of the curves in a panel, by how many they are.
_LINES = {2: (_ORIGINAL, _RESULT), 3: (_ORIGINAL, _BETWEEN, _RESULT)}


def _figure(width: float, height: float) -> Figure:
    """An empty figure of that many inches, independent of any display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _as_image(sample: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor | None:
    """A flat sample as (H, W) or (H, W, 3) for plotting, or None if its shape is not that of an image."""
    if len(shape) == 2 and min(shape) > 1:
        return sample.reshape(shape)
    if len(shape) == 3 and shape[0] in (1, 3):
        return sample.reshape(shape).permute(1, 2, 0).squeeze(-1)
    if len(shape) == 3 and shape[2] in (1, 3):
        return sample.reshape(shape).squeeze(-1)
    return None


def plot_samples(
    shown: dict[str, torch.Tensor], sample_shape: tuple[int, ...], title: str, path: Path
) -> None:
    """Draw each original beside what a model makes of it: pictures for images, lines for other vectors.

    Args:
        shown: what to draw by name, the originals first: two or three tensors (n, features) on the CPU.
        sample_shape: shape of one sample before it was flattened.
        title: headline.
        path: PNG file to write.
    """
    if _as_image(next(iter(shown.values()))[0], sample_shape) is None:
        figure = _line_groups(shown)
    else:
        figure = _image_groups(shown, sample_shape)
    figure.suptitle(title, color=_INK, fontsize=11, parse_math=False)
    with named_errors(path):
        figure.savefig(path)


def _image_groups(shown: dict[str, torch.Tensor], sample_shape: tuple[int, ...]) -> Figure:
    """Rows of originals, each with the rows of what was made of them below it, as one mosaic."""
    originals = next(iter(shown.values()))
    low, high = originals.min().item(), originals.max().item()
    if low >= 0 and high <= 1:
        low, high = 0.0, 1.0
    # (names, n, H, W, 3) in [0, 1].
    tiles = torch.stack(
        [torch.stack([_as_image(sample, sample_shape) for sample in samples]) for samples in shown.values()]
    )
    tiles = ((tiles - low) / max(high - low, 1e-12)).clamp(0, 1)
    if tiles.dim() == 4:
        tiles = tiles.unsqueeze(-1).expand(*tiles.shape, 3)

    names = list(shown)
    _, count, height, width, _ = tiles.shape
    columns = min(10, count)
    rows = len(names) * -(-count // columns)
    gap = max(1, round(0.08 * max(height, width)))
    mosaic = torch.ones(rows * (height + gap) - gap, columns * (width + gap) - gap, 3)
    label_places = []
    for index in range(count):
        row, column = divmod(index, columns)
        for below, name in enumerate(names):
            top, left = (len(names) * row + below) * (height + gap), column * (width + gap)
            mosaic[top : top + height, left : left + width] = tiles[below, index]
            if column == 0:
                label_places.append((top + height / 2, name))

    scale = 10.0 / mosaic.shape[1]
    figure = _figure(11.0, min(max(1.2, scale * mosaic.shape[0]), 40.0) + 0.5)
    axis = figure.subplots()
    axis.imshow(mosaic.numpy())
    axis.set_yticks([place for place, _ in label_places], [label for _, label in label_places])
    axis.set_xticks([])
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0, labelsize=8, colors=_INK)
    return figure


def _line_groups(shown: dict[str, torch.Tensor]) -> Figure:
    """A panel a sample with the original and what was made of it over the feature number."""
    count = min(8, len(next(iter(shown.values()))))
    columns = min(2, count)
    rows = -(-count // columns)
    figure = _figure(5.0 * columns, 0.6 + 1.5 * rows)
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True)
    for index, axis in enumerate(axes.flat):
        if index >= count:
            axis.set_axis_off()
            continue
        for (name, samples), style in zip(shown.items(), _LINES[len(shown)], strict=True):
            axis.plot(samples[index].numpy(), label=name, **style)
        _plain(axis)
        if index == 0:
            axis.legend(frameon=False, fontsize=8, loc="best")
        if index >= count - columns:
            axis.set_xlabel("feature", fontsize=8, color=_INK)
    return figure


def plot_loss(records: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    """Draw training and validation loss over the steps.

    Args:
        records: lines of ``metrics.jsonl``.
        title: headline.
        path: PNG file to write.
    """
    figure = _figure(7.0, 4.0)
    axis = figure.subplots()
    steps = [record["step"] for record in records]
    losses = [record["loss"] for record in records]
    axis.plot(steps, losses, color=_TRAIN, linewidth=1.6, label="training")
    validated = [(record["step"], record["val_loss"]) for record in records if "val_loss" in record]
    if validated:
        axis.plot(
            *zip(*validated, strict=True),
            color=_HELD_OUT,
            linewidth=1.4,
            marker="o",
            markersize=3.5,
            label=f"held out (last {validated[-1][1]:.4g})",
        )
    if all(loss > 0 for loss in losses + [loss for _, loss in validated]):
        axis.set_yscale("log")
    axis.set_xlabel("step", color=_INK)
    axis.set_ylabel("loss", color=_INK)
    axis.set_title(title, color=_INK, fontsize=11, parse_math=False)
    axis.grid(True, which="both", color="#eeeeee")
    axis.legend(frameon=False)
    _plain(axis)
    with named_errors(path):
        figure.savefig(path)


def _plain(axis: Axes) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(which="both", labelsize=8, colors=_INK)

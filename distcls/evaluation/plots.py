"""The pictures of an evaluation and of a training run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from distcls.evaluation.metrics import HIGHER_IS_BETTER, Floats, Integers
from distcls.figures import BLUE, GREEN, GREY, ORANGE, RED, fonts, new_figure, save, shorten

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COUNTS_UP_TO = 20
"""With more classes than this a count no longer fits its cell."""

Row = dict[str, float]


def confusion(matrix: Integers, classes: Sequence[str], path: Path) -> None:
    """Draw a confusion matrix, int64 [K, K] with the true classes as rows, as a PNG.

    The colour is the share of the true class, so that rare classes are seen as well, on a scale
    of its square root, so that rare mistakes are.
    """
    number = len(classes)
    inch = 0.55 if number <= COUNTS_UP_TO else max(0.12, 11 / number)
    side = max(4.0, inch * number)
    longest = max(len(shorten(name, 24)) for name in classes)
    figure = new_figure(side + 1.6 + 0.08 * longest, side + 0.9 + 0.06 * longest)
    from matplotlib.colors import PowerNorm  # after new_figure, which tells if it is missing

    axes = figure.add_subplot()
    support = matrix.sum(axis=1, keepdims=True)
    parts = matrix / np.maximum(support, 1)
    image = axes.imshow(parts, cmap="Blues", norm=PowerNorm(0.5, 0, 1), interpolation="nearest")
    hits = int(np.trace(matrix))
    total = int(matrix.sum())
    axes.set_title(f"{hits:,} of {total:,} right: {hits / max(1, total):.2%}", fontsize=12)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    _name_ticks(axes, classes, size=10 if number <= COUNTS_UP_TO else max(4.0, inch * 55))
    if number <= COUNTS_UP_TO:
        _write_counts(axes, matrix, parts)
    bar = figure.colorbar(image, ax=axes, fraction=0.046, pad=0.02, shrink=0.85)
    bar.set_label("share of the true class")
    bar.ax.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    save(figure, path, dpi=130)


def _name_ticks(axes: Axes, classes: Sequence[str], size: float) -> None:
    names = [shorten(name, 24) for name in classes]
    places = range(len(names))
    turn = 90 if max(map(len, names)) > 2 else 0
    style: dict[str, Any] = {"fontsize": size, "fontfamily": fonts(), "parse_math": False}
    axes.set_xticks(places, names, rotation=turn, **style)
    axes.set_yticks(places, names, **style)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_color("#d0d5dd")


def _write_counts(axes: Axes, matrix: Integers, parts: Floats) -> None:
    for row, column in np.ndindex(*matrix.shape):
        count = int(matrix[row, column])
        if not count:
            continue  # empty cells stay empty, so that the mistakes stand out
        color = "white" if parts[row, column] > 0.35 else "#1f2937"
        text = f"{count:,}" if count < 100_000 else f"{count:.1e}"
        size = 9 if len(text) < 5 else 7
        axes.text(column, row, text, ha="center", va="center", color=color, fontsize=size)


def curves(history: Sequence[Row], path: Path, monitor: str = "top1") -> None:
    """Draw loss, accuracy and learning rate against epochs as a PNG.

    `history` has one row an epoch with `epoch`, and where known `train_loss`, `val_loss`,
    `train_top1`, `val_top1`, `val_macro_f1`, `val_exact`, `lr`; the best epoch by `monitor` is
    marked.
    """
    if not history:
        raise ValueError("no epochs to draw")
    figure = new_figure(13, 4)
    monitor = monitor.removeprefix("val_")
    left, middle, right = figure.subplots(1, 3)
    best = _best_row(history, monitor)
    _panel(left, history, "loss", {"train_loss": ("train", ORANGE), "val_loss": ("val", BLUE)})
    accuracies = {
        "train_top1": ("train top-1", ORANGE),
        "val_top1": ("val top-1", BLUE),
        "val_macro_f1": ("val macro F1", GREEN),
        "val_exact": ("val exact", RED),
    }
    _panel(middle, history, "accuracy", accuracies)
    middle.yaxis.set_major_formatter(lambda value, _: f"{value:.{_digits(middle)}%}")
    _panel(right, history, "learning rate", {"lr": ("learning rate", GREY)}, legend=False)
    right.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    if best is not None:
        _mark(figure.axes, history, best, monitor)
    save(figure, path)


def _panel(
    axes: Axes,
    history: Sequence[Row],
    title: str,
    series: dict[str, tuple[str, str]],
    legend: bool = True,
) -> None:
    for key, (label, color) in series.items():
        known = [(row["epoch"], row[key]) for row in history if _finite(row.get(key))]
        if known:
            marker = "o" if len(known) < 25 else ""
            epochs, values = zip(*known, strict=True)
            axes.plot(epochs, values, label=label, color=color, marker=marker, markersize=3.5)
    axes.set_title(title, fontsize=12)
    axes.set_xlabel("epoch")
    epochs_seen = [row["epoch"] for row in history]
    axes.set_xlim(min(epochs_seen) - 0.5, max(epochs_seen) + 0.5)
    axes.locator_params(axis="x", integer=True, min_n_ticks=1)
    axes.grid(color="#e5e7eb")
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if legend and axes.lines:
        axes.legend(frameon=False)


def _mark(panels: Sequence[Axes], history: Sequence[Row], best: Row, monitor: str) -> None:
    name = f"val_{monitor}"
    for axes in panels:
        axes.axvline(best["epoch"], color="#9ca3af", linestyle="--", linewidth=1, zorder=0)
    first = panels[0].figure
    value = best[name]
    shown = f"{value:.4f}" if monitor == "loss" else f"{value:.2%}"
    first.suptitle(
        f"best (dashed): epoch {best['epoch']:.0f} of {len(history)}, {name} {shown}",
        fontsize=11,
        color="#374151",
    )


def _best_row(history: Sequence[Row], monitor: str) -> Row | None:
    key = f"val_{monitor}"
    known = [row for row in history if _finite(row.get(key))]
    if not known:
        return None
    sign = 1 if HIGHER_IS_BETTER.get(monitor, True) else -1
    return max(known, key=lambda row: sign * row[key])


def _digits(axes: Axes) -> int:
    low, high = axes.get_ylim()
    return 0 if high - low > 0.08 else 1 if high - low > 0.008 else 2


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)

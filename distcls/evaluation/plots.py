"""The pictures of an evaluation: worst mistakes, confusions, reliability, ROC, thresholds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from distcls import log, plotting
from distcls.data.source import ImageSource
from distcls.errors import BadImage, UsageError
from distcls.evaluation.outputs import Outputs, blocks
from distcls.evaluation.scores import CALIBRATION_BINS, calibration_bins, class_columns
from distcls.evaluation.scores import per_class_areas as areas_of
from distcls.plotting import BLUE, GREEN, GREY, ORANGE, RED
from distcls.task import BLANK, BLANK_SHOWN

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D

MISTAKES, PAIRS, RELIABILITY, CURVES, THRESHOLDS = (
    *("mistakes.png", "confusions.png", "reliability.png", "roc.png", "thresholds.png"),
)
PICTURES = (MISTAKES, PAIRS, RELIABILITY, CURVES, THRESHOLDS)
WORST = 24
"""Mistakes that are shown."""
MOST_PAIRS = 15
MOST_CURVES = 10
"""Classes with a curve of their own: of more, those with the least area."""
COLORS = (RED, ORANGE, BLUE, GREEN, "#7c3aed", "#0891b2", "#be185d", "#4d7c0f", "#92400e", GREY)
POINTS = 400
"""Of a curve."""

Floats = NDArray[np.float64]


def draw(outputs: Outputs, source: ImageSource, folder: Path) -> None:
    """Draw all pictures that there is something for; says which are left out, and why."""
    pictures: dict[str, Callable[[Path], None]] = {
        MISTAKES: lambda path: mistakes(outputs, source, path),
        PAIRS: lambda path: pairs(outputs, path),
        RELIABILITY: lambda path: reliability(outputs, path),
        CURVES: lambda path: curves(outputs, path),
        THRESHOLDS: lambda path: thresholds(outputs, path),
    }
    for name in pictures:
        (folder / name).unlink(missing_ok=True)  # of an evaluation that is replaced
    if outputs.right.all():
        del pictures[MISTAKES], pictures[PAIRS]
        log.say(f"no {MISTAKES} and no {PAIRS}: every prediction is right")
    try:
        for name, picture in pictures.items():
            picture(folder / name)
    except UsageError as error:
        log.warn(f"{', '.join(pictures)} are left out: {error}")


def mistakes(outputs: Outputs, source: ImageSource, path: Path) -> None:
    """The wrong predictions with the greatest loss, and what the truth is said to be."""
    wrong = np.flatnonzero(~outputs.right)
    worst = wrong[np.argsort(-outputs.loss[wrong], kind="stable")][:WORST]
    shown = outputs.take(worst)
    said = outputs.task.texts(shown.decided.astype(np.int64))
    truth = outputs.task.texts(shown.labels)
    chances = shown.confidence(slice(None)).tolist()
    tiles = []
    for place, label, true, chance in zip(worst.tolist(), said, truth, chances, strict=True):
        try:
            image = source.image(place)
        except BadImage:  # it was read a moment ago
            continue
        name = plotting.shorten(label or "nothing", plotting.LETTERS - 5)
        text = f"{name} {chance:.0%}\nlabelled {true or 'nothing'}"
        tiles.append(plotting.Tile(image=image, text=text, name=str(outputs.image_ids[place])))
    which = "the worst of" if len(wrong) > WORST else "the"
    title = f"{which} {len(wrong):,} wrong predictions of {len(outputs):,}"
    plotting.draw_grid(tiles, path, title=title)


def pairs(outputs: Outputs, path: Path) -> None:
    """The most frequent confusions, with the number of each."""
    counted = Counter(_confused(outputs)).most_common(MOST_PAIRS)
    names = [" → ".join(_shortened(name.split(" → "))) for name, _ in counted]
    counts = [count for _, count in counted]
    figure = plotting.new_figure(8, 1.2 + 0.3 * len(counted))
    axes = figure.subplots()
    bars = axes.barh(range(len(counted)), counts, color=ORANGE)
    axes.bar_label(bars, [f"{count:,}" for count in counts], padding=3, fontsize=9)
    axes.set_yticks(range(len(counted)), names, fontfamily=plotting.fonts(), parse_math=False)
    axes.invert_yaxis()
    axes.locator_params(axis="x", integer=True)
    axes.set_xlabel("images")
    figure.suptitle("most frequent confusions: truth → prediction", fontsize=12)
    _plain(axes, grid="x")
    plotting.save(figure, path)


def _shortened(parts: list[str]) -> list[str]:
    """Truth and prediction, each so short that both are seen."""
    return [plotting.shorten(part, 60 // len(parts)) for part in parts]


def _confused(outputs: Outputs) -> list[str]:
    """The name of each wrong decision."""
    rows, columns = np.nonzero(~outputs.hits)
    if outputs.task.kind == "multi_label":
        kinds = np.where(outputs.labels[rows, columns] == 1, " missed", " found in vain")
        names = np.array(outputs.task.classes, object)[columns]
        return [name + kind for name, kind in zip(names, kinds.tolist(), strict=True)]
    heads = [head.classes for head in outputs.task.heads] or [outputs.task.classes]
    prefix = [f"{head.name}: " for head in outputs.task.heads] or [""]
    truth, said = outputs.labels[rows, columns], outputs.decided[rows, columns]
    found = zip(columns.tolist(), truth.tolist(), said.tolist(), strict=True)
    return [f"{prefix[c]}{_shown(heads[c][t])} → {_shown(heads[c][s])}" for c, t, s in found]


def reliability(outputs: Outputs, path: Path) -> None:
    """Accuracy against confidence, and how many predictions have which confidence."""
    bins = calibration_bins(outputs)
    labels = outputs.task.kind == "multi_label"
    edges = np.arange(CALIBRATION_BINS + 1) / CALIBRATION_BINS
    width, filled = 1 / CALIBRATION_BINS, bins.count > 0
    figure = plotting.new_figure(5.6, 6.4)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    upper.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1, label="calibrated")
    upper.bar(edges[:-1], bins.accuracy, width, align="edge", color=BLUE, edgecolor="white")
    upper.plot(
        *(bins.confidence[filled], bins.accuracy[filled]),
        **{"marker": "o", "markersize": 4, "color": ORANGE, "label": "mean of each bar"},
    )
    upper.set_ylabel("fraction that is of the label" if labels else "accuracy")
    upper.set_ylim(0, 1)
    calibrated = " (calibrated)" if outputs.task.temperatures is not None else ""
    error = f"expected calibration error {bins.error:.2%}{calibrated}"
    upper.set_title(error, fontsize=12)
    upper.legend(frameon=False, loc="upper left")
    lower.bar(edges[:-1], bins.count, width, align="edge", color=GREY, edgecolor="white")
    lower.set_ylabel("labels" if labels else "predictions")
    lower.set_xlabel("probability of the label" if labels else "probability of the prediction")
    lower.set_xlim(0, 1)
    for axes in (upper, lower):
        _plain(axes, grid="y")
    plotting.save(figure, path)


def curves(outputs: Outputs, path: Path) -> None:
    """ROC and precision-recall of classes against the rest."""
    areas, precisions = areas_of(outputs)
    ranked = np.argsort(np.where(np.isnan(areas), 2, areas), kind="stable")
    number = int((~np.isnan(areas)).sum())
    chosen = ranked[: min(number, MOST_CURVES)].tolist()
    colors = dict(zip(chosen, COLORS, strict=False))
    figure = plotting.new_figure(13, 5.6)
    roc, recall = figure.subplots(1, 2)
    roc.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1)
    lines = {}
    for column, scores, truth in class_columns(outputs):
        if column in colors:
            false, hits, precision = _curve(scores, truth)
            style: dict[str, Any] = {"color": colors[column], "linewidth": 1.4}
            lines[column] = (
                roc.plot(false, hits, **style)[0],
                recall.plot(hits, precision, **style)[0],
            )
    names = {c: plotting.shorten(_shown(outputs.task.classes[c]), 32) for c in chosen}
    for axes, side, values, corner in ((roc, 0, areas, "right"), (recall, 1, precisions, "left")):
        handles = [lines[column][side] for column in chosen]
        _legend(axes, handles, [f"{names[c]} {values[c]:.4f}" for c in chosen], corner)
    which = "" if number <= MOST_CURVES else f" (the {MOST_CURVES} least of {number:,})"
    mean = f"{np.nanmean(areas):.4f}" if number else "not defined"
    roc.set_title(f"ROC, one class against the rest{which}; mean area {mean}", fontsize=11)
    mean = f"{np.nanmean(precisions):.4f}" if number else "not defined"
    recall.set_title(f"precision and recall; mean average precision {mean}", fontsize=11)
    titles = (("false positive rate", "true positive rate"), ("recall", "precision"))
    for axes, (below, left) in zip((roc, recall), titles, strict=True):
        axes.set_xlabel(below)
        axes.set_ylabel(left)
        axes.set_xlim(-0.01, 1.01)
        axes.set_ylim(-0.01, 1.02)
        _plain(axes, grid="both")
    plotting.save(figure, path)


def _curve(scores: NDArray[np.float32], truth: NDArray[np.bool_]) -> tuple[Floats, Floats, Floats]:
    """False positive rate, recall and precision at some thresholds from high to low, [P] each."""
    order = np.argsort(-scores, kind="stable")
    hits, ranked = np.cumsum(truth[order]), scores[order]
    ends = np.flatnonzero(np.append(np.diff(ranked) != 0, True))
    if len(ends) > POINTS:
        ends = ends[np.unique(np.linspace(0, len(ends) - 1, POINTS).astype(int))]
    found, every = hits[ends], ends + 1
    false = (every - found) / (len(truth) - truth.sum())
    rate, precision = found / truth.sum(), found / every
    return (
        np.concatenate([[0.0], false]),
        np.concatenate([[0.0], rate]),
        np.concatenate([precision[:1], precision]),
    )


def thresholds(outputs: Outputs, path: Path) -> None:
    """What a minimum probability does: of answers, how many are left and how many are right; of
    labels precision, recall and F1."""
    grid = np.linspace(0, 1, 201)
    figure = plotting.new_figure(7, 4.4)
    axes = figure.subplots()
    if outputs.task.kind == "multi_label":
        for name, values, color in _label_curves(outputs, grid):
            axes.plot(grid, values, color=color, label=name)
        axes.set_xlabel("probability from which a label is predicted, the same for all")
        axes.set_title("thresholds, over all labels", fontsize=12)
    else:
        left, right = _answer_curves(outputs, grid)
        axes.plot(grid, left, color=BLUE, label="predictions that are left")
        axes.plot(grid, right, color=GREEN, label="of these, right")
        axes.set_xlabel("minimum probability (distcls predict --threshold)")
        axes.set_title("fewer predictions, more of them right", fontsize=12)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.legend(frameon=False, loc="lower left")
    _plain(axes, grid="both")
    plotting.save(figure, path)


def _answer_curves(outputs: Outputs, grid: Floats) -> tuple[Floats, Floats]:
    """Fraction of the images above each threshold, and of those that are right; [T] each."""
    counts = np.zeros((2, len(grid) + 1))
    for rows in blocks(len(outputs), outputs.probabilities.shape[1]):
        places = np.searchsorted(grid, outputs.weakest(rows), "right")
        counts[0] += np.bincount(places, minlength=len(grid) + 1)
        counts[1] += np.bincount(places[outputs.right[rows]], minlength=len(grid) + 1)
    above = np.cumsum(counts[:, ::-1], axis=1)[:, ::-1][:, 1:]
    right = np.where(above[0] > 0, above[1] / np.maximum(above[0], 1), np.nan)
    return above[0] / max(1, len(outputs)), right


def _label_curves(outputs: Outputs, grid: Floats) -> list[tuple[str, Floats, str]]:
    counts = np.zeros((2, len(grid) + 1))
    for rows in blocks(len(outputs), outputs.probabilities.shape[1]):
        places = np.searchsorted(grid, outputs.probabilities[rows].ravel(), "right")
        truth = outputs.labels[rows].ravel()
        for value in (0, 1):
            counts[value] += np.bincount(places[truth == value], minlength=len(grid) + 1)
    no, yes = np.cumsum(counts[:, ::-1], axis=1)[:, ::-1][:, 1:]
    support = counts[1].sum()
    precision = np.where(yes + no > 0, yes / np.maximum(yes + no, 1), np.nan)
    f1 = 2 * yes / np.maximum(1, support + yes + no)
    recall = yes / max(1.0, support)
    return [("precision", precision, BLUE), ("recall", recall, ORANGE), ("F1", f1, GREEN)]


def _legend(axes: Axes, lines: list[Line2D], names: list[str], corner: str) -> None:
    """Name lines in a lower corner; a name may begin with _ or hold a $."""
    stand_ins = [str(place) for place in range(len(lines))]
    where: Any = f"lower {corner}"
    legend = axes.legend(lines, stand_ins, frameon=False, loc=where, fontsize=8)
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set(text=name, fontfamily=plotting.fonts(), parse_math=False)


def _plain(axes: Axes, grid: str) -> None:
    axes.grid(axis=grid, color="#e5e7eb")  # type: ignore[arg-type]  # "x", "y" or "both"
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _shown(name: str) -> str:
    return BLANK_SHOWN if name == BLANK else name

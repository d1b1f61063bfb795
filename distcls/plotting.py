"""Every figure: image grids, confusion matrix, training curves, the profile of a prediction."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from distcls import __version__, log
from distcls.errors import UsageError, legible
from distcls.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, RED, GREY = "#1f5fa8", "#e07b00", "#2e7d32", "#c62828", "#6b7280"

_WIDE_FONTS = (
    "Noto Sans CJK JP",
    "Noto Sans CJK SC",
    "Source Han Sans",
    "WenQuanYi Zen Hei",
    "Hiragino Sans",
    "PingFang SC",
    "Microsoft YaHei",
    "Malgun Gothic",
    "Arial Unicode MS",
)
"""Fonts with the scripts that matplotlib's own DejaVu Sans lacks, if one is installed."""


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of `width` by `height` inches. Raises UsageError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError(
            'drawing needs matplotlib, which is not installed; pip install "distcls[plot]"'
        ) from error
    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def save(figure: Figure, path: Path, dpi: int = 120) -> None:
    """Write the figure as a PNG, or an SVG by the ending of `path`, atomically."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    if path.suffix == ".svg":
        _save_svg(figure, path)
        return
    with atomic_path(path) as part, _one_line_for_missing_letters():
        FigureCanvasAgg(figure)
        # a search for images recognises it by this, and leaves it out
        software = {"Software": f"distcls {__version__}"}
        figure.savefig(part, format="png", dpi=dpi, metadata=software)


MISSING = "Glyph .* missing from"


@contextlib.contextmanager
def _one_line_for_missing_letters() -> Iterator[None]:
    """A letter without a font is drawn as a box: say so once, not for each letter."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    others = [each for each in caught if not re.match(MISSING, str(each.message))]
    if len(others) < len(caught):
        _say_boxes()
    for each in others:
        warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)


@functools.cache
def _say_boxes() -> None:
    log.say(
        "pictures: no installed font has some letters of the names, they are drawn as boxes; "
        "Noto Sans CJK (package fonts-noto-cjk) has them"
    )


def _save_svg(figure: Figure, path: Path) -> None:
    """Without a background, its letters as text: it takes the colours and fonts of a page."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    figure.set_facecolor("none")
    for axes in figure.axes:
        axes.set_facecolor("none")
    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": path.stem}
    with atomic_path(path) as part, warnings.catch_warnings(), matplotlib.rc_context(settings):
        # the page draws the letters, with its own fonts
        warnings.filterwarnings("ignore", message=MISSING)
        FigureCanvasSVG(figure)
        figure.savefig(part, format="svg", metadata={"Date": None})


@functools.cache
def fonts() -> list[str]:
    """Font families to draw names with: DejaVu Sans, then the installed ones of wider coverage."""
    from matplotlib import font_manager

    installed = set(font_manager.fontManager.get_font_names())
    return ["DejaVu Sans", *(name for name in _WIDE_FONTS if name in installed)]


def grid_columns(number: int) -> int:
    """Columns of a grid a little wider than high, with few empty cells in its last row."""
    ideal = math.ceil(math.sqrt(1.6 * number))
    choices = range(min(number, max(1, ideal - 1)), min(number, ideal + 2) + 1)
    return min(choices, key=lambda columns: (-number % columns, abs(columns - ideal)))


_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
"""Controls, and what is no letter at all."""


def shorten(text: str, most: int) -> str:
    """A name that was read, in at most `most` letters on one line, the middle cut: long names often
    differ at their end. What is not to be seen and does harm is escaped."""
    line = " ".join(text.split())
    line = legible(_UNPRINTABLE.sub(lambda found: ascii(found[0])[1:-1], line))
    tail = (most - 1) // 2
    return line if len(line) <= most else f"{line[: most - 1 - tail]}…{line[-tail:]}"


WIDTH, GAP, LINE, TITLE = 1.7, 0.12, 0.15, 0.4
"""Inches: an image's width, the gap between two, a line of text, the title."""
TALLEST = 2.0
"""Images of more than this height to width are drawn smaller."""
BESIDE = "#f3f3f3"
"""Beside images whose shape is not that of the others."""
NARROWEST = 4.5
"""Inches that the title takes."""
LETTERS = 28
"""What fits on a line below an image."""
TITLE_LETTERS = 150
SMALL = 100
"""Images with fewer pixels per side are drawn pixel by pixel."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Tile:
    """One image of a grid."""

    image: NDArray[np.uint8]
    """RGB [h, w, 3]."""
    text: str
    """Below the image; its lines are cut where they do not fit."""
    name: str = ""
    """Below the text in small grey letters; of a long one the end is shown."""
    color: str | None = None
    """Colour of its frame: GREY, GREEN or (highlighted) RED; None: no frame."""

    @functools.cached_property
    def lines(self) -> list[str]:
        """The text in lines that fit; a sum that does not is broken after its plus signs."""
        lines = []
        for line in self.text.split("\n"):
            terms = line.split(" + ") if len(line) > LETTERS else [line]
            lines += [f"{term} +" for term in terms[:-1]] + terms[-1:]
        return [shorten(line, LETTERS) for line in lines]


def draw_grid(tiles: Sequence[Tile], path: Path, *, title: str = "") -> None:
    """Write one image or more, each with its text, as a PNG, atomically.

    Images of several shapes are drawn in the middle of fields of one size.

    Raises UsageError without matplotlib.
    """
    columns = grid_columns(len(tiles))
    rows = math.ceil(len(tiles) / columns)
    ratios = [tile.image.shape[0] / tile.image.shape[1] for tile in tiles]
    mixed = min(ratios) < max(ratios)
    tall = WIDTH * min(max(ratios), 1.0 if mixed else TALLEST)
    most = max(len(tile.lines) + bool(tile.name) for tile in tiles)
    pitch = tall + LINE * most + 2 * GAP
    wide = columns * (WIDTH + GAP) - GAP
    above = TITLE if title else GAP
    width, height = max(NARROWEST, wide + 2 * GAP), rows * pitch + above
    figure = new_figure(width, height)
    from matplotlib.patches import Rectangle  # after new_figure, which raises if it is missing

    # positions are computed here: a layout engine would take a second for each dozen of images
    figure.set_layout_engine("none")
    plain: dict[str, Any] = {"parse_math": False, "ha": "center", "va": "center"}
    figure.text(0.5, 1 - TITLE / 2 / height, shorten(title, TITLE_LETTERS), fontsize=11, **plain)
    for index, tile in enumerate(tiles):
        row, column = divmod(index, columns)
        left = (width - wide) / 2 + column * (WIDTH + GAP)
        bottom = height - above - row * pitch - tall
        place = left / width, bottom / height, WIDTH / width, tall / height
        if mixed:
            figure.add_artist(Rectangle(place[:2], *place[2:], color=BESIDE, zorder=-1))
        axes = figure.add_axes(place)
        _draw_image(axes, tile)
        center = (left + WIDTH / 2) / width
        _draw_text(figure, tile, center, bottom - 0.05, height)
    save(figure, path)


def _draw_image(axes: Axes, tile: Tile) -> None:
    smooth = "nearest" if max(tile.image.shape[:2]) < SMALL else "antialiased"
    axes.imshow(tile.image, interpolation=smooth)
    if tile.color is None:
        axes.axis("off")
        return
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set(color=tile.color, linewidth=3 if tile.color == RED else 1.5)


def _draw_text(figure: Figure, tile: Tile, center: float, top: float, height: float) -> None:
    """`center` is a fraction of the figure's width; `top`, `height` (the figure's): inches."""
    style: dict[str, Any] = {"fontfamily": fonts(), "parse_math": False, "ha": "center"}
    color = RED if tile.color == RED else "#111827"
    text = "\n".join(tile.lines)
    figure.text(center, top / height, text, va="top", fontsize=8, color=color, **style)
    if tile.name:
        end = tile.name if len(tile.name) <= LETTERS else "…" + tile.name[1 - LETTERS :]
        below = (top - LINE * len(tile.lines)) / height
        name = shorten(end, LETTERS)
        figure.text(center, below, name, va="top", fontsize=7, color=GREY, **style)


_SPOKEN = {f"top{k}": f"top-{k}" for k in (1, 2, 3, 5, 10)}
_SPOKEN |= {name: name.upper() for name in ("f1", "auroc", "mcc", "ece")} | {"brier": "Brier score"}


def metric_title(name: str) -> str:
    """A metric in words for people, such as top-1 for `top1` and macro F1 for `macro_f1`."""
    return " ".join(_SPOKEN.get(word, word) for word in name.split("_"))


COUNTS_UP_TO = 20
"""With more classes than this a count no longer fits its cell."""

Row = dict[str, float]
Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


def confusion(matrix: Integers, classes: Sequence[str], path: Path) -> None:
    """Draw a confusion matrix, int64 [K, K] with the true classes as rows, as a PNG.

    The colour is the fraction of the true class, so that rare classes are seen as well, on a scale
    of its square root, so that rare mistakes are.
    """
    number = len(classes)
    inch = 0.55 if number <= COUNTS_UP_TO else max(0.12, 11 / number)
    side = max(4.0, inch * number)
    longest = max(len(shorten(name, 24)) for name in classes)
    figure = new_figure(side + 1.6 + 0.08 * longest, side + 0.9 + 0.06 * longest)
    from matplotlib.colors import PowerNorm  # after new_figure, which raises if it is missing

    axes = figure.add_subplot()
    support = matrix.sum(axis=1, keepdims=True)
    fractions = matrix / np.maximum(support, 1)
    image = axes.imshow(fractions, cmap="Blues", norm=PowerNorm(0.5, 0, 1), interpolation="nearest")
    hits = int(np.trace(matrix))
    total = int(matrix.sum())
    axes.set_title(f"{hits:,} of {total:,} right: {hits / max(1, total):.2%}", fontsize=12)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    _name_ticks(axes, classes, size=10 if number <= COUNTS_UP_TO else max(4.0, inch * 55))
    if number <= COUNTS_UP_TO:
        _write_counts(axes, matrix, fractions)
    bar = figure.colorbar(image, ax=axes, fraction=0.046, pad=0.02, shrink=0.85)
    bar.set_label("fraction of the true class")
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


def _write_counts(axes: Axes, matrix: Integers, fractions: Floats) -> None:
    for row, column in np.ndindex(*matrix.shape):
        count = int(matrix[row, column])
        if not count:
            continue  # empty cells stay empty, so that the mistakes stand out
        color = "white" if fractions[row, column] > 0.35 else "#1f2937"
        text = f"{count:,}" if count < 100_000 else f"{count:.1e}"
        size = 9 if len(text) < 5 else 7
        axes.text(column, row, text, ha="center", va="center", color=color, fontsize=size)


def curves(history: Sequence[Row], path: Path, monitor: str = "top1", best_epoch: int = 0) -> None:
    """Draw loss, top-1 and the like, and learning rate against epochs as a PNG.

    `history` has one row per epoch with `epoch`, and where known `train_loss`, `val_loss`,
    `train_top1`, `val_top1`, `val_macro_f1`, `val_exact`, `lr`; `best_epoch`, the best
    by `monitor`, is marked if it is one of them and has a finite value.
    """
    if not history:
        raise ValueError("no epochs to draw")
    figure = new_figure(13, 4)
    monitor = monitor.removeprefix("val_")
    left, middle, right = figure.subplots(1, 3)
    marked = (row for row in history if row["epoch"] == best_epoch)
    best = next((row for row in marked if _finite(row.get(f"val_{monitor}"))), None)
    _panel(left, history, "loss", {"train_loss": ("train", ORANGE), "val_loss": ("val", BLUE)})
    colors = {"train_top1": ORANGE, "val_top1": BLUE, "val_macro_f1": GREEN, "val_exact": RED}
    scores = {name: (metric_title(name), color) for name, color in colors.items()}
    _panel(middle, history, "scores", scores)
    middle.yaxis.set_major_formatter(lambda value, _: f"{value:.{digits(middle)}%}")
    _panel(right, history, "learning rate", {"lr": ("learning rate", GREY)}, legend=False)
    right.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    if best is not None:
        _mark(figure.axes, history, best, monitor)
    save(figure, path)


def compared_curves(histories: Mapping[str, Sequence[Row]], path: Path) -> None:
    """Draw validation loss and top-1 of several runs, by name, against epochs."""
    figure = new_figure(10, 4)
    colors = (BLUE, ORANGE, GREEN, RED, "#7c3aed", "#0891b2", "#be185d", GREY)
    series = {name: (name, color) for name, color in zip(histories, colors, strict=False)}
    panels = {"val_loss": "validation loss", "val_top1": "validation top-1"}
    for axes, (key, title) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        rows = [
            {"epoch": row["epoch"], name: row[key]}
            for name, history in histories.items()
            for row in history
            if key in row
        ]
        if rows:
            _panel(axes, rows, title, series)
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
        f"best (dashed): epoch {best['epoch']:.0f} of {len(history)}, {metric_title(name)} {shown}",
        fontsize=11,
        color="#374151",
    )


def digits(axes: Axes) -> int:
    """Decimals of percents on the axis of scores."""
    low, high = axes.get_ylim()
    return 0 if high - low > 0.08 else 1 if high - low > 0.008 else 2


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def draw_rates(
    rates: Floats, losses: Floats, smoothed: Floats, marks: Mapping[str, float], path: Path
) -> None:
    """Draw the loss of a learning-rate range test against the learning rate, as a PNG.

    `rates`, `losses` and `smoothed` are float64 [steps]; `marks` has learning rates by what they
    are, the first of which is the suggestion. Raises UsageError without matplotlib.
    """
    figure = new_figure(8, 4.5)
    axes = figure.subplots()
    axes.plot(rates, losses, color=GREY, alpha=0.45, linewidth=1, label="loss of each step")
    axes.plot(rates, smoothed, color=BLUE, linewidth=2, label="smoothed")
    for (words, rate), color in zip(marks.items(), (GREEN, ORANGE, RED), strict=False):
        dashed = "-" if color == GREEN else "--"
        axes.axvline(rate, color=color, linestyle=dashed, label=f"{words}: {rate:.2g}")
    axes.set_xscale("log")
    low, high = float(losses.min()), float(smoothed[0])
    # the loss beyond the divergence would flatten the rest
    axes.set_ylim(low - 0.1 * (high - low), high + 0.4 * (high - low))
    axes.set_xlabel("learning rate")
    axes.set_ylabel("training loss")
    axes.grid(color="#e5e7eb")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    save(figure, path)


PHASES = {"decode": BLUE, "infer": ORANGE, "write": GREEN, "wait": GREY}
"""Colours of the phases of a prediction."""


def draw_profile(profile: Mapping[str, float], path: Path, *, title: str) -> None:
    """Draw a bar for the working threads and one for the thread that writes, as a PNG.

    `profile` is `Profiler.to_json()`: images, threads, seconds, and the seconds of each phase.
    Raises UsageError without matplotlib.
    """
    seconds = max(profile["seconds"], 1e-9)
    threads, images = int(profile["threads"]), int(profile["images"])
    working = {phase: profile[phase] for phase in ("decode", "infer", "wait")}
    writing = {"write": profile["write"], "wait": max(0.0, seconds - profile["write"])}
    figure = new_figure(8, 2.8)
    axes = figure.subplots()
    _draw_phases(axes, 0, working, threads * seconds)
    _draw_phases(axes, 1, writing, seconds)
    axes.set_yticks([0, 1], [f"{threads} working thread" + "s" * (threads != 1), "writing thread"])
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    rate = f"{images:,} images, {images / seconds:,.0f} images/s"
    axes.set_xlabel(f"percent of {seconds:.2f} s, {rate}")
    axes.set_title(shorten(title, TITLE_LETTERS), fontfamily=fonts(), size=10, parse_math=False)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    save(figure, path)


def _draw_phases(axes: Axes, row: int, phases: Mapping[str, float], total: float) -> None:
    """A stacked bar of seconds as percents of `total`."""
    left = 0.0
    for name, seconds in phases.items():
        percent = 100 * seconds / total if total else 0.0
        axes.barh(row, percent, left=left, color=PHASES[name], edgecolor="white")
        if percent >= 6:
            label = f"{name}\n{percent:.0f} %, {seconds:.2f} s"
            center = left + percent / 2
            axes.text(center, row, label, ha="center", va="center", color="white", size=8)
        left += percent

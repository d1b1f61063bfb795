"""The pictures are drawn, show what they should, and need matplotlib only when drawn."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from distcls import plotting

ROWS = [
    {
        "epoch": float(epoch),
        "train_loss": 2.0 / epoch,
        "val_loss": 2.2 / epoch,
        "val_top1": 1 - 0.5 / epoch,
        "lr": 1e-3 / epoch,
    }
    for epoch in range(1, 13)
]


def pixels(path: Path) -> NDArray[np.uint8]:
    image = cv2.imread(str(path), cv2.IMREAD_COLOR_RGB)
    assert image is not None
    return np.asarray(image, np.uint8)


def near(image: NDArray[np.uint8], colour: str) -> int:
    """How many pixels have a colour given as #rrggbb."""
    wanted = np.array([int(colour[at : at + 2], 16) for at in (1, 3, 5)])
    return int((np.abs(image.astype(int) - wanted).max(axis=-1) < 12).sum())


@pytest.mark.parametrize("number", [1, 2, 10, 21, 100])
def test_confusion_matrix_of_any_size(tmp_path: Path, number: int) -> None:
    rng = np.random.default_rng(0)
    matrix = np.diag(rng.integers(10, 90, number)) + rng.integers(0, 3, (number, number))
    names = [f"$class {index}$ й" for index in range(number)]
    plotting.confusion(matrix, names, tmp_path / "confusion.png")
    image = pixels(tmp_path / "confusion.png")
    assert 400 < image.shape[0] < 2500
    assert image.std() > 5
    assert [path.name for path in tmp_path.iterdir()] == ["confusion.png"]


def test_confusion_shows_a_class_without_samples_and_names_without_glyphs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    matrix = np.array([[5, 0], [0, 0]])
    plotting._say_boxes.cache_clear()
    for _ in range(2):
        plotting.confusion(matrix, ["猫", "𓀀"], tmp_path / "c.png")
    assert capsys.readouterr().err.count("drawn as boxes") == 1
    assert pixels(tmp_path / "c.png").std() > 5


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("short", "short"),
        ("a" * 20 + "1", "aaaa…aa1"),
        ("\u202egpj.exe", "\\u20…exe"),
        ("a\tb\nc", "a b c"),
        ("\x1b[1m", "\\x1b[1m"),
        ("قطة", "قطة"),
        ("می\u200cشوی", "می\u200cشوی"),  # a letter of Persian words, not a mark of direction
    ],
)
def test_names_are_short_and_harmless(name: str, shown: str) -> None:
    assert plotting.shorten(name, 8) == shown


def test_names_with_dollars_are_no_formulas(tmp_path: Path) -> None:
    tile = plotting.Tile(image=np.zeros((9, 9, 3), np.uint8), text="$x^", name="\u202e" * 300)
    plotting.draw_grid([tile], tmp_path / "grid.png", title="$\\frac{" + "x" * 500)
    plotting.confusion(np.eye(2, dtype=int), ["$x^", "\u202e" * 300], tmp_path / "confusion.png")
    shapes = [pixels(tmp_path / f"{name}.png").shape for name in ("grid", "confusion")]
    assert max(max(shape) for shape in shapes) < 1500


def test_curves_show_both_losses_and_the_best_epoch(tmp_path: Path) -> None:
    plotting.curves(ROWS, tmp_path / "curves.png", "top1")
    image = pixels(tmp_path / "curves.png")
    assert near(image, plotting.ORANGE) > 100
    assert near(image, plotting.BLUE) > 200
    without = [{k: v for k, v in row.items() if k != "train_loss"} for row in ROWS]
    plotting.curves(without, tmp_path / "less.png", "val_top1")
    assert near(pixels(tmp_path / "less.png"), plotting.ORANGE) == 0


@pytest.mark.parametrize("monitor", ["loss", "top1", "macro_f1"])
def test_curves_take_one_epoch_gaps_and_unknown_monitors(tmp_path: Path, monitor: str) -> None:
    plotting.curves([ROWS[0]], tmp_path / "one.png", monitor)
    gaps = [dict(row) for row in ROWS]
    gaps[3]["val_loss"] = float("nan")
    del gaps[5]["val_top1"]
    plotting.curves(gaps, tmp_path / "gaps.png", monitor)
    assert (tmp_path / "one.png").exists()
    assert (tmp_path / "gaps.png").exists()


def test_the_best_epoch_is_the_one_that_the_run_has_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"epoch": float(n), "val_loss": 1 / n, "val_top1": 0.75} for n in range(1, 7)]
    marked: list[float] = []
    monkeypatch.setattr(
        plotting, "_mark", lambda axes, history, best, _: marked.append(best["epoch"])
    )
    plotting.curves(rows, tmp_path / "curves.png", "top1", 6)
    plotting.curves(rows, tmp_path / "curves.png", "top1", 9)
    plotting.curves([{**rows[0], "val_top1": math.nan}], tmp_path / "curves.png", "top1", 1)
    assert marked == [6]


def test_missing_matplotlib_names_the_extra() -> None:
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from distcls.errors import UsageError\n"
        "from distcls import plotting\n"
        "import numpy as np, pathlib\n"
        "for draw in (lambda p: plotting.curves([{'epoch': 1.0}], p),\n"
        "             lambda p: plotting.confusion(np.eye(2, dtype=int), ['a', 'b'], p)):\n"
        "    try: draw(pathlib.Path('never.png'))\n"
        "    except UsageError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.count('pip install "distcls[plot]"') == 2


def test_inference_loads_neither_torch_nor_matplotlib() -> None:
    modules = [
        *(
            f"distcls.{folder}.{path.stem}"
            for folder in ("runtime", "batch", "evaluation")
            for path in Path("distcls", folder).glob("*.py")
        ),
        "distcls.commands.predict",
        "distcls.evaluate",
        "distcls.predictor",
    ]
    names = [name.removesuffix(".__init__") for name in modules]
    code = (
        "import importlib, sys\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
        "print([m for m in ('torch', 'matplotlib', 'sklearn', 'onnx') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert len(names) > 12
    assert done.stdout.strip() == "[]"


def test_images_of_several_shapes_have_fields_of_one_size(tmp_path: Path) -> None:
    tiles = [
        plotting.Tile(image=np.full((*shape, 3), 9, np.uint8), text="a")
        for shape in ((90, 30), (30, 90), (60, 60))
    ]
    plotting.draw_grid(tiles, tmp_path / "grid.png")
    drawn = np.asarray(cv2.imread(str(tmp_path / "grid.png"), cv2.IMREAD_GRAYSCALE))
    assert len(drawn) < 2.5 * 120  # inches, dots an inch
    pixels = {name: int((drawn == value).sum()) for name, value in (("image", 9), ("field", 243))}
    field = (1.7 * 120) ** 2
    assert pixels["image"] == pytest.approx(field * (1 / 3 + 1 / 3 + 1), rel=0.05)
    assert pixels["field"] == pytest.approx(field * (2 / 3 + 2 / 3), rel=0.05)

"""distcls show, from its arguments to the picture."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from distcls.cli import dispatch
from distcls.commands.show import main
from distcls.errors import UsageError
from distcls.plotting import LINE, TITLE, Tile, draw_grid
from tests.e2e.commands import run

RECIPE = """
data: elsewhere
out: runs/of-this-recipe
batch_size: 16
epochs: 3
augment: {mixup: 0.4, cutmix: 1.0, crop_padding: 2}
"""


def read(path: Path) -> NDArray[np.uint8]:
    image = cv2.imread(str(path), cv2.IMREAD_COLOR_RGB)
    assert image is not None
    return np.asarray(image, np.uint8)


def test_a_picture_and_nothing_else(digits: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)
    out = tmp_path / "looks" / "first.png"
    flags = ["--config", recipe, "--out", out, "--epoch", "3", "--count", "20", "--json"]
    done = run("show", digits, *flags)
    result = json.loads(done.stdout)
    assert result == {"out": str(out), "images": 20, "steps": 2}
    assert done.stderr == f"epoch 3, steps 1 to 2: 20 images of 28x28; wrote {out}\n"
    assert sorted(path.name for path in tmp_path.rglob("*")) == [
        *("first.png", "looks", "recipe.yaml"),
    ]
    image = read(out)
    assert 500 < image.shape[1] < 2000
    assert image.std() > 20
    with pytest.raises(UsageError, match=r"first\.png exists already; .* add --overwrite"):
        main([str(digits), "--out", str(out)])
    main([str(digits), "--out", str(out), "--overwrite", "--count", "1", "--quiet"])
    assert read(out).shape != image.shape


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--epoch", "0"], "epoch: 0 is not valid, expected at least 1"),
        (["--epoch", "11", "--epochs", "10"], "epoch: 11 is not valid, expected 1 to 10"),
        (["--count", "0"], "count: 0 is not valid, expected 1 to 400"),
        (
            ["--out", "show.jpg"],
            r"out: 'show.jpg' is not valid, expected a name that ends in \.png",
        ),
        (["--augment.mixupp", "1"], r"--augment\.mixupp.*did you mean '--augment\.mixup'"),
        (["--augment.flip", "2"], r"augment\.flip: 2\.0 is not valid, expected a probability"),
        (["--model.name", "mobilenet_v3_smal"], "did you mean 'mobilenet_v3_small'"),
    ],
)
def test_bad_input_is_one_line(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=message) as caught:
        dispatch(["show", str(digits), *flags])
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_bad_places(digits: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="DATA; see distcls show --help"):
        main([])
    with pytest.raises(UsageError, match="none: no such file or folder"):
        main([str(tmp_path / "none"), "--out", str(tmp_path / "a.png")])
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(UsageError, match=r"folder\.png is a folder, expected the name of a file"):
        main([str(digits), "--out", str(tmp_path / "folder.png")])
    recipe = tmp_path / "wrong.yaml"
    recipe.write_text("augment: {mixup: 0.2}\nlearning_rate: 1\n")
    with pytest.raises(UsageError, match=r"wrong\.yaml: unknown key 'learning_rate'"):
        main([str(digits), "--config", str(recipe), "--out", str(tmp_path / "a.png")])


def tiles(images: NDArray[np.uint8], texts: list[str]) -> list[Tile]:
    return [Tile(image=image, text=text) for image, text in zip(images, texts, strict=True)]


@pytest.mark.parametrize("number", [1, 2, 7, 32])
def test_every_image_is_in_the_picture(tmp_path: Path, number: int) -> None:
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 256, (number, 3), dtype=np.uint8)
    images = np.broadcast_to(colours[:, None, None], (number, 8, 12, 3))
    texts = ["$a$ + b" * (place % 9) + "\nweight 2" for place in range(number)]
    draw_grid(tiles(images, texts), tmp_path / "grid.png", title="猫")
    found = read(tmp_path / "grid.png")
    for colour in colours.astype(int):
        seen = np.abs(found.astype(int) - colour).max(axis=-1) <= 1
        assert seen.sum() > 1000


def test_text_gets_the_room_it_needs(tmp_path: Path) -> None:
    images = np.zeros((3, 8, 8, 3), np.uint8)
    heights = []
    for text in ("cat", "cat\nweight 2"):
        draw_grid(tiles(images, [text, "dog", "dog"]), tmp_path / "grid.png")
        heights.append(read(tmp_path / "grid.png").shape[0] / 120)
    assert heights[0] > TITLE
    assert heights[1] - heights[0] == pytest.approx(LINE * 1, abs=0.02)

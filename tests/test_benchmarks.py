"""What the benchmarks compute beside running: gains, divided sources, the line at the end."""

from __future__ import annotations

import json
import math
import os
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from benchmarks import common, crops, freezing, open_loop, predict, scores, serve
from distcls.cli import run
from distcls.data.formats.idx import read_idx
from distcls.data.prepare import PrepareOptions, prepare
from distcls.errors import UsageError
from distcls.imaging import decode_file
from tests.sources import idx_folder


def test_gains_are_taken_seed_by_seed() -> None:
    found = {"alone": [0.80, 0.90, 0.85], "taught": [0.82, 0.91, 0.88]}
    assert scores.differences(found, "taught", "alone") == pytest.approx([0.02, 0.01, 0.03])
    assert scores.gain(found, "taught", "alone") == pytest.approx((0.02, 0.01))
    heads, alone, taught = scores.table(found, "alone").splitlines()
    assert heads.split() == ["test", "top-1", "mean", "spread", "min", "max", "gain", "spread"]
    assert [float(x) for x in alone.split()[1:]] == [0.85, 0.05, 0.80, 0.90, 0, 0]
    # statistics.stdev of 0.82, 0.91, 0.88 is 0.0458
    assert [float(x) for x in taught.split()[1:]] == [0.87, 0.0458, 0.82, 0.91, 0.02, 0.01]
    assert scores.spread([0.5]) == 0


def test_two_sources_of_different_images_and_classes(tmp_path: Path) -> None:
    source = idx_folder(tmp_path / "idx", count=200, test=40)
    first, second = freezing.split_source(source, tmp_path / "parts", images=60, seed=0)
    read = {
        (folder.name, role): read_idx(folder / f"{role}-ubyte", 3 if "images" in role else 1).values
        for folder in (first, second)
        for role in ("train-images-idx3", "train-labels-idx1", "t10k-labels-idx1")
    }
    assert set(read["first", "train-labels-idx1"].tolist()) == set(range(8))
    assert set(read["first", "t10k-labels-idx1"].tolist()) <= set(range(8))
    assert len(read["second", "train-labels-idx1"]) == 60
    assert len(read["second", "t10k-labels-idx1"]) == 40
    whole = read_idx(source / "train-images-idx3-ubyte.gz", 3).values
    halves = {image.tobytes() for image in whole[:100]}, {image.tobytes() for image in whole[100:]}
    assert {image.tobytes() for image in read["first", "train-images-idx3"]} <= halves[0]
    assert {image.tobytes() for image in read["second", "train-images-idx3"]} <= halves[1]
    options = PrepareOptions(source=str(first), out=tmp_path / "data", format="idx", quiet=True)
    assert prepare(options).classes == list("01234567")
    assert np.bincount(read["first", "train-labels-idx1"]).min() > 0


def test_the_line_at_the_end_goes_into_a_file_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common.finish("trial", out=tmp_path / "results" / "trial.json", gain=0.5)
    printed = capsys.readouterr().out
    assert (tmp_path / "results" / "trial.json").read_text() == printed
    line = json.loads(printed)
    assert (line["benchmark"], line["gain"]) == ("trial", 0.5)
    assert line["machine"]["cores"] >= 1


def test_the_finest_part_of_a_picture(tmp_path: Path) -> None:
    picture = np.full((256, 320), 99, np.uint8)
    noise = np.random.default_rng(0).integers(0, 256, (128, 128), dtype=np.uint8)
    picture[96:224, 160:288] = noise
    amount, found = crops.finest(picture, 128)
    assert np.array_equal(found, noise)
    assert amount > 100
    assert crops.finest(np.full((128, 128), 7, np.uint8), 128)[0] == 0


def test_textures_are_divided_by_place(tmp_path: Path) -> None:
    """Training images from the left half, the others from the quarters on the right."""
    picture = np.full((512, 512), 40, np.uint8)
    picture[::2, :256], picture[::8, 256:] = 250, 250
    crops.write_textures(tmp_path, {"stripes": picture}, images=3)
    counts = {
        split: len(list((tmp_path / split / "stripes").iterdir()))
        for split in ("train", "val", "test")
    }
    assert counts == {"train": 3, "val": crops.HELD_OUT, "test": 2 * crops.HELD_OUT}
    for split, period in (("train", 2), ("val", 8), ("test", 8)):
        image = decode_file(tmp_path / split / "stripes" / "000.jpg")
        assert image.shape == (crops.PHOTO, crops.PHOTO, 3)
        assert abs(image.mean() - 128) < 8
        strength = np.abs(np.fft.rfft(image[:, 200, 0] - image[:, 200, 0].mean()))
        assert strength.argmax() % (crops.PHOTO / period) < 2


def works() -> common.Contestant:
    """A contestant that runs here."""
    return lambda: 7.0


def refuses() -> common.Contestant:
    """As an execution provider without its hardware does, when the first round opens it."""

    def run() -> float:
        raise UsageError("provider: cuda finds no GPU")

    return run


def dies() -> common.Contestant:
    """As a library that ends its process."""
    return lambda: os._exit(3)


@pytest.mark.slow
def test_who_does_not_start_is_left_out_and_progress_is_said(
    capsys: pytest.CaptureFixture[str],
) -> None:
    makers = {"good": works, "cuda": refuses, "native": dies}
    with ExitStack() as stack:
        entered = {n: stack.enter_context(common.Apart(made)) for n, made in makers.items()}
        assert common.alternate(entered, 2) == {"good": [7.0, 7.0]}
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "good: warming up",
        "cuda: warming up",
        "warning: cuda does not start and is left out: provider: cuda finds no GPU",
        "native: warming up",
        "warning: native does not start and is left out: its process ended with code 3",
        "good: round 1 of 2, 7.0 a second",
        "good: round 2 of 2, 7.0 a second",
    ]


def test_the_load_that_a_server_sustains() -> None:
    """Between the last level within the limit and the next, by the logarithm of the p99."""
    assert serve.sustained({100: 20, 200: 50, 300: 200, 400: 900}, 100) == pytest.approx(250)
    assert serve.sustained({100: 500, 200: 50, 300: 200}, 100) == pytest.approx(250)
    assert serve.sustained({100: 20, 200: math.inf}, 100) == pytest.approx(123.3, abs=0.1)
    assert serve.sustained({100: 20, 200: 100}, 100) == 200
    assert serve.sustained({100: 101, 200: math.inf}, 100) == 0
    assert serve.sustained({}, 100) == 0


def outcome(*latencies: float, refused: int = 0) -> open_loop.Outcome:
    return open_loop.Outcome(
        offered=9, seconds=1, latencies=list(latencies), refused=[0.1] * refused, failed=0
    )


def test_a_level_that_most_rounds_left_out_counts_as_not_served() -> None:
    figures = serve.Figures(ready=1, idle=1)
    figures.levels = {8: [outcome(0.1), outcome(0.3), outcome(0.2)], 9: [outcome(0.1)]}
    assert figures.p99(3) == pytest.approx({8: 200, 9: math.inf})
    assert outcome(*[0.1] * 98, refused=2).percentile(50) == math.inf
    assert outcome(*[0.1] * 99, refused=1).percentile(50) == pytest.approx(100)
    assert figures.peak == 1


def test_predict_ends_in_a_line_for_a_mistake(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run(predict.main, ["--pictures", str(tmp_path)])
    assert ended.value.code == 2
    first, last = capsys.readouterr().err.splitlines()
    assert first.startswith("looking for pictures")
    assert last.startswith(f"error: {tmp_path}: no pictures of at least 1000 pixels a side")

"""`distcls cv`: disjoint folds, runs that resume, predictions out of fold, the interval."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import distcls
from distcls.cli import dispatch
from distcls.data.dataset import Dataset
from distcls.data.split import Resampling, resample
from distcls.errors import BadValue, Stopped, UsageError
from distcls.models.checkpoint import load_tensors
from distcls.training.config import TrainConfig
from distcls.training.cross_validation import CvResult, _records, cross_validate, interval_of
from tests import tiny_dataset

FLAGS = ("--model", "simple_cnn", "--limit", "150", "--batch-size", "25", "--epochs", "2")


def config(data: Path, out: Path, **changes: Any) -> TrainConfig:
    options: dict[str, Any] = {"model": "simple_cnn", "limit": 150, "batch_size": 25, "epochs": 2}
    return TrainConfig(data=data, out=out, **{**options, **changes})


@pytest.fixture(scope="module")
def done(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> CvResult:
    return cross_validate(config(digits, tmp_path_factory.mktemp("cv") / "cv"), 3)


def test_each_image_is_validated_once(done: CvResult, digits: Path) -> None:
    dataset = Dataset.open(digits)
    expected = {*dataset.split("train").image_ids, *dataset.split("val").image_ids}
    seen: list[str] = []
    for fold in (1, 2, 3):
        own = Dataset.open(done.out / f"fold-{fold}")
        train, val = own.split("train"), own.split("val")
        assert {*train.image_ids} == expected - {*val.image_ids}
        assert own.split("test").image_ids == dataset.split("test").image_ids
        seen += val.image_ids
        counts = np.bincount(val.labels)
        assert counts.max() - counts.min() <= 15  # stratified, as the digits are uneven
        # its pack is the dataset's own, not a copy
        assert (own.folder / "pack.bin").is_symlink()
        index = dataset.split("train").image_ids.index(train.image_ids[5])
        assert np.array_equal(train.image(5), dataset.split("train").image(index))
    assert len(seen) == len(expected) == done.images
    assert {*seen} == expected


def test_predictions_are_those_of_the_run_that_has_not_seen_the_image(done: CvResult) -> None:
    rows = pq.read_table(done.predictions).to_pylist()
    assert list(rows[0])[:5] == ["image_id", "fold", "truth", "label", "probability"]
    assert list(rows[0])[5:] == [f"p:{digit}" for digit in range(10)]
    by_fold = {fold: [row for row in rows if row["fold"] == fold] for fold in (1, 2, 3)}
    assert sum(map(len, by_fold.values())) == len(rows) == done.images
    for fold, own in by_fold.items():
        run = done.out / f"fold-{fold}"
        split = Dataset.open(run).split("val")
        assert [row["image_id"] for row in own] == split.image_ids
        assert [row["truth"] for row in own] == split.true_labels
        with distcls.load(run) as predictor:
            found = predictor([split.image(index) for index in (0, 7, 30)])
        for index, prediction in zip((0, 7, 30), found, strict=True):
            assert own[index]["label"] == prediction.label
            probabilities = [own[index][f"p:{name}"] for name in prediction.classes]
            assert np.allclose(probabilities, prediction.probabilities, atol=1e-5)
    right = np.mean([row["truth"] == row["label"] for row in rows])
    assert done.out_of_fold["top1"] == pytest.approx(right)


def test_the_summary(done: CvResult) -> None:
    assert done.mean == pytest.approx(np.mean(done.scores))
    assert done.std == pytest.approx(np.std(done.scores, ddof=1))
    low, high = interval_of(done.scores)
    assert done.interval == (max(low, 0.0), min(high, 1.0))
    plain = json.loads((done.out / "cv.json").read_text())
    assert plain == done.to_json()
    for fold, score in enumerate(done.scores, 1):
        history = (done.out / f"fold-{fold}" / "history.csv").read_text().splitlines()
        assert any(f"{score}"[:6] in line for line in history[1:])
        assert "folds" not in (done.out / f"fold-{fold}" / "config.yaml").read_text()


def test_the_interval_is_wider_than_that_of_independent_scores() -> None:
    scores = [0.90, 0.92, 0.91, 0.95, 0.93]
    low, high = interval_of(scores)
    quantile = 2.7764451  # of Student's t with 4 degrees of freedom, from a table
    half = quantile * np.std(scores, ddof=1) * math.sqrt(1 / 5 + 1 / 4)
    assert (high - low) / 2 == pytest.approx(half, rel=1e-6)
    assert (high + low) / 2 == pytest.approx(np.mean(scores))


class Interrupting:
    """A callback that stops the run as a scheduler would."""

    def __init__(self, fold: int, epoch: int) -> None:
        self._fold, self._epoch = fold, epoch

    def on_epoch_end(self, run: Any, metrics: Any) -> None:
        """Signal this process."""
        del metrics
        if run.out.name == f"fold-{self._fold}" and run.epoch == self._epoch:
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_second_call_goes_on(done: CvResult, digits: Path, tmp_path: Path) -> None:
    stopping = config(digits, tmp_path / "cv", callbacks=(Interrupting(2, 1),))
    with pytest.raises(Stopped, match=r"fold 2 of 3 stopped by SIGTERM.*the same command"):
        cross_validate(stopping, 3)
    assert not (tmp_path / "cv" / "cv.json").exists()
    first = tmp_path / "cv" / "fold-1" / "best.pth"
    before = first.stat().st_mtime_ns
    found = cross_validate(config(digits, tmp_path / "cv"), 3)
    assert first.stat().st_mtime_ns == before
    assert found.scores == done.scores
    for fold in (1, 2, 3):
        ours, theirs = (
            load_tensors(out / f"fold-{fold}" / "best.pth")["model"]
            for out in (found.out, done.out)
        )
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_command_on_a_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    images, labels = tiny_dataset.coloured(40)
    (tmp_path / "photos").mkdir()
    for label, name in enumerate(("a class", "b", "c")):
        chosen = images[np.array(labels) == label]
        tiny_dataset.write_images(tmp_path / "photos" / name, chosen)
    call = ["cv", "--data", "photos", "--out", "cv", "--folds", "2", "--epochs", "1"]
    dispatch([*call, "--model", "simple_cnn", "--batch-size", "8"])
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed] == ["fold", "fold", "mean", "out"]
    assert "95 % interval" in printed[2]
    # the images are gone, and what was prepared is enough
    shutil.rmtree(tmp_path / "photos")
    (tmp_path / "cv" / "out_of_fold.parquet").unlink()
    dispatch([*call, "--model", "simple_cnn", "--batch-size", "8", "--json"])
    assert json.loads(capsys.readouterr().out)["images"] > 20
    assert (tmp_path / "cv" / "out_of_fold.parquet").exists()


def test_groups_stay_together(tmp_path: Path) -> None:
    images, labels = tiny_dataset.coloured(30)
    names = [
        path.name for path in sorted(tiny_dataset.write_images(tmp_path / "f", images).iterdir())
    ]
    rows = [f"f/{name},{labels[i]},g{i // 3}" for i, name in enumerate(names)]
    (tmp_path / "m.csv").write_text("\n".join(["path,label,group", *rows]) + "\n")
    distcls.prepare_dataset(tmp_path / "m.csv", tmp_path / "data", quiet=True)
    records = _records(Dataset.open(tmp_path / "data"))
    assert {record.group for record in records} == {f"g{i}" for i in range(10)}
    how = Resampling(folds=2, fold=1)
    _, splits = resample(records, ["train"] * 30, how, seed=0, classes=("0", "1", "2"))
    groups = {
        split: {r.group for r, s in zip(records, splits, strict=True) if s == split}
        for split in ("train", "val")
    }
    assert not groups["train"] & groups["val"]


def test_folds_of_something_else_are_refused(done: CvResult, digits: Path, tmp_path: Path) -> None:
    same = config(digits, done.out)
    with pytest.raises(UsageError, match=r"fold-1 was made of --folds 3; choose another --out"):
        cross_validate(same, 4)
    with pytest.raises(UsageError, match=r"fold-1 was made of --seed 0"):
        cross_validate(dataclasses.replace(same, seed=1), 3)
    images, labels = tiny_dataset.coloured(12)
    splits = ["train"] * 8 + ["val"] * 4
    other = tiny_dataset.write(tmp_path / "d", [*images], labels, ("a", "b", "c"), splits=splits)
    with pytest.raises(UsageError, match="fold-1 was made of other data"):
        cross_validate(dataclasses.replace(same, data=other), 3)
    with pytest.raises(UsageError, match=r"folds: 20, but there are only 12 training images"):
        cross_validate(config(other, tmp_path / "many"), 20)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--folds", "1"], "folds"),
        (["--resume", "last.pth"], "resume"),
        (["--fold", "2"], "--fold"),
        (["--data", "nowhere"], "nowhere"),
    ],
)
def test_mistakes_are_one_line(flags: list[str], words: str, digits: Path, tmp_path: Path) -> None:
    with pytest.raises((BadValue, UsageError), match=words) as caught:
        dispatch(["cv", "--data", str(digits), "--out", str(tmp_path / "cv"), *FLAGS, *flags])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "cv").exists()

"""`distcls train --data photos/`: from a folder of images to a model, without another command."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import yaml

from distcls.cli import dispatch
from distcls.data.dataset import Dataset
from distcls.errors import UsageError
from distcls.task import class_list
from distcls.training.config import NEW_OUT, TrainConfig
from distcls.training.inputs import place
from tests.e2e.commands import ROOT, command, run
from tests.sources import digits, put, tree
from tests.tiny_dataset import coloured

QUICK = ["--model", "simple_cnn", "--epochs", "1", "--batch-size", "16", "--threads", "1"]
COLOURS = ("red", "green", "blue")


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """48 pictures of three classes in `photos`, below the working folder."""
    monkeypatch.chdir(tmp_path)
    images, labels = coloured(48, size=16)
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        put(Path("photos") / COLOURS[label] / f"{number:02d}.png", image)
    return Path("photos")


def train(data: Path | str, *more: object) -> None:
    dispatch(["train", "--data", str(data), *QUICK, *map(str, more)])


def test_it_is_prepared_into_the_run_directory(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(f"{photos}/", "--out", "runs/a", "--seed", 3)
    said = capsys.readouterr().err
    line = (
        "data: photos, prepared in runs/a/dataset: 48 images (33 train, 4 "
        "val, 11 test) of 3 classes: blue, green, red"
    )
    assert line in said.splitlines()
    assert "pack:" not in said
    assert "classes    blue, green, red" in said
    recorded = yaml.safe_load(Path("runs/a/config.yaml").read_text())
    assert recorded["data"] == "runs/a/dataset"
    assert recorded["source"] == str(tmp_path / "photos")
    assert Dataset.open(Path("runs/a/dataset")).info["seed"] == 3


def test_a_run_goes_on_with_it(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(photos, "--out", "runs/a")
    weights = Path("runs/a/best.pth").read_bytes()
    capsys.readouterr()
    train(photos, "--out", "runs/a", "--resume", "auto")
    assert "data: photos, as prepared before in runs/a/dataset" in capsys.readouterr().err
    train("runs/a/dataset", "--out", "runs/a", "--resume", "auto")  # its own name is the same
    put(photos / "red" / "new.png", coloured(1, size=16)[0][0])
    train(photos, "--out", "runs/a", "--resume", "auto")
    assert (
        "warning: photos has changed since; the run continues with what" in capsys.readouterr().err
    )
    shutil.rmtree(photos)
    train(photos, "--out", "runs/a", "--resume", "auto")
    assert "warning: photos cannot be read any more" in capsys.readouterr().err
    assert Path("runs/a/best.pth").read_bytes() == weights
    tree(Path("others"), 40)
    with pytest.raises(UsageError, match=r"was prepared from .*photos, and others is not the same"):
        train("others", "--out", "runs/a", "--resume", "auto")


def test_what_a_failed_start_prepared_is_taken_by_the_next_one(
    photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("damaged.pth").write_text("no weights")
    with pytest.raises(UsageError, match=r"damaged\.pth"):
        train(photos, "--out", "runs/a", "--model.pretrained", "damaged.pth")
    train(photos, "--out", "runs/a")
    assert "as prepared before in runs/a/dataset" in capsys.readouterr().err
    for path in Path("runs/a").glob("[!d]*"):  # all but the dataset
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(UsageError, match="and photos was split by seed 0"):
        train(photos, "--out", "runs/a", "--seed", 1)


def test_config_yaml_prepares_it_again_where_it_is_gone(photos: Path) -> None:
    train(photos, "--out", "runs/a")
    before = Path("runs/a/dataset/manifest.parquet").read_bytes()
    Path("runs/a/config.yaml").rename("kept.yaml")
    shutil.rmtree("runs/a")
    dispatch(["train", "--config", "kept.yaml", "--out", "runs/b"])
    assert Path("runs/b/dataset/manifest.parquet").read_bytes() == before


def test_a_run_directory_is_a_model_wherever_one_is_taken(
    photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(photos, "--out", "runs/a")
    dispatch(["export", "--ckpt", "runs/a", "--tolerance", "0.1"])
    assert Path("runs/a/best.onnx").is_file()
    dispatch(["evaluate", "--model", "runs/a", "--data", "runs/a/dataset"])
    assert "model: runs/a/best.onnx\n" in capsys.readouterr().err
    train(photos, "--out", "runs/b", "--model.pretrained", "runs/a", "--distill.teacher", "runs/a")
    assert "runs/a/best.pth" in capsys.readouterr().err
    with pytest.raises(UsageError, match=r"ckpt: photos is a folder without best\.pth"):
        dispatch(["export", "--ckpt", "photos"])
    with pytest.raises(UsageError, match=r"distill\.teacher: photos is a folder without best"):
        train(photos, "--out", "runs/c", "--distill.teacher", "photos")


def test_without_out_each_run_has_a_new_directory(
    photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in (1, 2):
        train(photos)
        said = capsys.readouterr().err
        assert f"out: runs/photos-{number}, a new run directory (--out names another)" in said
        assert Path(f"runs/photos-{number}/best.pth").is_file()
        assert yaml.safe_load(Path(f"runs/photos-{number}/config.yaml").read_text())["out"] == (
            f"runs/photos-{number}"
        )


@pytest.mark.parametrize(
    ("data", "flags", "told"),
    [
        ("phtos", [], r"data: phtos: no such file or folder"),
        ("photos/red", [], r"data: photos/red: its images are not in class folders"),
        (".", [], r"out: runs/\S+-1 lies inside \., the data; choose another --out"),
        ("photos", ["--model.pretrained", "nowhere.pth"], r"nowhere\.pth does not exist"),
        ("photos", ["--resume", "auto"], r"resume: 'auto' is not valid, expected none without"),
        ("s3://bucket/photos", [], r"data: s3://bucket/photos: a dataset is prepared from local"),
    ],
)
def test_a_mistake_leaves_no_new_run_directory(
    photos: Path, tmp_path: Path, data: str, flags: list[str], told: str
) -> None:
    with pytest.raises(UsageError, match=told) as caught:
        train(data, *flags)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


def test_the_name_comes_from_the_data(photos: Path, tmp_path: Path) -> None:
    Path("list.v2.csv").write_text(
        "path,label\n" + "".join(f"{path},{path.parent.name}\n" for path in photos.rglob("*.png"))
    )
    names = []
    for data in ("list.v2.csv", "digits", str(tmp_path / "photos"), "list.v2.csv"):
        placed = place(TrainConfig(data=Path(data)))
        names.append(placed.out.name)
        assert placed.data == placed.out / "dataset"
    assert names == ["list-1", "digits-1", "photos-1", "list-2"]
    assert TrainConfig(data=photos).out == NEW_OUT


@pytest.mark.parametrize("counts", [(8, 7), (2, 2), (13, 2)])
def test_few_images_of_two_classes(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    counts: tuple[int, int],
) -> None:
    monkeypatch.chdir(tmp_path)
    images, _ = digits(sum(counts))
    for number, image in enumerate(images):
        put(Path("few") / ("odd" if number < counts[0] else "even") / f"{number}.png", image)
    train("few", "--out", "run")
    found = json.loads(Path("run/dataset/dataset.json").read_text())["class_counts"]
    assert all(count["train"] >= 1 and count["val"] >= 1 for count in found.values())
    validated = sum(count["val"] for count in found.values())
    assert f"{validated} validation images: scores of so few say little" in capsys.readouterr().err


def test_two_processes_agree_on_the_new_directory(photos: Path, tmp_path: Path) -> None:
    call = command("--data", photos, *QUICK, module="distcls.train", processes=2)
    call = [str(ROOT / word) if word.startswith("launch/") else word for word in call]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        call, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True, timeout=300
    )
    assert done.stderr.count("prepared in runs/photos-1/dataset") == 1
    assert [path.name for path in Path("runs").iterdir()] == ["photos-1"]
    assert Path("runs/photos-1/best.pth").is_file()


@pytest.mark.slow
def test_one_error_ends_two_processes(photos: Path, tmp_path: Path) -> None:
    wrong = run(
        *("--data", tmp_path / "photos" / "red", "--out", tmp_path / "other", *QUICK),
        module="distcls.train",
        processes=2,
        code=1,  # the launcher's
    )
    assert wrong.stderr.count("error: ") == 1
    assert "error: data: " in wrong.stderr
    assert not (tmp_path / "other").exists()


def test_show_prepares_for_its_picture_alone(photos: Path, tmp_path: Path) -> None:
    dispatch(["show", "--data", "photos", "--out", "show.png", "--count", "4"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photos", "show.png"]


def test_a_search_says_what_to_type(photos: Path) -> None:
    from distcls.launch.search import main

    with pytest.raises(UsageError, match=r"distcls prepare photos --out datasets/photos"):
        main(["--data", "photos", "--out", "search", "--grid", "lr=1e-3,1e-2"])
    with pytest.raises(UsageError, match="out is missing"):
        main(["--data", "photos", "--grid", "lr=1e-3,1e-2"])
    assert not Path("search").exists()


def test_class_names_in_a_line() -> None:
    assert class_list(["a b", "c\nd", "e, f"]) == r"a b, c\nd, 'e, f'"
    names = [str(number) for number in range(1000)]
    assert class_list(names[:20]).count(",") == 19
    assert class_list(names) == "0, 1, 2, 3, 4, 5, 6, 7, 8, 9, ... (1,000 in all)"
    assert len(class_list(["x" * 10_000])) < 50
    assert np.all([name.isprintable() for name in class_list(["\x1b[31m", "ü"])])

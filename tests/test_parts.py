"""Batch prediction goes on where a run ended, with the same bytes, or says why it does not."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from distcls.batch.job import check_output, predict
from distcls.batch.loading import load_models
from distcls.batch.options import PredictOptions
from distcls.batch.parts import open_parts, parts_folder
from distcls.commands.predict import main
from distcls.data.formats.detect import open_source
from distcls.data.source import FunctionSource
from distcls.errors import BadImage, UsageError
from distcls.runtime.model import OnnxModel
from distcls.runtime.providers import ExecutionConfig
from tests import tiny_dataset, tiny_onnx
from tests.test_predict_rows import with_features

COUNT, ROWS = 50, 16
ENDINGS = [".csv", ".jsonl", ".parquet"]


class PowerCut(Exception):
    """What ends a run in the middle."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    images, _ = tiny_dataset.coloured(COUNT)
    (tmp_path / "in").mkdir()
    for index, image in enumerate(images):
        assert cv2.imwrite(str(tmp_path / "in" / f"{index:03d}.png"), image[..., ::-1])
    (tmp_path / "in" / "007.png").write_bytes(b"no image")
    return tmp_path / "in"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_onnx.write(tmp_path / "m.onnx")


def options(folder: Path, model: Path, out: Path, **more: Any) -> PredictOptions:
    kept = {"part_rows": ROWS, "batch_size": 8, "provider": "cpu", "workers": 2, **more}
    return PredictOptions(input=str(folder), model=str(model), out=out, quiet=True, **kept)


def run(given: PredictOptions, breaks_at: int | None = None) -> Any:
    """Predict; the image at `breaks_at` ends the run as a bug or a kill would."""
    source = open_source(given.input)

    def load(index: int) -> NDArray[np.uint8]:
        if index == breaks_at:
            raise PowerCut
        return source.image(index)

    broken = FunctionSource(source.image_ids, load, state=source.state)
    check_output(given)
    return predict(OnnxModel(Path(given.model)), broken, given)


def interrupt(given: PredictOptions, at: int) -> None:
    with pytest.raises(PowerCut):
        run(given, at)
    assert not given.out.exists()


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("at", [[20], [45, 47], [3, 17, 33]])
def test_the_same_bytes_after_interruptions(
    folder: Path, model: Path, tmp_path: Path, ending: str, at: list[int]
) -> None:
    whole, out = tmp_path / f"whole{ending}", tmp_path / f"pre{ending}"
    more = {"top_k": 2, "probabilities": True, "threshold": 0.5}
    expected = run(options(folder, model, whole, **more))
    for place in at:
        interrupt(options(folder, model, out, resume=True, **more), place)
        assert parts_folder(out).is_dir() == (place >= ROWS)
    result = run(options(folder, model, out, resume=True, **more))
    assert out.read_bytes() == whole.read_bytes()
    assert result.resumed == max(at) // ROWS * ROWS
    assert (result.images, result.errors) == (expected.images, expected.errors) == (COUNT, 1)
    assert result.abstained == expected.abstained
    assert not parts_folder(out).exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "in",
        "m.onnx",
        out.name,
        whole.name,
    ]


def test_the_pictures_of_show_are_the_same(folder: Path, model: Path, tmp_path: Path) -> None:
    run(options(folder, model, tmp_path / "whole.csv", show=9))
    given = options(folder, model, tmp_path / "pre.csv", show=9, resume=True)
    interrupt(given, 37)
    run(given)
    assert (tmp_path / "pre.png").read_bytes() == (tmp_path / "whole.png").read_bytes()


def test_what_is_finished_is_not_predicted_again(folder: Path, model: Path, tmp_path: Path) -> None:
    given = options(folder, model, tmp_path / "pre.csv", resume=True)
    interrupt(given, 40)
    asked: list[int] = []
    source = open_source(given.input)

    def load(index: int) -> NDArray[np.uint8]:
        asked.append(index)
        return source.image(index)

    state = source.state
    watched = FunctionSource(source.image_ids, load, state=state)
    predict(OnnxModel(model), watched, given)
    assert sorted(asked) == list(range(32, COUNT))


def test_without_resume_or_overwrite_it_is_refused(
    folder: Path, model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "pre.csv"
    interrupt(options(folder, model, out), 40)
    with pytest.raises(
        UsageError, match=r"pre\.csv\.parts holds 32 rows of an interrupted run; --resume"
    ):
        run(options(folder, model, out))
    run(options(folder, model, out, overwrite=True))
    assert len(out.read_text().splitlines()) == COUNT + 1


def change_a_file(folder: Path, model: Path) -> None:
    image = np.full((8, 8, 3), 9, np.uint8)
    assert cv2.imwrite(str(folder / "002.png"), image)
    os.utime(folder / "002.png", ns=(1, 1))


def touch_a_file(folder: Path, model: Path) -> None:
    os.utime(folder / "049.png", ns=(1, 1))


def add_a_file(folder: Path, model: Path) -> None:
    (folder / "0490.png").write_bytes((folder / "049.png").read_bytes())


def remove_a_file(folder: Path, model: Path) -> None:
    (folder / "049.png").unlink()


def rename_a_file(folder: Path, model: Path) -> None:
    (folder / "049.png").rename(folder / "051.png")


def change_the_model(folder: Path, model: Path) -> None:
    card = tiny_onnx.card(("x", "green", "blue"))
    tiny_onnx.write(model, card)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (change_a_file, "inputs"),
        (touch_a_file, "inputs"),
        (add_a_file, "inputs"),
        (remove_a_file, "inputs"),
        (rename_a_file, "inputs"),
        (change_the_model, "model"),
    ],
)
def test_changed_inputs_and_models_are_refused(
    folder: Path, model: Path, tmp_path: Path, change: Any, told: str
) -> None:
    given = options(folder, model, tmp_path / "pre.csv", resume=True)
    interrupt(given, 40)
    kept = sorted(path.name for path in parts_folder(given.out).iterdir())
    change(folder, model)
    with pytest.raises(
        UsageError, match=f"was started with {told} .*, now it is {told} "
    ) as caught:
        run(given)
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in parts_folder(given.out).iterdir()) == kept
    assert not given.out.exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [("top_k", 2), ("probabilities", True), ("threshold", 0.3), ("batch_size", 4), ("limit", 48)],
)
def test_other_options_are_refused(
    folder: Path, model: Path, tmp_path: Path, key: str, value: Any
) -> None:
    out = tmp_path / "pre.csv"
    interrupt(options(folder, model, out), 40)
    with pytest.raises(UsageError, match=r"was started with .*; --resume needs the same"):
        run(options(folder, model, out, resume=True, **{key: value}))


@pytest.mark.parametrize("damage", ["cut", "flipped", "record", "missing"])
def test_damaged_parts_are_made_again(
    folder: Path, model: Path, tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, out = tmp_path / "whole.csv", tmp_path / "pre.csv"
    run(options(folder, model, whole))
    interrupt(options(folder, model, out), 40)
    path = parts_folder(out) / "00000001.csv"
    data = path.read_bytes()
    if damage == "cut":
        path.write_bytes(data[:-20])
    elif damage == "flipped":
        path.write_bytes(data[:-5] + bytes([data[-5] ^ 1]) + data[-4:])
    elif damage == "record":
        path.with_suffix(".json").write_text("{")
    else:
        path.unlink()
    result = run(options(folder, model, out, resume=True))
    assert result.resumed == ROWS
    assert out.read_bytes() == whole.read_bytes()
    assert "00000001.json or its rows are damaged" in capsys.readouterr().err


def test_a_part_without_its_record_does_not_count(
    folder: Path, model: Path, tmp_path: Path
) -> None:
    whole, out = tmp_path / "whole.csv", tmp_path / "pre.csv"
    run(options(folder, model, whole))
    interrupt(options(folder, model, out), 40)
    (parts_folder(out) / "00000001.json").unlink()
    (parts_folder(out) / ".00000002.csv.abcd.part").write_text("half")
    assert run(options(folder, model, out, resume=True)).resumed == ROWS
    assert out.read_bytes() == whole.read_bytes()


def test_killed_between_delivering_and_clearing_away(
    folder: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = options(folder, model, tmp_path / "pre.csv", resume=True)

    def cut(self: Any) -> None:
        raise PowerCut

    with monkeypatch.context() as patch:
        patch.setattr("distcls.batch.parts.Parts.remove", cut)
        with pytest.raises(PowerCut):
            run(given)
    before = given.out.read_bytes()
    assert parts_folder(given.out).is_dir()
    result = run(given)
    assert result.resumed == COUNT
    assert given.out.read_bytes() == before
    assert not parts_folder(given.out).exists()


def test_a_complete_output_is_not_resumed(folder: Path, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "pre.csv"
    run(options(folder, model, out))
    with pytest.raises(UsageError, match=r"is complete, there is nothing to resume"):
        run(options(folder, model, out, resume=True))


def test_two_runs_at_once(folder: Path, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "pre.csv"
    parts_folder(out).mkdir()
    descriptor = os.open(parts_folder(out), os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        with pytest.raises(UsageError, match="another run is writing"):
            run(options(folder, model, out))
    finally:
        os.close(descriptor)
    run(options(folder, model, out))


def test_a_folder_of_something_else_is_left_alone(
    folder: Path, model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "pre.csv"
    parts_folder(out).mkdir()
    thesis = parts_folder(out) / "thesis.txt"
    thesis.write_text("precious")
    for more in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(UsageError, match=r"thesis\.txt is in the way"):
            run(options(folder, model, out, **more))
    assert thesis.read_text() == "precious"
    thesis.unlink()
    (parts_folder(out) / "00000000.csv").mkdir()  # with the name of a part
    with pytest.raises(UsageError, match=r"/00000000\.csv is in the way"):
        run(options(folder, model, out, overwrite=True))
    (parts_folder(out) / "00000000.csv").rmdir()
    parts_folder(out).rmdir()
    parts_folder(out).write_text("a file")
    with pytest.raises(UsageError, match=r"/pre\.csv\.parts is a file, expected a folder"):
        run(options(folder, model, out))


def test_nothing_readable_leaves_nothing(tmp_path: Path, model: Path) -> None:
    (tmp_path / "in").mkdir()
    for index in range(40):
        (tmp_path / "in" / f"{index}.png").write_bytes(b"text")
    with pytest.raises(UsageError, match=r"none of 40 images is readable; 0\.png: not an image"):
        run(options(tmp_path / "in", model, tmp_path / "pre.csv"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "m.onnx"]


def test_features_on_another_file_system(folder: Path, tmp_path: Path) -> None:
    memory = Path("/dev/shm")
    if not memory.is_dir() or memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is one file system only")
    path = with_features(tmp_path / "f.onnx")
    with tempfile.TemporaryDirectory(dir=memory) as name:
        written = []
        for features in (Path(name) / "f.parquet", tmp_path / "f.parquet"):
            out = tmp_path / f"{features.parent.name}.csv"
            flags = ["--out", str(out), "--features", str(features), "--provider", "cpu"]
            main([str(folder), "--model", str(path), *flags, "--quiet"])
            written.append(features.read_bytes())
        assert written[0] == written[1]
        assert [path.name for path in Path(name).iterdir()] == ["f.parquet"]


def test_resumed_it_runs_as_before_whatever_auto_would_choose(
    folder: Path, model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "pre.csv"
    given = options(folder, model, out, batch_size=None)
    plan = ExecutionConfig(layout="stages", threads=2, streams=1, batch_size=4)
    source = open_source(given.input)

    def load(index: int) -> NDArray[np.uint8]:
        if index == 40:
            raise PowerCut
        return source.image(index)

    broken = FunctionSource(source.image_ids, load, state=source.state)
    with pytest.raises(PowerCut):
        predict(OnnxModel(model, plan), broken, given)
    again = dataclasses.replace(given, provider="auto", resume=True)
    opened_again = load_models(again, source)
    assert opened_again.execution == plan
    assert predict(opened_again, source, again).resumed == 32
    assert load_models(again, source).execution != plan


def test_parts_are_whole_batches(folder: Path, model: Path, tmp_path: Path) -> None:
    given = options(folder, model, tmp_path / "pre.csv", part_rows=10)
    interrupt(given, 40)
    records = [
        json.loads(path.read_text()) for path in sorted(parts_folder(given.out).glob("0*.json"))
    ]
    assert [record["rows"] for record in records] == [16, 16]


def test_resume_and_overwrite_contradict(folder: Path, model: Path, tmp_path: Path) -> None:
    arguments = [str(folder), "--model", str(model), "--out", str(tmp_path / "pre.csv")]
    with pytest.raises(UsageError, match=r"resume: True is not valid, .* starts over"):
        main([*arguments, "--resume", "--overwrite"])


def test_an_empty_folder_of_parts_goes(tmp_path: Path) -> None:
    with open_parts(tmp_path / "pre.csv", resume=False, overwrite=False) as parts:
        assert parts.folder.is_dir()
    assert not any(tmp_path.iterdir())


def test_an_error_of_the_run_says_what_is_kept(folder: Path, model: Path, tmp_path: Path) -> None:
    from distcls.errors import DistclsError

    given = options(folder, model, tmp_path / "pre.csv")
    source = open_source(given.input)

    def load(index: int) -> NDArray[np.uint8]:
        if index == 40:
            raise DistclsError("the disk is gone")
        if index == 41:
            raise BadImage("never reached")
        return source.image(index)

    broken = FunctionSource(source.image_ids, load, state=source.state)
    with pytest.raises(DistclsError, match=r"the disk is gone; 32 rows are kept in .*--resume"):
        predict(OnnxModel(model), broken, given)

"""What a resumed run keeps, what it may be given anew, and the data by which it is recognised."""

from __future__ import annotations

import functools
import hashlib
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import pytest
import torch

from distcls.commands.train import main
from distcls.data.prepare import PrepareOptions, prepare
from distcls.errors import UsageError
from distcls.training import inputs, run
from distcls.training.checkpointing import newest_intact, read_recorded
from distcls.training.config import MonitorConfig, OptimizerConfig, TrainConfig
from distcls.training.schedule import ScheduleConfig, make_schedule
from tests import tiny_dataset
from tests.plain import plain_config
from tests.tiny_dataset import coloured


class Interrupted(Exception):
    """Stands for whatever ends a process."""


def settings(data: Path, out: Path) -> TrainConfig:
    """Every epoch after the first counts as no improvement, so the rate falls each time."""
    return plain_config(
        data=data,
        out=out,
        epochs=4,
        batch_size=32,
        limit=96,
        quiet=True,
        threads=1,
        resume="auto",
        optimizer=OptimizerConfig(name="ranger", layer_decay=0.8, head_lr_scale=2.0),
        schedule=ScheduleConfig(name="plateau", warmup="1 epoch", patience=1, factor=0.5),
        monitor=MonitorConfig(min_delta=1.0),
    )


def last_state(out: Path) -> dict[str, Any]:
    found = newest_intact(out / "last")
    assert found is not None
    return found[1]


def test_plateau_and_ranger_go_on_as_if_nothing_had_happened(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts = settings(digits, tmp_path / "whole"), settings(digits, tmp_path / "parts")
    run.train(whole)
    train_steps = run.train_steps

    def two_epochs(now: run.Run) -> dict[str, float]:
        if now.state.epoch == 2:
            raise Interrupted
        return train_steps(now)

    with monkeypatch.context() as patch:
        patch.setattr(run, "train_steps", two_epochs)
        with pytest.raises(Interrupted):
            run.train(parts)
    assert last_state(parts.out)["tensors"]["schedule"] == {"falls": 1, "waited": 0}
    run.train(parts)
    one, other = last_state(whole.out), last_state(parts.out)
    rates = [row["lr"] for row in one["progress"]["history"]]
    assert rates == pytest.approx([1e-3, 1e-3, 5e-4, 2.5e-4])
    assert rates == [row["lr"] for row in other["progress"]["history"]]
    assert one["tensors"]["schedule"] == other["tensors"]["schedule"] == {"falls": 3, "waited": 0}
    for name, tensor in one["tensors"]["model"].items():
        assert torch.equal(tensor, other["tensors"]["model"][name]), name
    moments = one["tensors"]["optimizer"]["state"]
    assert len(moments) > 100
    for index, values in other["tensors"]["optimizer"]["state"].items():
        assert set(values) == {"step", "exp_avg", "exp_avg_sq", "lookahead_slow_buff"}
        assert all(torch.equal(value, moments[index][key]) for key, value in values.items())


PICTURES = 18
"""Of each of three classes."""


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder with a folder of small pictures for each class."""
    images, labels = coloured(3 * PICTURES)
    folder = tmp_path / "photos"
    for index, image in enumerate(images):
        path = folder / "abc"[labels[index]] / f"{index:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        assert cv2.imwrite(str(path), image[..., ::-1])
    return folder


def prepared(photos: Path, out: Path, **options: Any) -> Path:
    shutil.rmtree(out, ignore_errors=True)
    prepare(PrepareOptions(source=str(photos), out=out, val_fraction=0.2, quiet=True, **options))
    return out


FLAGS = ("--model.name", "simple_cnn", "--batch-size", "16", "--threads", "1", "--epochs", "2")
CONSTANT = ("--schedule.name", "constant", "--schedule.warmup", "2 steps")


def trained(data: Path, out: Path, *flags: str) -> None:
    main(["--data", str(data), "--out", str(out), *FLAGS, *flags])


def went_on(data: Path, out: Path, *flags: str) -> None:
    trained(data, out, "--resume", "auto", *flags)


def refused(data: Path, out: Path, *flags: str) -> str:
    """The line that says why a run does not go on; it has left everything as it was."""
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    with pytest.raises(UsageError) as caught:
        went_on(data, out, *flags)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_dataset_prepared_anew_with_another_seed_is_refused(photos: Path, tmp_path: Path) -> None:
    """Else images that were for testing would be trained on, and the other way round."""
    drawn = functools.partial(prepared, photos, split_by="draw")  # as many of each split
    data, out = drawn(tmp_path / "data"), tmp_path / "run"
    trained(data, out)
    went_on(drawn(data), out)
    said = refused(drawn(data, seed=1), out)
    assert said.startswith(f"data: {data} is not what {out}/last/step_")
    assert "images as then, but other ones, or in another order; val has" in said
    assert (
        f"restore that data, or start over in another --out (--model.pretrained {out}/best" in said
    )
    assert said.endswith("which may have been trained on images that are for validation now)")


def test_a_renamed_class_is_refused_by_its_name(photos: Path, tmp_path: Path) -> None:
    data, out = prepared(photos, tmp_path / "data"), tmp_path / "run"
    trained(data, out)
    names = data / "classes.json"
    names.write_text(json.dumps(["a", "kitten", "c"]))
    assert "classes.json: wrong checksum, it is not what distcls prepare wrote" in refused(
        data, out
    )
    tiny_dataset.sign(data)
    assert "its classes have other names: 'kitten' was 'b'; restore" in refused(data, out)
    names.write_text(json.dumps(["b", "a", "c"]))
    tiny_dataset.sign(data)
    assert "classes are in another order: 'b' is where 'a' was" in refused(data, out)
    (photos / "b").rename(photos / "z")
    said = refused(prepared(photos, data), out)
    assert "its 3 classes are the previous 3 without 'b' and with 'z'; train has" in said


def test_edits_of_a_runs_config_are_not_ignored(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = prepared(photos, tmp_path / "data"), tmp_path / "run"
    trained(data, out, "--epochs", "1")
    path, flags = out / "config.yaml", ("--epochs", "1")
    text = path.read_text()
    decay = "  weight_decay: 0.05\n"
    for edit, told in (
        (f"{decay}  weight_decai: 1\n", "unknown key 'optimizer.weight_decai'; did you mean"),
        ("  weight_decay: much\n", "optimizer.weight_decay: 'much' is not valid, expected a num"),
        (
            "  weight_decay: 0.1\n",
            "optimizer.weight_decay was edited to 0.1, but the run began with 0.05; a resumed run",
        ),
    ):
        path.write_text(text.replace(decay, edit))
        assert refused(data, out, *flags).startswith(f"{path}: {told}")
    path.write_text(text.replace("  prefetch: 3\n", "  ahead: 5\n"))  # a name of 0.1.0
    capsys.readouterr()
    went_on(data, out, *flags)
    assert "ahead" not in capsys.readouterr().err


def test_names_of_another_process_in_a_runs_config_are_no_edits(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("data: d\nmonitor: {metric: 'object:brier-1'}\nloss: {name: '__main__:loss'}\n")
    assert read_recorded(path)["monitor.metric"].value == "object:brier-1"


def test_the_same_data_elsewhere_goes_on(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, out = prepared(photos, tmp_path / "data"), tmp_path / "run"
    monkeypatch.chdir(tmp_path)
    trained(Path("data"), out)
    went_on(data, out, "--epochs", "3")
    moved = data.rename(tmp_path / "moved")
    went_on(moved, out, "--epochs", "4")
    assert last_state(out)["progress"]["epoch"] == 4
    assert f"data: {moved}\n" in (out / "config.yaml").read_text()


def test_files_in_place_of_a_pack_go_on_but_not_other_pixels(photos: Path, tmp_path: Path) -> None:
    data, out = prepared(photos, tmp_path / "data"), tmp_path / "run"
    trained(data, out)
    went_on(prepared(photos, data, pack="off"), out, "--epochs", "3")
    went_on(prepared(photos, data), out, "--epochs", "4")
    went_on(prepared(photos, data, pack="off"), out, "--epochs", "5")
    first, second = (next((photos / name).iterdir()) for name in "ab")
    shutil.copy(first, second)
    assert ": its pack holds other pixels; restore" in refused(prepared(photos, data), out)


def test_a_state_without_a_fingerprint_notices_another_number_of_steps(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, out = prepared(photos, tmp_path / "data"), tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(inputs, "fingerprint_of", lambda *_: None)
        trained(data, out)
    said = refused(prepared(photos, data, test_fraction=0.6), out)
    assert "is not step 0 after 2 epochs of 1 steps; the training images have changed" in said
    went_on(prepared(photos, data), out, "--epochs", "3")
    assert last_state(out)["progress"]["data"]["classes"] == ("a", "b", "c")


def test_more_epochs_are_those_of_a_longer_run(digits: Path, tmp_path: Path) -> None:
    """Where neither schedule nor mean depend on the length, bit by bit."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    flags = (*CONSTANT, "--limit", "48", "--average.last-epochs", "2")
    trained(digits, whole, *flags, "--epochs", "5")
    trained(digits, parts, *flags)
    went_on(digits, parts, *flags, "--epochs", "5")
    one, other = last_state(whole), last_state(parts)
    assert other["progress"]["epoch"] == 5
    assert one["tensors"]["average"]["taken"] == other["tensors"]["average"]["taken"] == 2
    for part in ("model", "average"):
        pairs = [state["tensors"][part] for state in (one, other)]
        ours, theirs = pairs if part == "model" else [pair["model"] for pair in pairs]
        assert all(torch.equal(ours[name], theirs[name]) for name in ours), part
    moments = [state["tensors"]["optimizer"]["state"] for state in (one, other)]
    for index, values in moments[0].items():
        assert all(torch.equal(value, moments[1][index][key]) for key, value in values.items())


@pytest.mark.parametrize(
    ("epochs", "line"),
    [
        ("6", "a new one takes epochs 5 to 6 (2 of 2)"),
        ("3", "a new one takes epochs 3 to 3 (1 of 2)"),
    ],
)
def test_a_mean_that_had_begun_starts_anew_and_says_so(
    digits: Path, tmp_path: Path, epochs: str, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--limit", "32", "--average.last-epochs", "2")
    trained(digits, tmp_path / "run", *flags)
    went_on(digits, tmp_path / "run", *flags, "--epochs", epochs)
    said = capsys.readouterr().err
    assert f"average.last_epochs: the mean of 2 epochs so far is dropped, {line}\n" in said
    assert last_state(tmp_path / "run")["tensors"]["average"]["taken"] == int(line[-7])


def test_with_more_epochs_the_rate_is_that_of_the_longer_schedule(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--limit", "48", "--freeze.backbone", "75%", "--lr", "1e-3")
    trained(digits, tmp_path / "run", *flags)
    capsys.readouterr()
    went_on(digits, tmp_path / "run", *flags, "--epochs", "4")
    schedule = make_schedule(ScheduleConfig(), 1e-3, 3, 4)
    rates = [row["lr"] for row in last_state(tmp_path / "run")["progress"]["history"]]
    assert rates[2:] == pytest.approx([schedule.rate(8), schedule.rate(11)])
    assert rates[1] == pytest.approx(make_schedule(ScheduleConfig(), 1e-3, 3, 2).rate(5))
    said = capsys.readouterr().err
    assert (
        "epochs: 4 instead of 2; from step 7 on the learning rate is that of the cosine schedule "
        f"of 4 epochs (12 steps): {schedule.rate(6):.3g} there, after {rates[1]:.3g}\n" in said
    )
    assert "freeze.backbone: 75% of 4 epochs is until step 9\n" in said


def test_a_finished_run_says_that_nothing_is_left(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    trained(digits, out, "--limit", "32")
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    capsys.readouterr()
    went_on(digits, out, "--limit", "32", "--checkpoint.keep-last", "5")
    said = capsys.readouterr().err.splitlines()
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    assert said[1:-2] == ["nothing to do: all 2 epochs are done; --epochs N with more continues"]
    assert said[-2].startswith("best epoch ")
    assert "wrote" not in said[-2]
    assert "has started epoch 2; give 2 or more" in refused(
        digits, out, "--limit", "32", "--epochs", "1"
    )


def test_a_run_stopped_early_goes_on_with_more_patience(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--limit", "32", "--epochs", "9", "--monitor.min-delta", "1", "--monitor.patience")
    out = tmp_path / "run"
    trained(digits, out, *flags, "1")
    assert last_state(out)["progress"]["epoch"] == 2
    capsys.readouterr()
    went_on(digits, out, *flags, "1")
    assert (
        "nothing to do: stopped early after epoch 2 of 9, no better top-1 in 1 epoch "
        "(monitor.patience 1); --monitor.patience N with more than 1, or null, "
        "continues\n" in capsys.readouterr().err
    )
    went_on(digits, out, *flags, "3")
    assert last_state(out)["progress"]["epoch"] == 4
    went_on(digits, out, *flags, "null")
    assert last_state(out)["progress"]["epoch"] == 9


def test_tensors_of_another_network_are_one_line(digits: Path, tmp_path: Path) -> None:
    trained(digits, tmp_path / "run", "--limit", "32")
    [*_, (path, content)] = [newest_intact(tmp_path / "run" / "last") or (Path(), {})]
    for part in ({"model": {}}, {"optimizer": {"state": 3}}, {"model": torch.ones(3)}):
        other = {**content, "tensors": {**content["tensors"], **part}}
        buffer = io.BytesIO()
        torch.save(other, buffer)
        shutil.rmtree(path.parent)
        path.parent.mkdir()
        checksum = hashlib.sha256(buffer.getvalue()).hexdigest()[:32]
        (path.parent / f"step_00000009.{checksum}.pth").write_bytes(buffer.getvalue())
        said = refused(digits, tmp_path / "run", "--limit", "32")
        assert "its tensors do not fit this run: " in said


CHECKS = """
import sys
sys.modules["torch"] = None
from distcls.commands.show import main as show
from distcls.commands.train import main as train
from distcls.errors import UsageError
for command in train, show:
    for line in sys.argv[1:] if command is train else sys.argv[-2:]:
        data = [] if "--data " in line else ["--data", "photos"]
        try:
            command([*data, *line.split()])
        except UsageError as error:
            print(error)
"""


def test_wrong_paths_are_refused_before_torch_loads(photos: Path, tmp_path: Path) -> None:
    told = {}
    for name in ("config.yaml", "best.pth", "last"):
        (tmp_path / name[:4]).mkdir()
        (tmp_path / name[:4] / name).write_text("")
        advice = "choose another --out, or continue it with --resume auto"
        told[f"--out {name[:4]}"] = f"{name[:4]} already contains a run ({name}); {advice}"
    told["--out last/last/deeper"] = "out: last/last is a file, expected a folder"
    for key in ("resume", "distill.teacher"):
        told[f"--{key} none.pth"] = f"{key}: none.pth does not exist"
    told["--model.pretrained imagenet"] = (
        "model.pretrained: imagenet does not exist; auto takes the network's published weights"
    )
    told["--data phtos"] = "data: phtos: no such file or folder (digits is the bundled data set)"
    url = "gs://bucket/photos"
    told[f"--data {url}"] = f"data: {url}: a dataset is prepared from local files; copy them here"
    call = [sys.executable, "-c", CHECKS, *told]
    done = subprocess.run(call, capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stdout.splitlines() == [*told.values(), *list(told.values())[-2:]]
    assert not done.stderr

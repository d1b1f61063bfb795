"""Progress: which epoch is best, when to stop, and the state that a run resumes from."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from distcls.errors import DistclsError, UsageError
from distcls.models.config import ModelConfig
from distcls.training.checkpointing import Checkpoints, Progress, load_state, states, to_content
from distcls.training.config import (
    AugmentConfig,
    CheckpointConfig,
    LoaderConfig,
    LossConfig,
    MonitorConfig,
    TrainConfig,
)

NAN = math.nan


def judged(scores: list[float], monitor: MonitorConfig) -> tuple[list[bool], Progress]:
    progress, verdicts = Progress(), []
    for epoch, score in enumerate(scores, start=1):
        progress.epoch = epoch
        verdicts.append(progress.judge(score, monitor))
    return verdicts, progress


@pytest.mark.parametrize(
    ("metric", "mode", "scores", "verdicts"),
    [
        ("top1", "auto", [0.1, 0.3, 0.2, 0.3, 0.4], [True, True, False, False, True]),
        ("loss", "auto", [3.0, 2.0, 2.5, 2.0, 1.0], [True, True, False, False, True]),
        ("top1", "min", [0.1, 0.3, 0.05], [True, False, True]),
        ("loss", "max", [3.0, 2.0, 4.0], [True, False, True]),
        ("top1", "auto", [NAN, 0.1, NAN, 0.2], [False, True, False, True]),
        ("loss", "auto", [NAN, 2.0, NAN, 1.0], [False, True, False, True]),
        ("loss", "auto", [-1.0, -2.0, 0.0], [True, True, False]),
    ],
)
def test_which_epochs_are_the_best_so_far(
    metric: str, mode: Any, scores: list[float], verdicts: list[bool]
) -> None:
    found, progress = judged(scores, MonitorConfig(metric=metric, mode=mode))
    assert found == verdicts
    best = max(index for index, verdict in enumerate(verdicts) if verdict)
    assert progress.best_epoch == best + 1
    assert progress.best_score == scores[best]
    assert progress.epochs_since_best == len(scores) - 1 - best


@pytest.mark.parametrize(
    ("metric", "scores", "best"),
    [
        ("top1", {"ema": 0.9, "weights": 0.8}, "ema"),
        ("top1", {"ema": 0.8, "weights": 0.9}, "weights"),
        ("loss", {"ema": 0.8, "weights": 0.9}, "ema"),
        ("loss", {"ema": 0.9, "weights": 0.8}, "weights"),
        ("top1", {"ema": 0.9, "weights": 0.9}, "ema"),
        ("top1", {"ema": NAN, "weights": 0.0}, "weights"),
        ("loss", {"ema": 5.0, "weights": NAN}, "ema"),
        ("top1", {"ema": NAN, "weights": NAN}, "ema"),
    ],
)
def test_which_of_several_models_is_the_best(
    metric: str, scores: dict[str, float], best: str
) -> None:
    assert MonitorConfig(metric=metric).best_of(scores) == best


@pytest.mark.parametrize(("metric", "sign"), [("top1", 1), ("loss", -1)])
def test_small_changes_are_no_improvement(metric: str, sign: int) -> None:
    monitor = MonitorConfig(metric=metric, min_delta=0.1)
    scores = [sign * score for score in (0.5, 0.55, 0.59, 0.61, 0.70, 0.72)]
    # each is held against the best, not against the one before
    assert judged(scores, monitor)[0] == [True, False, False, True, False, True]


def test_patience() -> None:
    monitor = MonitorConfig(patience=2)
    progress = Progress()
    stops = []
    for score in (0.1, 0.2, 0.1, 0.3, NAN, 0.3, 0.2):
        progress.epoch += 1
        progress.judge(score, monitor)
        stops.append(progress.out_of_patience(monitor))
    assert stops == [False, False, False, False, False, True, True]
    assert not progress.out_of_patience(MonitorConfig(patience=None))


def config(folder: Path, **changes: Any) -> TrainConfig:
    return TrainConfig(**{"data": folder / "data", "out": folder / "run", **changes})


def save_state(folder: Path, now: TrainConfig, progress: Progress, tensors: dict[str, Any]) -> None:
    checkpoints = Checkpoints(folder, CheckpointConfig(), 0)
    checkpoints.save(progress.step, to_content(now, progress, tensors))
    checkpoints.close()


def test_the_state_comes_back_as_it_was(tmp_path: Path) -> None:
    progress = Progress(epoch=3, step=33, seconds=1.5, best_score=0.7, best_epoch=2)
    progress.history.append({"epoch": 1, "loss": 2.5})
    tensors = {"model": {"w": torch.arange(3.0)}, "ema": None, "updates": 7}
    save_state(tmp_path, config(tmp_path), progress, tensors)
    loaded = load_state(tmp_path, config(tmp_path))
    assert loaded is not None
    assert loaded[0] == progress
    assert torch.equal(loaded[1]["model"]["w"], torch.arange(3.0))
    assert (loaded[1]["ema"], loaded[1]["updates"]) == (None, 7)


def test_no_state_is_no_error(tmp_path: Path) -> None:
    assert load_state(tmp_path, config(tmp_path)) is None


@pytest.mark.parametrize(
    ("key", "changes"),
    [
        ("epochs", {"epochs": 11}),
        ("batch_size", {"batch_size": 64}),
        ("seed", {"seed": 1}),
        ("data", {"data": Path("elsewhere")}),
        ("model.dropout", {"model": ModelConfig(dropout=0.5)}),
        ("augment.resized_crop", {"augment": AugmentConfig(resized_crop=(0.5, 1.0))}),
        ("loss.class_weights.cat", {"loss": LossConfig(class_weights={"cat": 2.0})}),
    ],
)
def test_a_config_that_differs_is_refused_by_key(
    tmp_path: Path, key: str, changes: dict[str, Any]
) -> None:
    save_state(tmp_path, config(tmp_path), Progress(), {})
    with pytest.raises(UsageError, match=rf"^{key}: .* given, but .*step_.*pth was written with"):
        load_state(tmp_path, config(tmp_path, **changes))


def test_what_does_not_shape_the_result_may_change(tmp_path: Path) -> None:
    save_state(tmp_path, config(tmp_path), Progress(step=5), {})
    changes: dict[str, Any] = {
        "out": tmp_path / "moved",
        "resume": "auto",
        "quiet": True,
        "json": True,
        "processes": 2,
        "threads": 1,
        "log_every": 3,
        "loader": LoaderConfig(workers=1, prefetch=9),
    }
    loaded = load_state(tmp_path, config(tmp_path, **changes))
    assert loaded is not None
    assert loaded[0].step == 5


def test_a_mapping_that_lost_a_name_is_refused(tmp_path: Path) -> None:
    both = LossConfig(class_weights={"cat": 2.0, "dog": 3.0})
    save_state(tmp_path, config(tmp_path, loss=both), Progress(), {})
    assert load_state(tmp_path, config(tmp_path, loss=both)) is not None
    for weights in ({"cat": 2.0}, None):
        with pytest.raises(UsageError, match=r"^loss\.class_weights.*None given"):
            load_state(tmp_path, config(tmp_path, loss=LossConfig(class_weights=weights)))


def test_equal_configs_with_sequences_are_equal(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"augment": AugmentConfig(resized_crop=(0.35, 1.0))}
    save_state(tmp_path, config(tmp_path, **changes), Progress(), {})
    assert load_state(tmp_path, config(tmp_path, **changes)) is not None


def test_every_field_of_progress_is_saved(tmp_path: Path) -> None:
    names = {field.name for field in dataclasses.fields(Progress)}
    save_state(tmp_path, config(tmp_path), Progress(), {})
    saved = torch.load(states(tmp_path)[0], weights_only=True)["progress"]
    assert set(saved) == names


def test_a_damaged_state_is_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (7, 14):
        save_state(tmp_path, config(tmp_path), Progress(step=step), {"w": torch.zeros(1000)})
    newest = states(tmp_path)[0]
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1  # inside the tensor: torch itself would load it
    newest.write_bytes(data)
    loaded = load_state(tmp_path, config(tmp_path))
    assert loaded is not None
    assert loaded[0].step == 7
    assert f"{newest} is damaged" in capsys.readouterr().err
    for path in states(tmp_path):
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DistclsError, match="no state is whole"):
        load_state(tmp_path, config(tmp_path))


def test_another_file_in_the_states_place_is_refused(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(), 0)
    checkpoints.save(1, {"w": torch.zeros(3)})
    checkpoints.close()
    with pytest.raises(UsageError, match=r"pth: not the state of a run"):
        load_state(tmp_path, config(tmp_path))


def test_the_newest_states_are_kept_and_leftovers_go(tmp_path: Path) -> None:
    (tmp_path / ".step_00000003.abc.pth.xyz.part").write_bytes(b"half")
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(keep_last=3), 0)
    for step in (5, 10, 100, 15, 20):  # after 100 the run has gone back: that one was damaged
        checkpoints.save(step, {"step": step})
    checkpoints.close()
    kept = [torch.load(path, weights_only=True)["step"] for path in states(tmp_path)]
    assert kept == [20, 15, 10]
    assert not list(tmp_path.glob(".step_*"))


def test_a_state_is_a_copy_of_its_moment(tmp_path: Path) -> None:
    weights = torch.zeros(1000, 1000)
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(), 0)
    checkpoints.save(1, {"w": weights})
    weights += 1  # training goes on while the state is written
    checkpoints.close()
    assert float(torch.load(states(tmp_path)[0], weights_only=True)["w"].sum()) == 0


@pytest.mark.parametrize(
    ("config", "due"),
    [
        (CheckpointConfig(every_steps=5, every_minutes=None), [False, True]),
        (CheckpointConfig(every_minutes=None), [False, False]),
        (CheckpointConfig(every_minutes=1e-9), [True, True]),
        (CheckpointConfig(every_minutes=60), [False, False]),
    ],
)
def test_when_a_state_is_due(tmp_path: Path, config: CheckpointConfig, due: list[bool]) -> None:
    checkpoints = Checkpoints(tmp_path, config, step=100)
    assert [checkpoints.due(104), checkpoints.due(105)] == due
    checkpoints.close()

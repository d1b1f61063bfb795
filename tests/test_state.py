"""The training state: which epoch is best, when to stop, and what a run resumes from."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from distcls.data.dataset import DataFingerprint, SplitFingerprint
from distcls.errors import DistclsError, UsageError
from distcls.models.checkpoint import save_tensors
from distcls.models.config import ModelConfig
from distcls.training.checkpointing import BEST, CheckpointManager, TrainingState, states
from distcls.training.config import (
    AugmentConfig,
    CheckpointConfig,
    LoaderConfig,
    LossConfig,
    MonitorConfig,
    TrainConfig,
)
from tests.plain import plain_config

NAN = math.nan


def judged(scores: list[float], monitor: MonitorConfig) -> tuple[list[bool], TrainingState]:
    state, verdicts = TrainingState(), []
    for epoch, score in enumerate(scores, start=1):
        state.epoch = epoch
        verdicts.append(state.judge(score, monitor))
    return verdicts, state


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
    found, state = judged(scores, MonitorConfig(metric=metric, mode=mode))
    assert found == verdicts
    best = max(index for index, verdict in enumerate(verdicts) if verdict)
    assert state.best_epoch == best + 1
    assert state.best_score == scores[best]
    assert state.epochs_since_best == len(scores) - 1 - best


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
    assert MonitorConfig(metric=metric).best_of(scores, {}) == best


def test_of_equal_models_that_with_the_lower_loss_is_the_best() -> None:
    scores = {"ema": 0.9, "weights": 0.9}
    assert MonitorConfig().best_of(scores, {"ema": 0.4, "weights": 0.3}) == "weights"
    assert MonitorConfig().best_of(scores, {"ema": 0.3, "weights": 0.4}) == "ema"
    assert MonitorConfig().best_of(scores, {"ema": NAN, "weights": NAN}) == "ema"
    scores = {"ema": 0.9, "weights": 0.8}
    assert MonitorConfig().best_of(scores, {"ema": 0.4, "weights": 0.3}) == "ema"


def test_of_equal_epochs_that_with_the_lower_loss_is_the_best() -> None:
    state, verdicts = TrainingState(), []
    epochs = [(0.9, 0.5), (1.0, 0.4), (1.0, 0.3), (1.0, 0.3), (0.9, 0.1), (1.0, NAN), (1.0, 0.2)]
    for epoch, (score, loss) in enumerate(epochs, start=1):
        state.epoch = epoch
        state.history.append({"epoch": epoch, "val_loss": loss})
        verdicts.append(state.judge(score, MonitorConfig()))
        state = TrainingState.from_plain(state.to_plain(), Path("state"))  # a resumed run's
    assert verdicts == [True, True, True, False, False, False, True]
    state.epoch = 8
    state.history.append({"epoch": 8, "val_loss": 0.0})
    assert not state.judge(1.0, MonitorConfig(min_delta=0.01))
    assert (state.best_epoch, state.best_score, state.epochs_since_best) == (7, 1.0, 1)


@pytest.mark.parametrize(("metric", "sign"), [("top1", 1), ("loss", -1)])
def test_small_changes_are_no_improvement(metric: str, sign: int) -> None:
    monitor = MonitorConfig(metric=metric, min_delta=0.1)
    scores = [sign * score for score in (0.5, 0.55, 0.59, 0.61, 0.70, 0.72)]
    # each is held against the best, not against the one before
    assert judged(scores, monitor)[0] == [True, False, False, True, False, True]


def test_patience() -> None:
    monitor = MonitorConfig(patience=2)
    state = TrainingState()
    stops = []
    for score in (0.1, 0.2, 0.1, 0.3, NAN, 0.3, 0.2):
        state.epoch += 1
        state.judge(score, monitor)
        stops.append(state.out_of_patience(monitor))
    assert stops == [False, False, False, False, False, True, True]
    assert not state.out_of_patience(MonitorConfig(patience=None))


def config(folder: Path, **changes: Any) -> TrainConfig:
    values = {"data": folder / "data", "out": folder / "run", "resume": "auto", **changes}
    return plain_config(**values)


def save_state(now: TrainConfig, state: TrainingState, tensors: dict[str, Any]) -> None:
    with contextlib.closing(CheckpointManager(now)) as manager:
        manager.save(state, tensors)


def resume(now: TrainConfig) -> tuple[TrainingState, dict[str, Any]] | None:
    return CheckpointManager(now).resume()


def saved(folder: Path) -> list[Path]:
    return states(folder / "run" / "last")


def test_the_state_comes_back_as_it_was(tmp_path: Path) -> None:
    state = TrainingState(epoch=3, step=33, seconds=1.5, best_score=0.7, best_epoch=2)
    state.history.append({"epoch": 1, "loss": 2.5})
    state.top_models.append((0.7, "model_e2.pth"))
    tensors = {"model": {"w": torch.arange(3.0)}, "ema": None, "updates": 7}
    save_state(config(tmp_path), state, tensors)
    loaded = resume(config(tmp_path))
    assert loaded is not None
    assert loaded[0] == state
    assert torch.equal(loaded[1]["model"]["w"], torch.arange(3.0))
    assert (loaded[1]["ema"], loaded[1]["updates"]) == (None, 7)


def test_no_state_is_no_error(tmp_path: Path) -> None:
    assert resume(config(tmp_path)) is None


@pytest.mark.parametrize(
    ("key", "changes"),
    [
        ("batch_size", {"batch_size": 64}),
        ("seed", {"seed": 1}),
        ("data", {"data": Path("elsewhere")}),
        ("model.dropout", {"model": ModelConfig(dropout=0.5)}),
        (
            "augment.resized_crop",
            {"augment": AugmentConfig(flip=0.0, crop_padding=0, resized_crop=(0.5, 1.0))},
        ),
        ("loss.class_weights.cat", {"loss": LossConfig(class_weights={"cat": 2.0})}),
    ],
)
def test_a_config_that_differs_is_refused_by_key(
    tmp_path: Path, key: str, changes: dict[str, Any]
) -> None:
    save_state(config(tmp_path), TrainingState(), {})
    with pytest.raises(UsageError, match=rf"^{key}: .* given, but .*step_.*pth was written with"):
        resume(config(tmp_path, **changes))


def test_the_refusal_names_all_that_differs_and_the_way_out(tmp_path: Path) -> None:
    save_state(config(tmp_path), TrainingState(), {})
    now = config(tmp_path, lr=0.5, seed=3)
    with pytest.raises(
        UsageError, match=r"^lr: 0\.5 given, .* with 0\.001 \(changed, too: seed\)"
    ) as found:
        resume(now)
    assert str(found.value).endswith("give it as it was, or start over in another --out")
    (now.out / BEST).write_bytes(b"weights")
    with pytest.raises(UsageError) as found:
        resume(now)
    assert str(found.value).endswith(
        f"or start from its weights: --model.pretrained {now.out / BEST} and another --out"
    )
    assert "\n" not in str(found.value)
    with pytest.raises(UsageError) as found:  # whose weights would not fit
        resume(config(tmp_path, model=ModelConfig(name="simple_cnn")))
    assert str(found.value).endswith("give it as it was, or start over in another --out")


def test_what_does_not_shape_the_result_may_change(tmp_path: Path) -> None:
    save_state(config(tmp_path), TrainingState(step=5), {})
    (tmp_path / "run").rename(tmp_path / "moved")
    changes: dict[str, Any] = {
        "out": tmp_path / "moved",
        "quiet": True,
        "json": True,
        "processes": 2,
        "threads": 1,
        "log_every": 3,
        "epochs": 11,
        "tracker": "tensorboard",
        "max_nonfinite_steps": 3,
        "monitor": MonitorConfig(patience=7, min_delta=0.1),
        "checkpoint": CheckpointConfig(every_steps=3, keep_last=9, save_top_k=0),
        "loader": LoaderConfig(workers=1, prefetch=9),
    }
    loaded = resume(config(tmp_path, **changes))
    assert loaded is not None
    assert loaded[0].step == 5
    assert loaded.epochs == 10


def test_which_metric_is_monitored_may_not_change(tmp_path: Path) -> None:
    save_state(config(tmp_path), TrainingState(), {})
    with pytest.raises(UsageError, match=r"^monitor\.metric: 'loss' given"):
        resume(config(tmp_path, monitor=MonitorConfig(metric="loss")))


@pytest.mark.parametrize(("epoch_step", "fewest"), [(0, 3), (1, 4)])
def test_fewer_epochs_than_have_begun_are_refused(
    tmp_path: Path, epoch_step: int, fewest: int
) -> None:
    save_state(config(tmp_path), TrainingState(epoch=3, epoch_step=epoch_step, step=7), {})
    assert resume(config(tmp_path, epochs=fewest)) is not None
    line = rf"^epochs: {fewest - 1} given, but .*pth has started epoch {fewest}; give {fewest} or"
    with pytest.raises(UsageError, match=line):
        resume(config(tmp_path, epochs=fewest - 1))


def of_split(images: int, ids: str = "1", labels: str = "2") -> SplitFingerprint:
    return SplitFingerprint(images=images, ids=ids * 64, labels=labels * 64, weights=None)


def fingerprint(**changes: Any) -> DataFingerprint:
    values: dict[str, Any] = {
        **{"kind": "single_label", "classes": ("cat", "dog"), "pack_bytes": 9, "pack": "3" * 64},
        **{"train": of_split(20), "val": of_split(4)},
    }
    return DataFingerprint(**{**values, **changes})


def resume_with(now: TrainConfig, data: DataFingerprint | None) -> object:
    return CheckpointManager(now, data=data).resume()


def test_the_data_may_lie_elsewhere_but_is_the_same(tmp_path: Path) -> None:
    now = config(tmp_path, data=Path("elsewhere/data"))
    save_state(config(tmp_path), TrainingState(data=fingerprint()), {})
    assert resume_with(now, fingerprint()) is not None
    line = r"^data: elsewhere/data is not what .*pth was trained on \(then .*/data\): train has 21 "
    with pytest.raises(
        UsageError, match=line + r"images, then 20; restore that data, or start over"
    ):
        resume_with(now, fingerprint(train=of_split(21)))


@pytest.mark.parametrize("known", ["in the state", "now"])
def test_without_a_fingerprint_the_paths_are_compared(tmp_path: Path, known: str) -> None:
    data = [fingerprint(), None] if known == "in the state" else [None, fingerprint()]
    save_state(config(tmp_path), TrainingState(data=data[0]), {})
    assert resume_with(config(tmp_path), data[1]) is not None
    with pytest.raises(UsageError, match=r"^data: 'elsewhere' given.* has no fingerprint"):
        resume_with(config(tmp_path, data=Path("elsewhere")), data[1])


def test_a_mapping_that_lost_a_name_is_refused(tmp_path: Path) -> None:
    both = LossConfig(class_weights={"cat": 2.0, "dog": 3.0})
    save_state(config(tmp_path, loss=both), TrainingState(), {})
    assert resume(config(tmp_path, loss=both)) is not None
    for weights in ({"cat": 2.0}, None):
        with pytest.raises(UsageError, match=r"^loss\.class_weights.*None given"):
            resume(config(tmp_path, loss=LossConfig(class_weights=weights)))


def test_equal_configs_with_sequences_are_equal(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"augment": AugmentConfig(resized_crop=(0.35, 1.0))}
    save_state(config(tmp_path, **changes), TrainingState(), {})
    assert resume(config(tmp_path, **changes)) is not None


def test_every_field_of_the_state_is_saved(tmp_path: Path) -> None:
    """Under the name that it has always had in files."""
    names = {field.name for field in dataclasses.fields(TrainingState)}
    names = names - {"top_models"} | {"kept"}
    save_state(config(tmp_path), TrainingState(), {})
    content = torch.load(saved(tmp_path)[0], weights_only=True)["progress"]
    assert set(content) == names


def test_a_damaged_state_is_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (7, 14):
        save_state(config(tmp_path), TrainingState(step=step), {"w": torch.zeros(1000)})
    newest = saved(tmp_path)[0]
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1  # inside the tensor: torch itself would load it
    newest.write_bytes(data)
    loaded = resume(config(tmp_path))
    assert loaded is not None
    assert loaded[0].step == 7
    assert f"{newest} is damaged" in capsys.readouterr().err
    for path in saved(tmp_path):
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DistclsError, match="no state is intact"):
        resume(config(tmp_path))


def test_folders_in_the_places_of_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    now = config(tmp_path)
    folder = now.out / "last" / f"step_00000009.{'0' * 32}.pth"
    folder.mkdir(parents=True)
    (now.out / ".best.pth.x.part").mkdir()
    with pytest.raises(DistclsError, match="no state is intact"):
        resume(now)
    assert f"{folder} is damaged (Is a directory)" in capsys.readouterr().err
    save_state(now, TrainingState(step=7), {})
    save_state(now, TrainingState(step=10), {})
    assert folder.is_dir()
    loaded = resume(now)
    assert loaded is not None
    assert loaded[0].step == 10
    assert [path.name[:13] for path in saved(tmp_path)] == [
        "step_00000010",
        "step_00000009",
        "step_00000007",
    ]


def test_a_file_in_the_place_of_the_states_folder(tmp_path: Path) -> None:
    now = config(tmp_path)
    now.out.mkdir()
    (now.out / "last").write_text("")
    with pytest.raises(UsageError, match="last is a file, expected the folder of a run's states"):
        resume(now)


def write_state(now: TrainConfig, content: object, step: int = 1) -> Path:
    """A file in a state's place, its checksum right."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    checksum = hashlib.sha256(buffer.getvalue()).hexdigest()[:32]
    path = now.out / "last" / f"step_{step:08d}.{checksum}.pth"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(buffer.getvalue())
    return path


def test_another_file_in_the_states_place_is_refused(tmp_path: Path) -> None:
    now = config(tmp_path)
    write_state(now, {"w": torch.zeros(3)})
    with pytest.raises(UsageError, match=r"pth: not the state of a run"):
        resume(now)


def changed(now: TrainConfig, **progress: Any) -> dict[str, Any]:
    """A state's content with other values of its fields."""
    save_state(now, TrainingState(step=1), {})
    [path] = states(now.out / "last")
    content: dict[str, Any] = torch.load(path, weights_only=True)
    path.unlink()
    content["progress"] |= progress
    return content


HOSTILE = [
    "../notes.pth",
    "/etc/notes.pth",
    "a/b.pth",
    "..",
    "",
    "config.yaml",
    BEST,
    "a\\b.pth",
    7,
]


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("resumed", ["auto", "from a file"])
def test_a_state_that_names_files_elsewhere_is_refused(
    name: object, resumed: str, tmp_path: Path
) -> None:
    """Else the next model better than it would delete them."""
    now = config(tmp_path)
    content = changed(now, kept=[(0.5, "fine.pth"), (0.1, name)])
    if resumed == "auto":
        write_state(now, content)
    else:
        path = tmp_path / "model.pth"
        save_tensors(path, {"card": {}, "model": {}, "state": content})
        now = dataclasses.replace(now, resume=str(path))
    with pytest.raises(UsageError, match=r"expected a plain file name ending in \.pth") as caught:
        resume(now)
    assert repr(name) in str(caught.value)
    assert "\n" not in str(caught.value)


JUNK: list[tuple[str, object]] = [
    *((name, value) for name in ("epoch", "step", "epoch_step") for value in ("3", -1, 1.5, True)),
    *(("step", value) for value in (None, 2**60, torch.ones(3), [[1]])),
    *((name, value) for name in ("loss_sum", "right_sum") for value in (None, "x", [1.0])),
    *(("counted", value) for value in (-1, 2.0)),
    *(("accumulate", value) for value in (0, "2", 2.0)),
    *(("evaluation_batch", value) for value in (-5, "x" * 500)),
    *(("seconds", value) for value in (math.inf, NAN, -1.0, "an hour")),
    *(("best_score", value) for value in ("best", [0.5])),
    *(("best_epoch", value) for value in (None, -1, 7)),
    *(("epochs_since_best", value) for value in ("0", 10**6)),
    *(("history", value) for value in (None, {}, [1], [{"epoch": "1"}], [{"lr": 1.0}])),
    *(("history", [{"epoch": 1, **row}]) for row in ({3: 1.0}, {"lr": "x"})),
    *(("kept", value) for value in (None, "ab", [1], [(0.5,)], [("x", "a.pth")])),
    *(("data", value) for value in ("photos", {}, {"train": 3})),
]


@pytest.mark.parametrize(("name", "value"), JUNK)
def test_junk_in_a_field_is_one_line(name: str, value: object, tmp_path: Path) -> None:
    now = config(tmp_path)
    write_state(now, changed(now, **{name: value}))
    with pytest.raises(
        UsageError, match=r"pth: its training state .*damaged or was tampered with$"
    ) as caught:
        resume(now)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("ema_updates", value) for value in ("x", -1, 1.5)),
        *(("average", value) for value in ("x", {"taken": "x"}, {"taken": None})),
        *(("schedule", value) for value in ("x", {"falls": "x"})),
        *(("recent_losses", value) for value in ("x", torch.ones(2, 2))),
    ],
)
def test_junk_beside_the_tensors_is_one_line(name: str, value: object, tmp_path: Path) -> None:
    now = config(tmp_path)
    content = changed(now)
    content["tensors"][name] = value
    write_state(now, content)
    with pytest.raises(
        UsageError, match=rf"its training state has {name}: .*damaged or was tampered with$"
    ):
        resume(now)


@pytest.mark.parametrize(
    ("part", "value"),
    [
        *(("config", value) for value in (None, 3, "a: [", "- 1", "epochs: many", "{1: {2: 3}}")),
        *(("progress", value) for value in (None, [1], {7: 1})),
        *(("tensors", value) for value in (None, [])),
    ],
)
def test_junk_in_the_place_of_a_part_is_one_line(part: str, value: object, tmp_path: Path) -> None:
    now = config(tmp_path)
    write_state(now, changed(now) | {part: value})
    with pytest.raises(UsageError, match=r"^[^\n]*step_00000001[^\n]*$"):
        resume(now)


@pytest.mark.parametrize(
    "change",
    [
        {"kind": 3},
        {"classes": [1, 2]},
        {"classes": "cat"},
        {"pack_bytes": -1},
        {"pack": "abc"},
        {"train": None},
        {"val": {"images": 3}},
        {"more": 1},
    ],
)
def test_junk_in_the_fingerprint_is_one_line(change: dict[str, Any], tmp_path: Path) -> None:
    now = config(tmp_path)
    plain = dataclasses.asdict(fingerprint())
    write_state(now, changed(now, data=plain))
    assert resume_with(now, fingerprint()) is not None
    write_state(now, changed(now, data=plain | change), step=2)
    with pytest.raises(UsageError, match=r"its training state has a fingerprint of its data with"):
        resume_with(now, fingerprint())


def test_a_state_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    now = config(tmp_path)
    write_state(now, changed(now, moon="full"))
    with pytest.raises(UsageError, match=r"a field 'moon' that this version does not know"):
        resume(now)


def test_the_newest_states_are_kept_and_leftovers_go(tmp_path: Path) -> None:
    now = config(tmp_path, checkpoint=CheckpointConfig(keep_last=3))
    last = now.out / "last"
    last.mkdir(parents=True)
    leftovers = [
        last / ".step_00000003.abc.pth.xyz.part",
        now.out / ".best.pth.xyz.part",
        now.out / ".mobilenet_e1_0.5.pth.xyz.part",
    ]
    for path in leftovers:
        path.write_bytes(b"half")
    other = CheckpointManager(now, main_process=False)
    assert all(path.exists() for path in leftovers)  # the main process may be writing them
    other.close()
    with contextlib.closing(CheckpointManager(now)) as manager:
        assert not any(path.exists() for path in leftovers)
        for step in (5, 10, 100, 15, 20):  # after 100 the run has gone back: that one was damaged
            manager.save(TrainingState(step=step), {})
    progress = [torch.load(path, weights_only=True)["progress"] for path in saved(tmp_path)]
    assert [values["step"] for values in progress] == [20, 15, 10]


def test_a_state_is_a_copy_of_its_moment(tmp_path: Path) -> None:
    weights = torch.zeros(1000, 1000)
    manager = CheckpointManager(config(tmp_path))
    manager.save(TrainingState(step=1), {"w": weights})
    weights += 1  # training goes on while the state is written
    manager.close()
    content = torch.load(saved(tmp_path)[0], weights_only=True)
    assert float(content["tensors"]["w"].sum()) == 0


def test_other_processes_than_the_main_one_write_nothing(tmp_path: Path) -> None:
    now = config(tmp_path, checkpoint=CheckpointConfig(every_steps=1))
    with contextlib.closing(CheckpointManager(now, main_process=False)) as manager:
        assert not manager.due(1000)
        manager.save(TrainingState(step=1), {})
    assert not now.out.exists()


@pytest.mark.parametrize(
    ("options", "due"),
    [
        (CheckpointConfig(every_steps=5, every_minutes=None), [False, True]),
        (CheckpointConfig(every_minutes=None), [False, False]),
        (CheckpointConfig(every_minutes=1e-9), [True, True]),
        (CheckpointConfig(every_minutes=60), [False, False]),
    ],
)
def test_when_a_state_is_due(tmp_path: Path, options: CheckpointConfig, due: list[bool]) -> None:
    now = config(tmp_path, checkpoint=options)
    save_state(now, TrainingState(step=100), {})
    with contextlib.closing(CheckpointManager(now)) as manager:
        assert manager.resume() is not None
        assert [manager.due(104), manager.due(105)] == due

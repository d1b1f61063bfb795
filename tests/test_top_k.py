"""The top-k models: which epochs' are saved beside best.pth, and what is in the files."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
from pathlib import Path

import pytest
import torch

from distcls.errors import BadValue, UsageError
from distcls.imaging import Preprocess
from distcls.model_card import ModelCard
from distcls.models.checkpoint import load_tensors, open_checkpoint
from distcls.task import Task
from distcls.training.checkpointing import CheckpointManager, EpochModel, TrainingState
from distcls.training.config import CheckpointConfig, MonitorConfig, TrainConfig
from distcls.training.run import train

SCORES = [0.5, 0.7, 0.6, 0.7, 0.9, math.nan]


CARD = ModelCard(
    architecture={"name": "simple_nn"},
    task=Task(classes=("cat", "dog")),
    preprocess=Preprocess(size=(8, 8)),
)


def files_after(
    folder: Path,
    options: CheckpointConfig,
    metric: str = "top1",
    scores: list[float] = SCORES,
    losses: list[float] | None = None,
) -> list[str]:
    """Names of the top-k models that are left, with `scores` and `losses` epoch by epoch."""
    monitor = MonitorConfig(metric=metric)
    config = TrainConfig(data=folder, out=folder / "run", checkpoint=options, monitor=monitor)
    state = TrainingState()
    with contextlib.closing(CheckpointManager(config)) as manager:
        for number, score in enumerate(scores, start=1):
            state.epoch, state.step = number, 10 * number
            state.history.append({"epoch": number, "val_loss": (losses or scores)[number - 1]})
            best = state.judge(score, monitor)
            weights = {"w": torch.tensor(score)}
            model = EpochModel(weights=weights, card=CARD, score=score, best=best)
            manager.save_epoch(state, {}, model)
            names = {path.name for path in config.out.glob("*.pth")} - {"best.pth"}
            assert names == {file for _, file in state.top_models}
            for _, file in state.top_models:
                assert (config.out / file).stat().st_size > 100
    best_score = torch.load(config.out / "best.pth", weights_only=True)["model"]["w"]
    assert float(best_score) == pytest.approx(state.best_score)
    return sorted(names)


def test_an_epoch_is_saved_with_its_state_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill between any two leaves a state that the next run starts from, and writes again."""
    written: list[str] = []
    replace = Path.replace

    def recording(self: Path, target: Path) -> Path:
        written.append(target.name)
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", recording)
    files_after(tmp_path, CheckpointConfig(filename="e{epoch}.pth"), scores=[0.5])
    *first, state = written
    assert first == ["best.pth", "e1.pth", "history.csv"]
    assert re.fullmatch(r"step_00000010\.[0-9a-f]{32}\.pth", state)


@pytest.mark.parametrize(
    ("save_best_only", "number", "epochs"),
    [
        (True, 1, [5]),
        (True, 2, [2, 5]),
        (True, None, [1, 2, 5]),
        (True, 0, []),
        (False, 1, [5]),
        (False, 3, [2, 4, 5]),
        (False, None, [1, 2, 3, 4, 5, 6]),
    ],
)
def test_the_best_few_are_saved(
    save_best_only: bool, number: int | None, epochs: list[int], tmp_path: Path
) -> None:
    options = CheckpointConfig(
        save_best_only=save_best_only, save_top_k=number, filename="e{epoch}.pth"
    )
    assert files_after(tmp_path, options) == [f"e{epoch}.pth" for epoch in epochs]


def test_a_loss_is_better_when_smaller(tmp_path: Path) -> None:
    options = CheckpointConfig(save_best_only=False, save_top_k=2, filename="{metric}_{step}.pth")
    assert files_after(tmp_path, options, "loss") == ["loss_10.pth", "loss_30.pth"]


@pytest.mark.parametrize(("number", "epochs"), [(1, [2]), (2, [1, 2])])
def test_of_equal_scores_the_one_in_best_pth_is_saved(
    number: int, epochs: list[int], tmp_path: Path
) -> None:
    options = CheckpointConfig(save_best_only=False, save_top_k=number, filename="e{epoch}.pth")
    saved = files_after(tmp_path, options, scores=[0.5, 0.5, 0.5], losses=[0.3, 0.2, 0.4])
    assert saved == [f"e{epoch}.pth" for epoch in epochs]


def test_the_default_name_tells_model_epoch_and_score(tmp_path: Path) -> None:
    assert files_after(tmp_path, CheckpointConfig()) == ["mobilenet_v3_small_e5_0.90000.pth"]


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("{epoch}", 1),
        ("{epok}.pth", 1),
        ("{epoch:q}.pth", 1),
        ("a/{epoch}.pth", 1),
        ("best.pth", 1),
        ("{score:.3f}.pth", 3),
        ("{}.pth", 1),
        ("{epoch!r}.pth", 1),
        ("{epoch:c}.pth", 1),
        ("{epoch:>1000000000}.pth", 1),
        ("{score:.1000000000f}.pth", 1),
        ("{epoch:{step}}.pth", 1),
        ("{model.__class__}.pth", 1),
        ("{epoch:/>3}.pth", 1),
        ("a\\{epoch}.pth", 1),
        ("a\0.pth", 1),
        ("\n.pth", 1),
        ("a" * 300 + ".pth", 1),
    ],
)
def test_names_that_cannot_work_are_refused(name: str, number: int) -> None:
    with pytest.raises(BadValue, match=r"^filename: ") as caught:
        CheckpointConfig(filename=name, save_top_k=number)
    assert len(str(caught.value)) < 300


def test_formats_of_names() -> None:
    CheckpointConfig(filename="{model:_>20}-{epoch:03d}-{step:,}-{metric}-{score:+.2%}.pth")


@pytest.fixture(scope="module")
def run(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """A short run that has saved every epoch's model with its state."""
    options = CheckpointConfig(
        save_best_only=False, save_top_k=None, save_training_state=True, filename="e{epoch}.pth"
    )
    out = tmp_path_factory.mktemp("kept") / "run"
    config = TrainConfig(
        data=digits, out=out, epochs=3, limit=60, batch_size=20, checkpoint=options, quiet=True
    )
    train(config)
    return config


def test_a_top_k_model_loads_as_best_pth_does(run: TrainConfig) -> None:
    assert sorted(path.name for path in run.out.glob("e*.pth")) == ["e1.pth", "e2.pth", "e3.pth"]
    assert open_checkpoint(run.out / "e2.pth").card.training["epoch"] == 2
    best = open_checkpoint(run.out / "best.pth")
    own = open_checkpoint(run.out / f"e{best.card.training['epoch']}.pth")
    for one, other in zip(best.model.parameters(), own.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_run_goes_on_from_the_state_in_a_model_file(run: TrainConfig, tmp_path: Path) -> None:
    again = dataclasses.replace(run, out=tmp_path / "again", resume=str(run.out / "e1.pth"))
    assert train(again).epochs == 3
    one, other = load_tensors(run.out / "e3.pth"), load_tensors(again.out / "e3.pth")
    assert not [
        name for name in one["model"] if not torch.equal(one["model"][name], other["model"][name])
    ]
    history = [
        path.joinpath("history.csv").read_text().splitlines() for path in (run.out, again.out)
    ]
    assert [line.split(",")[:4] for line in history[0]] == [
        line.split(",")[:4] for line in history[1]
    ]


def test_a_model_without_its_state_is_nothing_to_resume_from(
    run: TrainConfig, tmp_path: Path
) -> None:
    bare = dataclasses.replace(run, out=tmp_path / "again", resume=str(run.out / "best.pth"))
    with pytest.raises(UsageError, match="holds no state to resume from"):
        train(bare)
    assert not (tmp_path / "again" / "metrics.jsonl").exists()


def test_the_best_model_is_written_once(run: TrainConfig, tmp_path: Path) -> None:
    out = tmp_path / "plain"
    train(dataclasses.replace(run, out=out, epochs=2, checkpoint=CheckpointConfig()))
    [kept] = out.glob("mobilenet*.pth")
    assert kept.samefile(out / "best.pth")

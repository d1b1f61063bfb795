"""What a search combines: grids, draws, and configs that are checked before anything runs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distcls.errors import UsageError
from distcls.launch.search import main, ranking, table
from distcls.launch.search_space import (
    SearchConfig,
    SearchSpace,
    Trial,
    command,
    gpus_of,
    plan,
    read_grid,
)
from distcls.training.config import LossConfig, MonitorConfig, TrainConfig

BASE = {"data": Path("digits"), "out": Path("found"), "epochs": 3, "quiet": True}


def values(trials: list[Trial]) -> list[dict[str, str]]:
    return [trial.values for trial in trials]


def configs(trials: list[Trial]) -> list[TrainConfig]:
    """The configs of trials of one run each."""
    found = []
    for trial in trials:
        [config] = trial.runs
        found.append(config)
    return found


def planned(*grid: str, **options: Any) -> list[Trial]:
    config: dict[str, Any] = {**BASE, **options, "grid": grid}
    return plan(SearchSpace(SearchConfig(**config)))


def test_a_grid_is_every_combination() -> None:
    trials = planned("lr=1e-3,3e-3", "augment.mixup=0,0.2")
    assert values(trials) == [
        {"lr": lr, "augment.mixup": mixup} for lr in ("1e-3", "3e-3") for mixup in ("0", "0.2")
    ]
    assert [config.lr for config in configs(trials)] == [1e-3, 1e-3, 3e-3, 3e-3]
    assert [config.augment.mixup for config in configs(trials)] == [0, 0.2, 0, 0.2]
    assert trials[2].name == "003-lr=3e-3-mixup=0"
    for trial, config in zip(trials, configs(trials), strict=True):
        assert config.out == Path("found") / trial.name
        assert (config.epochs, config.resume) == (3, "auto")
        assert config.json
        assert not config.quiet


def test_all_else_is_the_base() -> None:
    loss = LossConfig(class_weights={"a.b": 2.0, "c": 0.5})
    first = configs(planned("lr=1,2", loss=loss))[0]
    assert type(first) is TrainConfig
    assert first.loss == loss
    [one, other] = configs(planned("loss.class_weights=balanced;a=2,b=3"))
    assert one.loss.class_weights == "balanced"
    assert other.loss.class_weights == {"a": 2.0, "b": 3.0}


def test_values_may_hold_commas_and_spaces() -> None:
    assert read_grid(["augment.resized-crop=0.3,1; 0.5,1"]) == {
        "augment.resized_crop": ["0.3,1", "0.5,1"]
    }
    [first, _] = planned("schedule.warmup=2 epochs,5%")
    assert first.runs[0].schedule.warmup == "2 epochs"
    assert first.name == "001-warmup=2_epochs"


def test_a_key_under_its_old_name_is_taken_with_a_warning(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert read_grid(["average.last=2,3"]) == {"average.last_epochs": ["2", "3"]}
    assert "grid: average.last is now average.last_epochs; the old" in capsys.readouterr().err


def test_random_draws_are_log_uniform_and_stay_in_their_range() -> None:
    trials = planned("model.dropout=0,0.2", range=("lr=1e-4..1e-2", "batch_size=4..64"), random=150)
    rates = np.log10([config.lr for config in configs(trials)])
    sizes = [config.batch_size for config in configs(trials)]
    assert rates.min() >= -4
    assert rates.max() <= -2
    np.testing.assert_allclose(np.histogram(rates, 4, (-4, -2))[0] / 150, 0.25, atol=0.09)
    assert min(sizes) == 4
    assert 60 <= max(sizes) <= 64
    assert np.median(sizes) == pytest.approx(16, abs=4)
    dropouts = [config.model.dropout for config in configs(trials)]
    assert dropouts.count(0.2) / 150 == pytest.approx(0.5, abs=0.1)


def test_more_draws_begin_with_the_same_and_the_seed_decides() -> None:
    options: dict[str, Any] = {"range": ("lr=1e-4..1e-2",)}
    few, many = (planned("epochs=1,2", random=count, **options) for count in (3, 6))
    assert values(few) == values(many)[:3]
    assert values(planned("epochs=1,2", seed=1, random=3, **options)) != values(few)


def test_draws_from_a_grid_are_all_different() -> None:
    trials = planned("lr=1,2,3", "epochs=1,2", random=6)
    assert len({tuple(found.items()) for found in values(trials)}) == 6
    with pytest.raises(UsageError, match="random: 7 of only 6 combinations"):
        planned("lr=1,2,3", "epochs=1,2", random=7)
    with pytest.raises(UsageError, match="random: 5, but the ranges hold only about 2"):
        planned(range=("epochs=1..2",), random=5)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "grid: () is not valid, expected KEY=VALUE,VALUE at least once"),
        (["--grid", "lr"], "grid: 'lr' is not valid, expected KEY=VALUE,VALUE"),
        (["--grid", "lr=1,,2"], "grid: 'lr=1,,2' is not valid"),
        (["--grid", "lr=1,1"], "grid: lr: 1 is given twice"),
        (["--grid", "lr=1", "--grid", "lr=2"], "grid: lr is given twice"),
        (["--grid", "lrr=1"], "grid: unknown key 'lrr'; did you mean 'lr'?"),
        (["--grid", "augment.mixupp=1"], "did you mean 'augment.mixup'?"),
        (["--grid", "lr=1,fast"], "trial 002: lr: 'fast' is not valid, expected a number"),
        (["--grid", "lr=1,-1"], "trial 002: lr: -1.0 is not valid"),
        (["--grid", "out=a,b"], "grid: out cannot be searched: each trial has a folder of its own"),
        (["--grid", "monitor.metric=loss,top1"], "trials are ranked by one metric"),
        (["--range", "lr=1..2"], "expected none without --random N"),
        (
            ["--range", "lr=1", "--random", "2"],
            "range: 'lr=1' is not valid, expected KEY=LOW..HIGH",
        ),
        (["--range", "lr=0..2", "--random", "2"], "expected 0 < LOW < HIGH"),
        (["--range", "model.name=1..2", "--random", "2"], "range: model.name is not a number"),
        (["--grid", "lr=1", "--range", "lr=1..2", "--random", "2"], "range: lr is given twice"),
        (["--grid", "lr=1,2", "--random", "0"], "random: 0 is not valid"),
        (["--grid", "lr=1", "--random", "1", "--trials", "1"], "random: 1 is not valid"),
        (["--grid", "lr=1", "--random", "1", "--sampler", "tpe"], "random: 1 is not valid"),
        (["--grid", "lr=1", "--trials", "1"], "trials: 1 is not valid, expected null with grid"),
        (["--grid", "lr=1", "--sampler", "tpe"], "trials: None is not valid, expected at least 1"),
        (["--grid", "lr=1", "--sampler", "cmaes"], "expected one of grid, random, tpe or null"),
        (["--grid", "lr=1", "--pruner", "fast"], "expected one of none, median, hyperband"),
        (["--grid", "lr=1", "--jobs", "0"], "jobs: 0 is not valid, expected at least 1"),
        (["--grid", "lr=1", "--folds", "1"], "folds: 1 is not valid, expected at least 2, or null"),
        (["--grid", "lr=1", "--folds", "2"], "expected a path with {fold}"),
        (["--range", "epochs=1.2..1.8", "--random", "2"], "holds no whole number"),
        (["--grid", "lr=1,2", "--resume", "a.pth"], "resume: 'a.pth' is not valid"),
        (["--grid", "lr=1,2", "--learning-rate", "1"], "unexpected argument '--learning-rate'"),
        # contradictions between a value and all else
        (
            ["--grid", "augment.cutmix_probability=0.5"],
            "augment.cutmix_probability: 0.5 is not valid",
        ),
        (["--grid", "model.name=resnet18,resnet19"], "model.name"),
    ],
)
def test_wrong_searches_are_refused_before_the_first_trial(
    digits: Path, tmp_path: Path, flags: list[str], message: str
) -> None:
    with pytest.raises(UsageError) as caught:
        main(["--data", str(digits), "--out", str(tmp_path / "found"), *flags])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_dataset_that_is_not_there(tmp_path: Path) -> None:
    flags = ["--out", str(tmp_path / "found"), "--grid", "lr=1,2"]
    with pytest.raises(UsageError, match="no such dataset directory"):
        main(["--data", str(tmp_path / "none"), *flags])
    assert not list(tmp_path.iterdir())


def test_processes_decide_the_launcher() -> None:
    [alone] = configs(planned("lr=1"))
    assert command(alone)[1:] == ["-m", "distcls.train", "--config", "found/001-lr=1.yaml"]
    [pair] = configs(planned("lr=1", processes=2))
    words = command(pair)
    assert words[1:3] == ["-m", "accelerate.commands.launch"]
    assert words[words.index("--num_processes") + 1] == "2"
    assert words[-4:] == command(alone)[1:]


def test_several_trials_at_a_time_share_cores_and_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distcls.launch.search_space.available_cores", lambda: 12)
    [pair] = configs(planned("lr=1", processes=2))
    assert command(pair, jobs=3)[-4:] == ["--threads", "2", "--loader.workers", "2"]
    [own] = configs(planned("lr=1", threads=5))
    assert command(own, jobs=3)[-3:] == ["found/001-lr=1.yaml", "--loader.workers", "4"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,7")
    assert [gpus_of(slot, 2, 1) for slot in (0, 1)] == ["4", "5"]
    assert [gpus_of(slot, 2, 2) for slot in (0, 1)] == ["4,5", "7,4"]
    assert gpus_of(0, 1, 2) is None
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpus_of(1, 2, 1) is None


def test_a_run_for_each_fold() -> None:
    [first, _] = planned("lr=1,2", data=Path("cut/fold{fold}"), folds=2)
    assert [str(run.data) for run in first.runs] == ["cut/fold1", "cut/fold2"]
    assert [str(run.out) for run in first.runs] == [f"found/001-lr=1/fold{k}" for k in (1, 2)]
    with pytest.raises(UsageError, match=r"data: 'digits' is not valid, expected .* \{fold\}"):
        planned("lr=1,2", folds=2)


def test_tpe_is_checked_at_the_corners_of_its_space() -> None:
    options: dict[str, Any] = {"sampler": "tpe", "trials": 9, "range": ("epochs=2..5.5",)}
    assert values(planned("lr=1,2", **options)) == [
        {"lr": lr, "epochs": epochs} for lr in ("1", "2") for epochs in ("2", "5")
    ]
    with pytest.raises(UsageError, match=r"average\.last_epochs: 4 is not valid, expected at most"):
        planned("average.last_epochs=2,4", **options)


@pytest.mark.parametrize(("metric", "best"), [("top1", "0.9"), ("loss", "0.1")])
def test_the_ranking_follows_the_metric(metric: str, best: str) -> None:
    config: dict[str, Any] = {**BASE, "monitor": MonitorConfig(metric=metric), "grid": ("lr=1,2",)}
    states = ("complete", "complete", "complete", "failed", "pruned")
    rows = [
        {
            **{"trial": f"00{number}-lr={number}", "lr": str(number), "state": state, "std": ""},
            **{"best_score": score, "best_epoch": "2", "seconds": "1.0"},
        }
        for number, (score, state) in enumerate(
            zip(("nan", "0.1", "0.9", "", "0.95"), states, strict=True), 1
        )
    ]
    ranked = ranking(SearchConfig(**config), rows)
    assert len(ranked) == 3
    assert ranked[0]["best_score"] == best
    assert math.isnan(float(ranked[-1]["best_score"]))
    lines = table(SearchConfig(**config), rows)
    assert lines[0].split() == ["rank", metric, "epoch", "seconds", "lr"]
    assert lines[1].split()[:3] == ["1", f"{best}0000", "2"]
    assert [line.split()[0] for line in lines[1:]] == ["1", "2", "3", "pruned"]

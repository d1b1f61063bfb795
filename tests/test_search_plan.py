"""What a search combines: grids, draws, and configs that are checked before anything runs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distcls.errors import UsageError
from distcls.launch.search import (
    OWN,
    SearchConfig,
    Trial,
    command,
    main,
    plan,
    ranking,
    read_grid,
    table,
)
from distcls.training.config import LossConfig, MonitorConfig, TrainConfig

BASE = TrainConfig(data=Path("digits"), out=Path("found"), epochs=3, quiet=True)


def values(trials: list[Trial]) -> list[dict[str, str]]:
    return [trial.values for trial in trials]


def planned(*grid: str, base: TrainConfig = BASE, **options: Any) -> list[Trial]:
    return plan(base, grid, options.pop("ranges", ()), random=options.pop("random", None))


def test_a_grid_is_every_combination() -> None:
    trials = planned("lr=1e-3,3e-3", "augment.mixup=0,0.2")
    assert values(trials) == [
        {"lr": lr, "augment.mixup": mixup} for lr in ("1e-3", "3e-3") for mixup in ("0", "0.2")
    ]
    assert [trial.config.lr for trial in trials] == [1e-3, 1e-3, 3e-3, 3e-3]
    assert [trial.config.augment.mixup for trial in trials] == [0, 0.2, 0, 0.2]
    assert trials[2].name == "003-lr=3e-3-mixup=0"
    for trial in trials:
        assert trial.config.out == Path("found") / trial.name
        assert (trial.config.epochs, trial.config.resume) == (3, "auto")
        assert trial.config.json
        assert not trial.config.quiet


def test_all_else_is_the_base(tmp_path: Path) -> None:
    loss = LossConfig(class_weights={"a.b": 2.0, "c": 0.5})
    base = SearchConfig(data=tmp_path, out=tmp_path, loss=loss, grid=("lr=1,2",))
    [first, _] = plan(base, base.grid, (), random=None, own=OWN)
    assert type(first.config) is TrainConfig
    assert first.config.loss == loss
    [one, other] = planned("loss.class_weights=balanced;a=2,b=3", base=first.config)
    assert one.config.loss.class_weights == "balanced"
    assert other.config.loss.class_weights == {"a": 2.0, "b": 3.0}


def test_values_may_hold_commas_and_spaces() -> None:
    assert read_grid(["augment.resized-crop=0.3,1; 0.5,1"]) == {
        "augment.resized_crop": ["0.3,1", "0.5,1"]
    }
    [first, _] = planned("schedule.warmup=2 epochs,5%")
    assert first.config.schedule.warmup == "2 epochs"
    assert first.name == "001-warmup=2_epochs"


def test_random_draws_are_log_uniform_and_stay_in_their_range() -> None:
    trials = planned(
        "model.dropout=0,0.2", ranges=("lr=1e-4..1e-2", "batch_size=4..64"), random=300
    )
    rates = np.log10([trial.config.lr for trial in trials])
    sizes = [trial.config.batch_size for trial in trials]
    assert rates.min() >= -4
    assert rates.max() <= -2
    np.testing.assert_allclose(np.histogram(rates, 4, (-4, -2))[0] / 300, 0.25, atol=0.08)
    assert min(sizes) == 4
    assert 60 <= max(sizes) <= 64
    assert np.median(sizes) == pytest.approx(16, abs=4)
    dropouts = [trial.config.model.dropout for trial in trials]
    assert dropouts.count(0.2) / 300 == pytest.approx(0.5, abs=0.1)


def test_more_draws_begin_with_the_same_and_the_seed_decides() -> None:
    options: dict[str, Any] = {"ranges": ("lr=1e-4..1e-2",)}
    few, many = (planned("epochs=1,2", random=count, **options) for count in (3, 6))
    assert values(few) == values(many)[:3]
    other = TrainConfig(data=BASE.data, out=BASE.out, seed=1)
    assert values(planned("epochs=1,2", base=other, random=3, **options)) != values(few)


def test_draws_from_a_grid_are_all_different() -> None:
    trials = planned("lr=1,2,3", "epochs=1,2", random=6)
    assert len({tuple(found.items()) for found in values(trials)}) == 6
    with pytest.raises(UsageError, match="random: 7 of only 6 combinations"):
        planned("lr=1,2,3", "epochs=1,2", random=7)
    with pytest.raises(UsageError, match="random: 5, but the ranges hold only about 2"):
        planned(ranges=("epochs=1..2",), random=5)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "grid: () is not valid, expected KEY=VALUE,VALUE at least once"),
        (["--grid", "lr"], "grid: 'lr' is not valid, expected KEY=VALUE,VALUE"),
        (["--grid", "lr=1,,2"], "grid: 'lr=1,,2' is not valid"),
        (["--grid", "lr=1,1"], "grid: lr: 1 stands there twice"),
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
        (["--range", "model.name=1..2", "--random", "2"], "range: model.name is no number"),
        (["--grid", "lr=1", "--range", "lr=1..2", "--random", "2"], "range: lr is given twice"),
        (["--grid", "lr=1,2", "--random", "0"], "random: 0 is not valid"),
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
    [alone] = planned("lr=1")
    assert command(alone)[1:] == ["-m", "distcls.train", "--config", "found/001-lr=1.yaml"]
    [pair] = planned("lr=1", base=TrainConfig(data=BASE.data, out=BASE.out, processes=2))
    words = command(pair)
    assert words[1:3] == ["-m", "accelerate.commands.launch"]
    assert words[words.index("--num_processes") + 1] == "2"
    assert words[-4:] == command(alone)[1:]


@pytest.mark.parametrize(("metric", "best"), [("top1", "0.9"), ("loss", "0.1")])
def test_the_ranking_follows_the_metric(metric: str, best: str) -> None:
    monitor = MonitorConfig(metric=metric)
    base = TrainConfig(data=BASE.data, out=BASE.out, monitor=monitor)
    trials = planned("lr=1,2,3,4", base=base)
    rows = {
        trial.name: {
            "trial": trial.name,
            **trial.values,
            **{"best_score": score, "best_epoch": "2", "seconds": "1.0", "exit_code": code},
        }
        for trial, score, code in zip(
            trials, ("nan", "0.1", "0.9", ""), ("0", "0", "0", "1"), strict=True
        )
    }
    ranked = ranking(trials, rows)
    assert len(ranked) == 3
    assert ranked[0]["best_score"] == best
    assert math.isnan(float(ranked[-1]["best_score"]))
    lines = table(metric, trials, ranked)
    assert lines[0].split() == ["rank", metric, "epoch", "seconds", "lr"]
    assert lines[1].split()[:3] == ["1", f"{best}0000", "2"]

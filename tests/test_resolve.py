"""The resolved config: every default filled in, the same run from it after defaults change."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from distcls.commands.train import main
from distcls.config import parse, read_yaml
from distcls.errors import UsageError
from distcls.models import config as model_config
from distcls.models.checkpoint import load_tensors
from distcls.registry import Registry
from distcls.training import inputs
from distcls.training.config import LOSSES, OPTIMIZERS, POLICIES, OptimizerConfig, TrainConfig
from distcls.training.optim import filled_optimizer
from distcls.training.resolve import require_usable
from distcls.training.run import train
from distcls.training.schedule import SCHEDULES, ScheduleConfig

OLD = Path(__file__).parent / "fixtures" / "v076daf9"

SMALL = ("--epochs", "2", "--limit", "48", "--batch-size", "16", "--quiet")
CNN = ("--model.name", "simple_cnn")
CASES: dict[str, list[str]] = {
    "as usual": [*CNN],
    "torchvision": ["--epochs", "1"],
    "sgd": [*CNN, "--optimizer.name", "sgd", "--schedule.name", "step"],
    "timm": [*CNN, "--optimizer.name", "lamb", "--schedule.name", "onecycle"],
    "mixed": [
        *(*CNN, "--augment.mixup", "0.2", "--augment.cutmix", "1"),
        *("--augment.policy", "randaugment", "--loss.name", "focal"),
        *("--optimizer.name", "ranger", "--schedule.name", "restarts"),
    ],
}


def run(digits: Path, out: Path, *flags: str) -> dict[str, Any]:
    main(["--data", str(digits), "--out", str(out), *SMALL, *flags])
    return load_tensors(out / "best.pth")


def again(first: Path, out: Path, *flags: str) -> dict[str, Any]:
    """The run that the config.yaml of another gives."""
    main(["--config", str(first / "config.yaml"), "--out", str(out), *flags])
    return load_tensors(out / "best.pth")


def equal(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(torch.equal(one["model"][name], other["model"][name]) for name in one["model"])


def changed(registry: Registry[Any], name: str, patch: pytest.MonkeyPatch, **values: Any) -> None:
    for key, value in values.items():
        assert registry.find(name).defaults[key] != value
        patch.setitem(registry.find(name).defaults, key, value)


@pytest.fixture
def other_defaults(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A later version, which has other defaults."""
    changed(OPTIMIZERS, "adamw", monkeypatch, weight_decay=0.5, beta1=0.5, eps=1e-2)
    changed(OPTIMIZERS, "sgd", monkeypatch, momentum=0.1, nesterov=True)
    changed(OPTIMIZERS, "ranger", monkeypatch, weight_decay=0.5, beta2=0.5)
    changed(SCHEDULES, "cosine", monkeypatch, warmup="60%", final=0.5)
    changed(SCHEDULES, "step", monkeypatch, every="2 steps", factor=0.5)
    changed(SCHEDULES, "onecycle", monkeypatch, start=0.9)
    changed(SCHEDULES, "restarts", monkeypatch, period="2 steps")
    changed(LOSSES, "focal", monkeypatch, focal_gamma=0.5)
    changed(POLICIES, "randaugment", monkeypatch, randaugment_ops=1, randaugment_magnitude=30)
    monkeypatch.setattr(inputs, "SMALLEST_INPUT", 40)
    monkeypatch.setattr(model_config, "SMALL_INPUT", 10)
    return monkeypatch


@pytest.mark.parametrize("name", CASES)
def test_the_same_run_after_defaults_have_changed(
    name: str, digits: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    first = run(digits, tmp_path / "first", *CASES[name])
    request.getfixturevalue("other_defaults")
    assert equal(again(tmp_path / "first", tmp_path / "second"), first)
    texts = [(tmp_path / run / "config.yaml").read_text() for run in ("first", "second")]
    assert texts[0].replace("first", "second") == texts[1]
    third = run(digits, tmp_path / "third", *CASES[name])
    shapes = [[tensor.shape for tensor in each["model"].values()] for each in (first, third)]
    assert shapes[0] != shapes[1] or not equal(third, first)


def test_what_is_written(digits: Path, tmp_path: Path) -> None:
    run(digits, tmp_path / "run", "--epochs", "1")
    found = {key: value for key, (value, _) in read_yaml(tmp_path / "run" / "config.yaml").items()}
    expected = {
        **{"precision": "bf16" if torch.cuda.is_available() else "fp32", "monitor.mode": "max"},
        **{"input.size": [28, 28], "input.resize": "crop", "input.interpolation": "area"},
        **{"input.crop_fraction": 1.0, "model.stem_stride": 1, "model.dropout": 0.2},
        **{"optimizer.weight_decay": 0.05, "optimizer.beta1": 0.9, "optimizer.beta2": 0.999},
        **{"optimizer.eps": 1e-8, "schedule.warmup": "5%", "schedule.final": 0.01},
        **{"loss.name": "cross_entropy", "loss.sample_weights": "off"},
        # nobody reads them here, or the machine decides
        **{"optimizer.momentum": None, "schedule.period": None, "loss.focal_gamma": None},
        **{"distill.weight": None, "augment.randaugment_ops": None, "threads": None},
        **{"processes": None, "loader.workers": None, "loader.pack": "auto"},
    }
    assert {key: found[key] for key in expected} == expected


def test_a_run_started_with_nulls_goes_on_with_nulls_and_with_what_was_written(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ("--data", str(digits), "--out", str(tmp_path / "run"), *SMALL, *CNN)
    main([*flags])
    main([*flags, "--resume", "auto"])
    again(tmp_path / "run", tmp_path / "run", "--resume", "auto")
    with pytest.raises(UsageError, match=r"^optimizer\.eps: 0\.001 given, but .* with 1e-08"):
        main([*flags, "--resume", "auto", "--optimizer.eps", "1e-3"])
    changed(OPTIMIZERS, "adamw", monkeypatch, weight_decay=0.5)
    with pytest.raises(UsageError, match=r"^optimizer\.weight_decay: 0\.5 is the default now, but"):
        main([*flags, "--resume", "auto"])
    again(tmp_path / "run", tmp_path / "run", "--resume", "auto")


def test_a_run_of_the_version_before_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its states hold nulls; once continued, it is told by either config."""
    for name in ("run", "digits"):
        shutil.copytree(OLD / name, tmp_path / name)
    shutil.copy(tmp_path / "run" / "config.yaml", tmp_path / "old.yaml")
    monkeypatch.chdir(tmp_path)
    given = parse(
        TrainConfig, ["--config", "old.yaml", "--resume", "auto"], prog="x", about="", config=True
    )
    other = dataclasses.replace(given.model, dropout=0.1)
    with pytest.raises(UsageError, match=r"^model\.dropout: 0\.1 given, but .* with None"):
        train(dataclasses.replace(given, model=other))
    assert train(given).epochs == 4
    for path in ("run/config.yaml", "old.yaml"):
        main(["--config", path, "--resume", "auto"])


def test_a_printed_config_gives_the_run_that_its_flags_give(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*SMALL, *CASES["mixed"], "--model.pretrained", "none"]
    with pytest.raises(SystemExit):
        main(["--data", str(digits), *flags, "--print-config"])
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    weights = run(digits, tmp_path / "flags", *flags)
    main(["--config", str(tmp_path / "printed.yaml"), "--out", str(tmp_path / "printed")])
    assert equal(weights, load_tensors(tmp_path / "printed" / "best.pth"))
    printed, by_flags, by_file = (
        {key: value for key, (value, _) in read_yaml(tmp_path / name).items() if key != "out"}
        for name in ("printed.yaml", "flags/config.yaml", "printed/config.yaml")
    )
    assert by_file == by_flags
    left = {key for key, value in printed.items() if value != by_flags[key]}
    assert left <= {
        *("precision", "model.stem_stride", "model.dropout", "loss.name", "loss.sample_weights"),
        *(f"input.{name}" for name in ("size", "resize", "interpolation", "crop_fraction")),
        *("input.background", "augment.flip", "augment.crop_padding", "augment.resized_crop"),
    }


@pytest.mark.parametrize("name", ["lamb", "timm:sgd", "lookahead_adamw", "muon", "timm:rmsproptf"])
def test_defaults_of_timms_optimisers(name: str) -> None:
    config = OptimizerConfig(name=name)
    found = filled_optimizer(config)
    assert found != config
    assert filled_optimizer(found) == found
    require_usable(TrainConfig(data=Path("d"), out=Path("o"), optimizer=found))


def test_filling_twice_changes_nothing() -> None:
    for name in OPTIMIZERS.names():
        found = filled_optimizer(OptimizerConfig(name=name))
        OPTIMIZERS.check(found)
        assert OPTIMIZERS.filled(found) == found
    for name in SCHEDULES.names():
        filled = SCHEDULES.filled(ScheduleConfig(name=name))
        assert SCHEDULES.filled(filled) == filled


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("optimizer.momentum", "0.5"),
        ("loss.focal_gamma", "2"),
        ("loss.name", "crossentropy"),
        ("augment.policy", "autoaugmentt"),
        ("augment.randaugment_ops", "2"),
        ("optimizer.name", "adamv"),
        ("model.name", "resnet19"),
    ],
)
def test_wrong_names_and_options_are_found_before_anything_is_written(
    key: str, value: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=f"^{key.replace('.', '[.]')}") as caught:
        main(["--data", str(tmp_path), "--out", str(tmp_path / "run"), f"--{key}", value])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()

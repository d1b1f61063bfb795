"""Frozen layers do not move by a bit, nor do their statistics, and learn once released."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distcls.errors import BadValue, UsageError
from distcls.models.classifier import Classifier
from distcls.training.checkpointing import states
from distcls.training.config import FreezeConfig, OptimizerConfig
from distcls.training.distributed import start
from distcls.training.engine import Engine
from distcls.training.inputs import choose_preprocess, open_input
from tests.e2e.commands import train
from tests.plain import plain_config

OPTIMISERS = ("adamw", "sgd", "ranger", "adabelief")


def make_engine(digits: Path, **changes: Any) -> Engine:
    """An engine over two convolutions with a batch norm each, and a head."""
    base = plain_config(data=digits, out=digits / "unused", batch_size=40, limit=120, epochs=2)
    config = dataclasses.replace(base, **changes)
    accelerator = start(config)
    data = open_input(config)
    preprocess = choose_preprocess(config.input, data.train, None)
    torch.manual_seed(0)
    features = [nn.Conv2d(3, 4, 3, 2, bias=False), nn.BatchNorm2d(4), nn.ReLU()]
    features += [nn.Conv2d(4, 8, 3, 2, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)]
    backbone = nn.Sequential(*features, *head)
    return Engine(config, accelerator, data, Classifier(backbone, preprocess), preprocess)


def snapshot(engine: Engine) -> dict[str, Tensor]:
    """Parameters and running statistics, by the backbone's names."""
    state = engine._model.backbone.state_dict()
    return {name: value.clone() for name, value in state.items() if "num_batches" not in name}


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


HEAD = {"8.weight", "8.bias"}


@pytest.mark.parametrize("name", OPTIMISERS)
@pytest.mark.parametrize("alone", [True, False], ids=["one process", "as with others"])
def test_the_backbone_is_frozen_and_then_released(
    name: str, alone: bool, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"freeze": FreezeConfig(backbone="1 epoch")}
    engine = make_engine(digits, optimizer=OptimizerConfig(name=name), **settings)
    begin = engine._freezing.begin
    monkeypatch.setattr(engine._freezing, "begin", lambda step, **_: begin(step, alone=alone))
    first = snapshot(engine)
    list(engine.train_epoch(0))
    second = snapshot(engine)
    assert moved(first, second) == HEAD
    # no moments of what did not learn, so that it begins afresh
    assert len(engine._optimizer.optimizer.state_dict()["state"]) == 2
    list(engine.train_epoch(1))
    assert moved(second, snapshot(engine)) == set(first)
    assert len(engine._optimizer.optimizer.state_dict()["state"]) == 8


def test_it_makes_no_difference_whether_the_gradients_were_computed(
    digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = []
    for alone in (True, False):
        engine = make_engine(digits, freeze=FreezeConfig(backbone="4 steps"))
        begin = engine._freezing.begin
        how = {"alone": alone}
        monkeypatch.setattr(
            engine._freezing, "begin", lambda step, begin=begin, how=how, **_: begin(step, **how)
        )
        for epoch in range(2):
            list(engine.train_epoch(epoch))
        ends.append(snapshot(engine))
    assert not moved(*ends)


def test_release_within_an_epoch(digits: Path) -> None:
    engine = make_engine(digits, freeze=FreezeConfig(backbone="2 steps"))
    before = snapshot(engine)
    changed = [moved(before, snapshot(engine)) == HEAD for _ in engine.train_epoch(0)]
    assert changed == [True, True, False]


def test_evaluation_does_not_thaw_the_norms(digits: Path) -> None:
    engine = make_engine(digits, freeze=FreezeConfig(backbone="100%"))
    before = snapshot(engine)
    for epoch in range(2):
        list(engine.train_epoch(epoch))
        engine.evaluate()
    assert moved(before, snapshot(engine)) == HEAD


@pytest.mark.parametrize(
    ("names", "still"),
    [
        (("0", "1"), {"0.weight", "1.weight", "1.bias", "1.running_mean", "1.running_var"}),
        (("[03].*",), {"0.weight", "3.weight"}),
        (("*.bias",), {"1.bias", "4.bias", "8.bias"}),
    ],
)
def test_frozen_for_good_by_name(names: tuple[str, ...], still: set[str], digits: Path) -> None:
    engine = make_engine(digits, freeze=FreezeConfig(names=names))
    before = snapshot(engine)
    for epoch in range(2):
        list(engine.train_epoch(epoch))
    assert moved(before, snapshot(engine)) == set(before) - still


def test_both_together(digits: Path) -> None:
    engine = make_engine(digits, freeze=FreezeConfig(backbone="1 epoch", names=("0",)))
    before = snapshot(engine)
    list(engine.train_epoch(0))
    assert moved(before, snapshot(engine)) == HEAD
    list(engine.train_epoch(1))
    assert moved(before, snapshot(engine)) == set(before) - {"0.weight"}


@pytest.mark.parametrize(
    ("names", "why"),
    [
        (("9",), r"freeze.names: no parameter matches '9'"),
        (("8.wieght",), r"no parameter matches '8.wieght'"),
        (("*",), "nothing is left to train"),
    ],
)
def test_patterns_that_are_refused(names: tuple[str, ...], why: str, digits: Path) -> None:
    with pytest.raises(UsageError, match=why):
        make_engine(digits, freeze=FreezeConfig(names=names))


def test_a_duration_that_is_none() -> None:
    with pytest.raises(BadValue, match="backbone: 'long' is not valid, expected a duration"):
        FreezeConfig(backbone="long")


@pytest.mark.slow
def test_two_processes_freeze_alike(digits: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    options = ("--freeze.backbone", "1 epoch", "--freeze.names", "features.0", "--lr", "0.01")
    train(digits, out, *options, "--checkpoint.keep_last", "2", processes=2)
    last, first = [torch.load(path, weights_only=True)["tensors"] for path in states(out / "last")]
    parameters = {name for name in first["model"] if name.endswith(("weight", "bias"))}
    learnt = {n for n in parameters if not torch.equal(first["model"][n], last["model"][n])}
    assert learnt == {name for name in parameters if "features.0." not in name}
    assert len(first["optimizer"]["state"]) == 2  # the head's
    assert len(last["optimizer"]["state"]) == len(learnt)

"""The mean over the last epochs against its definition, through a resume, and what it excludes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from distcls.errors import BadValue
from distcls.training.config import AverageConfig, EmaConfig, TrainConfig
from distcls.training.engine import Engine
from distcls.training.weight_averaging import select_weights
from tests.test_engine import make_engine


def weights(engine: Engine) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in engine._model.state_dict().items()}


def average_of(engine: Engine) -> dict[str, torch.Tensor]:
    return select_weights(engine.state_dict(), "average")


def averaging(digits: Path) -> Engine:
    return make_engine(digits, epochs=4, average=AverageConfig(last_epochs=3))


def test_the_mean_of_the_last_epochs_is_evaluated(digits: Path) -> None:
    engine = averaging(digits)
    ends = []
    for epoch in range(4):
        list(engine.train_epoch(epoch))
        ends.append(weights(engine))
        assert list(engine.evaluate()) == (["average"] if epoch else ["weights"])
    found = average_of(engine)
    for name, value in found.items():
        mean = torch.stack([end[name].double() for end in ends[1:]]).mean(0)
        torch.testing.assert_close(value.double(), mean, rtol=1e-5, atol=1e-7)
        assert not torch.equal(value, ends[-1][name])
    before = engine.evaluate()["average"].scalars()
    with torch.no_grad():
        for parameter in engine._model.parameters():
            parameter.fill_(float("nan"))
    assert engine.evaluate()["average"].scalars() == before


def test_a_resumed_run_comes_to_the_same_mean(digits: Path) -> None:
    whole, first, second = (averaging(digits) for _ in range(3))
    for epoch in range(4):
        list(whole.train_epoch(epoch))
    for epoch in range(3):
        list(first.train_epoch(epoch))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    list(second.train_epoch(3))
    expected = average_of(whole)
    for name, value in average_of(second).items():
        assert torch.equal(value, expected[name])


@pytest.mark.parametrize(
    "changes",
    [
        {"average": AverageConfig(last_epochs=3), "epochs": 2},
        {"average": AverageConfig(last_epochs=3), "ema": EmaConfig(decay=0.9)},
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(BadValue, match=r"^average\.last_epochs: 3 is not valid"):
        TrainConfig(data=Path("d"), out=Path("o"), **changes)
    with pytest.raises(BadValue, match=r"^last_epochs: 1 "):
        AverageConfig(last_epochs=1)

"""The moving average of weights against its closed form."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import nn

from distcls.imaging import Preprocess
from distcls.models.checkpoint import read_checkpoint
from distcls.models.classifier import Classifier
from distcls.training.checkpointing import newest_intact
from distcls.training.config import EmaConfig, MonitorConfig, TrainConfig
from distcls.training.run import train
from distcls.training.weight_averaging import Ema


def network(value: float = 0.0) -> Classifier:
    torch.manual_seed(0)
    model = Classifier(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1)),
        Preprocess(size=(8, 8)),
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
    return model


def fill(model: Classifier, value: float) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)


@pytest.mark.parametrize("decay", [0.2, 0.9, 0.9999])
def test_equals_the_closed_form_with_rising_decay(decay: float) -> None:
    model = network(1.0)
    ema = Ema(model, decay)
    values = [3.0, -1.0, 4.0, 1.0, 5.0, -9.0, 2.0]
    expected = 1.0
    for updates, value in enumerate(values):
        fill(model, value)
        ema.update(model)
        kept = min(decay, (1 + updates) / (10 + updates))
        expected = kept * expected + (1 - kept) * value
        for parameter in ema.model.parameters():
            assert torch.allclose(parameter, torch.tensor(expected), atol=1e-5)
    assert ema.updates == len(values)


def test_buffers_are_averaged_and_the_counter_is_copied() -> None:
    model = network()
    ema = Ema(model, 0.5)
    model.train()
    for step in range(3):
        torch.manual_seed(step)
        model(torch.randint(0, 256, (4, 8, 8, 3), dtype=torch.uint8))
        ema.update(model)
    own, trained = ema.model.backbone[1], model.backbone[1]
    assert int(own.num_batches_tracked) == int(trained.num_batches_tracked) == 3
    assert own.num_batches_tracked.dtype == torch.int64

    variance, trailing = 1.0, 1.0  # zero weights: every batch has variance 0, so 0.9 of it is kept
    for updates in range(3):
        variance *= 0.9
        kept = min(0.5, (1 + updates) / (10 + updates))
        trailing = kept * trailing + (1 - kept) * variance
    assert torch.allclose(own.running_var, torch.full((4,), trailing))
    assert not torch.allclose(own.running_var, trained.running_var)


def test_the_average_is_a_model_of_its_own() -> None:
    model = network(1.0)
    ema = Ema(model, 0.9)
    fill(model, 100.0)
    assert all((parameter == 1).all() for parameter in ema.model.parameters())
    assert not any(parameter.requires_grad for parameter in ema.model.parameters())
    assert not ema.model.training
    ema.update(model)
    assert all((parameter == 100).all() for parameter in model.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())
    torch.testing.assert_close(ema.model.mean, model.mean)


@pytest.mark.parametrize(("mode", "choose"), [("min", min), ("max", max)])
def test_the_better_of_average_and_weights_is_saved(
    mode: Literal["min", "max"], choose: Any, digits: Path, tmp_path: Path
) -> None:
    """Whichever it is: one of both modes wants the one, the other mode the other."""
    config = TrainConfig(
        data=digits,
        out=tmp_path / "run",
        epochs=1,
        batch_size=32,
        limit=96,
        quiet=True,
        threads=1,
        ema=EmaConfig(decay=0.9),
        monitor=MonitorConfig(metric="loss", mode=mode),
    )
    train(config)
    with (config.out / "history.csv").open(newline="") as handle:
        (row,) = csv.DictReader(handle)
    losses = {name: float(row[f"val_loss_{name}"]) for name in ("ema", "weights")}
    assert losses["ema"] != losses["weights"]
    better = choose(losses, key=losses.__getitem__)
    assert float(row["val_loss"]) == losses[better]
    card, saved = read_checkpoint(config.out / "best.pth")
    assert card.training["weights"] == better
    found = newest_intact(config.out / "last")
    assert found is not None
    expected = found[1]["tensors"]["ema" if better == "ema" else "model"]
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], value) for name, value in expected.items())

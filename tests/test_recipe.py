"""What `auto` becomes, and the warnings about runs that learn nothing."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from distcls.evaluation.metrics import Metrics, SingleLabelState
from distcls.task import Head, Task
from distcls.training.config import AugmentConfig, LossConfig, MonitorConfig, TrainConfig
from distcls.training.recipe import fill_recipe
from distcls.training.run import train
from distcls.training.stability import CHECKED_EPOCHS, EpochChecks

ANIMALS, DIGITS = Task(classes=("cat", "dog")), Task(classes=tuple("0123456789"))
HEADS = Task.of_heads(
    [
        Head(name="colour", classes=("red", "blue")),
        Head(name="shape", classes=("round", "square")),
    ]
)


def filled(
    images: int,
    task: Task = ANIMALS,
    side: int = 224,
    *,
    pretrained: bool = False,
    **given: Any,
) -> tuple[TrainConfig, str]:
    config = TrainConfig(data=Path("d"), out=Path("o"), **given)
    found, lines = fill_recipe(
        config, images=images, task=task, size=(side, side), pretrained=pretrained
    )
    return found, "\n".join(lines)


def test_small_sets_have_small_batches_and_many_epochs() -> None:
    sizes = (20, 168, 1_300, 60_000)
    found = [filled(images)[0] for images in sizes]
    assert [each.batch_size for each in found] == [16, 16, 128, 128]
    assert [each.epochs for each in found] == [100, 55, 55, 10]
    rates = [each.lr for each in found]
    assert rates == sorted(rates)
    assert rates[-1] == 1e-3


def test_what_is_pretrained_learns_slower_and_shorter() -> None:
    scratch, tuned = filled(168)[0], filled(168, pretrained=True)[0]
    assert (tuned.epochs, tuned.batch_size) == (28, 16)
    assert isinstance(tuned.lr, float)
    assert isinstance(scratch.lr, float)
    assert tuned.lr < scratch.lr


def test_the_loss_fits_the_task() -> None:
    tags = Task(classes=("wet", "warm"), kind="multi_label")
    found, said = filled(168, tags)
    assert found.loss.name == "bce"
    assert "loss       bce (auto: any number of labels per image)" in said.splitlines()
    given, said = filled(168, tags, loss=LossConfig(name="focal"))
    assert given.loss.name == "focal"
    assert "loss " not in said
    for task in (ANIMALS, HEADS):
        found, said = filled(168, task)
        assert found.loss.name == "cross_entropy"
        assert "loss " not in said


def test_what_is_given_stays() -> None:
    monitor = MonitorConfig(patience=None)
    augment = AugmentConfig(flip=0.25, crop_padding=3, resized_crop=None)
    given = {"epochs": 3, "batch_size": 50, "lr": 0.5, "monitor": monitor, "augment": augment}
    found, said = filled(168, **given)
    assert dataclasses.replace(found, **given) == found
    assert said == ""


def test_early_stopping_waits_for_a_third_of_the_epochs() -> None:
    assert filled(168)[0].monitor.patience == 19
    assert filled(168, epochs=5)[0].monitor.patience == 10


@pytest.mark.parametrize(
    ("task", "side", "expected", "why"),
    [
        (
            ANIMALS,
            224,
            (0.5, 0, (0.35, 1.0)),
            "flips 0.5, crops of 0.35 to 1 of the area (auto: ph",
        ),
        (ANIMALS, 32, (0.5, 4, None), "flips 0.5, shifts up to 4 pixels (auto: small images)"),
        (DIGITS, 28, (0.0, 3, None), "no flips, shifts up to 3 pixels (auto: characters)"),
        (DIGITS, 224, (0.0, 0, (0.35, 1.0)), "no flips, crops of 0.35 to 1 of the area (auto: cha"),
        (HEADS, 224, (0.0, 0, None), "no flips (auto: several outputs per image)"),
        (HEADS, 48, (0.0, 6, None), "no flips, shifts up to 6 pixels (auto: several outputs"),
    ],
)
def test_augmentation_by_the_kind_of_the_images(
    task: Task, side: int, expected: tuple[Any, ...], why: str
) -> None:
    found, said = filled(168, task, side)
    augment = found.augment
    assert (augment.flip, augment.crop_padding, augment.resized_crop) == expected
    assert f"augment    {why}" in said


def test_crops_exclude_shifts_whoever_chose_them() -> None:
    cropped = filled(168, side=32, augment=AugmentConfig(resized_crop=(0.5, 1.0)))[0].augment
    assert (cropped.resized_crop, cropped.crop_padding) == ((0.5, 1.0), 0)
    shifted = filled(168, side=224, augment=AugmentConfig(crop_padding=8))[0].augment
    assert (shifted.resized_crop, shifted.crop_padding) == (None, 8)


def test_the_run_says_and_records_it(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = TrainConfig(data=digits, out=tmp_path / "run", epochs=1, limit=60)
    train(dataclasses.replace(config, model=dataclasses.replace(config.model, name="simple_cnn")))
    said = capsys.readouterr().err
    assert "recipe     batch size 16, learning rate 0.00035, patience 10 (auto: 60 images, " in said
    assert "augment    no flips, shifts up to 3 pixels (auto: characters)" in said
    recorded = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert (recorded["batch_size"], recorded["lr"], recorded["epochs"]) == (16, 0.00035, 1)
    assert recorded["monitor"]["patience"] == 10
    augment = recorded["augment"]
    assert (augment["flip"], augment["crop_padding"], augment["resized_crop"]) == (0.0, 3, None)


def metrics(predicted: list[int], labels: list[int]) -> Metrics:
    state = SingleLabelState(2)
    state.update(np.eye(2, dtype=np.float32)[predicted], np.array(labels))
    return state.compute()


def problems(
    losses: list[float], predicted: list[int], labels: list[int], val_loss: float = 0.8
) -> list[list[str]]:
    """What is said after each epoch of a run whose predictions are always these."""
    checks, found = EpochChecks(("cat", "dog")), metrics(predicted, labels)
    rows = [
        {"epoch": number, "train_loss": loss, "val_loss": val_loss, "val_top1": found.top1}
        for number, loss in enumerate(losses, 1)
    ]
    return [checks.problems(rows[: count + 1], found, lr=0.01) for count, _ in enumerate(rows)]


FALLING = [0.7, 0.3, 0.1, 0.05, 0.02, 0.01, 0.01]
HALF = [0] * 20 + [1] * 20


def test_validation_at_chance_while_training_learns() -> None:
    said = problems(FALLING, [0, 1] * 20, HALF)
    assert [len(each) for each in said] == [0, 0, 0, 0, 1, 0, 0]
    assert said[4][0].startswith(
        "validation top-1 stays at 0.50, the level of guessing (0.50 for the most frequent class)"
        ", while the training loss fell to 0.02: "
    )
    assert not any(problems(FALLING, [0] * 17 + [1] * 3 + [1] * 17 + [0] * 3, HALF))
    (still,) = problems([0.7] * 7, [0, 1] * 20, HALF)[4]  # it has not learnt yet
    assert still.startswith("the training loss stays at 0.7 after 5 epochs: nothing is learnt")


def test_a_few_images_that_are_all_right_are_not_at_chance() -> None:
    """Guessing would get four of four right often enough, but not with this loss."""
    assert not any(problems(FALLING, [0, 0, 1, 1], [0, 0, 1, 1], val_loss=0.05))
    assert any(problems(FALLING, [0, 0, 1, 1], [0, 0, 1, 1], val_loss=0.7))


def test_one_class_takes_all_predictions() -> None:
    said = problems(FALLING, [1] * 40, HALF)
    assert [len(each) for each in said] == [0] * (CHECKED_EPOCHS - 1) + [1, 0, 0]
    assert said[4][0].startswith(
        "100% of the validation images are predicted as 'dog', which 50% are: "
    )
    nearly_all = problems(FALLING, [1] * 40, [1] * 38 + [0] * 2)
    assert not any("are predicted as" in text for found in nearly_all for text in found)


def test_a_loss_that_rises() -> None:
    right = [0] * 20 + [1] * 20
    said = problems([0.7, 0.6, 0.8, 0.9, 2.5], right, HALF)
    assert [len(each) for each in said] == [0, 0, 0, 1, 0]
    assert said[3][0] == (
        "the training loss rose from 0.7 in epoch 1 to 0.9 in epoch 4: the learning rate (0.01) is "
        "too high, lower --lr"
    )


def test_what_is_not_finite_is_said_once() -> None:
    checks = EpochChecks(("cat", "dog"), "margin")
    row = {
        "epoch": 3.0,
        "train_loss": np.inf,
        "val_loss": 0.5,
        "val_top1": 1.0,
        "val_margin": np.nan,
    }
    found = metrics([0, 1], [0, 1])
    (said,) = checks.problems([row], found, 0.1)
    assert said.startswith("epoch 3: train_loss is inf, val_margin is nan; such an epoch is never")
    assert checks.problems([row], found, 0.1) == []
    (said,) = EpochChecks(("cat", "dog")).problems([row], found, 0.1)
    assert said == "epoch 3: train_loss is inf"

"""The images that are shown are those that are trained on; their labels in words."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from distcls.data.dataset import MANIFEST
from distcls.task import Head, Task
from distcls.training.config import AugmentConfig, TrainConfig
from distcls.training.loader import Batch
from distcls.training.losses import Examples
from distcls.training.preview import label_text, preview
from tests import tiny_dataset
from tests.plain import plain_config
from tests.test_engine import make_engine

PLAIN = AugmentConfig(crop_padding=3, flip=0.5)
CROPPED = AugmentConfig(resized_crop=(0.35, 1.0), policy="trivialaugment")
MIXED = AugmentConfig(crop_padding=2, mixup=0.4, cutmix=1.0, policy="randaugment", erase=0.5)
ANIMALS = Task(classes=("ape", "bee", "cow"))
OWN_IMAGE = dataclasses.replace(PLAIN, transform="tests.plain_hooks:noise")
OWN_BATCH = dataclasses.replace(MIXED, transform="tests.plain_hooks:Shade")


def trained_on(data: Path, epoch: int, **changes: Any) -> list[Examples]:
    """What the training loop itself hands to the network in the first two steps of an epoch."""
    engine = make_engine(data, **changes)
    seen: list[Examples] = []
    make = engine._objective.examples

    def recording(epoch: int, batch: Batch) -> Examples:
        seen.append(make(epoch, batch))
        return seen[-1]

    engine._objective.examples = recording  # type: ignore[method-assign]
    steps = engine.train_epoch(epoch)
    next(steps)
    next(steps)
    steps.close()
    return seen


def config(data: Path, **changes: Any) -> TrainConfig:
    return plain_config(data=data, out=data / "unused", batch_size=100, limit=250, **changes)


@pytest.mark.parametrize(
    ("augment", "accumulate"),
    [(PLAIN, 1), (CROPPED, 1), (MIXED, 1), (MIXED, 4), (OWN_IMAGE, 1), (OWN_BATCH, 1)],
)
def test_what_is_shown_is_what_is_trained_on(
    digits: Path, augment: AugmentConfig, accumulate: int
) -> None:
    changes: dict[str, Any] = {"augment": augment, "accumulate": accumulate, "seed": 4}
    seen = trained_on(digits, 2, **changes)
    found = preview(config(digits, **changes), epoch=2, count=120)
    assert found.steps == 2  # of 83 and 83 images
    expected = torch.cat([examples.images for examples in seen])
    assert found.images.shape == (120, 28, 28, 3)
    assert torch.equal(found.images, expected[:120])
    targets = torch.cat([examples.targets for examples in seen])
    classes = Task(classes=tuple("0123456789"))
    assert found.labels == [label_text(target, classes) for target in targets[:120]]
    assert any(" + " in label for label in found.labels) == (augment.mixup > 0)


def test_another_epoch_or_seed_shows_others(digits: Path) -> None:
    first = preview(config(digits, augment=PLAIN), epoch=0, count=20)
    assert first.steps == 1
    again = preview(config(digits, augment=PLAIN), epoch=0, count=20)
    assert torch.equal(first.images, again.images)
    for other in (
        preview(config(digits, augment=PLAIN), epoch=1, count=20),
        preview(config(digits, augment=PLAIN, seed=1), epoch=0, count=20),
    ):
        assert not torch.equal(first.images, other.images)


def test_no_more_images_than_there_are(digits: Path) -> None:
    found = preview(config(digits), epoch=0, count=400)
    assert (len(found.images), len(found.labels), found.steps) == (250, 250, 3)


def test_pixels_outside_of_what_can_be_drawn_are_cut(digits: Path) -> None:
    found = preview(config(digits), epoch=0, count=2)
    object.__setattr__(found, "images", torch.tensor([[-3.0, 0.4], [254.6, 300.0]]))
    pixels = found.pixels()
    assert pixels.dtype == np.uint8
    assert pixels.tolist() == [[0, 0], [255, 255]]


def test_weights_stand_below_the_labels(digits: Path, tmp_path: Path) -> None:
    folder = tmp_path / "digits"
    shutil.copytree(digits, folder)
    table = pq.read_table(folder / MANIFEST)
    weights = pa.array(np.where(np.arange(len(table)) % 2, 1.5, 0.5))
    pq.write_table(table.append_column("weight", weights), folder / MANIFEST)
    tiny_dataset.sign(folder)
    seen = trained_on(folder, 0, augment=MIXED)
    found = preview(config(folder, augment=MIXED), epoch=0, count=30)
    assert seen[0].weights is not None
    for label, weight in zip(found.labels, seen[0].weights[:30].tolist(), strict=True):
        _, _, below = label.partition("\n")
        assert below == ("" if f"{weight:.3g}" == "1" else f"weight {weight:.3g}")
    assert any("weight" in label for label in found.labels)


@pytest.mark.parametrize(
    ("target", "text"),
    [
        (torch.tensor(2), "cow"),
        (torch.tensor([0.0, 1.0, 0.0]), "bee"),
        (torch.tensor([0.3, 0.0, 0.7]), "cow 0.7 + ape 0.3"),
        (torch.tensor([0.126, 0.874, 0.0]), "bee 0.87 + ape 0.13"),
        (torch.tensor([0.002, 0.998, 0.0]), "bee"),
    ],
)
def test_labels_in_words(target: Tensor, text: str) -> None:
    assert label_text(target, ANIMALS) == text


def test_labels_of_several_answers() -> None:
    heads = Task.of_heads([Head("1", ("", "a", "b")), Head("2", ("", "a", "b"))])
    assert label_text(torch.tensor([2, 1]), heads) == "ba"
    assert label_text(torch.tensor([2, 0]), heads) == "b"
    assert label_text(torch.tensor([0.0, 0, 1, 0, 1, 0]), heads) == "ba"
    several = Task(kind="multi_label", classes=("ape", "bee", "cow"))
    assert label_text(torch.tensor([1, 0, 1]), several) == "ape|cow"
    assert label_text(torch.tensor([1.0, 0.0, 1.0]), several) == "ape|cow"
    assert label_text(torch.tensor([0.0, 0.0, 0.0]), several) == "(no label)"
    assert label_text(torch.tensor([1.0, 0.0, 0.25]), several) == "ape 1 + cow 0.25"


def test_long_names_leave_room_for_their_shares() -> None:
    long = Task(classes=("a" * 40, "b" * 40))
    assert (
        label_text(torch.tensor([0.6, 0.4]), long)
        == f"{'a' * 10}…{'a' * 9} 0.6 + {'b' * 10}…{'b' * 9} 0.4"
    )

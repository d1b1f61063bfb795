"""Losses of heads and of labels against plain PyTorch, mixing, and what contradicts the dataset."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import sigmoid_focal_loss

from distcls.errors import UsageError
from distcls.models.classifier import Classifier
from distcls.training.config import (
    LOSSES,
    AugmentConfig,
    DistillConfig,
    LossConfig,
    MonitorConfig,
)
from distcls.training.distributed import start
from distcls.training.engine import Engine
from distcls.training.inputs import choose_preprocess, open_input
from distcls.training.loader import Batch
from distcls.training.losses import make_loss, multi_hot
from tests import multi_output
from tests.plain import plain_config

CPU = torch.device("cpu")
HEADS = multi_output.heads(3, 4)
LABELS = multi_output.labels(5)
BCE = LossConfig(name="bce")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return multi_output.manifest(tmp_path_factory.mktemp("pairs"), 90)


@pytest.fixture(scope="module")
def texts(source: Path) -> Path:
    return multi_output.dataset(source, source.parent / "texts", **multi_output.TEXT)


@pytest.fixture(scope="module")
def five(source: Path) -> Path:
    return multi_output.dataset(source, source.parent / "five", label_column="left")


@pytest.fixture(scope="module")
def tagged(source: Path) -> Path:
    return multi_output.dataset(source, source.parent / "tagged", **multi_output.TAGGED)


def logits(classes: int) -> torch.Tensor:
    return torch.randn(6, classes, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "config",
    [
        LossConfig(name="cross_entropy"),
        LossConfig(name="cross_entropy", label_smoothing=0.1),
        LossConfig(name="focal", focal_gamma=0.0),
        LossConfig(name="focal"),
    ],
)
def test_heads_are_the_mean_of_their_losses(config: LossConfig) -> None:
    own = logits(7)
    labels = torch.tensor([[0, 3], [1, 2], [2, 1], [0, 0], [1, 1], [2, 3]])
    expected = []
    for place, part in enumerate(HEADS.slices):
        plain = F.cross_entropy(
            own[:, part],
            labels[:, place],
            reduction="none",
            label_smoothing=config.label_smoothing,
        )
        if config.name == "focal":
            gamma = LOSSES.filled(config).focal_gamma
            plain = (1 - torch.exp(-plain)) ** gamma * plain
        expected.append(plain)
    loss = make_loss(config, HEADS, None, CPU)
    torch.testing.assert_close(loss(own, labels), (expected[0] + expected[1]) / 2)
    # the same labels as shares
    torch.testing.assert_close(loss(own, multi_hot(labels, HEADS).float()), loss(own, labels))


def test_labels_are_bce_and_torchvisions_sigmoid_focal_loss() -> None:
    own = logits(5).requires_grad_()
    labels = (torch.rand(6, 5, generator=torch.Generator().manual_seed(1)) < 0.5).long()
    bce = F.binary_cross_entropy_with_logits(own, labels.float(), reduction="none").mean(1)
    torch.testing.assert_close(make_loss(BCE, LABELS, None, CPU)(own, labels), bce)
    for gamma in (0.0, 0.5, 2.0):
        loss = make_loss(LossConfig(name="focal", focal_gamma=gamma), LABELS, None, CPU)
        expected = sigmoid_focal_loss(own, labels.float(), alpha=-1, gamma=gamma).mean(1)
        torch.testing.assert_close(loss(own, labels), expected)
    smooth = make_loss(LossConfig(name="bce", label_smoothing=0.2), LABELS, None, CPU)
    softened = labels * 0.8 + 0.1
    expected = F.binary_cross_entropy_with_logits(own, softened, reduction="none").mean(1)
    torch.testing.assert_close(smooth(own, labels), expected)


def make_engine(data: Path, **changes: Any) -> Engine:
    """An engine over a linear model."""
    config = plain_config(data=data, out=data / "unused", batch_size=20)
    config = dataclasses.replace(config, **changes)
    found = open_input(config)
    accelerator = start(config)
    preprocess = choose_preprocess(config.input, found.train, None)
    torch.manual_seed(0)
    height, width = preprocess.size
    layers = nn.Sequential(nn.Flatten(), nn.Linear(3 * height * width, len(found.classes)))
    return Engine(config, accelerator, found, Classifier(layers, preprocess), preprocess)


def batch_of(engine: Engine, count: int) -> Batch:
    split, samples = engine._data.train, np.arange(count)
    images = [engine._preprocess(split.image(index)) for index in samples]
    return Batch(
        torch.from_numpy(np.stack(images)), torch.from_numpy(split.labels[samples]), samples
    )


def test_a_step_trains_on_both_heads(texts: Path) -> None:
    engine = make_engine(texts)
    begin, end = engine._sampler.bounds(0)
    samples = engine._data.train_samples[engine._sampler.permutation(0)[begin:end]]
    split = engine._data.train
    images = np.stack([engine._preprocess(split.image(index)) for index in samples])
    with torch.no_grad():
        own = engine._model(torch.from_numpy(images))
    truth = torch.from_numpy(split.labels[samples])
    losses = [F.cross_entropy(own[:, 6 * h : 6 * h + 6], truth[:, h]) for h in range(2)]
    report = next(iter(engine.train_epoch(0)))
    assert float(report.loss) == pytest.approx(float(losses[0] + losses[1]) / 2, rel=1e-4)
    engine.trial_step(3)  # what is tried before the first step takes such labels too


def test_mixed_heads_have_shares_that_add_up_to_one_each(texts: Path) -> None:
    engine = make_engine(texts, augment=AugmentConfig(mixup=0.4))
    batch = batch_of(engine, 11)
    examples = engine._objective.examples(0, batch)
    assert examples.targets.shape == (11, 12)
    for part in engine._data.task.slices:
        torch.testing.assert_close(examples.targets[:, part].sum(1), torch.ones(11))
    # the last of an odd number stays as it is
    expected = multi_hot(batch.labels, engine._data.task)[-1].float()
    torch.testing.assert_close(examples.targets[-1], expected)
    # image and labels are the same mean of two
    flat = multi_hot(batch.labels, engine._data.task).float()
    one = next(index for index in range(0, 10, 2) if not torch.equal(flat[index], flat[index + 1]))
    other = one + 1
    place = int((flat[one] - flat[other]).abs().argmax())
    share = float(
        (examples.targets[one, place] - flat[other, place])
        / (flat[one, place] - flat[other, place])
    )
    assert 0 < share < 1
    pixels = batch.images.float()
    mean = share * pixels[one] + (1 - share) * pixels[other]
    torch.testing.assert_close(examples.images[one], mean, atol=0.05, rtol=0)
    assert all(np.isfinite(float(report.loss)) for report in engine.train_epoch(0))


@pytest.mark.parametrize("augment", [AugmentConfig(mixup=0.4), AugmentConfig(cutmix=1.0)])
def test_mixed_labels_are_shares_of_two_images_labels(tagged: Path, augment: AugmentConfig) -> None:
    engine = make_engine(tagged, loss=BCE, augment=augment)
    batch = batch_of(engine, 10)
    examples = engine._objective.examples(0, batch)
    one, other = batch.labels[0].float(), batch.labels[1].float()
    assert bool((examples.targets[0] <= torch.maximum(one, other)).all())
    assert bool((examples.targets[0] >= torch.minimum(one, other)).all())
    losses = engine._objective.losses(engine._model(examples.images), examples)
    own = engine._model(examples.images)
    expected = F.binary_cross_entropy_with_logits(own, examples.targets, reduction="none").mean(1)
    torch.testing.assert_close(losses, expected)


@pytest.mark.parametrize(
    ("kind", "changes", "told"),
    [
        (
            "tagged",
            {"loss": LossConfig(name="cross_entropy")},
            r"^loss\.name: .* has any number of labels per image; cross_entropy .* bce",
        ),
        ("texts", {"loss": BCE}, r"^loss\.name: .* one class per head; bce is binary"),
        (
            "texts",
            {"augment": AugmentConfig(cutmix=1.0)},
            r"^augment\.cutmix: .* one class per head; the pasted box hides",
        ),
        (
            "texts",
            {"loss": LossConfig(class_weights="balanced")},
            r"^loss\.class_weights: .* more than one weight",
        ),
        (
            "tagged",
            {"loss": LossConfig(name="bce", class_weights="balanced")},
            r"^loss\.class_weights: ",
        ),
        (
            "tagged",
            {"loss": BCE, "distill": DistillConfig(teacher=Path("best.pth"))},
            r"^distill\.teacher: .* one class per image only",
        ),
        (
            "tagged",
            {"loss": BCE, "monitor": MonitorConfig(metric="top5")},
            r"^monitor\.metric: .* labels have no top5",
        ),
        (
            "five",
            {"monitor": MonitorConfig(metric="top5")},
            r"^monitor\.metric: .* top5 is always 1 with five classes or fewer, choose top1",
        ),
        (
            "digits",
            {"monitor": MonitorConfig(metric="exact")},
            r"^monitor\.metric: .* has one class per image; exact is for more",
        ),
    ],
)
def test_contradictions_are_refused_with_the_reason(
    kind: str, changes: dict[str, Any], told: str, request: pytest.FixtureRequest
) -> None:
    data: Path = request.getfixturevalue(kind)
    config = dataclasses.replace(plain_config(data=data, out=data / "unused"), **changes)
    with pytest.raises(UsageError, match=told) as caught:
        open_input(config)
    assert "\n" not in str(caught.value)

"""Losses, weights and mixing within the training step, against plain PyTorch."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from distcls.data.dataset import MANIFEST
from distcls.errors import UsageError
from distcls.training.config import AugmentConfig, LossConfig, OptimizerConfig
from distcls.training.engine import Engine
from distcls.training.loader import Batch
from distcls.training.losses import balanced
from distcls.training.sampler import shard
from tests import tiny_dataset
from tests.test_engine import gradients_of, make_engine

MIXED = AugmentConfig(crop_padding=2, mixup=0.4, cutmix=1.0, policy="randaugment")


@pytest.fixture(scope="module")
def weighted(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits with a weight each, 0 to 2."""
    folder = tmp_path_factory.mktemp("weighted") / "digits"
    shutil.copytree(digits, folder)
    table = pq.read_table(folder / MANIFEST)
    weights = pa.array(np.arange(len(table)) % 5 / 2.0)
    pq.write_table(table.append_column("weight", weights), folder / MANIFEST)
    tiny_dataset.sign(folder)
    return folder


def first_batch(engine: Engine) -> tuple[Tensor, Tensor, np.ndarray]:
    """Images, labels and samples of the first step, from the dataset itself."""
    begin, end = engine._sampler.bounds(0)
    samples = engine._data.train_samples[engine._sampler.permutation(0)[begin:end]]
    split = engine._data.train
    images = torch.from_numpy(np.stack([engine._preprocess(split.image(i)) for i in samples]))
    return images, torch.from_numpy(split.labels[samples]), samples


@pytest.mark.parametrize("accumulate", [1, 3])
def test_weighted_gradients_do_not_depend_on_the_micro_batches(
    accumulate: int, weighted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss, free = LossConfig(class_weights="balanced"), OptimizerConfig(clip_norm=None)
    engine = make_engine(weighted, accumulate=accumulate, loss=loss, optimizer=free)
    images, labels, samples = first_batch(engine)
    # the reference from its definition: class weight times image weight, 1 on average
    used, split = engine._data.train_samples, engine._data.train
    assert split.weights is not None
    by_class = balanced(split.labels[used], 10)
    every = by_class[split.labels[used]] * split.weights[used]
    weights = by_class[labels.numpy()] * split.weights[samples] / every.mean()
    losses = F.cross_entropy(engine._model(images), labels, reduction="none")
    mean = (losses * torch.from_numpy(weights).float()).mean()
    expected = torch.autograd.grad(mean, list(engine._model.parameters()))
    first = gradients_of(engine, monkeypatch)[0]
    for own, reference in zip(first, expected, strict=True):
        torch.testing.assert_close(own, reference, rtol=1e-4, atol=1e-6)


def test_weights_may_be_left_aside(weighted: Path, digits: Path) -> None:
    off = make_engine(weighted, loss=LossConfig(sample_weights="off"))
    losses = [float(next(iter(e.train_epoch(0))).loss) for e in (off, make_engine(digits))]
    assert losses[0] == losses[1]
    assert losses[0] != float(next(iter(make_engine(weighted).train_epoch(0))).loss)
    with pytest.raises(UsageError, match=r"loss\.sample_weights: .* has no weights"):
        make_engine(digits, loss=LossConfig(sample_weights="on"))
    with pytest.raises(UsageError, match=r"loss\.class_weights: .* no class 'ten'"):
        make_engine(digits, loss=LossConfig(class_weights={"ten": 1.0}))


@pytest.mark.parametrize("name", ["focal", "bce"])
def test_the_step_takes_the_loss_that_was_named(name: Any, digits: Path) -> None:
    engine = make_engine(digits, loss=LossConfig(name=name))
    images, labels, _ = first_batch(engine)
    with torch.no_grad():
        logits = engine._model(images)
    if name == "bce":
        expected = F.binary_cross_entropy_with_logits(logits, F.one_hot(labels, 10).float())
    else:
        p = logits.softmax(1)[torch.arange(len(labels)), labels]
        expected = ((1 - p) ** 2 * -p.log()).mean()
    report = next(iter(engine.train_epoch(0)))
    assert float(report.loss) == pytest.approx(float(expected), rel=1e-4)


def batch_of(engine: Engine, samples: np.ndarray) -> Batch:
    split = engine._data.train
    images = [engine._preprocess(split.image(index)) for index in samples]
    return Batch(
        torch.from_numpy(np.stack(images)), torch.from_numpy(split.labels[samples]), samples
    )


def test_examples_do_not_depend_on_the_number_of_processes(weighted: Path) -> None:
    engine = make_engine(weighted, augment=MIXED)
    part = engine._data.train_samples[engine._sampler.permutation(0)[:31]]
    whole = engine._objective.examples(0, batch_of(engine, part))
    assert whole.weights is not None
    assert whole.targets.shape == (31, 10)
    torch.testing.assert_close(whole.targets.sum(1), torch.ones(31))
    assert engine._objective.group_size == 2
    for world in (2, 3):
        for rank in range(world):
            places = shard(np.arange(31), rank, world, group_size=2)
            mine = engine._objective.examples(0, batch_of(engine, part[places]))
            torch.testing.assert_close(mine.images, whole.images[places], atol=1e-3, rtol=0)
            torch.testing.assert_close(mine.targets, whole.targets[places])
            torch.testing.assert_close(mine.weights, whole.weights[places])


def test_another_epoch_mixes_otherwise(digits: Path) -> None:
    engine = make_engine(digits, augment=MIXED)
    batch = batch_of(engine, engine._data.train_samples[:10])
    one, same, other = (engine._objective.examples(epoch, batch) for epoch in (0, 0, 1))
    assert torch.equal(one.images, same.images)
    assert torch.equal(one.targets, same.targets)
    assert not torch.equal(one.targets, other.targets)


def test_a_mixed_epoch_trains_and_its_plan_keeps_pairs(digits: Path) -> None:
    engine = make_engine(digits, augment=MIXED, accumulate=3)
    assert all(np.isfinite(float(report.loss)) for report in engine.train_epoch(0))
    samples = engine._data.train_samples
    plan = list(
        engine._shards.training(samples, engine._sampler, 0, 0, engine.micro_batching.accumulate)
    )
    assert sum(len(part) for part in plan) == 250

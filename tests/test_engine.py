"""The training step against plain PyTorch, and the evaluation against a direct computation."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from distcls.errors import UsageError
from distcls.models.classifier import Classifier
from distcls.training.config import (
    AugmentConfig,
    EmaConfig,
    LossConfig,
    OptimizerConfig,
)
from distcls.training.distributed import start, sum_over_processes
from distcls.training.engine import Engine
from distcls.training.inputs import choose_preprocess, open_input
from tests.plain import plain_config


def make_engine(digits: Path, **changes: object) -> Engine:
    """An engine over a linear model: no batch norm, so a batch may be split without a trace."""
    base = plain_config(data=digits, out=digits / "unused", batch_size=100, limit=250)
    config = dataclasses.replace(base, **changes)
    accelerator = start(config)
    data = open_input(config)
    preprocess = choose_preprocess(config.input, data.train, None)
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(3 * 28 * 28, 10))
    return Engine(config, accelerator, data, Classifier(backbone, preprocess), preprocess)


def make_norm_engine(digits: Path) -> Engine:
    """The same over a network with batch norm."""
    config = plain_config(data=digits, out=digits / "unused", batch_size=100, limit=250)
    accelerator = start(config)
    data = open_input(config)
    preprocess = choose_preprocess(config.input, data.train, None)
    torch.manual_seed(0)
    features = [nn.Conv2d(3, 4, 3, 2), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(2), nn.Flatten()]
    model = Classifier(nn.Sequential(*features, nn.Linear(16, 10)), preprocess)
    return Engine(config, accelerator, data, model, preprocess)


def gradients_of(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[list[Tensor]]:
    """Train an epoch; the gradients that the optimiser met in each step."""
    met: list[list[Tensor]] = []
    step = engine._optimizer.step

    def recording() -> None:
        met.append([p.grad.clone() for p in engine._model.parameters()])
        step()

    monkeypatch.setattr(engine._optimizer, "step", recording)
    list(engine.train_epoch(0))
    return met


def expected_gradients(engine: Engine) -> list[Tensor]:
    """Gradients of the first step's mean loss over the whole global batch, by plain PyTorch."""
    begin, end = engine._sampler.bounds(0)
    samples = engine._data.train_samples[engine._sampler.permutation(0)[begin:end]]
    split, preprocess = engine._data.train, engine._preprocess
    images = torch.from_numpy(np.stack([preprocess(split.image(i)) for i in samples]))
    labels = torch.from_numpy(split.labels[samples])
    smoothing = engine._config.loss.label_smoothing
    loss = F.cross_entropy(engine._model(images), labels, label_smoothing=smoothing)
    return list(torch.autograd.grad(loss, list(engine._model.parameters())))


@pytest.mark.parametrize("accumulate", [1, 3])
def test_accumulated_gradients_are_those_of_the_global_batch(
    accumulate: int, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    smooth, free = LossConfig(label_smoothing=0.1), OptimizerConfig(clip_norm=None)
    engine = make_engine(digits, accumulate=accumulate, loss=smooth, optimizer=free)
    expected = expected_gradients(engine)
    first, *others = gradients_of(engine, monkeypatch)
    assert len(others) == 2  # 250 images in batches of at most 100
    for own, reference in zip(first, expected, strict=True):
        torch.testing.assert_close(own, reference, rtol=1e-4, atol=1e-6)


def test_gradients_are_clipped_as_a_whole(digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(digits, optimizer=OptimizerConfig(clip_norm=0.01))
    expected = expected_gradients(engine)
    first = gradients_of(engine, monkeypatch)[0]
    norm = torch.sqrt(sum((g**2).sum() for g in expected))
    assert norm > 0.02
    for own, reference in zip(first, expected, strict=True):
        torch.testing.assert_close(own, reference * (0.01 / norm), rtol=1e-3, atol=1e-8)


def test_each_step_takes_the_rate_of_the_schedule(digits: Path) -> None:
    engine = make_engine(digits, epochs=2)
    rates = [report.lr for epoch in range(2) for report in engine.train_epoch(epoch)]
    assert rates == [engine._schedule.rate(step) for step in range(6)]
    assert len(set(rates)) == 6
    assert all(group["lr"] == rates[-1] for group in engine._optimizer.param_groups)


def test_each_group_takes_its_scale_of_the_rate(digits: Path) -> None:
    engine = make_engine(digits, optimizer=OptimizerConfig(name="sgd", head_lr_scale=3.0))
    [report, *_] = list(engine.train_epoch(0))
    assert report.lr == engine._schedule.rate(0)
    last = 3.0 * engine._schedule.rate(2)
    assert [group["lr"] for group in engine._optimizer.param_groups] == [last, last]


def test_reported_loss_is_the_mean_over_the_batch(digits: Path) -> None:
    engine = make_engine(digits, accumulate=2)
    begin, end = engine._sampler.bounds(0)
    samples = engine._data.train_samples[engine._sampler.permutation(0)[begin:end]]
    split, preprocess = engine._data.train, engine._preprocess
    images = torch.from_numpy(np.stack([preprocess(split.image(i)) for i in samples]))
    logits, labels = engine._model(images), torch.from_numpy(split.labels[samples])
    expected = F.cross_entropy(logits, labels)
    report = next(iter(engine.train_epoch(0)))
    assert report.images == end - begin
    assert sum_over_processes(report.loss) == pytest.approx(expected.item(), rel=1e-5)
    assert report.recent_loss == pytest.approx(expected.item(), rel=1e-5)
    hits = int((logits.argmax(1) == labels).sum())
    assert 0 < hits < len(samples)
    assert report.sums[1:].tolist() == [hits, len(samples)]


def test_a_step_reads_nothing_from_the_device(digits: Path) -> None:
    """Not even a count of what is right: with a GPU each reading would wait for it."""
    engine = make_engine(digits)
    micro_batches = engine._shards.training(engine._data.train_samples, engine._sampler, 0, 0, 1)
    read: list[str] = []

    class Recording(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if "_local_scalar_dense" in str(func):
                read.append(str(func))
            return func(*args, **(kwargs or {}))

    with contextlib.closing(engine._train_loader.batches(micro_batches)) as batches, Recording():
        sums = engine._step(0, 0, 0.1, engine._sampler.bounds(0)[1], batches)
        assert not read
        assert float(sums[1]) > 0
        assert read


def test_evaluation_counts_every_sample_once(digits: Path) -> None:
    engine = make_engine(digits, limit=None)
    metrics = engine.evaluate()["weights"]
    split, preprocess = engine._data.val, engine._preprocess
    images = torch.from_numpy(np.stack([preprocess(split.image(i)) for i in range(len(split))]))
    with torch.no_grad():
        logits = engine._model(images)
    labels = torch.from_numpy(split.labels)
    assert metrics.count == len(split) == 179
    assert metrics.top1 == (logits.argmax(1) == labels).sum().item() / 179
    assert metrics.loss == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-5)


def test_the_average_is_evaluated_where_there_is_one(digits: Path) -> None:
    engine = make_engine(digits, ema=EmaConfig(decay=0.5))
    list(engine.train_epoch(0))
    with torch.no_grad():
        for parameter in engine._model.parameters():
            parameter.fill_(float("nan"))
    found = engine.evaluate()
    assert list(found) == ["ema", "weights"]
    assert np.isfinite(found["ema"].loss)
    assert np.isnan(found["weights"].loss)


def test_augmentation_reaches_the_network(digits: Path) -> None:
    """Erasing every image with certainty changes the loss of the first step."""
    plain = next(iter(make_engine(digits).train_epoch(0)))
    erased = next(iter(make_engine(digits, augment=AugmentConfig(erase=1.0)).train_epoch(0)))
    assert float(plain.loss) != float(erased.loss)


def test_resized_crop_trains_on_a_larger_canvas(digits: Path) -> None:
    engine = make_engine(digits, augment=AugmentConfig(resized_crop=(0.5, 1.0)))
    assert engine._augment.canvas == (32, 32)
    report = next(iter(engine.train_epoch(0)))
    assert np.isfinite(float(report.loss))


def test_a_resumed_run_that_skips_its_first_step_keeps_its_statistics(digits: Path) -> None:
    """They go back to what the state held, not to what a new network starts with."""
    first, second = make_norm_engine(digits), make_norm_engine(digits)
    list(first.train_epoch(0))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for engine in (first, second):
        losses = engine._losses
        engine._losses = lambda *batch, of=losses: tuple(x * math.nan for x in of(*batch))  # type: ignore[method-assign]
        report = next(iter(engine.train_epoch(1)))
        assert report.anomalies.skipped == [4]
    one, other = first.state_dict()["model"], second.state_dict()["model"]
    assert any("running_mean" in name for name in one)
    assert not [name for name in one if not torch.equal(one[name], other[name])]


def test_batches_too_small_for_the_processes_are_refused(digits: Path) -> None:
    with pytest.raises(UsageError, match="batch_size: 8 is too small"):
        make_engine(digits, batch_size=8, accumulate=5)

"""Distillation against its formula, with teachers of both kinds and of other sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from distcls.errors import UsageError
from distcls.imaging import Preprocess
from distcls.model_card import ModelCard
from distcls.models import factory
from distcls.models.checkpoint import save_checkpoint
from distcls.models.classifier import Classifier
from distcls.models.config import ModelConfig
from distcls.task import Task
from distcls.training.config import DistillConfig
from distcls.training.distillation import Teacher
from tests import tiny_onnx
from tests.pictures import smooth
from tests.test_engine import make_engine

CPU = torch.device("cpu")
DIGITS = tuple("0123456789")


def checkpoint(
    path: Path, classes: tuple[str, ...], size: tuple[int, int] = (28, 28)
) -> Classifier:
    """A teacher with fresh weights."""
    torch.manual_seed(1)
    preprocess = Preprocess(size=size)
    model = factory.build(ModelConfig(), len(classes), preprocess)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)  # fresh answers hardly differ from class to class
    architecture = {"name": "mobilenet_v3_small"}
    card = ModelCard(architecture=architecture, task=Task(classes=classes), preprocess=preprocess)
    save_checkpoint(path, model, card)
    return model.eval()


def batch(count: int = 4, size: int = 28) -> Tensor:
    return torch.from_numpy(np.stack([smooth(size, size, seed=seed) for seed in range(count)]))


def distance(teacher: Tensor, student: Tensor, temperature: float) -> list[float]:
    """temperature^2 times the sum of p log(p / q), in NumPy."""
    both = [np.exp(x.double().numpy() / temperature) for x in (teacher, student)]
    p, q = (powers / powers.sum(1, keepdims=True) for powers in both)
    return list(temperature**2 * (p * np.log(p / q)).sum(1))


@pytest.mark.parametrize("options", [{}, {"temperature": 2.0, "weight": 0.9}])
def test_the_loss_is_the_stated_mean(tmp_path: Path, options: dict[str, float]) -> None:
    shuffled = DIGITS[5:] + DIGITS[:5]
    model = checkpoint(tmp_path / "best.pth", shuffled)
    teacher = Teacher(DistillConfig(teacher=tmp_path / "best.pth", **options), DIGITS, CPU)
    with torch.no_grad():
        answers = model(batch())[:, [5, 6, 7, 8, 9, 0, 1, 2, 3, 4]]
    torch.testing.assert_close(teacher.logits(batch()), answers, rtol=1e-4, atol=1e-5)
    student = torch.randn(4, 10, generator=torch.Generator().manual_seed(0), requires_grad=True)
    losses = F.cross_entropy(student, torch.tensor([1, 2, 3, 4]), reduction="none")
    found = teacher.teach(losses, student, batch())
    temperature, share = options.get("temperature", 4.0), options.get("weight", 0.5)
    away = torch.tensor(distance(answers, student.detach(), temperature))
    expected = (1 - share) * losses.detach().double() + share * away
    torch.testing.assert_close(found.detach().double(), expected, rtol=1e-4, atol=1e-5)
    found.sum().backward()
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()


def test_who_answers_as_the_teacher_has_nothing_to_learn(tmp_path: Path) -> None:
    checkpoint(tmp_path / "best.pth", DIGITS)
    config = DistillConfig(teacher=tmp_path / "best.pth", weight=1.0)
    teacher = Teacher(config, DIGITS, CPU)
    student = teacher.logits(batch()).requires_grad_()
    losses = teacher.teach(torch.full((4,), 7.0), student, batch())
    losses.sum().backward()
    assert losses.abs().max() < 1e-6
    assert student.grad is not None
    assert student.grad.abs().max() < 1e-6


def test_an_onnx_teacher_of_another_size(tmp_path: Path) -> None:
    path = tiny_onnx.write(tmp_path / "best.onnx")  # 8 by 8
    teacher = Teacher(DistillConfig(teacher=path), ("blue", "red", "green"), CPU)
    small = batch(size=8)
    expected = tiny_onnx.expected_logits(small.numpy())[:, [2, 0, 1]]
    np.testing.assert_allclose(teacher.logits(small).numpy(), expected, rtol=1e-5)
    # twice as large, each pixel four times: scaled down it is the same picture
    large = small.repeat_interleave(2, 1).repeat_interleave(2, 2)
    np.testing.assert_allclose(teacher.logits(large).numpy(), expected, atol=0.2)
    # augmentation leaves fractions
    floats = teacher.logits(small.float() + 0.25).numpy()
    np.testing.assert_allclose(floats, expected, rtol=1e-5)


def test_the_step_learns_from_the_teacher(digits: Path, tmp_path: Path) -> None:
    path = tmp_path / "best.pth"
    checkpoint(path, DIGITS, size=(24, 20))
    distill = DistillConfig(teacher=path, weight=0.7)
    engine = make_engine(digits, distill=distill)
    samples = engine._data.train_samples[
        engine._sampler.permutation(0)[slice(*engine._sampler.bounds(0))]
    ]
    split = engine._data.train
    images = torch.from_numpy(np.stack([engine._preprocess(split.image(i)) for i in samples]))
    with torch.no_grad():
        logits = engine._model(images)
    losses = F.cross_entropy(logits, torch.from_numpy(split.labels[samples]), reduction="none")
    answers = Teacher(distill, DIGITS, CPU).logits(images)
    expected = 0.3 * losses.mean() + 0.7 * np.mean(distance(answers, logits, 4.0))
    report = next(iter(engine.train_epoch(0)))
    assert float(report.loss) == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (DIGITS[:9], r"distill\.teacher: .* has 10 classes, the dataset 9; '9' is in one of them"),
        ((*DIGITS[:9], "ten"), r"has 10 classes, the dataset 10; '9' is in one of them alone"),
    ],
)
def test_other_classes_are_refused(tmp_path: Path, classes: Any, message: str) -> None:
    checkpoint(tmp_path / "best.pth", DIGITS)
    with pytest.raises(UsageError, match=message):
        Teacher(DistillConfig(teacher=tmp_path / "best.pth"), classes, CPU)


@pytest.mark.parametrize("name", ["none.pth", "teacher.h5"])
def test_no_model_is_refused_by_its_key(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match=r"^distill\.teacher: .*" + name):
        Teacher(DistillConfig(teacher=tmp_path / name), DIGITS, CPU)

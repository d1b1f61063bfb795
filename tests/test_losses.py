"""The losses against PyTorch's, timm's and hand-computed numbers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.loss import BinaryCrossEntropy
from torch import Tensor

from distcls.errors import BadValue
from distcls.training.config import LOSSES, LossConfig
from distcls.training.losses import Loss

CPU = torch.device("cpu")
WEIGHTS = np.array([0.5, 2.0, 1.0, 0.0, 1.5])


def make(weights: Any = None, **options: Any) -> Loss:
    return Loss(LossConfig(**{"name": "cross_entropy", **options}), weights, CPU)


def logits(count: int = 12, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 5, generator=generator, dtype=dtype) * 3


def labels(count: int = 12) -> Tensor:
    return torch.arange(count) % 5


def mixed(count: int = 12) -> Tensor:
    """Labels of two classes, float32 as mixing makes them."""
    generator = torch.Generator().manual_seed(1)
    own = torch.rand(count, 1, generator=generator)
    return F.one_hot(labels(count), 5) * own + F.one_hot(labels(count).flip(0), 5) * (1 - own)


def same(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("targets", [labels(), mixed()], ids=["labels", "mixed"])
@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["plain", "weighted"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_is_pytorchs(targets: Tensor, weights: Any, smoothing: float) -> None:
    loss = make(weights, label_smoothing=smoothing)(logits(), targets)
    assert loss.shape == (12,)
    weight = None if weights is None else torch.from_numpy(weights)
    exact = targets.double() if targets.is_floating_point() else targets
    same(
        loss,
        F.cross_entropy(
            logits(), exact, weight=weight, label_smoothing=smoothing, reduction="none"
        ),
    )


@pytest.mark.parametrize("targets", [labels(), mixed()], ids=["labels", "mixed"])
@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["plain", "weighted"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_focal_with_gamma_nought_is_cross_entropy(
    targets: Tensor, weights: Any, smoothing: float
) -> None:
    options = {"label_smoothing": smoothing}
    values = []
    for name, more in (("focal", {"focal_gamma": 0.0}), ("cross_entropy", {})):
        given = logits().requires_grad_()
        loss = make(weights, name=name, **options, **more)(given, targets)
        loss.sum().backward()
        values.append((loss.detach(), given.grad))
    same(values[0][0], values[1][0])
    same(values[0][1], values[1][1])


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0, 5.0])
def test_focal_is_the_papers_formula(gamma: float) -> None:
    loss = make(name="focal", focal_gamma=gamma)(logits(), labels())
    for row, label, value in zip(logits().tolist(), labels().tolist(), loss.tolist(), strict=True):
        powers = [math.exp(number) for number in row]
        p = powers[label] / sum(powers)
        assert value == pytest.approx(-((1 - p) ** gamma) * math.log(p), rel=1e-9)


def test_focal_of_two_classes_by_hand() -> None:
    """p = 3/4: (1/4)^2 * -log(3/4); weight 0.25 on it as the paper's alpha."""
    given = torch.tensor([[math.log(3), 0.0]], dtype=torch.float64)
    value = 1 / 16 * -math.log(0.75)
    assert make(name="focal")(given, torch.tensor([0])).item() == pytest.approx(value)
    weighted = make(np.array([0.25, 0.75]), name="focal")(given, torch.tensor([0]))
    assert weighted.item() == pytest.approx(value / 4)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
def test_focal_has_finite_slopes_where_the_answer_is_certain(gamma: float) -> None:
    given = torch.tensor([[200.0, 0.0], [0.0, 200.0]], requires_grad=True)
    loss = make(name="focal", focal_gamma=gamma)(given, torch.tensor([0, 0]))
    loss.sum().backward()
    assert loss.tolist() == [0, pytest.approx(200.0)]
    assert given.grad is not None
    assert torch.isfinite(given.grad).all()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_bce_is_timms(smoothing: float) -> None:
    reference = BinaryCrossEntropy(smoothing=smoothing)
    loss = make(name="bce", label_smoothing=smoothing)(logits(), labels())
    same(loss.mean(), reference(logits(), labels()))


def test_bce_of_mixed_labels_is_pytorchs_with_the_images_weight() -> None:
    each = F.binary_cross_entropy_with_logits(logits(), mixed().double(), reduction="none")
    same(make(name="bce")(logits(), mixed()), each.mean(1))
    weight = (mixed().double() * torch.from_numpy(WEIGHTS)).sum(1)
    same(make(WEIGHTS, name="bce")(logits(), mixed()), each.mean(1) * weight)


@pytest.mark.parametrize("name", LOSSES.names())
def test_a_sure_right_answer_costs_less_and_types_stay(name: str) -> None:
    loss = make(WEIGHTS, name=name, label_smoothing=0.1)
    single = logits(dtype=torch.float32)
    assert loss(single, labels()).dtype == loss(single, mixed()).dtype == torch.float32
    right = 10.0 * F.one_hot(torch.tensor([1]), 5)
    assert loss(right, torch.tensor([1])) < loss(right, torch.tensor([2]))


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"label_smoothing": 1.0}, "label_smoothing"),
        ({"name": "focal", "focal_gamma": -1.0}, "focal_gamma"),
        ({"name": "focal", "focal_gamma": math.nan}, "focal_gamma"),
        ({"class_weights": (1.0, -1.0)}, "class_weights"),
        ({"class_weights": (0.0, 0.0)}, "class_weights"),
        ({"class_weights": {"cat": math.inf}}, "class_weights"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], key: str) -> None:
    with pytest.raises(BadValue, match=f"^{key}: "):
        LossConfig(**options)


def test_what_a_loss_does_not_read_is_refused() -> None:
    with pytest.raises(BadValue, match=r"^focal_gamma: 2\.0 .* cross_entropy does not read it"):
        LOSSES.check(LossConfig(name="cross_entropy", focal_gamma=2.0))
    with pytest.raises(BadValue, match=r"^name: 'crossentropy' .*did you mean 'cross_entropy'"):
        LOSSES.check(LossConfig(name="crossentropy"))

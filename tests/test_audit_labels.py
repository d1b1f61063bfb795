"""Wrong labels: confident learning on probabilities, and by models of their own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from distcls.audit.labels import find_label_issues
from distcls.errors import UsageError
from tests.sources import digits, put
from tests.test_audit import look, photo


def test_the_confident_joint_by_hand() -> None:
    """Means of the labels' probabilities: 0.6 for class 0, 0.5 for class 1."""
    labels = np.array([0, 0, 0, 1, 1])
    probabilities = np.array([[0.9, 0.1], [0.7, 0.3], [0.2, 0.8], [0.65, 0.35], [0.35, 0.65]])
    found = find_label_issues(labels, probabilities)
    assert found.joint.tolist() == [[2, 1], [1, 1]]
    assert found.suspects.tolist() == [2, 3]


def test_nothing_is_suspect_where_models_agree() -> None:
    labels = np.arange(60) % 3
    found = find_label_issues(labels, np.eye(3)[labels] * 0.8 + 0.1)
    assert not len(found.suspects)


def test_flipped_labels_come_first() -> None:
    rng = np.random.default_rng(0)
    true = rng.integers(0, 10, 3000)
    logits = rng.normal(0, 1, (3000, 10))
    logits[np.arange(3000), true] += 4
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    labels = true.copy()
    wrong = rng.choice(3000, 90, replace=False)
    labels[wrong] = (labels[wrong] + rng.integers(1, 10, 90)) % 10
    found = find_label_issues(labels, probabilities)
    assert np.isin(found.suspects[:90], wrong).mean() > 0.8


def test_a_dataset_with_flipped_labels(tmp_path: Path) -> None:
    """Two kinds of digits, six of them in the wrong folder."""
    images, labels = digits(1797)
    chosen = np.flatnonzero(labels < 2)[:120]
    for place, at in enumerate(chosen.tolist()):
        label = labels[at] if place >= 6 else 1 - labels[at]
        put(tmp_path / "digits" / f" {label} " / f"{place:03d}.png", images[at])
    (tmp_path / "quick.yaml").write_text(
        "model: {name: simple_cnn}\nepochs: 6\nbatch_size: 16\ninput: {size: 16}\n"
    )
    found = look(
        tmp_path / "digits",
        label_errors=True,
        folds=2,
        recipe=str(tmp_path / "quick.yaml"),
        out=tmp_path / "audit",
    )
    images_found = [each.image for each in found.findings if each.kind == "label_error"]
    wrong = {int(Path(name).stem) < 6 for name in images_found[:4]}
    assert wrong == {True}
    assert found.judges is not None
    assert f"right for {found.judges:.1%} of the images" in found.to_text()
    with pytest.raises(UsageError, match=r"recipe: .* expected nothing without label_errors"):
        look(tmp_path / "digits", recipe="digits")


def test_classes_of_one_image_cannot_be_divided(tmp_path: Path) -> None:
    for number in range(3):
        put(tmp_path / "ab c"[number : number + 1] / f"{number}.png", photo(number))
    with pytest.raises(UsageError, match="only 0 of 3 images can be divided"):
        look(tmp_path, label_errors=True)

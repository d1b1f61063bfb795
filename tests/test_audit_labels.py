"""Wrong labels: confident learning on probabilities, and by models of their own."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from distcls import log
from distcls.audit.findings import Finding
from distcls.audit.labels import are_poor, find_label_issues
from distcls.audit.page import DRAWN, _place, _reduced, _wrapped
from distcls.cli import run
from distcls.commands.audit import main
from distcls.errors import UsageError
from distcls.plotting import LETTERS
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


QUICK = "model: {name: simple_cnn}\nepochs: 6\nbatch_size: 16\ninput: {size: 16}\n"


def flipped(root: Path, count: int = 120) -> Path:
    """Two kinds of digits, the first six of them in the wrong folder."""
    images, labels = digits(1797)
    chosen = np.flatnonzero(labels < 2)[:count]
    for place, at in enumerate(chosen.tolist()):
        label = labels[at] if place >= 6 else 1 - labels[at]
        put(root / f" {label} " / f"{place:03d}.png", images[at])
    return root


def test_a_dataset_with_flipped_labels(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "FIRST_LINE", 0.0)  # seconds of silence
    flipped(tmp_path / "digits")
    (tmp_path / "quick.yaml").write_text(QUICK)
    found = look(
        tmp_path / "digits",
        label_errors=True,
        folds=2,
        recipe=str(tmp_path / "quick.yaml"),
        out=tmp_path / "audit",
    )
    images_found = [each.image for each in found.findings if each.kind == "label_error"]
    shown = capsys.readouterr().err
    assert "fold 1/2  epoch 1/6   0%" in shown
    assert re.search(r"fold 2/2  epoch 4/6  75%  at most \d+ s left", shown)
    wrong = {int(Path(name).stem) < 6 for name in images_found[:4]}
    assert wrong == {True}
    assert found.judges is not None
    assert f"right for {found.judges:.1%} of the images" in found.to_text()
    with Image.open(tmp_path / "audit/label_errors.png") as drawn:
        assert min(drawn.size) > 300
    assert json.loads((tmp_path / "audit/audit.json").read_text())["failure"] is None
    with pytest.raises(UsageError, match=r"recipe: .* expected nothing without label_errors"):
        look(tmp_path / "digits", recipe="digits")


def test_classes_of_one_image_cannot_be_divided(tmp_path: Path) -> None:
    for number in range(3):
        put(tmp_path / "ab c"[number : number + 1] / f"{number}.png", photo(number))
    with pytest.raises(UsageError, match="only 0 of 3 images can be divided"):
        look(tmp_path, label_errors=True)


class Stopping:
    """A callback of a run that is told to stop."""

    def on_epoch_end(self, run: object, figures: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(
    ("more", "code", "told"),
    [
        ("callbacks: [tests.test_audit_labels:Stopping]", 1, "fold 1 of 2 stopped by SIGTERM"),
        ("model.pretrained: nowhere.pth", 2, "nowhere.pth does not exist"),
    ],
)
def test_what_was_found_is_written_where_the_runs_fail(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], more: str, code: int, told: str
) -> None:
    data, out = flipped(tmp_path / "digits", 40), tmp_path / "audit"
    put(data / " 1 " / "broken.png", np.zeros((8, 8, 3), np.uint8))
    (data / " 1 " / "broken.png").write_bytes(b"nothing")
    (tmp_path / "quick.yaml").write_text(f"{QUICK}{more}\n")
    call = [str(data), "--out", str(out), "--label-errors", "--folds", "2"]
    with pytest.raises(SystemExit) as left:
        run(main, [*call, "--recipe", str(tmp_path / "quick.yaml"), "--quiet"])
    printed = capsys.readouterr()
    assert left.value.code == code
    assert "files that are no readable image" in printed.out
    assert told in printed.err.splitlines()[-1]
    assert "broken.png" in (out / "audit.csv").read_text()
    failure = json.loads((out / "audit.json").read_text())["failure"]
    assert printed.err.splitlines()[-1] == f"error: {failure}"


def test_a_recipe_that_cannot_work_is_told_before_an_image_is_read(tmp_path: Path) -> None:
    data, recipe = flipped(tmp_path / "digits", 10), tmp_path / "wrong.yaml"
    for text, told in (
        ("model: {name: simple_cn}", "simple_cn"),
        ("epoch: 3", "unknown key 'epoch'"),
        ("optimizer: {name: adamx}", "adamx"),
    ):
        recipe.write_text(text)
        with pytest.raises(UsageError, match=told):
            look(data, label_errors=True, recipe=str(recipe), out=tmp_path / "audit")
        assert not (tmp_path / "audit").exists()


def test_long_class_names_below_a_picture_are_whole() -> None:
    name = "a_very_long_name_of_a_class_without_any_blanks_and_more_than_two_lines"
    for word in ("labelled", "rather"):
        lines = _wrapped(word, name, 0.024).split("\n")
        text = "".join(lines).removeprefix(word).removesuffix("0.02")
        assert text.strip() == f"“{name}”"
        assert max(map(len, lines)) <= LETTERS
    assert all(len(line) <= LETTERS // 2 for line in _wrapped("rather", "猫" * 40, 0.9).split("\n"))
    assert _wrapped("rather", "\u202ecat", 0.9) == "rather “\\u202ecat” 0.90"


def test_the_split_is_named_and_a_large_picture_reduced() -> None:
    about: dict[str, Any] = {"kind": "label_error", "severity": "warning", "text": ""}
    long = Finding(**about, image="val/a class of a long name/picture_001.jpg", split="val")
    assert re.fullmatch(r"val: ….*picture_001\.jpg", _place(long))
    assert len(_place(long)) == LETTERS
    assert _place(Finding(**about, image="7.png", split="test")) == "test: 7.png"
    assert _place(Finding(**about, image="val/7.png", split="val")) == "val/7.png"
    assert _place(Finding(**about, image="7.png")) == "7.png"
    for shape, drawn in {
        (1200, 300): (DRAWN, 100),
        (1, 900): (1, DRAWN),
        (20, 60): (20, 60),
    }.items():
        assert _reduced(np.zeros((*shape, 3), np.uint8)).shape == (*drawn, 3)


@pytest.mark.parametrize(
    ("accuracy", "classes", "suspects", "poor"),
    [(0.743, 3, 25, True), (0.9, 3, 4, False), (0.629, 3, 2, True), (0.9, 2, 11, True)],
)
def test_judges_are_poor_with_a_long_list_or_little_better_than_chance(
    accuracy: float, classes: int, suspects: int, poor: bool
) -> None:
    assert are_poor(accuracy, np.arange(100) % classes, suspects) == poor


def test_poor_judges_are_told_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "untrained.yaml").write_text(f"{QUICK.replace('6', '1', 1)}lr: 1e-9\n")
    recipe = str(tmp_path / "untrained.yaml")
    found = look(flipped(tmp_path / "digits", 40), label_errors=True, folds=2, recipe=recipe)
    assert re.search("warning: label errors: .* are right for .* only", capsys.readouterr().err)
    assert "too seldom, most of these labels may be right" in found.to_text()

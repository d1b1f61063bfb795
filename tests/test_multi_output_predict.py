"""Heads and labels with thresholds, flips, merging and features: the rows against NumPy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from distcls.errors import UsageError
from distcls.runtime.ensemble import Ensemble, FlipAveraged
from distcls.runtime.model import OnnxModel
from distcls.task import Head, Task
from tests import multi_output, tiny_dataset, tiny_onnx
from tests.test_multi_output_evaluate import HEADS, LABELS, card
from tests.test_predict_rows import COUNT, IMAGES, run, uneven, with_features

BOTH = pytest.mark.parametrize("task", [HEADS, LABELS], ids=["heads", "labels"])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_dataset.write_images(tmp_path / "in", IMAGES)


def probabilities(task: Task, images: NDArray[np.uint8] = IMAGES) -> NDArray[np.float32]:
    return task.probabilities(tiny_onnx.expected_logits(images, len(task.classes)))


@pytest.mark.parametrize("ending", [".csv", ".parquet"])
def test_each_head_abstains_by_itself(folder: Path, tmp_path: Path, ending: str) -> None:
    model = tiny_onnx.write(tmp_path / "m.onnx", card(HEADS))
    (folder / "004.png").write_bytes(b"")
    parts = [probabilities(HEADS)[:, part] for part in HEADS.slices]
    threshold = float(np.median(np.concatenate([part.max(axis=1) for part in parts])))
    out = tmp_path / f"pre{ending}"
    rows = run(folder, model, out, "--threshold", str(threshold), "--show", "4")
    assert list(rows[0])[1::2] == ["label", "label:a", "label:b", "abstained"]
    sure = np.stack([part.max(axis=1) >= threshold for part in parts], axis=1)
    assert {tuple(row) for row in sure.tolist()} >= {(True, True), (True, False)}
    for index, row in enumerate(rows):
        if index == 4:
            assert {value for key, value in row.items() if key not in ("image_id", "error")} == {
                None
            }
            continue
        own = [f"c{part[index].argmax()}" for part in parts]
        given = [name if is_sure else None for name, is_sure in zip(own, sure[index], strict=True)]
        assert [row["label:a"], row["label:b"]] == given
        assert row["label"] == (None if None in given else "|".join(own))
        assert str(row["abstained"]).lower() == str(None in given).lower()
        assert float(row["probability:b"]) == pytest.approx(parts[1][index].max(), rel=1e-4)
    assert (tmp_path / "pre.png").exists()
    if ending == ".parquet":
        assert pq.read_schema(out).field("abstained").type == "bool"


def test_labels_have_thresholds_of_their_own(folder: Path, tmp_path: Path) -> None:
    model = tiny_onnx.write(tmp_path / "m.onnx", card(LABELS))
    with pytest.raises(UsageError, match=r"^threshold: 0\.9 is for .* has 5 labels, each with its"):
        run(folder, model, tmp_path / "pre.csv", "--threshold", "0.9")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "m.onnx"]


@BOTH
def test_flips_are_averaged_part_by_part(task: Task, tmp_path: Path) -> None:
    model = OnnxModel(uneven(tmp_path / "u.onnx", card(task)))
    images = np.concatenate([IMAGES[:5, :, :4], 255 - IMAGES[5:10, :, :4]], axis=2)
    both = [probabilities(task, images[:, :, part]) for part in (slice(4), slice(4, 8))]
    found = task.probabilities(FlipAveraged(model).logits(images))
    np.testing.assert_allclose(found, (both[0] + both[1]) / 2, rtol=1e-4)
    assert np.abs(both[0] - found).max() > 0.05


class Sure(tiny_onnx.FakeModel):
    """Logits so far apart that a float32 probability is nought or one."""

    card = card(LABELS)
    row = (500.0, -500.0, 0.0, 40.0, -40.0)

    def logits(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        logits = np.tile(np.array([self.row], np.float32), (len(images), 1))
        logits[images.max(axis=(1, 2, 3)) == 255, 1] = np.inf
        return logits


def test_certain_labels_stay_finite_and_what_is_not_is_seen() -> None:
    images = np.zeros((2, 8, 8, 3), np.uint8)
    images[1] = 255
    logits = FlipAveraged(Sure()).logits(images)
    assert np.isfinite(logits[0]).all()
    np.testing.assert_allclose(logits[0, 2:], Sure.row[2:], atol=1e-5)
    assert logits[0, 0] > 80
    assert logits[0, 1] < -80
    assert np.isnan(logits[1, 1])


def test_labels_of_merged_models_have_the_mean_of_their_thresholds(
    folder: Path, tmp_path: Path
) -> None:
    others = (0.999, 0.999, 0.999, 0.5, 0.6)
    paths = [
        tiny_onnx.write(tmp_path / "m.onnx", card(LABELS)),
        uneven(tmp_path / "u.onnx", card(multi_output.labels(5, others))),
    ]
    merged = Ensemble([OnnxModel(path) for path in paths], ["m", "u"])
    assert LABELS.thresholds is not None
    thresholds = (np.array(LABELS.thresholds) + others) / 2
    assert merged.card.task.thresholds == pytest.approx(tuple(thresholds))
    means = (probabilities(LABELS) + probabilities(LABELS, IMAGES[:, :, :4])) / 2
    rows = run(folder, ",".join(map(str, paths)), tmp_path / "pre.csv", "--probabilities")
    given = [[float(row[f"p:{name}"]) for name in LABELS.classes] for row in rows]
    np.testing.assert_allclose(given, means, rtol=1e-4)
    names = ["|".join(np.array(LABELS.classes)[row]) for row in means >= thresholds]
    assert [row["label"] or "" for row in rows] == names
    assert len(set(names)) > 1


def test_heads_are_merged(tmp_path: Path) -> None:
    paths = [
        tiny_onnx.write(tmp_path / "m.onnx", card(HEADS)),
        uneven(tmp_path / "u.onnx", card(HEADS)),
    ]
    merged = Ensemble([OnnxModel(path) for path in paths], ["m", "u"])
    expected = (probabilities(HEADS) + probabilities(HEADS, IMAGES[:, :, :4])) / 2
    found = HEADS.probabilities(merged.logits(IMAGES))
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    np.testing.assert_allclose(found[:, HEADS.slices[0]].sum(axis=1), 1, rtol=1e-5)


def test_other_questions_are_not_merged(folder: Path, tmp_path: Path) -> None:
    model = tiny_onnx.write(tmp_path / "m.onnx", card(HEADS))
    renamed = Task.of_heads([HEADS.heads[0], Head("z", HEADS.heads[1].classes)])
    for task, told in [
        (multi_output.labels(7), r"has 2 heads of several .*, .* 7 labels; .* the same task"),
        (Task(classes=HEADS.classes), "has 2 heads .*, .* 7 classes; .* the same task"),
        (multi_output.heads(4, 3), r"\(a 3, b 4\), .* \(a 4, b 3\); .* the same task"),
        (renamed, "class 3 is 'b:c0' in .* and 'z:c0' in"),
    ]:
        own = card(task) if not task.single else tiny_onnx.card(task.classes)
        other = tiny_onnx.write(tmp_path / "other.onnx", own)
        with pytest.raises(UsageError, match=told) as caught:
            run(folder, f"{model},{other}", tmp_path / "pre.csv")
        assert "\n" not in str(caught.value)


@BOTH
def test_features_beside_several_answers(task: Task, folder: Path, tmp_path: Path) -> None:
    (folder / "004.png").write_bytes(b"")
    path = with_features(tmp_path / "f.onnx", card(task))
    features = tmp_path / "features.parquet"
    more = ["--probabilities", "--part-rows", "8", "--batch-size", "4"]
    rows = run(folder, path, tmp_path / "pre.csv", *more, "--features", str(features))
    assert rows == run(folder, path, tmp_path / "plain.csv", *more)
    answers = task.texts(task.decide(tiny_onnx.expected_logits(IMAGES, len(task.classes))))
    assert [row["label"] or "" for row in rows] == [
        "" if i == 4 else t for i, t in enumerate(answers)
    ]
    found = pq.read_table(features).column("features").to_pylist()
    assert found[4] is None
    good = [index for index in range(COUNT) if index != 4]
    expected = IMAGES[good].astype(np.float32).mean(axis=(1, 2))
    np.testing.assert_allclose([found[index] for index in good], expected, rtol=1e-5)

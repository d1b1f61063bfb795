"""Threshold, flips, merged models and features: what the rows say against NumPy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pyarrow.parquet as pq
import pytest
from onnx import TensorProto, helper

from distcls.commands.predict import main
from distcls.errors import UsageError
from distcls.model_card import ModelCard
from distcls.runtime.ensemble import Ensemble, FlipAveraged
from distcls.runtime.model import OnnxModel
from distcls.task import softmax
from tests import tiny_dataset, tiny_onnx
from tests.test_writers import read

COUNT = 30
IMAGES = tiny_dataset.coloured(COUNT)[0]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_dataset.write_images(tmp_path / "in", IMAGES)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_onnx.write(tmp_path / "m.onnx")


def with_features(path: Path, card: ModelCard | None = None) -> Path:
    """The tiny model with its channel means as features."""
    proto = tiny_onnx.proto(card or tiny_onnx.card())
    proto.graph.node.append(helper.make_node("Identity", ["means"], ["features"]))
    info = helper.make_tensor_value_info("features", TensorProto.FLOAT, ["N", 3])
    proto.graph.output.append(info)
    onnx.checker.check_model(proto)
    path.write_bytes(proto.SerializeToString())
    return path


def uneven(path: Path, card: ModelCard | None = None) -> Path:
    """A model that sees the left half only, so that a mirror image is another one to it."""
    proto = tiny_onnx.proto(card or tiny_onnx.card())
    constants = {"start": [0], "end": [4], "axis": [2]}
    for name, value in constants.items():
        proto.graph.initializer.append(helper.make_tensor(name, TensorProto.INT64, [1], value))
    cut = helper.make_node("Slice", ["values", *constants], ["half"])
    proto.graph.node[1].input[0] = "half"
    proto.graph.node.insert(1, cut)
    onnx.checker.check_model(proto)
    path.write_bytes(proto.SerializeToString())
    return path


def run(folder: Path, model: object, out: Path, *more: str) -> list[dict[str, Any]]:
    main([str(folder), "--model", str(model), "--out", str(out), "--provider", "cpu", *more])
    return read(out)


def probabilities() -> np.ndarray:
    return softmax(tiny_onnx.expected_logits(IMAGES))


@pytest.mark.parametrize("ending", [".csv", ".jsonl", ".parquet"])
def test_below_the_threshold_there_is_no_label(
    folder: Path, model: Path, tmp_path: Path, ending: str
) -> None:
    (folder / "004.png").write_bytes(b"")
    likeliest = probabilities().max(axis=1)
    threshold = float(np.median(likeliest))
    rows = run(
        folder, model, tmp_path / f"pre{ending}", "--threshold", str(threshold), "--top-k", "2"
    )
    assert list(rows[0])[-2:] == ["abstained", "error"]
    words: dict[str, Any] = {".csv": {"true": True, "false": False}}.get(ending, {})
    for index, row in enumerate(rows):
        abstained = words.get(row["abstained"], row["abstained"])
        if index == 4:
            assert (row["label"], abstained, row["error"]) == (None, None, "empty file")
            continue
        assert abstained == (likeliest[index] < np.float32(threshold))
        assert (row["label"] is None) == abstained
        assert float(row["probability"]) == pytest.approx(likeliest[index], rel=1e-5)
        assert row["label_2"] is not None
    if ending == ".parquet":
        schema = pq.read_schema(tmp_path / "pre.parquet")
        assert schema.field("abstained").type == "bool"


def test_abstentions_are_counted(
    folder: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(folder, model, tmp_path / "pre.csv", "--threshold", "1", "--show", "4")
    assert f"{COUNT} abstained" in capsys.readouterr().err
    assert (tmp_path / "pre.png").exists()


def test_flips_are_averaged(folder: Path, tmp_path: Path) -> None:
    path = uneven(tmp_path / "u.onnx")
    images = np.concatenate([IMAGES[:5, :, :4], 255 - IMAGES[5:10, :, :4]], axis=2)
    model = OnnxModel(path)
    both = [tiny_onnx.expected_logits(images[:, :, part]) for part in (slice(4), slice(4, 8))]
    np.testing.assert_allclose(model.logits(images), both[0], rtol=1e-5)
    expected = (softmax(both[0]) + softmax(both[1])) / 2
    assert np.abs(expected - softmax(both[0])).max() > 0.1
    np.testing.assert_allclose(softmax(FlipAveraged(model).logits(images)), expected, rtol=1e-5)
    plain = run(folder, path, tmp_path / "plain.csv")
    flipped = run(folder, path, tmp_path / "flip.csv", "--tta", "flip")
    assert [row["image_id"] for row in plain] == [row["image_id"] for row in flipped]
    assert [row["probability"] for row in plain] != [row["probability"] for row in flipped]


def test_models_are_merged(folder: Path, model: Path, tmp_path: Path) -> None:
    other = uneven(tmp_path / "u.onnx")
    merged = Ensemble([OnnxModel(model), OnnxModel(other)], ["m", "u"])
    left = tiny_onnx.expected_logits(IMAGES[:, :, :4])
    expected = (probabilities() + softmax(left)) / 2
    np.testing.assert_allclose(softmax(merged.logits(IMAGES)), expected, rtol=1e-5)
    assert merged.logits(IMAGES[:0]).shape == (0, 3)
    rows = run(folder, f"{model},{other}", tmp_path / "pre.csv", "--probabilities")
    given = [[float(row[f"p:{name}"]) for name in tiny_onnx.COLOURS] for row in rows]
    np.testing.assert_allclose(given, expected, rtol=1e-4)


def test_certain_answers_stay_finite() -> None:
    class Sure(tiny_onnx.FakeModel):
        """Logits so far apart that a float32 probability is nought."""

        card = tiny_onnx.card()

        def logits(self, images: np.ndarray) -> np.ndarray:
            return np.tile(np.array([[500, 0, -500]], np.float32), (len(images), 1))

    logits = FlipAveraged(Sure()).logits(IMAGES)
    assert np.isfinite(logits).all()
    np.testing.assert_array_equal(logits.argmax(axis=1), 0)


def test_other_classes_or_other_pixels_are_not_merged(
    folder: Path, model: Path, tmp_path: Path
) -> None:
    for card, told in [
        (tiny_onnx.card(("red", "blue", "green")), "class 1 is 'green' in .* and 'blue' in"),
        (tiny_onnx.card(("red", "green", "blue", "x")), "has 3 classes, .* 4"),
        (tiny_onnx.card(size=(9, 8)), r"takes images by size \(8, 8\), .* by \(9, 8\)"),
    ]:
        other = tiny_onnx.write(tmp_path / "other.onnx", card)
        with pytest.raises(UsageError, match=told):
            run(folder, f"{model},{other}", tmp_path / "pre.csv")


def test_a_comma_in_a_name_parts_nothing(folder: Path, tmp_path: Path) -> None:
    path = tiny_onnx.write(tmp_path / "a,b.onnx")
    assert len(run(folder, path, tmp_path / "pre.csv")) == COUNT


def test_features_beside_the_rows(folder: Path, tmp_path: Path) -> None:
    (folder / "004.png").write_bytes(b"")
    path = with_features(tmp_path / "f.onnx")
    features = tmp_path / "features.parquet"
    more = ["--features", str(features), "--part-rows", "8", "--batch-size", "4"]
    rows = run(folder, path, tmp_path / "pre.csv", *more)
    table = pq.read_table(features)
    assert table.column_names == ["image_id", "features"]
    assert table.column("image_id").to_pylist() == [row["image_id"] for row in rows]
    assert str(table.schema.field("features").type).startswith("fixed_size_list")
    found = table.column("features").to_pylist()
    assert found[4] is None
    good = [index for index in range(COUNT) if index != 4]
    expected = IMAGES[good].astype(np.float32).mean(axis=(1, 2))
    np.testing.assert_allclose([found[index] for index in good], expected, rtol=1e-5)
    plain = run(folder, path, tmp_path / "plain.csv")
    assert plain == rows
    assert {path.name for path in tmp_path.iterdir()} == {
        *("in", "f.onnx", "features.parquet", "pre.csv", "plain.csv")
    }


def test_features_that_cannot_be_had(folder: Path, model: Path, tmp_path: Path) -> None:
    out, features = tmp_path / "pre.csv", ["--features", str(tmp_path / "f.parquet")]
    with pytest.raises(UsageError, match="was exported without them; export its checkpoint again"):
        run(folder, model, out, *features)
    with pytest.raises(UsageError, match=r"the name of a \.parquet file"):
        run(folder, model, out, "--features", str(tmp_path / "f.csv"))
    with pytest.raises(UsageError, match="one model and no --tta"):
        run(folder, model, out, *features, "--tta", "flip")
    with pytest.raises(UsageError, match="one model and no --tta"):
        run(folder, f"{model},{model}", out, *features)
    (tmp_path / "f.parquet").write_text("precious")
    with pytest.raises(UsageError, match=r"f\.parquet exists already"):
        run(folder, with_features(tmp_path / "f.onnx"), out, *features)
    assert not out.exists()

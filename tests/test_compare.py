"""`distcls compare`: paired differences, their intervals and p-values, and its verdict in words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from sklearn.metrics import f1_score

from distcls.commands.compare import main
from distcls.errors import BadValue, UsageError
from distcls.evaluation.compare import CompareOptions, Comparison, _over_seeds, compare
from distcls.evaluation.evaluate import evaluate_model
from distcls.evaluation.intervals import mcnemar, paired_difference
from distcls.evaluation.outputs import Outputs, labels_of
from distcls.task import Head, Task
from tests import tiny_dataset, tiny_onnx
from tests.serving import EXPORTED

TASK = Task(classes=("cat", "dog", "owl"))
COUNT = 2000


def logits_of(accuracy: float, seed: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Logits of a model that is right by chance, and the labels, which no seed changes."""
    labels = np.random.default_rng(99).integers(0, 3, COUNT)
    rng = np.random.default_rng(seed)
    said = np.where(rng.random(COUNT) < accuracy, labels, (labels + 1) % 3)
    logits = rng.normal(size=(COUNT, 3)).astype(np.float32) / 4
    logits[np.arange(COUNT), said] += 3
    return logits, labels


def write(path: Path, accuracy: float, seed: int, order: int | None = None) -> Path:
    logits, labels = logits_of(accuracy, seed)
    outputs = Outputs.of(TASK, logits, labels, [f"{number}.png" for number in range(COUNT)])
    if order is not None:
        outputs = outputs.take(np.random.default_rng(order).permutation(COUNT))
    path.parent.mkdir(exist_ok=True, parents=True)
    outputs.write(path, {})
    return path


def compared(*runs: Path | str, **more: Any) -> Comparison:
    return compare(CompareOptions(runs=tuple(map(str, runs)), **more))


def test_a_better_model_is_said_to_be_better_whatever_the_order(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = write(tmp_path / "a" / "predictions.parquet", 0.80, 1)
    other = write(tmp_path / "b.parquet", 0.86, 2, order=5)
    models = (logits_of(0.80, 1), logits_of(0.86, 2))
    right = [logits.argmax(axis=1) == labels for logits, labels in models]
    one, two = int((right[0] & ~right[1]).sum()), int((right[1] & ~right[0]).sum())
    main([str(first.parent), str(other), "--json"])
    found = json.loads(capsys.readouterr().out)
    by_name = {each["figure"]: each for each in found["comparisons"][0]["differences"]}
    accuracy = by_name["top1"]
    assert (accuracy["first"], accuracy["other"]) == (right[0].mean(), right[1].mean())
    assert (accuracy["low"], accuracy["high"]) == paired_difference(two, one, COUNT)
    assert accuracy["p"] == mcnemar(one, two)
    assert set(by_name) == {"top1", "loss", "macro_f1", "auroc", "average_precision", "brier"}
    assert by_name["loss"]["p"] < 0.01
    assert by_name["loss"]["high"] < 0
    main([str(first), str(other)])
    lines = capsys.readouterr().out.splitlines()
    difference = 100 * accuracy["difference"]
    ends = f"{100 * accuracy['low']:.2f} to {100 * accuracy['high']:.2f}"
    verdict = f"B is better than A by {difference:.2f} points of top-1 ({ends}), p < 0.001"
    assert verdict in lines
    assert compared(other, first).verdict(1).startswith(f"A is better than B by {difference:.2f} ")


def test_equal_ones_cannot_be_told_apart(tmp_path: Path) -> None:
    paths = [write(tmp_path / f"{seed}.parquet", 0.8, seed) for seed in (1, 2)]
    assert compared(*paths).verdict(1).startswith("A and B cannot be told apart: B has ")
    same = compared(paths[0], paths[0])
    assert same.verdict(1).endswith("(-0.10 to +0.10), p 1.000")
    assert "another seed" in same.to_text()


def test_many_sides_are_corrected_for_their_number(tmp_path: Path) -> None:
    first = write(tmp_path / "0.parquet", 0.8, 0)
    others = [write(tmp_path / f"{seed}.parquet", 0.815, seed) for seed in range(1, 20)]
    alone = [compared(first, other) for other in others]
    together = compared(first, *others)
    better = sum("is better" in each.verdict(1) for each in alone)
    assert sum("is better" in together.verdict(place) for place in range(1, 20)) < better


def test_runs_of_several_seeds(tmp_path: Path) -> None:
    a = [write(tmp_path / f"a{s}.parquet", share, s) for s, share in enumerate((0.80, 0.82, 0.78))]
    b = [
        write(tmp_path / f"b{s}.parquet", share, 9 + s) for s, share in enumerate((0.9, 0.91, 0.89))
    ]
    found = compared(",".join(map(str, a)), ",".join(map(str, b)))
    assert found.runs == (3, 3)
    assert found.verdict(1).startswith("B is better than A by ")
    assert "another seed" not in found.to_text()
    # one lucky seed against another is no proof: the spread of the seeds counts
    lucky = compared(",".join(map(str, a)), a[1])
    assert "cannot be told apart" in lucky.verdict(1)
    assert "B is better" in compared(a[2], a[1]).verdict(1)


def test_intervals_over_seeds_cover_what_they_say() -> None:
    """Runs differ by their seed and the images by chance; no recipe is better."""
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(1000):
        hard = rng.normal(size=400)
        sides = [
            [rng.normal(0, 0.03) + 0.3 * hard + rng.normal(0, 0.4, 400) for _ in range(3)]
            for _ in range(2)
        ]
        changes = np.mean(sides[1], axis=0) - np.mean(sides[0], axis=0)
        means = [[float(run.mean()) for run in side] for side in sides]
        low, high, p = _over_seeds(changes, *means)
        assert (p > 0.05) == (low <= 0 <= high) or abs(p - 0.05) < 1e-3
        inside += low <= 0 <= high
    assert 935 <= inside <= 990  # the chance of the images is in the spread of the runs as well


def test_other_images_are_refused_or_left_out(tmp_path: Path) -> None:
    first = write(tmp_path / "a.parquet", 0.8, 1)
    some = pq.read_table(first).slice(0, 1500)
    pq.write_table(some, tmp_path / "some.parquet")
    with pytest.raises(UsageError, match=r"has 2,000 images and .* 1,500, 1,500 of them the same"):
        compared(first, tmp_path / "some.parquet")
    found = compared(first, tmp_path / "some.parquet", intersect=True)
    assert (found.images, found.left_out) == (1500, 500)
    renamed = some.set_column(0, "image_id", [[f"x{n}" for n in range(1500)]])
    pq.write_table(renamed, tmp_path / "renamed.parquet")
    with pytest.raises(UsageError, match="no image in common"):
        compared(first, tmp_path / "renamed.parquet", intersect=True)
    twice = some.set_column(0, "image_id", [["0.png"] * 1500])
    pq.write_table(twice, tmp_path / "twice.parquet")
    with pytest.raises(UsageError, match="has an image twice"):
        compared(first, tmp_path / "twice.parquet", intersect=True)
    labels = some.column("truth").to_pylist()
    other = some.set_column(1, "truth", [["dog" if labels[0] != "dog" else "cat", *labels[1:]]])
    pq.write_table(other, tmp_path / "other.parquet")
    with pytest.raises(UsageError, match=r"1 image of other true classes than in .* first '0.png'"):
        compared(tmp_path / "some.parquet", tmp_path / "other.parquet")


def test_what_cannot_be_compared(tmp_path: Path) -> None:
    first = write(tmp_path / "a.parquet", 0.8, 1)
    (tmp_path / "bad.parquet").write_bytes(b"PAR1")
    pq.write_table(pq.read_table(first).drop_columns(["loss"]), tmp_path / "less.parquet")
    plain = pq.read_table(first).replace_schema_metadata(None)
    pq.write_table(plain, tmp_path / "plain.parquet")
    (tmp_path / "empty").mkdir()
    (tmp_path / "cv" / "fold-1").mkdir(parents=True)
    (tmp_path / "alone").mkdir()
    tiny_onnx.write(tmp_path / "alone" / "best.onnx")
    (tmp_path / "table.csv").write_text("image_id,label\n")
    table = pq.read_table(first)
    chances = table.column("probabilities").to_pylist()
    loss = table.column("loss").to_pylist()
    for name, column, values in (
        ("nan", "probabilities", [*chances[:3], [float("nan"), 0.5, 0.5], *chances[4:]]),
        ("more", "probabilities", [[2 * each for each in row] for row in chances]),
        ("loss", "loss", [-1.0, *loss[1:]]),
    ):
        place = table.column_names.index(column)
        array = pa.array(values, table.schema.field(place).type)
        other = table.set_column(place, table.schema.field(place), array)
        pq.write_table(other, tmp_path / f"{name}.parquet")
    for name, told in (
        ("none.parquet", "none.parquet does not exist"),
        ("none", "none does not exist"),
        ("bad.parquet", r"bad.parquet: not the predictions.parquet of distcls evaluate --out"),
        ("less.parquet", "not the predictions.parquet"),
        ("plain.parquet", r"it does not say of which model and classes it is\)$"),
        ("nan.parquet", r"1 image with probabilities that are not 0 to 1.* first '3.png'"),
        ("more.parquet", "2,000 images with probabilities .* sum is not 1"),
        ("loss.parquet", "1 image with a loss that is no number"),
        ("table.csv", "table.csv: expected predictions.parquet"),
        ("empty", "empty is a folder without best.onnx or best.pth"),
        ("cv", "runs of a cross-validation; name one, such as .*fold-1 .*out_of_fold.parquet"),
        ("alone", r"data: .*alone has no dataset directory; name one with --data"),
    ):
        with pytest.raises(UsageError, match=told):
            compared(first, tmp_path / name)
    with pytest.raises(BadValue, match="2 to 26 of them"):
        compared(first)


def test_model_files_are_evaluated(tmp_path: Path) -> None:
    images, labels = tiny_dataset.coloured(60)
    data = tiny_dataset.write(tmp_path / "d", list(images), labels, tiny_onnx.COLOURS)
    model = tiny_onnx.write(tmp_path / "m.onnx")
    evaluate_model(model, data, out=tmp_path / "out", quiet=True)
    found = compared(model, tmp_path / "out", data=data, quiet=True)
    assert found.images == 60
    assert found.differences[0][0].p == 1


def test_what_is_missing_is_said_before_anything_is_evaluated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, labels = tiny_dataset.coloured(20)
    data = tiny_dataset.write(tmp_path / "d", list(images), labels, tiny_onnx.COLOURS)
    with pytest.raises(UsageError, match="nowhere does not exist"):
        compared(tiny_onnx.write(tmp_path / "m.onnx"), tmp_path / "nowhere", data=data)
    assert "evaluating" not in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["one source", "packs", "files", "class folders", "named alike"])
def test_images_that_a_run_was_trained_on(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second run has 23 of the first's 30 test images in its training split."""
    images, labels = tiny_dataset.coloured(60)
    where: dict[str, Any] = {"files": kind in ("files", "class folders")}
    where["packed"] = not where["files"]
    for name, first in (("a", 0), ("b", 23)):
        splits = ["train"] * 60
        splits[first : first + 30] = ["test"] * 30
        run = tmp_path / name
        run.mkdir()
        tiny_onnx.write(run / "best.onnx")
        shown = list(images if kind != "named alike" or name == "a" else 255 - images)
        folder = tiny_dataset.write(
            run / "dataset", shown, labels, tiny_onnx.COLOURS, splits=splits, **where
        )
        if kind == "one source":
            info = json.loads((folder / "dataset.json").read_text()) | {"source": "/photos"}
            (folder / "dataset.json").write_text(json.dumps(info))
            tiny_dataset.sign(folder)
    runs, data = [tmp_path / "a", tmp_path / "b"], tmp_path / "a" / "dataset"
    if kind == "class folders":
        for at in range(30):
            target = tmp_path / "photos" / tiny_onnx.COLOURS[labels[at]] / f"{at}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((data / "files" / f"image {at:04d}.png").read_bytes())
        data = tmp_path / "photos"
    found = compared(*runs, data=data)
    seen = 0 if kind == "named alike" else 23
    assert found.trained_on == (0, seen)
    told = [line for line in capsys.readouterr().err.splitlines() if "training split" in line]
    assert len(told) == bool(seen)
    if seen:
        assert f"{runs[1]}: 23 images of 30 were in its own training split" in told[0]
    # the same of evaluations
    for run in runs:
        evaluate_model(run, data, out=run / "out", quiet=True)
    assert compared(*(run / "out" for run in runs)).trained_on == (0, seen)


SIMPLE = ("macro_f1", "auroc", "average_precision", "brier")
OF_SEVERAL = {
    "run_heads": (*(f"accuracy of {name}" for name in ("parity", "size")), *SIMPLE),
    "run_labels": (SIMPLE[0], "micro_f1", *SIMPLE[1:]),
}
HEADS = Task.of_heads(
    [Head("shape", ("round", "flat")), Head("my colour", ("red", "blue", "teal"))]
)
LETTERS = Task.of_heads([Head("1", ("a", "b")), Head("2", ("", "a", "|")), Head("3", ("", "b"))])
LABELS = Task(kind="multi_label", classes=("sea", "sky", "sun"))


@pytest.mark.parametrize("task", [TASK, HEADS, LETTERS, LABELS])
def test_labels_are_read_from_their_texts(task: Task) -> None:
    logits = np.random.default_rng(0).normal(size=(200, len(task.classes))).astype(np.float32)
    labels = task.decide(logits)
    read = labels_of(task, task.texts(labels))
    np.testing.assert_array_equal(read, labels)
    with pytest.raises(ValueError, match="label 'cow' is none of its classes"):
        labels_of(task, ["cow"])
    odd = Task(kind="multi_label", classes=("a|b", "a", "b"))
    assert labels_of(odd, ["a|b"]) is None


def several(task: Task, folder: Path, name: str, noise: float) -> tuple[Path, Outputs]:
    """A table of predictions that are the less right the greater the noise."""
    truth = np.random.default_rng(5).normal(size=(COUNT, len(task.classes))).astype(np.float32)
    rng = np.random.default_rng(int(100 * noise))
    logits = truth + rng.normal(scale=noise, size=truth.shape).astype(np.float32)
    ids = [f"{number}.png" for number in range(COUNT)]
    outputs = Outputs.of(task, logits, task.decide(truth), ids)
    outputs.write(folder / f"{name}.parquet", {})
    return folder / f"{name}.parquet", outputs


def test_heads_are_compared_one_by_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (one, first), (two, other) = (several(HEADS, tmp_path, f"{n}", n) for n in (0.5, 0.6))
    (found,) = compared(one, two).differences
    by_name = {each.figure: each for each in found}
    for place, name in enumerate(("shape", "my colour")):
        right = [each.decided[:, place] == each.labels[:, place] for each in (first, other)]
        only = [int((right[at] & ~right[1 - at]).sum()) for at in (0, 1)]
        head = by_name[f"accuracy of {name}"]
        assert (head.first, head.other) == (right[0].mean(), right[1].mean())
        assert (head.low, head.high) == paired_difference(only[1], only[0], COUNT)
        assert head.p == mcnemar(*only)
    assert by_name["exact"].first == (first.decided == first.labels).all(axis=1).mean()
    assert by_name["top1"].first == (first.decided == first.labels).mean()
    main([str(one), str(two)])
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("accuracy of my colour ") for line in lines) == 1
    points = 100 * abs(by_name["exact"].value)
    assert any(f"{points:.2f} points of exact, all heads of an image right (" in x for x in lines)
    starts = {line.index("McNemar") for line in lines if "McNemar" in line}
    assert len(starts) <= 2  # `< 0.001` is longer


def test_labels_have_f1(tmp_path: Path) -> None:
    (one, first), (two, other) = (several(LABELS, tmp_path, f"{n}", n) for n in (0.5, 0.9))
    (found,) = compared(one, two).differences
    by_name = {each.figure: each for each in found}
    for kind in ("macro", "micro"):
        figure = by_name[f"{kind}_f1"]
        values = [f1_score(each.labels, each.decided, average=kind) for each in (first, other)]
        assert (figure.first, figure.other) == pytest.approx(values)
        assert figure.test == "bootstrap, paired"
        rng = np.random.default_rng(1)
        draws = []
        for _ in range(100):
            at = rng.integers(0, COUNT, COUNT)
            own = [f1_score(e.labels[at], e.decided[at], average=kind) for e in (first, other)]
            draws.append(own[1] - own[0])
        ends = np.quantile(draws, [0.025, 0.975])
        assert [figure.low, figure.high] == pytest.approx(ends, abs=0.2 * (ends[1] - ends[0]))


@pytest.mark.parametrize(("run", "data"), [("run_heads", "heads"), ("run_labels", "labels")])
def test_several_outputs(tmp_path: Path, run: str, data: str) -> None:
    for name in ("best.pth", "best.onnx"):
        evaluate_model(EXPORTED / run / name, EXPORTED / data, out=tmp_path / name, quiet=True)
    (found,) = compared(tmp_path / "best.pth", tmp_path / "best.onnx").differences
    assert [each.figure for each in found] == ["exact", "top1", "loss", *OF_SEVERAL[run]]
    measured = json.loads((tmp_path / "best.onnx" / "metrics.json").read_text())
    for each in found[:2]:
        assert each.other == pytest.approx(measured[each.figure])


def test_runs_are_evaluated_on_what_their_config_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    images, labels = tiny_dataset.coloured(20)
    tiny_dataset.write(
        Path("ds", "m"), list(images), labels, tiny_onnx.COLOURS, splits=["test"] * 20
    )
    for name in ("a", "b"):
        Path(name).mkdir()
        tiny_onnx.write(Path(name, "best.onnx"))
        Path(name, "config.yaml").write_text("data: ds/m\n")
    assert compared("a", "b").images == 20
    Path("b", "config.yaml").write_text("data: ds/n\n")
    Path("b", "best.pth").write_bytes(b"damaged")
    told = "data: b has no dataset directory, and 'ds/n' in its config.yaml is not there; name one"
    with pytest.raises(UsageError, match=told):
        compared("a", "b")

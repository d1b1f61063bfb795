"""`distcls merge`: the mean of several runs' weights, uniform and greedy."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import distcls
from distcls.cli import dispatch
from distcls.data.dataset import Dataset
from distcls.errors import BadValue, UsageError
from distcls.imaging import Preprocess
from distcls.model_card import ModelCard
from distcls.models.checkpoint import read_checkpoint, save_checkpoint
from distcls.task import Task
from distcls.training.merge import averaged, merge, recount
from distcls.training.run import fit
from tests import small_networks

FEW: dict[str, Any] = {"model": "simple_cnn", "batch_size": 32, "limit": 500, "quiet": True}


@pytest.fixture(scope="module")
def runs(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run, two fine-tuned from it, and one from another start."""
    folder = tmp_path_factory.mktemp("runs")
    fit(data=digits, out=folder / "base", epochs=4, lr=0.01, **FEW)
    for seed in (1, 2):
        tuned = {"name": "simple_cnn", "pretrained": str(folder / "base")}
        options: dict[str, Any] = {**FEW, "model": tuned, "seed": seed, "epochs": 2, "lr": 0.003}
        fit(data=digits, out=folder / f"tuned{seed}", **options)
    fit(data=digits, out=folder / "other", epochs=4, lr=0.01, seed=7, **FEW)
    return {path.name: path for path in folder.iterdir()}


def test_the_mean_of_tuned_runs(
    runs: dict[str, Path], digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call = ["merge", str(runs["tuned1"]), str(runs["tuned2"]), "--out", str(tmp_path / "mean")]
    dispatch([*call, "--json"])
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert len(found["merged"]) == 2
    assert found["score"] > min(found["scores"].values()) - 0.02
    card, weights = read_checkpoint(tmp_path / "mean" / "best.pth")
    originals = [read_checkpoint(runs[name] / "best.pth")[1] for name in ("tuned1", "tuned2")]
    for name, tensor in weights.items():
        if not name.endswith(("running_mean", "running_var", "num_batches_tracked")):
            assert torch.allclose(tensor, (originals[0][name] + originals[1][name]) / 2), name
    assert card.training["merged"] == found["merged"]
    # what the commands make of it
    result = distcls.evaluate_model(tmp_path / "mean", digits, split="val", quiet=True)
    assert result.top1 == found["score"]
    assert f"distcls evaluate --model {tmp_path / 'mean'} --data {digits}" in captured.err
    exported = distcls.export_onnx(tmp_path / "mean", quiet=True)
    assert exported.agreement == 1.0


def test_greedy_leaves_out_what_harms(
    runs: dict[str, Path], digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [runs[name] for name in ("other", "tuned1", "base")]
    uniform = merge(paths, tmp_path / "uniform", data=digits)
    assert "the mean is worse than" in capsys.readouterr().err
    soup = merge(paths, tmp_path / "soup", data=digits, greedy=True)
    said = capsys.readouterr().err
    assert "warning" not in said
    assert soup.score >= max(soup.scores.values()) > uniform.score
    taken = {Path(name).parent.name for name in soup.merged}
    assert not {"other", "tuned1"} <= taken
    assert "it is left out" in said


def test_validation_images_that_were_trained_on_are_said(
    runs: dict[str, Path], digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As where each run has divided the same images by a seed of its own."""
    data = tmp_path / "data"
    distcls.prepare_dataset("digits", data, seed=9, quiet=True)
    capsys.readouterr()
    both = [runs["tuned1"], runs["tuned2"]]
    merge(both, tmp_path / "mean", data=data)
    trained = set(Dataset.open(digits).split("train").image_ids)
    measured = Dataset.open(data).split("val").image_ids
    seen = len(trained.intersection(measured))
    assert 0 < seen < len(measured)
    said = capsys.readouterr().err
    for run in both:
        words = f"{run / 'best.pth'}: {seen} images of {len(measured)} were in its own training"
        assert f"warning: {words}" in said
    # an evaluation says the same of the images that it measures
    for split, count in {"val": seen, "test": 0, "train": 0}.items():
        own = digits if split != "val" else data
        dispatch(["evaluate", "--model", str(both[0]), "--data", str(own), "--split", split])
        assert ("were in its own training split" in capsys.readouterr().err) == (count > 0)


def test_the_mean_is_that_of_the_numbers() -> None:
    one = {"w": torch.tensor([1.0, 2.0]), "n": torch.tensor(3)}
    two = {"w": torch.tensor([2.0, 6.0]), "n": torch.tensor(8)}
    three = {"w": torch.tensor([6.0, 1.0]), "n": torch.tensor(1)}
    found = averaged([one, two, three])
    assert found["w"].tolist() == [3.0, 3.0]
    assert found["n"] == 3
    halves = [{"w": torch.full((3,), value, dtype=torch.bfloat16)} for value in (1.0, 1.0078125)]
    assert averaged(halves)["w"].dtype == torch.bfloat16


def test_statistics_are_those_of_the_training_images(digits: Path) -> None:
    split, network = Dataset.open(digits).split("train"), small_networks.network()
    norm = next(module for module in network.modules() if isinstance(module, nn.BatchNorm2d))
    before, momentum = norm.weight.detach().clone(), norm.momentum
    seen: list[torch.Tensor] = []
    hook = norm.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach().clone()))
    recount(network, split, small_networks.PROCESS)
    hook.remove()
    assert sum(map(len, seen)) == len(split) == 1259
    means = torch.stack([batch.mean((0, 2, 3)) for batch in seen]).mean(0)
    variances = torch.stack([batch.var((0, 2, 3)) for batch in seen]).mean(0)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert torch.allclose(norm.running_mean, means, atol=1e-3)
    assert torch.allclose(norm.running_var, variances, rtol=1e-2)
    assert torch.equal(norm.weight, before)
    assert norm.momentum == momentum
    assert not any(module.training for module in network.modules())


def test_a_mean_has_statistics_of_its_own(digits: Path, tmp_path: Path) -> None:
    files = []
    for seed in (1, 2):
        card = ModelCard(
            architecture={"name": "mobilenet_v3_small"},
            task=Task(classes=tuple("0123456789")),
            preprocess=small_networks.PROCESS,
        )
        files.append(tmp_path / f"{seed}.pth")
        save_checkpoint(files[-1], small_networks.network(10, seed), card)
    merge(files, tmp_path / "out", data=digits)
    before, after = (read_checkpoint(path)[1] for path in (files[0], tmp_path / "out/best.pth"))
    name = next(name for name in after if name.endswith("running_mean"))
    assert not before[name].any()  # untrained
    assert after[name].any()


def changed(run: Path, out: Path, **changes: Any) -> Path:
    """The run's best.pth with another card."""
    card, weights = read_checkpoint(run / "best.pth")
    save_checkpoint(out, weights, dataclasses.replace(card, **changes))
    return out


def test_unlike_models_are_refused(runs: dict[str, Path], digits: Path, tmp_path: Path) -> None:
    base = runs["base"]
    card, weights = read_checkpoint(base / "best.pth")
    names = ("a", *card.classes[1:])
    others = {
        r"model\.name is 'mobilenet_v3_small', and 'simple_cnn' in": {
            "architecture": {**card.architecture, "name": "mobilenet_v3_small"}
        },
        r"other classes \(0, a\)": {"task": dataclasses.replace(card.task, classes=names)},
        "other classes.*in another order": {
            "task": dataclasses.replace(card.task, classes=card.classes[::-1])
        },
        r"input\.size is \(32, 32\), and \(28, 28\) in": {"preprocess": Preprocess(size=(32, 32))},
    }
    for number, (words, changes) in enumerate(others.items()):
        other = changed(base, tmp_path / f"{number}.pth", **changes)
        with pytest.raises(UsageError, match=words) as caught:
            merge([base, other], tmp_path / "out", data=digits)
        assert "\n" not in str(caught.value)
    weights = {name: tensor[:1] if tensor.ndim else tensor for name, tensor in weights.items()}
    save_checkpoint(tmp_path / "cut.pth", weights, card)
    with pytest.raises(UsageError, match="is of shape"):
        merge([base, tmp_path / "cut.pth"], tmp_path / "out", data=digits)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["base"], "one model has no mean"),
        (["base", "base/best.pth"], "is given twice"),
        (["base", "best.onnx"], "an exported model has no weights"),
        (["base", "nowhere.pth"], "does not exist"),
        (["base", "other", "--metric", "top2"], "top2"),
        (["base", "other", "--metric", "exact"], "this task has loss"),
        (["base", "other", "--data", "nowhere"], "nowhere"),
    ],
)
def test_mistakes_are_one_line(
    given: list[str], words: str, runs: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "best.onnx").write_bytes(b"x")
    folder = runs["base"].parent
    (tmp_path / "base").symlink_to(folder / "base")
    (tmp_path / "other").symlink_to(folder / "other")
    names = [str(tmp_path / text) if (tmp_path / text).exists() else text for text in given]
    with pytest.raises((BadValue, UsageError), match=words) as caught:
        dispatch(["merge", *names, "--out", str(tmp_path / "out")])
    assert "\n" not in str(caught.value)


def test_a_run_is_not_overwritten(runs: dict[str, Path], digits: Path) -> None:
    with pytest.raises(UsageError, match="already contains a run"):
        merge([runs["base"], runs["other"]], runs["tuned1"], data=digits)


def test_means_of_one_model_change_nothing(runs: dict[str, Path]) -> None:
    _, weights = read_checkpoint(runs["base"] / "best.pth")
    same = averaged([weights, weights])
    assert all(np.array_equal(same[name], weights[name]) for name in weights)

"""Weights to start from: what fits is taken, what does not is named."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torchvision.models import get_model

from distcls.errors import UsageError
from distcls.model_card import ModelCard
from distcls.models.checkpoint import save_checkpoint
from distcls.models.config import ModelConfig
from distcls.models.matching import apply_weights
from distcls.models.pretrained import find_weights
from distcls.task import Task
from tests.small_networks import PROCESS, assert_taken, load, network, plain


def test_nothing_asked_for() -> None:
    assert find_weights(ModelConfig(pretrained=None)) is None


def test_our_checkpoint_with_another_class_count(tmp_path: Path) -> None:
    path = tmp_path / "best.pth"
    source = network(7, seed=1)
    card = ModelCard(
        architecture={"name": "mobilenet_v3_small"},
        task=Task(classes=tuple("abcdefg")),
        preprocess=PROCESS,
    )
    save_checkpoint(path, source, card)
    model = network(5)
    fresh = {name: value.clone() for name, value in model.backbone.state_dict().items()}
    weights = find_weights(ModelConfig(pretrained=str(path)))
    assert weights is not None
    assert weights.preprocess == PROCESS
    report = apply_weights(model, weights)
    assert_taken(model, dict(source.backbone.state_dict()), report)
    assert report.skipped == {
        "classifier.3.weight ([7, 1024] in the file, [5, 1024] in the network)": 7 * 1024,
        "classifier.3.bias ([7] in the file, [5] in the network)": 7,
    }
    assert report.missing == {}
    assert len(report.loaded) == len(fresh) - 2
    own = model.backbone.state_dict()
    for name in ("classifier.3.weight", "classifier.3.bias"):
        assert not own[name].any()  # from equal logits
    lines = report.lines()
    assert lines[0] == f"pretrained: {path}"
    values = sum(tensor.numel() for tensor in fresh.values()) - 5 * 1025
    assert [line.split() for line in lines[1:4]] == [
        ["loaded", str(len(report.loaded)), "tensors", f"{values:,}", "values"],
        ["skipped", "2", "tensors", "7,175", "values"],
        ["missing", "0", "tensors", "0", "values"],
    ]
    assert lines[4].startswith("  skipped classifier.3.weight ([7, 1024]")
    assert len(lines) == 6


@pytest.mark.parametrize(
    "prefix",
    [
        *("", "module.", "_orig_mod.", "model.", "backbone.", "pretrain_", "pretrain_model."),
        *("module.backbone.", "_orig_mod.module.", "module.model._orig_mod."),
    ],
)
@pytest.mark.parametrize("wrapper", [None, "state_dict"])
def test_plain_state_dicts_however_wrapped(
    tmp_path: Path, prefix: str, wrapper: str | None
) -> None:
    tensors = plain()
    content: dict[str, Any] = {prefix + name: value for name, value in tensors.items()}
    if wrapper:
        content = {wrapper: content, "epoch": 3, "optimizer": {"lr": 0.1}}
    torch.save(content, tmp_path / "w.pth")
    model = network()
    report = load(tmp_path / "w.pth", model)
    assert_taken(model, tensors, report)
    assert len(report.loaded) == len(tensors)
    assert (report.skipped, report.missing) == ({}, {})
    assert len(report.lines()) == 4


@pytest.mark.parametrize(
    "keys",
    [
        *("model", "model_state_dict", "ema", "model_ema", "tensors.model", "net", "weights"),
        *("teacher", "student", "network", "ema_state_dict", "params", "my_network", "a.b.c"),
    ],
)
def test_dictionaries_around_a_state_dict(tmp_path: Path, keys: str) -> None:
    tensors = plain()
    content: dict[str, Any] = dict(tensors)
    for key in reversed(keys.split(".")):
        content = {key: content, "epoch": 3, "args": argparse.Namespace(lr=np.float64(1))}
    torch.save(content, tmp_path / "w.pth")
    model = network()
    report = load(tmp_path / "w.pth", model)
    assert_taken(model, tensors, report)
    assert len(report.loaded) == len(tensors)


def test_missing_and_foreign_tensors_are_named(tmp_path: Path) -> None:
    tensors = plain()
    del tensors["features.0.0.weight"]
    tensors["extra.weight"] = torch.zeros(3)
    torch.save(tensors, tmp_path / "w.pth")
    report = load(tmp_path / "w.pth", network())
    assert report.missing == {"features.0.0.weight": 16 * 3 * 3 * 3}
    assert report.skipped == {"extra.weight (not in the network)": 3}
    assert "  missing features.0.0.weight" in report.lines()


@pytest.mark.parametrize(
    "content", [{}, {"a": 1}, {"state_dict": {}}, {"fc.weight": torch.zeros(3, 4)}]
)
def test_another_architecture_is_refused(tmp_path: Path, content: dict[str, Any]) -> None:
    torch.save(content, tmp_path / "w.pth")
    refusal = r"w.pth fills 0 of the network's [\d,]+ values by name \(0 of its \d+ tensors\)"
    with pytest.raises(UsageError, match=refusal):
        load(tmp_path / "w.pth", network())


def test_large_and_small_are_not_mixed(tmp_path: Path) -> None:
    torch.save(plain(), tmp_path / "w.pth")
    model = network(name="mobilenet_v3_large")
    before = {name: value.clone() for name, value in model.backbone.state_dict().items()}
    with pytest.raises(UsageError, match=r"it has 210 weights and statistics, the network 266; "):
        load(tmp_path / "w.pth", model)
    after = model.backbone.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)


def part_of(share: float) -> tuple[dict[str, Tensor], int]:
    """Tensors of a network that make up at most `share` of its values, and how many these are."""
    tensors = plain()
    total, taken = sum(tensor.numel() for tensor in tensors.values()), 0
    part: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if taken + tensor.numel() <= share * total:
            part[name] = tensor
            taken += tensor.numel()
    return part, taken


@pytest.mark.parametrize("share", [0.3, 0.49])
def test_less_than_half_is_refused_unless_asked_for(tmp_path: Path, share: float) -> None:
    part, taken = part_of(share)
    torch.save(part, tmp_path / "w.pth")
    with pytest.raises(UsageError, match=rf"fills {taken:,} of .*model\.allow_partial takes"):
        load(tmp_path / "w.pth", network())
    model = network()
    weights = find_weights(ModelConfig(pretrained=str(tmp_path / "w.pth")))
    assert weights is not None
    report = apply_weights(model, weights, allow_partial=True)
    assert_taken(model, part, report)
    assert sum(report.loaded.values()) == taken
    assert report.loaded.keys() | report.missing.keys() == model.backbone.state_dict().keys()


def test_more_than_half_is_taken(tmp_path: Path) -> None:
    part, taken = part_of(0.6)
    torch.save(part, tmp_path / "w.pth")
    model = network()
    report = load(tmp_path / "w.pth", model)
    assert_taken(model, part, report)
    assert sum(report.loaded.values()) == taken


def test_nothing_that_fits_is_refused_always(tmp_path: Path) -> None:
    torch.save({"fc.weight": torch.zeros(3, 4)}, tmp_path / "w.pth")
    weights = find_weights(ModelConfig(pretrained=str(tmp_path / "w.pth")))
    assert weights is not None
    refusal = (
        r"names without a counterpart in the file: fc\.weight; in the network: "
        r"features\.0\.0\.weight, features\.0\.1\.weight, features\.0\.1\.bias, \.\.\.$"
    )
    with pytest.raises(UsageError, match=refusal):
        apply_weights(network(), weights, allow_partial=True)


def test_long_reports_are_cut(tmp_path: Path) -> None:
    torch.save({n: v for n, v in plain().items() if v.ndim > 1}, tmp_path / "w.pth")
    report = load(tmp_path / "w.pth", network())
    assert len(report.missing) > 20
    lines = report.lines()
    assert len(lines) == 4 + 20 + 1
    assert lines[-1] == f"  ... and {len(report.missing) - 20} more missing"


def test_two_copies_in_one_file(tmp_path: Path) -> None:
    tensors = plain()
    doubled = {f"pretrain_model.{name}": value for name, value in tensors.items()}
    doubled |= {f"backbone.{name}": torch.zeros_like(value) for name, value in tensors.items()}
    torch.save(doubled, tmp_path / "w.pth")
    model = network()
    report = load(tmp_path / "w.pth", model)
    assert_taken(model, tensors, report)
    assert len(report.skipped) == len(tensors)
    assert all(name.endswith("(in the file twice)") for name in report.skipped)


def test_an_average_goes_before_the_weights_it_averages(tmp_path: Path) -> None:
    tensors = plain()
    zeros = {name: torch.zeros_like(value) for name, value in tensors.items()}
    averaged = {f"module.{name}": value for name, value in tensors.items()}
    content = {"model": zeros, "model_ema": {"n_averaged": torch.tensor(3), **averaged}}
    torch.save(content, tmp_path / "w.pth")
    model = network()
    report = load(tmp_path / "w.pth", model)
    assert_taken(model, tensors, report)
    assert report.skipped == {"n_averaged (not in the network)": 1}
    for off in (None, {"decay": 0.99, "updates": 0}):
        torch.save({"model": tensors, "ema": off}, tmp_path / "off.pth")
        assert_taken(model, tensors, load(tmp_path / "off.pth", model))


def test_an_optimisers_tensors_are_not_the_networks(tmp_path: Path) -> None:
    tensors = plain()
    moments = {at: {"exp_avg": value, "step": value} for at, value in enumerate(tensors.values())}
    content = {"my_optimizer": {"state": moments}, "my_network": tensors}
    torch.save(content, tmp_path / "w.pth")
    model = network()
    assert_taken(model, tensors, load(tmp_path / "w.pth", model))


def test_the_full_state_of_a_run_of_ours(tmp_path: Path) -> None:
    source = network(seed=1)
    state = {"model": {}, "optimizer": {}, "ema": source.state_dict(), "ema_updates": 7}
    torch.save({"config": "", "progress": {}, "tensors": state}, tmp_path / "step.pth")
    model = network()
    report = load(tmp_path / "step.pth", model)
    assert_taken(model, dict(source.backbone.state_dict()), report)
    assert (report.skipped, report.missing) == ({}, {})


def test_safetensors(tmp_path: Path) -> None:
    tensors = plain()
    save_file(
        {f"module.{name}": value for name, value in tensors.items()}, tmp_path / "w.safetensors"
    )
    model = network()
    report = load(tmp_path / "w.safetensors", model)
    assert_taken(model, tensors, report)
    assert len(report.loaded) == len(tensors)


@pytest.mark.parametrize("content", [b"", b"\x08\0\0\0\0\0\0\0{}junk{}", b"not safetensors at all"])
def test_damaged_safetensors(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(content)
    with pytest.raises(
        UsageError, match=r"w.safetensors: cannot be read as safetensors: "
    ) as caught:
        load(path, network())
    assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match="No such file"):
        load(tmp_path / "none.safetensors", network())


def test_half_precision_weights_become_the_networks_own(tmp_path: Path) -> None:
    tensors = {n: v.half() if v.is_floating_point() else v for n, v in plain().items()}
    torch.save(tensors, tmp_path / "w.pth")
    model = network()
    load(tmp_path / "w.pth", model)
    weight = model.backbone.state_dict()["features.0.0.weight"]
    assert weight.dtype == torch.float32
    assert torch.equal(weight, tensors["features.0.0.weight"].float())


def test_names_of_densenet_files_from_before_dots_were_banned(tmp_path: Path) -> None:
    torch.manual_seed(1)
    tensors = get_model("densenet121", num_classes=5).state_dict()
    old = {
        re.sub(r"(denselayer\d+\.(?:norm|conv))([12])\.", r"\1.\2.", name): value
        for name, value in tensors.items()
    }
    assert old.keys() != tensors.keys()
    torch.save(old, tmp_path / "w.pth")
    model = network(name="densenet121")
    report = load(tmp_path / "w.pth", model, "densenet121")
    assert len(report.loaded) == len(tensors)
    assert_taken(model, dict(tensors), report)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none.pth: no such file"):
        load(tmp_path / "none.pth", network())

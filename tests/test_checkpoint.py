"""Checkpoints: the same logits after a round trip, and nothing dangerous or damaged gets in."""

from __future__ import annotations

import argparse
import collections
import datetime
import io
import pickle
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distcls.errors import UsageError
from distcls.imaging import Preprocess
from distcls.model_card import ModelCard
from distcls.models.checkpoint import (
    load_tensors,
    open_checkpoint,
    read_checkpoint,
    save_checkpoint,
    save_tensors,
)
from distcls.models.classifier import Classifier
from distcls.models.config import ModelConfig
from distcls.models.factory import build
from distcls.task import Task
from tests.pictures import smooth

PROCESS = Preprocess(size=(32, 40), mean=(0.1, 0.2, 0.3), std=(0.3, 0.2, 0.1))
ARCHITECTURE = {
    "name": "mobilenet_v3_small",
    "stem_stride": 1,
    "dropout": 0.1,
    "batch_norm_momentum": 0.1,
    "pretrained": None,
}


def make(path: Path, **changes: Any) -> tuple[Classifier, ModelCard]:
    torch.manual_seed(0)
    config = ModelConfig(stem_stride=1, dropout=0.1, batch_norm_momentum=1.0)
    values: dict[str, Any] = {
        "architecture": ARCHITECTURE,
        "task": Task(classes=("a", "b", "ß")),
        "preprocess": PROCESS,
        "training": {"epoch": 2},
    }
    card = ModelCard(**{**values, **changes})
    model = build(config, 3, PROCESS)
    with torch.no_grad():  # fresh statistics would let every image's logits vanish
        model.train()(torch.randint(0, 256, (8, 32, 40, 3), dtype=torch.uint8))
    save_checkpoint(path, model, card)
    return model, card


def refused(path: Path, reader: Callable[[Path], Any] = load_tensors) -> str:
    with pytest.raises(UsageError) as caught:
        reader(path)
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith(str(path))
    return text


def test_round_trip_gives_the_same_logits(tmp_path: Path) -> None:
    model, card = make(tmp_path / "best.pth")
    opened = open_checkpoint(tmp_path / "best.pth", "cpu")
    assert opened.card == card
    images = np.stack([smooth(32, 40, seed=seed) for seed in range(5)])
    with torch.no_grad():
        layout = model.eval().to(memory_format=torch.channels_last)
        expected = layout(torch.from_numpy(images)).numpy()
    logits = opened.logits(images)
    assert logits.dtype == np.float32
    assert logits.shape == (5, 3)
    assert np.array_equal(logits, expected)
    assert np.ptp(logits, axis=0).max() > 1e-2
    assert "cpu" in opened.provider


def test_card_and_tensors_are_read_as_written(tmp_path: Path) -> None:
    model, card = make(tmp_path / "best.pth")
    found, tensors = read_checkpoint(tmp_path / "best.pth")
    assert found == card
    state = model.state_dict()
    assert list(tensors) == list(state)
    assert all(torch.equal(tensors[name], state[name]) for name in state)


def test_what_training_scripts_keep_beside_their_weights(tmp_path: Path) -> None:
    path = tmp_path / "theirs.pth"
    things = {
        "args": argparse.Namespace(lr=0.1, out=Path("runs"), betas=(0.9, 0.99)),
        "best": np.float64(0.5),
        "steps": np.int32(7),
        "weights": np.arange(4.0),
        "shape": torch.Size([3, 4]),
        "meters": collections.defaultdict(list, {"loss": [1.0]}),
        "recent": collections.deque([1, 2], 5),
        "when": datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC),
        "config": types.SimpleNamespace(a=1),
        "ids": frozenset([1]),
    }
    known = set(torch.serialization.get_safe_globals())
    for name, thing in things.items():
        save_tensors(path, {"w": torch.ones(2), name: thing})
        assert torch.equal(load_tensors(path)["w"], torch.ones(2)), name
    assert load_tensors(path).keys() == {"w", "ids"}
    save_tensors(path, {"shape": things["shape"], "best": things["best"]})
    assert load_tensors(path)["shape"] == torch.Size([3, 4])
    assert set(torch.serialization.get_safe_globals()) == known


class ViaNamespace:
    """A harmless type is given code to call."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return argparse.Namespace, (), {"x": Payload(self.target)}


class ViaNumpy:
    """numpy's own reconstruction is asked for an array of objects."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        array = np.empty(1, object)
        array[0] = Payload(self.target)
        return array.__reduce__()  # type: ignore[return-value]


@pytest.mark.parametrize("wrapper", [ViaNamespace, ViaNumpy])
def test_harmless_types_open_no_way_for_others(tmp_path: Path, wrapper: type[Any]) -> None:
    path, target = tmp_path / "best.pth", tmp_path / "owned"
    torch.save({"x": wrapper(target), "w": torch.zeros(2)}, path)
    assert "refused" in refused(path)
    assert not target.exists()
    assert pickle.loads(pickle.dumps(wrapper(target))) is not None  # it would have worked
    assert target.exists()


class Payload:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.target,)


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle"])
def test_a_malicious_pickle_is_refused_and_not_run(tmp_path: Path, kind: str) -> None:
    path, target = tmp_path / "best.pth", tmp_path / "owned"
    content = {"card": Payload(target), "model": {"w": torch.zeros(2)}}
    if kind == "pickle":
        path.write_bytes(pickle.dumps({"card": Payload(target)}, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    for reader in (load_tensors, read_checkpoint, open_checkpoint):
        assert "refused" in refused(path, reader)
        assert "save `model.state_dict()` alone" in refused(path, reader)
        assert not target.exists()
    if kind == "pickle":  # the payload would have worked
        pickle.loads(path.read_bytes())
        assert target.exists()


@pytest.mark.parametrize("legacy", [False, True])
def test_truncated_files_are_refused(tmp_path: Path, legacy: bool) -> None:
    whole, path = io.BytesIO(), tmp_path / "cut.pth"
    torch.save({"w": torch.arange(500.0)}, whole, _use_new_zipfile_serialization=not legacy)
    data = whole.getvalue()
    for length in (0, 3, 10, len(data) // 4, len(data) // 2, len(data) * 9 // 10, len(data) - 1):
        path.write_bytes(data[:length])
        refused(path)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_damage_raises_nothing_else(tmp_path: Path, legacy: bool) -> None:
    rng = np.random.default_rng(0)
    whole, path = io.BytesIO(), tmp_path / "damaged.pth"
    torch.save({"w": torch.arange(50.0)}, whole, _use_new_zipfile_serialization=not legacy)
    found = 0
    for _ in range(80):
        data = bytearray(whole.getvalue())
        data[rng.integers(0, len(data))] = rng.integers(0, 256)
        path.write_bytes(data)
        try:
            load_tensors(path)
        except UsageError:
            found += 1
    assert found > 10


@pytest.mark.parametrize(
    "data", [b"", b"hello world\n", b'{"a": 1}', b"\x89PNG\r\n\x1a\n", b"PK\x03\x04junk", b"\x80x"]
)
def test_what_is_no_checkpoint(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "best.pth"
    path.write_bytes(data)
    refused(path)
    assert "pickled objects" not in refused(path) or data.startswith(b"\x80")


def test_missing_files_and_folders(tmp_path: Path) -> None:
    assert "no such file" in refused(tmp_path / "none.pth")
    assert "a folder, expected a checkpoint" in refused(tmp_path)


def test_checkpoints_of_others(tmp_path: Path) -> None:
    path = tmp_path / "best.pth"
    save_tensors(path, {"conv.weight": torch.zeros(2)})
    assert "no model card" in refused(path, read_checkpoint)
    torch.save([torch.zeros(2)], path)
    assert "holds list" in refused(path)
    save_tensors(path, {"card": {"format": 1}, "model": {}})
    assert "not a model written by distcls" in refused(path, read_checkpoint)


def test_weights_that_do_not_fit_the_card(tmp_path: Path) -> None:
    path = tmp_path / "best.pth"
    make(path, task=Task(classes=("a", "b")))
    text = refused(path, open_checkpoint)
    assert "its weights do not fit its card" in text
    assert "classifier.3.weight" in text
    card = make(path)[1]
    save_tensors(path, {"card": card.to_json(), "model": None})
    assert "do not fit" in refused(path, open_checkpoint)


def test_a_card_of_an_unknown_network_or_field(tmp_path: Path) -> None:
    path = tmp_path / "best.pth"
    make(path, architecture={**ARCHITECTURE, "name": "resnet_from_tomorrow"})
    with pytest.raises(UsageError, match="unknown model 'resnet_from_tomorrow'"):
        open_checkpoint(path)
    make(path, architecture={**ARCHITECTURE, "colour": "red"})
    assert "unknown key 'colour'" in refused(path, open_checkpoint)


FULL = """
import resource, signal, sys
from pathlib import Path
import torch
from distcls.errors import DistclsError
from distcls.models.checkpoint import save_tensors
from distcls.task import Task
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
try:
    save_tensors(Path(sys.argv[1]), {"w": torch.zeros(100_000)})
except DistclsError as error:
    print(error)
"""


def test_a_full_disk_keeps_the_previous_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "best.pth"
    save_tensors(path, {"w": torch.ones(3)})
    command = [sys.executable, "-c", FULL, str(path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert str(tmp_path) in result.stdout
    assert "MiB free" in result.stdout
    assert torch.equal(load_tensors(path)["w"], torch.ones(3))
    assert [entry.name for entry in tmp_path.iterdir()] == ["best.pth"]

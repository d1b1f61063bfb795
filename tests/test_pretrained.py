"""Weights to start from: what fits is taken, what does not is named. No network is needed."""

from __future__ import annotations

import functools
import gc
import http.server
import pickle
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.models import MobileNet_V3_Small_Weights, get_model

from distcls.bundle import ModelCard
from distcls.errors import DistclsError, UsageError
from distcls.files import digest
from distcls.imaging import Preprocess
from distcls.models.checkpoint import save_checkpoint
from distcls.models.classifier import Classifier
from distcls.models.config import ModelConfig
from distcls.models.pretrained import Report, apply_weights, find_weights
from distcls.models.zoo import build

PROCESS = Preprocess(size=(32, 32), mean=(0.5, 0.4, 0.3))
LEAK = pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
SMALL = MobileNet_V3_Small_Weights.DEFAULT


def network(classes: int = 5, seed: int = 0, name: str = "mobilenet_v3_small") -> Classifier:
    torch.manual_seed(seed)
    return build(ModelConfig(name=name), classes, PROCESS)


def plain(classes: int = 5) -> dict[str, Tensor]:
    return dict(network(classes, seed=1).backbone.state_dict())


def load(source: str | Path, model: Classifier, name: str = "mobilenet_v3_small") -> Report:
    weights = find_weights(ModelConfig(name=name, pretrained=str(source)))
    assert weights is not None
    return apply_weights(model, weights)


def assert_taken(model: Classifier, tensors: dict[str, Tensor], report: Report) -> None:
    own = model.backbone.state_dict()
    assert report.loaded
    for name in report.loaded:
        assert torch.equal(own[name], tensors[name]), name


def test_nothing_asked_for() -> None:
    assert find_weights(ModelConfig()) is None


def test_our_checkpoint_with_another_class_count(tmp_path: Path) -> None:
    path = tmp_path / "best.pth"
    source = network(7, seed=1)
    card = ModelCard(
        architecture={"name": "mobilenet_v3_small"}, classes=tuple("abcdefg"), preprocess=PROCESS
    )
    save_checkpoint(path, source, card)
    model = network(5)
    fresh = {name: value.clone() for name, value in model.backbone.state_dict().items()}
    weights = find_weights(ModelConfig(pretrained=str(path)))
    assert weights is not None
    assert weights.preprocess == PROCESS
    report = apply_weights(model, weights)
    assert_taken(model, dict(source.backbone.state_dict()), report)
    assert report.skipped == (
        "classifier.3.weight ([7, 1024] in the file, [5, 1024] in the network)",
        "classifier.3.bias ([7] in the file, [5] in the network)",
    )
    assert report.missing == ()
    assert len(report.loaded) == len(fresh) - 2
    own = model.backbone.state_dict()
    for name in ("classifier.3.weight", "classifier.3.bias"):
        assert torch.equal(own[name], fresh[name])
    lines = report.lines()
    assert lines[0] == f"pretrained: {len(report.loaded)} tensors loaded from {path}"
    assert lines[1].startswith("  skipped classifier.3.weight ([7, 1024]")
    assert len(lines) == 3


@pytest.mark.parametrize(
    "prefix",
    ["", "module.", "_orig_mod.", "model.", "backbone.", "module.backbone.", "_orig_mod.module."],
)
@pytest.mark.parametrize("wrapper", [None, "state_dict", "model"])
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
    assert (report.skipped, report.missing) == ((), ())
    assert len(report.lines()) == 1


def test_missing_and_foreign_tensors_are_named(tmp_path: Path) -> None:
    tensors = plain()
    del tensors["features.0.0.weight"]
    tensors["extra.weight"] = torch.zeros(3)
    torch.save(tensors, tmp_path / "w.pth")
    report = load(tmp_path / "w.pth", network())
    assert report.missing == ("features.0.0.weight",)
    assert report.skipped == ("extra.weight (not in the network)",)
    assert "  missing features.0.0.weight" in report.lines()


@pytest.mark.parametrize(
    "content", [{}, {"a": 1}, {"state_dict": {}}, {"fc.weight": torch.zeros(3, 4)}]
)
def test_another_architecture_is_refused(tmp_path: Path, content: dict[str, Any]) -> None:
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(UsageError, match=r"w.pth fits 0 of the network's \d+ tensors.*another"):
        load(tmp_path / "w.pth", network())


def test_large_and_small_are_not_mixed(tmp_path: Path) -> None:
    torch.save(plain(), tmp_path / "w.pth")
    model = network(name="mobilenet_v3_large")
    before = {name: value.clone() for name, value in model.backbone.state_dict().items()}
    with pytest.raises(UsageError, match="another architecture"):
        load(tmp_path / "w.pth", model)
    after = model.backbone.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none.pth: no such file"):
        load(tmp_path / "none.pth", network())


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder where torch keeps downloaded weights, empty, for this test alone."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    folder = tmp_path / "hub" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def imagenet_weights(path: Path) -> dict[str, Tensor]:
    torch.manual_seed(3)
    tensors = dict(get_model("mobilenet_v3_small", num_classes=1000).state_dict())
    torch.save(tensors, path)
    return tensors


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder and the address under which it is served."""
    folder = tmp_path / "served"
    folder.mkdir()

    class Silent(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    handler = functools.partial(Silent, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.05,))
        thread.start()
        yield folder, f"http://127.0.0.1:{running.server_address[1]}"
        running.shutdown()
        thread.join()
    gc.collect()  # torch leaves the sockets of its downloads to the collector: see LEAK


def test_torchvisions_own_weights_from_its_cache(hub: Path) -> None:
    tensors = imagenet_weights(hub / Path(SMALL.url).name)
    model = network(5)
    weights = find_weights(ModelConfig(pretrained="torchvision"))
    assert weights is not None
    report = apply_weights(model, weights)
    assert_taken(model, tensors, report)
    assert [name.split()[0] for name in report.skipped] == [
        "classifier.3.weight",
        "classifier.3.bias",
    ]
    assert report.source == "MobileNet_V3_Small_Weights.IMAGENET1K_V1"
    process = weights.preprocess
    assert process is not None
    assert (process.size, process.resize, process.crop_fraction) == ((224, 224), "crop", 224 / 256)
    assert (process.mean, process.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@LEAK
def test_torchvisions_own_weights_are_downloaded(
    hub: Path, server: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, address = server
    tensors = imagenet_weights(folder / "w.pth")
    name = f"small-{digest(folder / 'w.pth')[:8]}.pth"
    (folder / "w.pth").rename(folder / name)
    monkeypatch.setattr(SMALL.value, "url", f"{address}/{name}")
    model = network()
    assert_taken(model, tensors, load("torchvision", model))
    assert (hub / name).exists()


@LEAK
@pytest.mark.parametrize("name", ["small-00000000.pth", "none-00000000.pth"])
def test_a_download_that_fails_says_what_to_do(
    hub: Path, server: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    folder, address = server
    (folder / "small-00000000.pth").write_bytes(b"a login page")
    monkeypatch.setattr(SMALL.value, "url", f"{address}/{name}")
    with pytest.raises(DistclsError) as caught:
        find_weights(ModelConfig(pretrained="torchvision"))
    text = str(caught.value)
    assert text.startswith(f"model.pretrained: cannot download {address}/{name} (")
    assert "give the file's path" in text
    assert list(hub.iterdir()) == []


def test_nobody_listens(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SMALL.value, "url", "http://127.0.0.1:9/w-00000000.pth")
    with pytest.raises(DistclsError, match=r"cannot download http://127.0.0.1:9/"):
        find_weights(ModelConfig(pretrained="torchvision"))
    assert list(hub.iterdir()) == []


class Payload:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.target,)


@pytest.mark.parametrize("kind", ["pickle", "zip"])
def test_a_malicious_pickle_in_the_cache_is_not_run(hub: Path, tmp_path: Path, kind: str) -> None:
    stored, target = hub / Path(SMALL.url).name, tmp_path / "owned"
    if kind == "zip":
        torch.save({"w": Payload(target)}, stored)
    else:
        stored.write_bytes(pickle.dumps({"w": Payload(target)}, protocol=2))
    with pytest.raises(DistclsError, match=r"the stored copy of .* is damaged; remove it"):
        find_weights(ModelConfig(pretrained="torchvision"))
    assert not target.exists()

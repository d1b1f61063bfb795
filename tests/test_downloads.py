"""torchvision's own weights, from its cache or downloaded. No network is needed."""

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

from distcls.errors import DistclsError
from distcls.files import digest
from distcls.models.config import ModelConfig
from distcls.models.matching import apply_weights
from distcls.models.pretrained import find_weights
from tests.small_networks import assert_taken, load, network

LEAK = pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
SMALL = MobileNet_V3_Small_Weights.DEFAULT


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder where torch keeps downloaded weights, empty, for this test alone."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    monkeypatch.delenv("DISTCLS_OFFLINE")
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


@pytest.mark.parametrize("value", ["torchvision", "library"])
def test_torchvisions_own_weights_from_its_cache(hub: Path, value: str) -> None:
    tensors = imagenet_weights(hub / Path(SMALL.url).name)
    model = network(5)
    weights = find_weights(ModelConfig(pretrained=value))
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

"""`model.pretrained: auto`: published weights where they can be had, else from scratch, said."""

from __future__ import annotations

import dataclasses
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from accelerate import PartialState
from torchvision.models import MobileNet_V3_Small_Weights

from distcls.commands.show import main as show
from distcls.commands.train import main
from distcls.config import read_yaml
from distcls.data.dataset import Dataset
from distcls.errors import DistclsError, UsageError
from distcls.files import digest
from distcls.launch import search
from distcls.launch.search_space import Trial, log_of
from distcls.models import pretrained
from distcls.models.checkpoint import load_tensors, read_checkpoint
from distcls.models.config import ModelConfig
from distcls.models.pretrained import find_weights
from distcls.training import inputs
from distcls.training.config import InputConfig, TrainConfig
from distcls.training.inputs import choose_weights
from tests import tiny_dataset
from tests.forked import spawn
from tests.test_downloads import LEAK, hub, imagenet_weights, server

__all__ = ["hub", "server"]
SMALL = MobileNet_V3_Small_Weights.DEFAULT
NAME = "torchvision:IMAGENET1K_V1"
FLAGS = ("--epochs", "1", "--batch-size", "4", "--threads", "1", "--input.size", "64")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dataset(tmp_path_factory.mktemp("photos") / "data", 96)


def dataset(folder: Path, side: int) -> Path:
    images = list(np.random.default_rng(0).integers(0, 256, (12, side, side, 3), np.uint8))
    splits = ["train"] * 8 + ["val"] * 4
    return tiny_dataset.write(folder, images, [0, 1] * 6, ("a", "b"), splits=splits)


@pytest.fixture
def stored(hub: Path) -> Path:
    """Weights in torchvision's cache, and no network."""
    os.environ["DISTCLS_OFFLINE"] = "1"
    imagenet_weights(hub / Path(SMALL.url).name)
    return hub / Path(SMALL.url).name


@pytest.fixture(autouse=True)
def _offline() -> Iterator[None]:
    yield
    os.environ["DISTCLS_OFFLINE"] = "1"


def train(data: Path, out: Path, *flags: str) -> dict[str, Any]:
    main(["--data", str(data), "--out", str(out), *FLAGS, *flags])
    return written(out)


def written(out: Path) -> dict[str, Any]:
    values = read_yaml(out / "config.yaml")
    return {key: value for key, (value, _) in values.items()}


def test_the_librarys_weights_are_taken_and_recorded(
    stored: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = train(photos, tmp_path / "run")
    assert found["model.pretrained"] == NAME
    assert found["model.pretrained_sha256"] == digest(stored)
    assert found["input.crop_fraction"] == 224 / 256
    said = capsys.readouterr().err
    assert "pretrained: MobileNet_V3_Small_Weights.IMAGENET1K_V1\n  loaded" in said
    assert f"mobilenet_v3_small from {NAME}, stem stride 1" in said
    assert "scratch" not in said
    card, _ = read_checkpoint(tmp_path / "run" / "best.pth")
    assert card.preprocess.mean == (0.485, 0.456, 0.406)
    assert card.architecture["pretrained"] is None
    assert card.architecture["pretrained_sha256"] is None


def test_the_config_gives_the_same_run_or_an_error(
    stored: Path, photos: Path, tmp_path: Path
) -> None:
    train(photos, tmp_path / "first")
    config = ["--config", str(tmp_path / "first" / "config.yaml"), "--out"]
    main([*config, str(tmp_path / "second")])
    one, other = (load_tensors(tmp_path / name / "best.pth") for name in ("first", "second"))
    assert all(torch.equal(one["model"][key], other["model"][key]) for key in one["model"])
    texts = [(tmp_path / name / "config.yaml").read_text() for name in ("first", "second")]
    assert texts[0].replace("first", "second") == texts[1]
    tensors = load_tensors(stored)
    torch.save({name: tensor + 1 for name, tensor in tensors.items()}, stored)
    with pytest.raises(UsageError, match=r"has SHA-256 .*, expected .* \(model\.pretrained_sha256"):
        main([*config, str(tmp_path / "third")])
    stored.unlink()
    with pytest.raises(DistclsError, match=r"cannot download .*DISTCLS_OFFLINE is set"):
        main([*config, str(tmp_path / "third")])
    assert not (tmp_path / "third").exists()


def test_a_file_is_recorded_with_its_hash(photos: Path, tmp_path: Path) -> None:
    imagenet_weights(tmp_path / "w.pth")
    found = train(photos, tmp_path / "run", "--model.pretrained", str(tmp_path / "w.pth"))
    assert found["model.pretrained"] == str(tmp_path / "w.pth")
    assert found["model.pretrained_sha256"] == digest(tmp_path / "w.pth")
    with pytest.raises(UsageError, match=r"pretrained_sha256: 'AB' is not valid"):
        train(photos, tmp_path / "other", "--model.pretrained_sha256", "AB")


def test_without_weights_it_says_what_that_costs(
    hub: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.environ["DISTCLS_OFFLINE"] = "1"
    found = train(photos, tmp_path / "run")
    assert found["model.pretrained"] is None
    assert found["model.pretrained_sha256"] is None
    [line] = [
        line for line in capsys.readouterr().err.splitlines() if "training from scratch" in line
    ]
    assert line.startswith(f"warning: model.pretrained: cannot download {SMALL.url} (DISTCLS_OFF")
    assert "needs more images and epochs" in line
    assert "--model.pretrained FILE gives weights" in line
    main(["--config", str(tmp_path / "run" / "config.yaml"), "--out", str(tmp_path / "again")])
    assert "training from scratch" not in capsys.readouterr().err
    train(photos, tmp_path / "chosen", "--model.pretrained", "none")
    assert "training from scratch" not in capsys.readouterr().err
    train(photos, tmp_path / "own", "--model.name", "simple_cnn")
    assert "model.pretrained: distcls publishes no weights for simple_cnn: training" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize("flags", [("--input.size", "48"), ("--input.size", "48,160")])
def test_small_inputs_start_from_scratch(
    stored: Path,
    photos: Path,
    tmp_path: Path,
    flags: tuple[str, ...],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert train(photos, tmp_path / "run", *flags)["model.pretrained"] is None
    assert "training from scratch" not in capsys.readouterr().err


@pytest.mark.parametrize(("side", "taken"), [(63, False), (64, True), (65, True)])
def test_small_images_start_from_scratch(
    stored: Path, tmp_path: Path, side: int, taken: bool
) -> None:
    split = Dataset.open(dataset(tmp_path / "data", side)).split("train")
    weights = choose_weights(TrainConfig(data=tmp_path, out=tmp_path), split)
    assert (weights is not None) == taken
    he = TrainConfig(data=tmp_path, out=tmp_path, model=ModelConfig(init="he"))
    assert choose_weights(he, split) is None  # an initialisation that was asked for


def test_a_resumed_run_needs_no_weights(
    stored: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It keeps those that it was started with, whatever can be had by now."""
    before = train(photos, tmp_path / "run", "--epochs", "1")
    stored.unlink()
    for value in ("auto", "library", NAME):
        flags = ("--resume", "auto", "--model.pretrained", value)
        assert train(photos, tmp_path / "run", *flags) == before  # nothing is left to train
    with pytest.raises(UsageError, match=r"^model\.pretrained: None given, but .* with 'torchv"):
        train(photos, tmp_path / "run", "--resume", "auto", "--model.pretrained", "none")
    capsys.readouterr()
    scratch = train(photos, tmp_path / "scratch")
    assert "training from scratch" in capsys.readouterr().err
    imagenet_weights(stored)
    assert train(photos, tmp_path / "scratch", "--resume", "auto") == scratch
    assert "training from scratch" not in capsys.readouterr().err


def test_show_needs_the_preprocessing_of_the_weights_alone(
    hub: Path,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked: list[object] = []
    monkeypatch.setattr(pretrained, "_require_answer", asked.append)
    flags = ("--batch-size", "4", "--count", "4", "--model", "resnet18")
    show([str(photos), "--out", str(tmp_path / "a.png"), *flags])
    assert asked == []
    assert "preprocessing of ResNet18_Weights.IMAGENET1K_V1\n" in (capsys.readouterr().err)
    assert (tmp_path / "a.png").exists()


@pytest.mark.parametrize(("size", "calls"), [((64, 64), 1), ((32, 32), 0), (None, 1)])
def test_a_search_downloads_once_before_its_trials(
    photos: Path, monkeypatch: pytest.MonkeyPatch, size: tuple[int, int] | None, calls: int
) -> None:
    asked: list[TrainConfig] = []
    monkeypatch.setattr(inputs, "choose_weights", lambda config, _: asked.append(config))
    first = TrainConfig(data=photos, out=photos, input=InputConfig(size=size))
    runs = first, dataclasses.replace(first, lr=0.1)
    search.fetch_weights([Trial(number=1, name="", values={}, parameters={}, runs=runs)])
    assert len(asked) == calls


@pytest.mark.parametrize(("value", "offline"), [("auto", "1"), ("library", "0"), (None, "0")])
def test_its_trials_download_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str | None, offline: str
) -> None:
    monkeypatch.setenv("DISTCLS_OFFLINE", "0")
    config = TrainConfig(data=tmp_path, out=tmp_path, model=ModelConfig(pretrained=value))
    program = """import os; print('{"offline": "%s"}' % os.environ["DISTCLS_OFFLINE"])"""
    log_of(config).parent.mkdir(parents=True, exist_ok=True)
    with (tmp_path / "lock").open("w") as lock:
        call = [sys.executable, "-c", program]
        with search.Process(config, call, lock.fileno(), None) as process:
            while process.poll() is None:
                time.sleep(0.01)
            assert process.result() == {"offline": offline}


@LEAK
def test_they_are_downloaded(
    hub: Path,
    server: tuple[Path, str],
    photos: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, address = server
    imagenet_weights(folder / "w.pth")
    name = f"small-{digest(folder / 'w.pth')[:8]}.pth"
    (folder / "w.pth").rename(folder / name)
    monkeypatch.setattr(SMALL.value, "url", f"{address}/{name}")
    found = train(photos, hub.parent / "run")
    assert found["model.pretrained_sha256"] == digest(folder / name)
    assert f"downloading {address}/{name}\n" in capsys.readouterr().err
    assert (hub / name).exists()


@pytest.mark.parametrize("switch", ["DISTCLS_OFFLINE", "HF_HUB_OFFLINE"])
def test_switches_keep_it_from_trying(
    hub: Path, monkeypatch: pytest.MonkeyPatch, switch: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(0.1)
        port = listening.getsockname()[1]
        monkeypatch.setattr(SMALL.value, "url", f"http://127.0.0.1:{port}/w-00000000.pth")
        monkeypatch.setenv("DISTCLS_OFFLINE", "1" if switch == "DISTCLS_OFFLINE" else "0")
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", switch == "HF_HUB_OFFLINE")
        with pytest.raises(DistclsError, match=rf"{switch} is set, and it is not in the cache"):
            find_weights(ModelConfig())
        with pytest.raises(TimeoutError):
            listening.accept()


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "timm:mobilenetv3_small_050"])
def test_a_server_that_never_answers_is_given_up_at_once(
    hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """As behind a firewall; the libraries' own downloads would wait for minutes, or for ever."""
    monkeypatch.setattr(pretrained, "CONNECT_SECONDS", 0.3)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = f"http://127.0.0.1:{listening.getsockname()[1]}"
        monkeypatch.setattr(SMALL.value, "url", f"{address}/w-00000000.pth")
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
        template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        began = time.monotonic()
        with pytest.raises(DistclsError, match=r"cannot download .*timed out"):
            find_weights(ModelConfig(name=name))
        assert time.monotonic() - began < 5


def test_a_name_that_is_never_looked_up_is_given_up(
    hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(*_: object, **__: object) -> None:
        time.sleep(0.6)
        raise socket.gaierror

    monkeypatch.setattr(pretrained, "ANSWER_SECONDS", 0.2)
    monkeypatch.setattr(socket, "getaddrinfo", slow)
    monkeypatch.setattr(SMALL.value, "url", "http://weights.invalid/w-00000000.pth")
    with pytest.raises(DistclsError, match=r"no answer within"):
        find_weights(ModelConfig())


def work(rank: int, world: int, data: Path, caches: list[str]) -> None:
    """One process on a machine of its own: its own cache."""
    os.environ["TORCH_HOME"] = caches[rank]
    ranks = {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": "0"}
    os.environ.update(ranks, MASTER_ADDR="127.0.0.1", MASTER_PORT=caches[-1])
    PartialState(cpu=True)
    config = TrainConfig(data=data, out=data, input=InputConfig(size=(64, 64)))
    split = Dataset.open(data).split("train")
    result: str | None
    try:
        weights = choose_weights(config, split)
        result = None if weights is None else weights.sha256
    except DistclsError as error:
        result = str(error)
    Path(caches[rank], "result").write_text(str(result))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("case", [pytest.param("both", marks=pytest.mark.slow), "one", "different"])
def test_machines_with_caches_of_their_own_decide_alike(
    case: str, photos: Path, tmp_path: Path
) -> None:
    homes = [tmp_path / "0", tmp_path / "1"]
    for number, home in enumerate(homes):
        folder = home / "hub" / "checkpoints"
        folder.mkdir(parents=True)
        if case != "one" or number == 0:
            imagenet_weights(folder / Path(SMALL.url).name)
        if case == "different" and number == 1:
            path = folder / Path(SMALL.url).name
            torch.save(load_tensors(path) | {"x": torch.ones(1)}, path)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    spawn(work, (2, photos, [*map(str, homes), port]), 2)
    found = {(home / "result").read_text() for home in homes}
    path = homes[0] / "hub" / "checkpoints" / Path(SMALL.url).name
    expected = {
        "both": digest(path),
        "one": "None",
        "different": "model.pretrained: auto differs between processes",
    }
    assert found == {expected[case]}

"""`distcls models`: figures against the published ones, and nothing computed that is not shown."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import timm
import torch
from torchvision.models import get_model_weights

import distcls.commands.models
from distcls.commands import models
from distcls.imaging import Preprocess
from distcls.models.classifier import count_macs, count_parameters
from distcls.models.config import ModelConfig
from distcls.models.factory import build
from distcls.models.registry import known, listed


@pytest.mark.parametrize(
    "name",
    [
        *("mobilenet_v2", "mobilenet_v3_large", "shufflenet_v2_x1_0", "efficientnet_b2"),
        *("efficientnet_v2_s", "resnet50", "resnext50_32x4d", "regnet_y_400mf", "densenet121"),
        *("convnext_tiny", "swin_t"),
    ],
)
def test_figures_are_the_published_ones(name: str) -> None:
    weights = get_model_weights(name).DEFAULT
    entry = models.describe(name)
    assert entry.parameters == weights.meta["num_params"]
    assert entry.size == (weights.transforms().crop_size[0],) * 2
    assert entry.macs is not None
    # torchvision counts three digits of GFLOPS, and for Swin some that are no multiplications
    assert entry.macs / 1e9 == pytest.approx(weights.meta["_ops"], abs=6e-4, rel=0.03)


def test_the_size_is_that_of_the_weights() -> None:
    entry = models.describe("adv-efficientnet-b2")
    assert entry.size == (260, 260)
    assert entry.library == "timm"
    assert entry.parameters == 9_109_994  # of the paper's 9.2 M


def test_meta_counts_as_the_cpu_does() -> None:
    entry = models.describe("shufflenet_v2_x0_5")
    model = build(ModelConfig(name="shufflenet_v2_x0_5"), 1000, Preprocess(size=entry.size))
    assert entry.parameters == count_parameters(model)
    assert entry.macs == count_macs(model, entry.size)


def test_nothing_is_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    devices = []
    count = count_parameters

    def noted(model: torch.nn.Module) -> int:
        devices.append({parameter.device.type for parameter in model.parameters()})
        return count(model)

    monkeypatch.setattr("distcls.models.classifier.count_parameters", noted)
    for name in ("resnet50", "timm:resnet50"):
        models.describe(name)
    assert devices == [{"meta"}, {"meta"}]


def test_a_network_that_meta_cannot_build_is_built_on_the_cpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    figures = models._figures
    tried = []

    def fails_on_meta(origin: object, size: object, device: str) -> tuple[int, int]:
        tried.append(device)
        if device == "meta":
            raise NotImplementedError("no data")
        return figures(origin, size, device)  # type: ignore[arg-type]

    monkeypatch.setattr(models, "_figures", fails_on_meta)
    assert models.describe("simple_nn").parameters is not None
    assert tried == ["meta", "cpu"]


def test_what_cannot_be_built_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> tuple[int, int]:
        raise RuntimeError("needs a GPU")

    monkeypatch.setattr(models, "_figures", fails)
    entry = models.describe("simple_nn")
    assert (entry.parameters, entry.macs, entry.note) == (None, None, "needs a GPU")
    assert "needs a GPU" in entry.line()


def test_the_command_lists_what_matches_and_computes_no_more(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    describe = models.describe

    def noted(name: str) -> models.ModelEntry:
        asked.append(name)
        return describe(name)

    monkeypatch.setattr(models, "describe", noted)
    distcls.commands.models.main(["simple_*"])
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split() == ["name", "library", "parameters", "MACs", "input"]
    assert [row.split()[0] for row in rows] == ["simple_cnn", "simple_nn"] == asked
    distcls.commands.models.main(["simple_*", "--json"])
    listed = json.loads(capsys.readouterr().out)["models"]
    assert [model["name"] for model in listed] == ["simple_cnn", "simple_nn"]
    assert listed[0]["size"] == [32, 32]


def test_many_are_listed_by_name_alone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "_figures", lambda *_: (1_000_000, 2_000_000))
    distcls.commands.models.main(["*"])
    text, note = capsys.readouterr()
    header, *rows = text.splitlines()
    assert header.split() == ["name", "library"]
    assert [row.split()[0] for row in rows] == list(known())
    assert all(len(row.split()) == 2 for row in rows)
    assert note.startswith(f"{len(rows):,} networks; --figures adds ")
    distcls.commands.models.main(["mobilenet*", "--json"])
    listed = json.loads(capsys.readouterr().out)["models"]
    assert len(listed) > models.FEW
    assert {model["parameters"] for model in listed} == {None}
    distcls.commands.models.main(["torchvision:*", "--figures"])
    header, *rows = capsys.readouterr().out.splitlines()
    assert len(rows) > models.FEW
    assert {row.split()[2] for row in rows} == {"1.00"}
    distcls.commands.models.main(["simple_*", "--figures=false"])
    assert "1.00" not in capsys.readouterr().out


def test_all_names_in_less_than_the_time_that_loading_torch_takes() -> None:
    program = (
        "import sys\n"
        "from distcls.cli import dispatch\n"
        "dispatch(['models', '*'])\n"
        "assert not {'torch', 'torchvision', 'timm'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    assert len(done.stdout.splitlines()) > 1400


def test_without_a_pattern_the_named_ones(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "_figures", lambda *_: (1_000_000, 2_000_000))
    distcls.commands.models.main([])
    rows = capsys.readouterr().out.splitlines()[1:]
    assert [row.split()[0] for row in rows] == list(listed())
    assert not set(timm.list_models()) <= {row.split()[0] for row in rows}

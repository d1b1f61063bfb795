"""Published weights: where they come from, and the preprocessing that belongs to them."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_sample_image
from torch import Tensor
from torchvision.models import get_model, get_model_weights

from distcls.errors import DistclsError, UsageError
from distcls.imaging import Preprocess
from distcls.imaging.preprocess import INTERPOLATIONS
from distcls.models import pretrained
from distcls.models.config import ModelConfig
from distcls.models.factory import build
from distcls.models.pretrained import apply_weights, find_weights, library_preprocess
from distcls.models.registry import resolve

ADV = "tf_efficientnet_b0.ap_in1k"


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the Hugging Face hub, and no network beside it."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def publish(hub: Path, name: str) -> dict[str, Tensor]:
    """Put weights into the cache as if they had been downloaded."""
    torch.manual_seed(4)
    tensors = timm.create_model(name, pretrained=False).state_dict()
    folder = hub / f"models--timm--{name}"
    snapshot = folder / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0" * 40)
    save_file(tensors, snapshot / "model.safetensors")
    return dict(tensors)


@pytest.mark.parametrize("value", ["timm", "library"])
def test_timms_weights_from_its_cache(offline: Path, value: str) -> None:
    tensors = publish(offline, ADV)
    weights = find_weights(ModelConfig(name="adv-efficientnet-b0", pretrained=value))
    assert weights is not None
    assert weights.source == f"timm's {ADV}"
    process = weights.preprocess
    assert process is not None
    assert (process.mean, process.std) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))  # AdvProp's own
    assert (process.size, process.crop_fraction) == ((224, 224), 0.875)
    model = build(ModelConfig(name="adv-efficientnet-b0"), 5, process)
    report = apply_weights(model, weights)
    own = model.backbone.state_dict()
    assert all(torch.equal(own[name], tensors[name]) for name in report.loaded)
    assert [name.split()[0] for name in report.skipped] == ["classifier.weight", "classifier.bias"]
    assert report.missing == {}


def test_offline_timm_fails_with_one_line(offline: Path) -> None:
    with pytest.raises(DistclsError) as caught:
        find_weights(ModelConfig(name="adv-efficientnet-b0", pretrained="library"))
    text = str(caught.value)
    assert text.startswith(f"model.pretrained: cannot download https://huggingface.co/timm/{ADV} (")
    assert "give the file's path" in text
    assert "\n" not in text
    assert caught.value.exit_code == 1


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("simple_cnn", "library", "distcls publishes no weights for simple_cnn"),
        ("timm:mnasnet_050", "library", "timm publishes no weights for mnasnet_050"),
        ("resnet18", "timm", "timm has no resnet18, which is of torchvision; `library`"),
        ("xception", "torchvision", "torchvision has no xception, which is of timm"),
    ],
)
def test_weights_that_nobody_publishes(name: str, value: str, text: str) -> None:
    with pytest.raises(UsageError, match=rf"^model\.pretrained: {text}"):
        find_weights(ModelConfig(name=name, pretrained=value))


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_normalisation_is_what_the_network_itself_makes_of_torchvisions(name: str) -> None:
    """With published weights these renormalise: here that is part of the preprocessing."""
    process = library_preprocess(resolve(name))
    assert process is not None
    transform = get_model_weights(name).DEFAULT.transforms()
    pixels = torch.rand(2, 3, 8, 8)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (transform.mean, transform.std))
    network = get_model(name, weights=None, transform_input=True, init_weights=False, num_classes=2)
    expected = network._transform_input((pixels - mean) / std)
    own_mean, own_std = (torch.tensor(v).view(1, 3, 1, 1) for v in (process.mean, process.std))
    torch.testing.assert_close((pixels - own_mean) / own_std, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "file", "mean", "size"),
    [
        ("timm:tf_efficientnet_b2", "tf_efficientnet_b2_ap-2f8e7636.pth", 0.5, (260, 260)),
        ("resnet18", "resnet18-f37072fd.pth", 0.485, (224, 224)),
    ],
)
def test_a_file_under_its_published_name_is_known(
    tmp_path: Path, name: str, file: str, mean: float, size: tuple[int, int]
) -> None:
    torch.save({"w": torch.zeros(1)}, tmp_path / file)
    weights = find_weights(ModelConfig(name=name, pretrained=str(tmp_path / file)))
    assert weights is not None
    assert weights.preprocess is not None
    assert (weights.preprocess.mean[0], weights.preprocess.size) == (mean, size)
    torch.save({"w": torch.zeros(1)}, tmp_path / "mine.pth")
    other = find_weights(ModelConfig(name=name, pretrained=str(tmp_path / "mine.pth")))
    assert other is not None
    assert other.preprocess is None


def test_a_name_with_a_tag_names_the_weights(tmp_path: Path) -> None:
    """The hub calls every file model.safetensors, whatever normalisation it was trained with."""
    save_file({"w": torch.zeros(1)}, tmp_path / "model.safetensors")
    config = ModelConfig(name="adv-efficientnet-b2", pretrained=str(tmp_path / "model.safetensors"))
    weights = find_weights(config)
    assert weights is not None
    assert weights.preprocess is not None
    assert (weights.preprocess.mean, weights.preprocess.size) == ((0.5,) * 3, (260, 260))


@pytest.mark.parametrize(
    ("name", "crop"), [("swin_t", 224 / 232), ("timm:vit_tiny_patch16_224", 0.9)]
)
def test_the_crop_is_the_weights_own(name: str, crop: float) -> None:
    process = library_preprocess(resolve(name))
    assert process is not None
    assert process.crop_fraction == pytest.approx(crop)
    assert process.resize == "crop"


@pytest.mark.parametrize(
    ("filter_", "theirs"),
    [("bilinear", Image.Resampling.BILINEAR), ("bicubic", Image.Resampling.BICUBIC)],
)
@pytest.mark.parametrize("picture", ["china.jpg", "flower.jpg"])
def test_interpolation_is_the_nearest_to_the_librarys(
    filter_: str, theirs: Image.Resampling, picture: str
) -> None:
    """Photographs of 427x640, cut to 427 square and shrunk to 256, as by the libraries' Pillow."""
    photo = np.ascontiguousarray(load_sample_image(picture)[:, :427])
    expected = np.asarray(Image.fromarray(photo).resize((256, 256), theirs), np.float64)
    errors = {}
    for name in INTERPOLATIONS:
        ours = Preprocess(size=(256, 256), resize="squash", interpolation=name)(photo)
        errors[name] = float(np.abs(ours - expected).mean())
    best = min(errors, key=lambda name: errors[name])
    assert best == pretrained.INTERPOLATIONS[filter_], errors


def test_every_published_preprocess_can_be_told() -> None:
    for name in [*timm.list_models("*resnet*"), "vit_base_patch16_siglip_224"]:
        assert library_preprocess(resolve(f"timm:{name}")) is not None

"""Explanations: they lie on the object, and follow from the weights; Grad-CAM and occlusion."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr

import distcls
from distcls.cli import dispatch
from distcls.errors import BadImage, BadValue, UsageError
from distcls.explanation.explain import explain, explain_pixels, overlay
from distcls.explanation.occlusion import log_odds, patches
from distcls.imaging import Preprocess
from distcls.model_card import ModelCard
from distcls.models.checkpoint import TorchModel, open_checkpoint
from distcls.models.classifier import Classifier
from distcls.models.config import ModelConfig
from distcls.models.factory import build
from distcls.predictor import Predictor
from distcls.task import Head, Task
from distcls.training.run import fit
from tests import tiny_dataset

Pixels = NDArray[np.uint8]
SIDE, OBJECT = 32, 9
CLASSES = ("red", "green", "blue")
METHODS = ("gradcam", "occlusion")


def corner(rng: np.random.Generator, label: int) -> tuple[Pixels, tuple[int, int]]:
    """Noise with a square of the class's colour in one corner; the image and the corner."""
    image = rng.integers(40, 120, (SIDE, SIDE, 3), dtype=np.uint8)
    down, right = rng.integers(0, 2, 2)
    top, left = (int(place) * (SIDE - OBJECT) for place in (down, right))
    image[top : top + OBJECT, left : left + OBJECT] = 20
    image[top : top + OBJECT, left : left + OBJECT, label] = 230
    return image, (top, left)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on images whose class is the colour of a square in any corner; exported, too."""
    folder, rng = tmp_path_factory.mktemp("corners"), np.random.default_rng(0)
    labels = [index % 3 for index in range(240)]
    images = [corner(rng, label)[0] for label in labels]
    splits = ["val" if index >= 180 else "train" for index in range(240)]
    data = tiny_dataset.write(folder / "data", images, labels, CLASSES, splits=splits)
    augment = {"crop_padding": 0, "flip": 0.0}
    options: dict[str, Any] = {"model": "simple_cnn", "epochs": 4, "batch_size": 16, "lr": 0.003}
    result = fit(data=data, out=folder / "run", augment=augment, quiet=True, **options)
    assert result.best_score == 1.0
    distcls.export_onnx(folder / "run", quiet=True)
    return folder / "run"


def model_file(run: Path, method: str) -> Path:
    return run / ("best.pth" if method == "gradcam" else "best.onnx")


@pytest.mark.parametrize("method", METHODS)
def test_an_object_in_a_corner_is_explained_there(trained: Path, method: str) -> None:
    rng = np.random.default_rng(1)
    with distcls.load(model_file(trained, method)) as predictor:
        for number in range(12):
            image, (top, left) = corner(rng, number % 3)
            found = explain_pixels(predictor.model, image)
            assert (found.method, found.label) == (method, CLASSES[number % 3])
            assert found.heat.dtype == np.float32
            assert found.heat.shape == (SIDE, SIDE)
            assert (found.heat.min(), found.heat.max()) == (0.0, 1.0)
            there = found.heat[top : top + OBJECT, left : left + OBJECT]
            area = OBJECT**2 / SIDE**2  # 8 % of the image
            assert there.sum() / found.heat.sum() > 5 * area
            peak = np.unravel_index(found.heat.argmax(), found.heat.shape)
            assert top - 2 <= peak[0] < top + OBJECT + 2
            assert left - 2 <= peak[1] < left + OBJECT + 2


@pytest.mark.parametrize("method", METHODS)
def test_random_weights_give_another_map(trained: Path, method: Any) -> None:
    """Adebayo et al.: Sanity Checks for Saliency Maps, 2018."""
    rng, model = np.random.default_rng(2), open_checkpoint(trained / "best.pth", "cpu")
    images = [corner(rng, number % 3)[0] for number in range(8)]
    before = [explain_pixels(model, image, 0, method=method).heat for image in images]
    again = [explain_pixels(model, image, 0, method=method).heat for image in images]
    assert all(np.array_equal(*pair) for pair in zip(before, again, strict=True))
    torch.manual_seed(0)
    for parameter in model.model.parameters():
        torch.nn.init.normal_(parameter, std=parameter.detach().std().item())
    after = [explain_pixels(model, image, 0, method=method).heat for image in images]
    alike = [spearmanr(a.ravel(), b.ravel()).statistic for a, b in zip(before, after, strict=True)]
    assert np.nan_to_num(alike).mean() < 0.4


def test_another_class_has_another_map(trained: Path) -> None:
    image, (top, left) = corner(np.random.default_rng(3), 0)
    with distcls.load(trained / "best.pth") as predictor:
        by_name = explain(predictor, image, "green")
        assert np.array_equal(by_name, explain(predictor, image, 1))
        own = explain(predictor, image)
        assert np.array_equal(own, explain(predictor, image, "red"))
    place = np.s_[top : top + OBJECT, left : left + OBJECT]
    assert own[place].sum() / own.sum() > 3 * by_name[place].sum() / max(by_name.sum(), 1e-9)


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "resnet18", "timm:convnext_atto"])
def test_networks_with_convolutions(name: str) -> None:
    model = untrained(name, (64, 64))
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    found = explain_pixels(model, pixels)
    assert found.method == "gradcam"
    assert found.heat.shape == (64, 64)
    assert np.isfinite(found.heat).all()
    assert all(parameter.grad is None for parameter in model.model.parameters())
    assert not any(module._forward_hooks for module in model.model.modules())


def untrained(name: str, size: tuple[int, int], task: Task | None = None) -> TorchModel:
    task, preprocess = task or Task(classes=CLASSES), Preprocess(size=size)
    torch.manual_seed(0)
    network: Classifier = build(ModelConfig(name=name), len(task.classes), preprocess)
    card = ModelCard(architecture={"name": name}, task=task, preprocess=preprocess)
    return TorchModel(network, card, torch.device("cpu"))


@pytest.mark.parametrize("name", ["simple_nn", "timm:vit_tiny_patch16_224"])
def test_networks_without_are_explained_by_occlusion(name: str) -> None:
    side = 16 if name == "simple_nn" else 224
    model = untrained(name, (side, side))
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    with pytest.raises(UsageError, match=r"gradcam needs a best\.pth of a network"):
        explain_pixels(model, pixels, method="gradcam")
    if side < 224:  # 270 passes of the other take seconds
        assert explain_pixels(model, pixels).method == "occlusion"


def test_a_gradcam_is_the_gradient_times_the_features() -> None:
    """Of a network with global pooling: the features, weighted by the row of the last layer."""
    model = untrained("resnet18", (224, 224))
    pixels = np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8)
    found = explain_pixels(model, pixels, 2).heat
    network: Any = model.model.backbone
    seen: list[torch.Tensor] = []
    hook = network.layer4.register_forward_hook(lambda *given: seen.append(given[-1].clone()))
    model.model(torch.from_numpy(pixels[None]))
    hook.remove()
    cam = torch.einsum("c,chw->hw", network.fc.weight[2], seen[0][0]).clamp(min=0)
    expected = cv2.resize(cam.detach().numpy(), (224, 224), interpolation=cv2.INTER_LINEAR)
    assert np.allclose(found, expected / expected.max(), atol=1e-4)


def test_threads_do_not_mix_their_maps(trained: Path) -> None:
    model = open_checkpoint(trained / "best.pth", "cpu")
    rng = np.random.default_rng(4)
    images = [corner(rng, number % 3)[0] for number in range(24)]
    alone = [explain_pixels(model, image).heat for image in images]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda image: explain_pixels(model, image).heat, images))
    assert all(np.allclose(*pair, atol=1e-5) for pair in zip(alone, together, strict=True))


def test_log_odds_of_each_task() -> None:
    logits = np.array([[2.0, -1.0, 0.5], [30.0, 0.0, 0.0]], np.float32)
    single = Task(classes=CLASSES)
    probability = float(single.probabilities(logits)[0, 0])
    odds = np.log(probability / (1 - probability))
    assert log_odds(logits[:1], single, [0])[0] == pytest.approx(odds, abs=1e-5)
    assert log_odds(logits, single, [0])[1] == pytest.approx(30 - np.log(2))  # not saturated
    labels = Task(kind="multi_label", classes=CLASSES)
    assert log_odds(logits, labels, [0, 2]).tolist() == [2.5, 30.0]
    heads = Task.of_heads([Head("a", ("x", "y")), Head("b", ("z",))])
    assert log_odds(logits, heads, [1, 2]).tolist() == [-3.0, -30.0]


@pytest.mark.parametrize("size", [(28, 28), (224, 224), (10, 33), (3, 2), (1, 1)])
@pytest.mark.parametrize("part", [4, 8])
def test_patches_cover_every_pixel(size: tuple[int, int], part: int) -> None:
    covered = np.zeros(size)
    boxes = list(patches(*size, part))
    for box in boxes:
        covered[box.top : box.top + box.height, box.left : box.left + box.width] += 1
        assert box.top + box.height <= size[0]
        assert box.left + box.width <= size[1]
    assert covered.min() >= 1
    assert len(boxes) <= 400
    assert len(set(boxes)) == len(boxes)


def test_several_outputs(tmp_path: Path) -> None:
    heads = Task.of_heads([Head("shape", ("a", "b")), Head("colour", ("c", "d"))])
    labels = Task(kind="multi_label", classes=CLASSES, thresholds=(0.99, 0.99, 0.99))
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    for task, label in ((heads, "shape:b"), (labels, "green")):
        model = untrained("simple_cnn", (16, 16), task)
        assert explain_pixels(model, pixels).heat.shape == (16, 16)
        assert explain_pixels(model, pixels, label).label == label
    assert explain_pixels(model, pixels).label in CLASSES  # none is found: the nearest


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"label": "gren"}, UsageError, "did you mean 'green'"),
        ({"label": 3}, BadValue, "label"),
        ({"label": True}, BadValue, "label"),
        ({"method": "lime"}, BadValue, "method"),
        ({"image": np.zeros((3, 32, 32), np.float32)}, UsageError, "image"),
        ({"image": "nowhere.jpg"}, BadImage, "cannot be read"),
        ({"model": "nowhere.onnx"}, UsageError, "does not exist"),
    ],
)
def test_mistakes_are_one_line(
    given: dict[str, Any], error: type[Exception], words: str, trained: Path
) -> None:
    image = np.zeros((SIDE, SIDE, 3), np.uint8)
    options = {"model": trained / "best.pth", "image": image, **given}
    with pytest.raises(error, match=words) as caught:
        explain(options.pop("model"), options.pop("image"), **options)
    assert "\n" not in str(caught.value)


def test_an_overlay_keeps_what_nothing_speaks_for() -> None:
    pixels = np.full((28, 30, 3), 90, np.uint8)
    heat = np.zeros((28, 30), np.float32)
    drawn = overlay(pixels, heat)
    assert drawn.shape == (224, 240, 3)
    assert (drawn == 90).all()
    heat[:14] = 1
    drawn = overlay(pixels, heat).astype(int)
    assert (drawn[-60:] == 90).all()
    assert abs(drawn[:60] - 90).max(axis=2).min() > 30


def test_predict_draws_a_picture_for_each_image(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng, photos = np.random.default_rng(5), tmp_path / "photos"
    images = np.stack([corner(rng, number % 3)[0] for number in range(3)])
    tiny_dataset.write_images(photos, images)
    (photos / "broken.png").write_bytes(b"nothing")
    (photos / "sub").mkdir()
    long = "a long name, with ünïcode 猫 " + "x" * 150
    assert cv2.imwrite(str(photos / "sub" / f"{long}.png"), images[0, :20, :, ::-1])
    out = tmp_path / "why"
    call = ["predict", str(photos), "--model", str(trained), "--explain", str(out)]
    dispatch([*call, "--out", str(tmp_path / "p.csv")])
    assert "explained: 4 images" in capsys.readouterr().err
    names = sorted(path.name for path in out.iterdir())
    assert names[:3] == ["0-000.png", "1-001.png", "2-002.png"]
    assert len(names) == 4
    picture = cv2.imread(str(out / names[0]))
    assert picture is not None
    assert picture.shape[1] > 1.8 * picture.shape[0] * 0.8
    colourful = np.ptp(picture.astype(int), axis=2) > 60
    assert colourful.mean() > 0.005  # the heat, and the square
    with pytest.raises(UsageError, match="has files already"):
        dispatch([*call, "--out", str(tmp_path / "q.csv")])
    assert not (tmp_path / "q.csv").exists()


def test_an_exported_model_is_explained_without_torch(trained: Path, tmp_path: Path) -> None:
    image, _ = corner(np.random.default_rng(6), 1)
    assert cv2.imwrite(str(tmp_path / "image.png"), image[..., ::-1])
    program = (
        "import sys; sys.modules['torch'] = None; sys.modules['torchvision'] = None\n"
        "import numpy as np\n"
        "from distcls.explanation.explain import explain\n"
        f"np.save({str(tmp_path / 'heat.npy')!r}, "
        f"explain({str(trained / 'best.onnx')!r}, {str(tmp_path / 'image.png')!r}))"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
    with Predictor(open_checkpoint(trained / "best.pth", "cpu")) as predictor:
        expected = explain(predictor, image, method="occlusion")
    assert np.allclose(np.load(tmp_path / "heat.npy"), expected, atol=1e-3)

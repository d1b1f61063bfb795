"""Transparency: blended with one background, from `prepare` through training to any prediction."""

from __future__ import annotations

import dataclasses
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image, ImageDraw

from distcls.batch.loading import scale_decoding
from distcls.commands.prepare import main as prepare
from distcls.commands.train import main as train
from distcls.data.dataset import INFO, Dataset
from distcls.data.formats.detect import open_source
from distcls.errors import BadImage, BadValue, UsageError
from distcls.export.certificate import load_images
from distcls.imaging import Preprocess, decode
from distcls.model_card import ModelCard
from distcls.predictor import Predictor, load_model
from distcls.runtime.ensemble import Ensemble
from distcls.task import Task
from distcls.training.config import InputConfig
from distcls.training.inputs import choose_preprocess
from distcls.training.loader import Loader
from tests import tiny_dataset, tiny_onnx
from tests.pictures import Pixels, encode

ORANGE, WHITE, GREEN = (255, 128, 0), (255, 255, 255), (0, 160, 0)
SIDE = 24


def disc(alpha: int = 255) -> Image.Image:
    """An orange disc; around it orange again, but transparent."""
    image = Image.new("RGBA", (SIDE, SIDE), (*ORANGE, 0))
    ImageDraw.Draw(image).ellipse((4, 4, 19, 19), (*ORANGE, alpha))
    return image


def palette() -> Image.Image:
    image = Image.new("P", (SIDE, SIDE), 1)
    image.putpalette([*ORANGE, *ORANGE])
    ImageDraw.Draw(image).ellipse((4, 4, 19, 19), 0)
    return image


FILES: dict[str, bytes] = {
    "png": encode(disc(), "PNG"),
    "webp": encode(disc(), "WEBP", lossless=True, exact=True),
    "lossy webp": encode(disc(), "WEBP", quality=95, exact=True),
    "palette png": encode(palette(), "PNG", transparency=b"\xff\0"),
    "gif": encode(palette(), "GIF", transparency=1),
    "tiff": encode(disc(), "TIFF"),
    "avif": encode(disc(), "AVIF", quality=100, subsampling="4:4:4"),
}


def close(pixel: Any, color: tuple[int, int, int], tolerance: int = 6) -> bool:
    return bool(np.abs(np.asarray(pixel, int) - color).max() <= tolerance)


@pytest.mark.parametrize("kind", FILES)
def test_an_orange_disc_stays_a_disc(kind: str) -> None:
    for color in (WHITE, GREEN):
        pixels = decode(FILES[kind], background=color)
        assert pixels.shape == (SIDE, SIDE, 3)
        assert pixels.dtype == np.uint8
        assert close(pixels[12, 12], ORANGE)
        assert close(pixels[0, 0], color)
        assert close(pixels[-1, -1], color)


@pytest.mark.parametrize("kind", [kind for kind in FILES if kind != "tiff"])
def test_without_a_background_alpha_is_ignored_as_ever(kind: str) -> None:
    assert close(decode(FILES[kind])[0, 0], ORANGE, 8)


def test_half_transparent_is_half_and_half() -> None:
    pixels = decode(encode(disc(alpha=102), "PNG"), background=(5, 200, 255))
    assert close(pixels[12, 12], (105, 171, 153), 1)  # 0.4 of the disc, 0.6 of the background


def test_grey_with_alpha() -> None:
    image = Image.new("LA", (4, 4), (90, 0))
    image.putpixel((1, 1), (90, 255))
    pixels = decode(encode(image, "PNG"), background=GREEN)
    assert pixels[1, 1].tolist() == [90, 90, 90]
    assert pixels[0, 0].tolist() == [*GREEN]


def png(depth: int, kind: int, row: bytes, width: int, key: bytes = b"") -> bytes:
    """A PNG of one row."""

    def chunk(name: bytes, body: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(name + body))
        return struct.pack(">I", len(body)) + name + body + check

    header = struct.pack(">IIBBBBB", width, 1, depth, kind, 0, 0, 0)
    parts = [chunk(b"IHDR", header), chunk(b"tRNS", key) if key else b""]
    parts += [chunk(b"IDAT", zlib.compress(b"\0" + row)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


RGB, GREY, GREY_ALPHA, RGBA = 2, 0, 4, 6


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (png(8, RGB, bytes([10, 20, 30, 200, 201, 202]), 2, bytes([0, 10, 0, 20, 0, 30])), 200),
        (png(8, GREY, bytes([10, 200]), 2, bytes([0, 10])), 200),
        (png(1, GREY, bytes([0x40]), 2, bytes([0, 0])), 255),
        (png(16, GREY, struct.pack(">2H", 1000, 51300), 2, struct.pack(">H", 1000)), 200),
        # only the lower byte tells it from the transparent colour
        (png(16, GREY, struct.pack(">2H", 51301, 51300), 2, struct.pack(">H", 51301)), 200),
        (
            png(
                16,
                RGB,
                struct.pack(">6H", 51300, 51301, 51302, 51300, 51301, 51303),
                2,
                struct.pack(">3H", 51300, 51301, 51302),
            ),
            200,
        ),
        (png(16, GREY_ALPHA, struct.pack(">4H", 1000, 0, 51300, 65535), 2), 200),
        (png(16, RGBA, struct.pack(">8H", 1, 2, 3, 0, *[51300] * 3, 65535), 2), 200),
    ],
)
def test_all_ways_a_png_has_of_being_transparent(data: bytes, expected: int) -> None:
    pixels = decode(data, background=GREEN)
    assert pixels[0, 0].tolist() == [*GREEN]
    assert close(pixels[0, 1], (expected,) * 3, 2)
    assert not close(decode(data)[0, 0], GREEN, 10)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_transparent_images_are_upright_too(kind: str) -> None:
    image = Image.new("RGBA", (6, 4), (*ORANGE, 255))
    image.paste((0, 0, 0, 0), (0, 0, 3, 4))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise: the left side comes to the top
    options: dict[str, Any] = {"lossless": True} if kind == "WEBP" else {}
    pixels = decode(encode(image, kind, exif=exif, **options), background=GREEN)
    assert pixels.shape == (6, 4, 3)
    assert close(pixels[0, 0], GREEN)
    assert close(pixels[-1, -1], ORANGE)


def test_images_without_transparency_are_decoded_as_before() -> None:
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (9, 7, 3), dtype=np.uint8))
    for kind, options in (("PNG", {}), ("JPEG", {}), ("WEBP", {}), ("GIF", {}), ("BMP", {})):
        data = encode(image, kind, **options)
        assert np.array_equal(decode(data, background=GREEN), decode(data))


def test_damaged_transparent_files_are_refused() -> None:
    for kind in ("png", "webp", "palette png"):
        data = FILES[kind]
        with pytest.raises(BadImage):
            decode(data[: len(data) * 2 // 3], background=WHITE)


def test_the_background_travels_with_the_model() -> None:
    process = Preprocess(size=(8, 8), background=GREEN)
    assert Preprocess.from_json(json.loads(json.dumps(process.to_json()))) == process
    old = Preprocess(size=(8, 8)).to_json()
    assert "background" not in old  # the file of such a model is what it was
    assert Preprocess.from_json(old).background is None


@pytest.mark.parametrize(
    "value", [(0, 0), (0, 0, 256), (0, 0, -1), (0.5, 0, 0), "white", (True,) * 3]
)
def test_a_bad_background_is_refused(value: Any) -> None:
    with pytest.raises(BadValue, match="red, green and blue"):
        Preprocess(size=(8, 8), background=value)


def save(folder: Path) -> Path:
    """Two classes, on transparent ground whose hidden pixels are all alike."""
    for name in ("disc", "square"):
        (folder / name).mkdir(parents=True)
        for index in range(10):
            image = Image.new("RGBA", (SIDE, SIDE), (*ORANGE, 0))
            draw = ImageDraw.Draw(image)
            shape = draw.ellipse if name == "disc" else draw.rectangle
            shape((4, 4, 18, 16 + index % 3), (*ORANGE, 255))
            image.save(folder / name / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def icons(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("icons") / "in")


@pytest.fixture(scope="module")
def packed(icons: Path) -> Path:
    prepare([str(icons), "--out", str(icons.parent / "packed"), "--quiet"])
    return icons.parent / "packed"


@pytest.fixture(scope="module")
def files(icons: Path) -> Path:
    options = ["--pack", "off", "--background", "0,160,0", "--quiet"]
    prepare([str(icons), "--out", str(icons.parent / "files"), *options])
    return icons.parent / "files"


def test_prepare_blends_with_white_and_says_so(icons: Path, tmp_path: Path, capfd: Any) -> None:
    prepare([str(icons), "--out", str(tmp_path / "data")])
    assert "20 images with transparency are shown on 255,255,255" in capfd.readouterr().err
    info = json.loads((tmp_path / "data" / INFO).read_text())
    assert (info["background"], info["transparent"]) == ([255, 255, 255], 20)
    train = Dataset.open(tmp_path / "data").split("train")
    assert train.packed
    assert close(train.image(0)[0, 0], WHITE, 0)
    assert close(train.image(0)[10, 10], ORANGE, 0)


def test_prepare_can_ignore_alpha(icons: Path, tmp_path: Path, capfd: Any) -> None:
    prepare([str(icons), "--out", str(tmp_path / "data"), "--background", "ignore"])
    assert "20 images with transparency are shown without their alpha" in capfd.readouterr().err
    train = Dataset.open(tmp_path / "data").split("train")
    assert close(train.image(0)[0, 0], ORANGE, 0)
    assert choose_preprocess(InputConfig(), train, None).background is None


@pytest.mark.parametrize("value", ["1,2", "1,2,300", "orange"])
def test_a_bad_background_of_prepare_is_one_line(icons: Path, tmp_path: Path, value: str) -> None:
    with pytest.raises((UsageError, BadValue), match="background"):
        prepare([str(icons), "--out", str(tmp_path / "data"), "--background", value])
    assert not (tmp_path / "data").exists()


def test_training_takes_the_background_of_the_dataset(packed: Path, files: Path) -> None:
    for folder, color in ((packed, WHITE), (files, GREEN)):
        split = Dataset.open(folder).split("train")
        process = choose_preprocess(InputConfig(), split, None)
        assert process.background == color
        loader = Loader(
            split, dataclasses.replace(process, size=(SIDE, SIDE)), workers=1, prefetch=1
        )
        [batch] = loader.batches([np.arange(2)])
        assert close(batch.images[0, 0, 0].tolist(), color, 0)


def test_another_background_is_taken_for_files_and_refused_for_a_pack(
    packed: Path, files: Path
) -> None:
    config = InputConfig(background=(1, 2, 3))
    split = Dataset.open(files).split("train")
    assert choose_preprocess(config, split, None).background == (1, 2, 3)
    assert close(split.on_background((1, 2, 3)).image(0)[0, 0], (1, 2, 3), 0)
    with pytest.raises(UsageError) as caught:
        choose_preprocess(config, Dataset.open(packed).split("train"), None)
    text = str(caught.value)
    assert text.startswith("input.background 1,2,3: ")
    assert "255,255,255" in text
    assert "--background 1,2,3" in text


def test_a_pack_without_transparent_images_takes_any(packed: Path, tmp_path: Path) -> None:
    save(tmp_path / "in")
    for path in (tmp_path / "in").rglob("*.png"):
        Image.open(path).convert("RGB").save(path)
    prepare([str(tmp_path / "in"), "--out", str(tmp_path / "data"), "--quiet"])
    split = Dataset.open(tmp_path / "data").split("train")
    config = InputConfig(background=(1, 2, 3))
    assert choose_preprocess(config, split, None).background == (1, 2, 3)


def test_a_directory_of_an_earlier_version_ignores_alpha(files: Path, tmp_path: Path) -> None:
    info = json.loads((files / INFO).read_text())
    for key in ("background", "transparent"):
        del info[key]
    old = tmp_path / "old"
    old.mkdir()
    for path in files.iterdir():
        (old / path.name).write_bytes(path.read_bytes())
    (old / INFO).write_text(json.dumps(info))
    tiny_dataset.sign(old)
    split = Dataset.open(old).split("train")
    assert choose_preprocess(InputConfig(), split, None).background is None
    assert close(split.image(0)[0, 0], ORANGE, 0)


def test_a_damaged_background_on_disk_is_one_line(files: Path, tmp_path: Path) -> None:
    old = tmp_path / "old"
    old.mkdir()
    for path in files.iterdir():
        (old / path.name).write_bytes(path.read_bytes())
    for value in ([1, 2], "white", [1, 2, 999], {"r": 1}):
        info = json.loads((files / INFO).read_text()) | {"background": value}
        (old / INFO).write_text(json.dumps(info))
        with pytest.raises(UsageError, match=r"dataset\.json: background"):
            Dataset.open(old)


class Corner(tiny_onnx.FakeModel):
    """Its logits are the pixel in the upper left corner."""

    def __init__(self, background: tuple[int, int, int] | None) -> None:
        process = Preprocess(size=(SIDE, SIDE), background=background)
        task = Task(classes=("red", "green", "blue"))
        self.card = ModelCard(architecture={}, task=task, preprocess=process)

    def logits(self, images: Pixels) -> Any:
        return images[:, 0, 0].astype(np.float32)


@pytest.mark.parametrize("background", [None, WHITE, GREEN])
def test_every_way_to_a_prediction_blends_alike(
    background: tuple[int, int, int] | None, icons: Path, files: Path
) -> None:
    model, expected = Corner(background), [*(background or ORANGE)]
    folder = open_source(str(icons))
    sources = [folder, scale_decoding(folder, model), Dataset.open(files).split("test")]
    for source in sources:
        for chunk in Predictor(model).chunks(source):
            assert chunk.logits.tolist() == [expected] * len(chunk.indices)
    with Predictor(model) as predictor:
        found = predictor.submit((icons / "disc" / "0.png").read_bytes()).result(timeout=30)
    assert found.logits.tolist() == expected
    images = load_images(Dataset.open(files).split("val"), model.card.preprocess, 2)
    assert images[0, 0, 0].tolist() == expected


def test_a_pack_on_another_background_is_said(packed: Path, capfd: Any) -> None:
    split = Dataset.open(packed).split("test")
    for _ in range(2):
        list(Predictor(Corner(GREEN)).chunks(split))
    said = capfd.readouterr().err
    assert said.count("--background 0,160,0") == 1
    list(Predictor(Corner(WHITE)).chunks(split))
    assert not capfd.readouterr().err


def test_an_ensemble_has_one_background() -> None:
    with pytest.raises(UsageError, match="background"):
        Ensemble([Corner(WHITE), Corner(None)], ["one", "two"])


def test_a_run_records_its_background_and_predicts_with_it(files: Path, tmp_path: Path) -> None:
    options = ["--model.name", "simple_nn", "--epochs", "1", "--batch-size", "8", "--quiet"]
    train(["--data", str(files), "--out", str(tmp_path / "run"), *options])
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config["input"]["background"] == [*GREEN]
    model = load_model(tmp_path / "run" / "best.pth", "cpu")
    assert model.card.preprocess.background == GREEN
    image = Image.new("RGBA", (SIDE, SIDE), (*ORANGE, 0))
    with Predictor(model) as predictor:
        found = predictor.submit(encode(image, "PNG")).result(timeout=60)
        plain = Image.new("RGB", (SIDE, SIDE), GREEN)
        expected = predictor.submit(encode(plain, "PNG")).result(timeout=60)
    np.testing.assert_allclose(found.logits, expected.logits, rtol=1e-5)

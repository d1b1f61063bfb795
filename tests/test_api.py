"""Prediction from Python: every form of an image gives the numbers of `distcls predict`, or an
error of ours; nothing is guessed, nothing waits for ever."""

from __future__ import annotations

import array as array_module
import copy
import csv
import dataclasses
import functools
import http.server
import io
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from onnx import helper, numpy_helper
from PIL import Image, ImageOps, features
from sklearn.datasets import load_sample_images

import distcls
from distcls import predictor as predictor_module
from distcls.commands.predict import main as predict
from distcls.errors import BadImage, BadValue, DistclsError, UsageError
from distcls.imaging import Preprocess, decode
from distcls.prediction import Prediction, Predictions
from distcls.predictor import Predictor
from distcls.runtime.autotune import cache_key, write_cache
from distcls.runtime.onnx_file import OnnxFile
from distcls.runtime.providers import ExecutionConfig, ExecutionRequest
from tests import test_quickstart as quickstart
from tests import tiny_dataset, tiny_onnx
from tests.e2e.commands import ROOT
from tests.pictures import Pixels, encode, smooth
from tests.sources import tree
from tests.test_multi_output_evaluate import HEADS, LABELS
from tests.test_multi_output_evaluate import card as multi_card
from tests.test_pipeline import working
from tests.test_predict_rows import with_features

EXPORTED = ROOT / "tests" / "fixtures" / "v076daf9"
"""Real networks, exported."""


def model_file(folder: Path, seed: int = 0, **rule: Any) -> Path:
    """A model at 32 pixels that weighs each of them differently: turned images are others."""
    rule = {"size": (32, 32), "background": (255, 255, 255), **rule}
    card = dataclasses.replace(tiny_onnx.card(), preprocess=Preprocess(**rule))
    proto = tiny_onnx.proto(card)
    weights = np.random.default_rng(seed).normal(0, 1e-3, (32 * 32 * 3, 3)).astype(np.float32)
    proto.graph.initializer.append(numpy_helper.from_array(weights, "each"))
    proto.graph.node[1].CopyFrom(helper.make_node("Flatten", ["values"], ["means"], axis=1))
    proto.graph.node[2].input[1] = "each"
    folder.mkdir(exist_ok=True)
    path = folder / "best.onnx"
    path.write_bytes(proto.SerializeToString())
    return path


@pytest.fixture
def model(tmp_path: Path) -> Iterator[Predictor]:
    with distcls.load(model_file(tmp_path)) as predictor:
        yield predictor


def rows_of(source: Path, model: Path, out: Path, *options: str) -> list[dict[str, Any]]:
    """The rows of `distcls predict` as its file holds them."""
    predict([str(source), "--model", str(model), "--out", str(out), "--quiet", *options])
    if out.suffix == ".csv":
        with out.open(newline="", encoding="utf-8") as handle:
            return list(csv.DictReader(handle))
    if out.suffix == ".jsonl":
        return [json.loads(line) for line in out.read_text().splitlines()]
    return list(pq.read_table(out).to_pylist())


# --- importing it


def python(program: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", program]
    return subprocess.run(
        command, check=False, capture_output=True, text=True, cwd=ROOT, timeout=60, **options
    )


def test_importing_distcls_loads_nothing_heavy() -> None:
    done = python(
        "import sys, distcls\n"
        "heavy = {'torch', 'numpy', 'cv2', 'onnxruntime', 'PIL', 'yaml', 'pandas', 'pyarrow'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "assert 'load' in dir(distcls) and 'load' not in vars(distcls)\n"
        "distcls.load\n"
        "assert 'cv2' in sys.modules and 'torch' not in sys.modules\n"
        "assert 'load' in vars(distcls)\n"
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_the_names_of_the_package() -> None:
    assert distcls.Predictor is Predictor
    assert distcls.Predictions is Predictions
    assert distcls.BadImage is BadImage
    assert {name for name in distcls.__all__ if getattr(distcls, name)} <= set(dir(distcls))
    with pytest.raises(AttributeError, match="module 'distcls' has no attribute 'lod'"):
        distcls.lod  # type: ignore[attr-defined]  # noqa: B018


def test_the_base_install_predicts(tmp_path: Path, pictures: Path, digits: Path) -> None:
    model = with_features(tmp_path / "best.onnx")
    folder = tree(tmp_path / "photos", 20)
    done = python(
        "import sys\n"
        "for name in ('torch', 'torchvision', 'pyarrow', 'pandas', 'onnx', 'fsspec'):\n"
        "    sys.modules[name] = None\n"
        "import distcls\n"
        f"predictor = distcls.load({str(model)!r})\n"
        f"print(predictor({str(pictures / 'rgb.png')!r}).label in predictor.classes)\n"
        f"print(len(list(predictor.stream({str(pictures)!r}))))\n"
        f"print(predictor.features({str(pictures / 'rgb.png')!r}).shape)\n"
        f"print(distcls.open_dataset({str(folder)!r})[0].image().shape)\n"
        f"for ask in (lambda: distcls.load({str(EXPORTED / 'whole' / 'best.pth')!r}),\n"
        f"            lambda: predictor.stream({str(digits)!r}),\n"
        f"            lambda: distcls.open_dataset({str(digits)!r}),\n"
        f"            lambda: distcls.evaluate_model(predictor, {str(digits)!r}),\n"
        f"            lambda: distcls.export_onnx({str(EXPORTED / 'whole')!r}, 'm.onnx'),\n"
        f"            lambda: distcls.fit(data={str(digits)!r})):\n"
        "    try:\n"
        "        ask()\n"
        "    except distcls.UsageError as error:\n"
        "        print(error)\n"
    )
    assert (done.returncode, done.stderr) == (0, "")
    said = done.stdout.splitlines()
    assert said[:4] == ["True", str(len(FILES)), "(1, 3)", "(8, 8, 3)"]
    assert 'needs PyTorch, which is not installed; pip install "distcls[train]"' in said[4]
    for line in said[5:8]:
        assert 'needs pyarrow, which is not installed; pip install "distcls[parquet]"' in line
    for line, what in zip(said[8:], ("export", "distcls.fit"), strict=True):
        assert line.startswith(f"{what}: this needs torch, which is not installed; pip install")


SCRIPT = """
from pathlib import Path

import distcls

with distcls.load("best.onnx") as predictor:
    prediction = predictor("photo.jpg")
    label: str | None = prediction.label
    pairs: list[tuple[str, float]] = predictor(b"...").top_k(3)
    several: distcls.Predictions = predictor(["a.jpg", b"..."])
    first: distcls.Prediction = several[0]
    for found in predictor.stream("photos"):
        number: float | None = found.probability

with distcls.load(["a.onnx", Path("b.onnx")]) as predictor:
    data = distcls.open_dataset("photos", label_column="kind")
    pixels: int = data[0].image().size
    part: distcls.ImageDataset = data[:5]
    result = distcls.evaluate_model(predictor, data, split="val")
    top1: float = result.top1
path: Path = distcls.export_onnx("runs/photos", precision="int8").path
config = distcls.TrainConfig(data="photos", model="resnet50", ema={"decay": 0.99}, epochs=3)
name: str = config.model.name
config = distcls.TrainConfig.from_yaml("digits", data=Path("digits"))
epochs: int = distcls.fit(config, quiet=True).best_epoch
"""
BAD = """import distcls
distcls.lod
x: int = distcls.load('m.onnx')('a.jpg')
distcls.TrainConfig(data="photos", ema=0.9)
distcls.TrainConfig(model="resnet50")
distcls.export_onnx("runs/photos", precision="int4")
"""


@pytest.mark.slow
def test_scripts_of_the_user_pass_mypy_strict(tmp_path: Path) -> None:
    (tmp_path / "good.py").write_text(SCRIPT)
    (tmp_path / "quickstart.py").write_text(quickstart.source())
    (tmp_path / "bad.py").write_text(BAD)
    # scikit-learn, of which the notebook takes its pictures, has no types
    command = [sys.executable, "-m", "mypy", "--strict", "--ignore-missing-imports", "--cache-dir"]
    done = subprocess.run(
        [*command, str(ROOT / ".mypy_cache" / "user"), "good.py", "quickstart.py", "bad.py"],
        check=False,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        # a folder on the path of modules is a package that is installed: its py.typed counts
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    errors = [line for line in done.stdout.splitlines() if "error:" in line]
    lines = [tuple(line.split(":")[:2]) for line in errors]
    assert lines == [("bad.py", str(number)) for number in range(2, 7)], done.stdout
    assert 'has no attribute "lod"' in errors[0]
    assert '"Prediction", variable has type "int"' in errors[1]
    assert 'expected "EmaConfig | Mapping[str, object]"' in errors[2]
    assert 'Missing named argument "data"' in errors[3]


def test_the_wheel_says_that_it_is_typed(tmp_path: Path) -> None:
    for name in ("distcls", "export", "launch"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    program = "from setuptools import build_meta; build_meta.build_wheel('out')"
    command = [sys.executable, "-W", "ignore", "-c", program]
    subprocess.run(command, check=True, cwd=tmp_path, capture_output=True)
    with zipfile.ZipFile(next((tmp_path / "out").glob("*.whl"))) as wheel:
        assert "distcls/py.typed" in wheel.namelist()


# --- the same picture in every form


def transparent(height: int = 40, width: int = 56) -> Image.Image:
    alpha = np.linspace(0, 255, height * width).astype(np.uint8).reshape(height, width, 1)
    return Image.fromarray(np.concatenate([smooth(height, width, 3), alpha], axis=2))


def sixteen_bits() -> Image.Image:
    values = np.random.default_rng(1).integers(0, 65536, (30, 41), dtype=np.uint16)
    return Image.fromarray(values)


def rotated(orientation: int) -> dict[str, Any]:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return {"exif": exif}


def see_through_palette() -> bytes:
    image = Image.fromarray(smooth(30, 30)).quantize(20)
    return encode(image, "PNG", transparency=bytes(range(0, 240, 12)))


PHOTOGRAPH = np.asarray(load_sample_images().images[0], np.uint8)
GREY = Image.fromarray(smooth(33, 47)).convert("L")
FILES: dict[str, bytes] = {
    "photograph.jpg": encode(PHOTOGRAPH, "JPEG", quality=90),
    "small.jpg": encode(PHOTOGRAPH[50:151, 20:97], "JPEG", quality=75),
    "grey.jpg": encode(GREY, "JPEG"),
    "rotated.jpg": encode(PHOTOGRAPH[:120, :200], "JPEG", **rotated(6)),
    "mirrored.jpg": encode(PHOTOGRAPH[:120, :200], "JPEG", **rotated(5)),
    "rgb.png": encode(smooth(40, 50, 1), "PNG"),
    "rotated.png": encode(smooth(40, 50, 2), "PNG", **rotated(8)),
    "alpha.png": encode(transparent(), "PNG"),
    "grey_alpha.png": encode(transparent().convert("LA"), "PNG"),
    "palette.png": encode(Image.fromarray(smooth(30, 30)).quantize(20), "PNG"),
    "see_through_palette.png": see_through_palette(),
    "grey.png": encode(GREY, "PNG"),
    "one_bit.png": encode(GREY.convert("1"), "PNG"),
    "sixteen_bits.png": encode(sixteen_bits(), "PNG"),
    "rotated_sixteen_bits.png": encode(sixteen_bits(), "PNG", **rotated(6)),
    "lossless.webp": encode(transparent(), "WEBP", lossless=True, exact=True),
    "raw.bmp": encode(smooth(21, 22), "BMP"),
    "raw.tiff": encode(transparent(), "TIFF"),
    "cmyk.jpg": encode(Image.fromarray(smooth()).convert("CMYK"), "JPEG"),
}
"""Photographs, transparency, grey, EXIF orientation: what cameras, screens and scanners write."""

SET = pytest.mark.parametrize("name", FILES)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for name, data in FILES.items():
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture(scope="module", params=[(255, 255, 255), (9, 200, 30), None], ids=str)
def background_model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    return model_file(tmp_path_factory.mktemp("model"), background=request.param)


def array(name: str, background: Any) -> Pixels:
    """A file's pixels as an array: four channels where it has alpha, and the model a use for it."""
    image = Image.open(io.BytesIO(FILES[name]))
    if background is not None and image.has_transparency_data:
        return np.asarray(ImageOps.exif_transpose(image).convert("RGBA"))
    return decode(FILES[name], background=background)


@pytest.fixture(scope="module")
def server(pictures: Path) -> Iterator[str]:
    pytest.importorskip("aiohttp", reason="distcls[remote] is not installed")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing."""

    handler = functools.partial(Quiet, directory=str(pictures))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as found:
        thread = threading.Thread(target=found.serve_forever, args=(0.02,))
        thread.start()
        yield f"http://127.0.0.1:{found.server_address[1]}"
        found.shutdown()
        thread.join()


def test_the_same_picture_in_every_form(
    background_model: Path, pictures: Path, tmp_path: Path
) -> None:
    tables = [
        {
            row["image_id"]: row
            for row in rows_of(pictures, background_model, tmp_path / out, "--probabilities")
        }
        for out in ("pre.csv", "pre.jsonl", "pre.parquet")
    ]
    with distcls.load(background_model) as predictor:
        background = predictor.card.preprocess.background
        for name, data in FILES.items():
            path = pictures / name
            with Image.open(path) as opened:
                forms: list[Any] = [path, str(path), data, bytearray(data), memoryview(data)]
                forms += [array(name, background), opened]
                found = [*predictor(forms), *map(predictor, forms)]
                found += [predictor.submit(form).result(30) for form in forms]
                found += predictor.stream(iter(forms))
            numbers = {prediction.probabilities.tobytes() for prediction in found}
            assert len(numbers) == 1, name
            assert len(found) == 4 * len(forms)
            for row in (table[name] for table in tables):
                for prediction in found:
                    assert prediction.label == row["label"]
                    assert prediction.error is None
                    # CSV and JSON lines give the float itself, Parquet holds float32
                    number = float(row["probability"])
                    assert number in (prediction.probability, np.float32(prediction.probability))
                given = [row[f"p:{label}"] for label in predictor.classes]
                np.testing.assert_array_equal(np.float32(given), found[0].probabilities)
            assert found[0].image_id == found[1].image_id == str(path)
            assert found[2].image_id is None
            assert found[6].image_id == str(path)


def test_urls_give_the_same_too(background_model: Path, pictures: Path, server: str) -> None:
    with distcls.load(background_model) as predictor:
        urls = [f"{server}/{name}" for name in FILES]
        expected = predictor([pictures / name for name in FILES])
        found = predictor(urls)
        assert [p.image_id for p in found] == urls
        assert [p.logits.tolist() for p in found] == [p.logits.tolist() for p in expected]
        assert predictor(urls[0]).logits.tolist() == expected[0].logits.tolist()
        streamed = list(predictor.stream(server + "/*.png"))
        assert [p.image_id for p in streamed] == sorted(n for n in FILES if n.endswith("png"))
        missing = predictor([f"{server}/none.png", urls[1]])
        assert missing[0].error == "cannot be fetched: not found"
        assert missing[1].error is None
    fetching = [thread for thread in threading.enumerate() if "distcls-fetch" in thread.name]
    for thread in fetching:
        thread.join(10)
        assert not thread.is_alive()


def test_urls_without_the_extra_say_what_to_install(
    model: Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    from distcls.data.formats import remote

    remote.filesystem.cache_clear()
    monkeypatch.setitem(sys.modules, "fsspec", None)
    try:
        for ask in (model, lambda url: model([b"x", url]), lambda url: list(model.stream([url]))):
            with pytest.raises(UsageError, match=r'pip install "distcls\[remote\]"'):
                ask("https://example.org/a.jpg")
    finally:
        remote.filesystem.cache_clear()
    with pytest.raises(UsageError, match="unknown scheme 'htp://'; did you mean 'http'"):
        model("htp://example.org/a.jpg")


@pytest.mark.parametrize("kind", ["onnx", "pth"])
@pytest.mark.parametrize("run", ["whole", "run_heads", "run_labels"])
def test_real_networks_give_the_rows_of_predict(
    kind: str, run: str, pictures: Path, tmp_path: Path
) -> None:
    path = EXPORTED / run / f"best.{kind}"
    rows = rows_of(pictures, path, tmp_path / "pre.jsonl")
    with distcls.load(path) as predictor:
        found = predictor([pictures / row["image_id"] for row in rows])
        assert predictor.path == path
    heads = [key.partition(":")[2] for key in rows[0] if key.startswith("label:")]
    for row, prediction in zip(rows, found, strict=True):
        assert (row["label"], row["probability"]) == (prediction.label, prediction.probability)
        assert list(prediction.heads) == heads
        for head in heads:
            assert prediction.heads[head] == (row[f"label:{head}"], row[f"probability:{head}"])


# --- PIL images: those that stand for their file, and those that do not


def test_a_jpeg_that_pillow_has_decoded_is_near() -> None:
    with distcls.load(EXPORTED / "whole" / "best.onnx") as predictor:
        for name in ("photograph.jpg", "small.jpg", "grey.jpg"):
            image = Image.open(io.BytesIO(FILES[name]))
            image.load()
            near, exact = predictor([image, FILES[name]])
            np.testing.assert_allclose(near.probabilities, exact.probabilities, atol=2e-2)


@SET
def test_lossless_images_are_equal_once_decoded(name: str, model: Predictor) -> None:
    image = Image.open(io.BytesIO(FILES[name]))
    image.load()
    if image.mode == "CMYK":
        with pytest.raises(UsageError, match="libraries differ in its conversion to RGB"):
            model(image)
        return
    found, expected = model([image, FILES[name]])
    if not name.endswith(".jpg"):
        assert found.logits.tolist() == expected.logits.tolist()
    else:
        np.testing.assert_allclose(found.logits, expected.logits, rtol=1e-2)


def test_an_undecoded_image_stays_undecoded_and_open(model: Predictor, pictures: Path) -> None:
    with Image.open(pictures / "rotated.jpg") as image:
        place = image.fp.tell()
        model(image)
        assert image.tile
        assert image.fp.tell() == place
        assert np.asarray(image).shape == (120, 200, 3)


def draft(image: Image.Image) -> None:
    image.draft("RGB", (20, 20))


def upright_already(image: Image.Image) -> None:
    image.getexif()[0x0112] = 1


def drop_key(image: Image.Image) -> None:
    del image.info["transparency"]


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("photograph.jpg", draft),
        ("rotated.jpg", upright_already),
        ("see_through_palette.png", drop_key),
        ("rgb.png", lambda image: image.putpixel((25, 20), (0, 0, 0))),
        ("rgb.png", lambda image: image.paste((255, 0, 0), (0, 0, 20, 20))),
    ],
    ids=["draft", "exif", "info", "putpixel", "paste"],
)
def test_a_changed_image_is_not_its_file(
    name: str, change: Callable[[Image.Image], None], model: Predictor
) -> None:
    image, other = (Image.open(io.BytesIO(FILES[name])) for _ in range(2))
    change(image)
    change(other)
    expected = np.asarray(ImageOps.exif_transpose(other).convert("RGB"))
    assert model(image).logits.tolist() == model(expected).logits.tolist()
    assert model(image).logits.tolist() != model(FILES[name]).logits.tolist()


@pytest.mark.parametrize("kind", ["TIFF", "GIF", "AVIF"])
def test_another_frame_is_not_the_file(kind: str, model: Predictor) -> None:
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    frames = [Image.fromarray(smooth(20, 20, seed)) for seed in range(2)]
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:])
    first, second, other = (Image.open(io.BytesIO(data)) for _ in range(3))
    second.seek(1)
    other.seek(1)
    expected = model(np.asarray(other.convert("RGB"))).logits.tolist()
    assert model(second).logits.tolist() == expected
    assert model(first).logits.tolist() == model(data).logits.tolist() != expected


class SlowFile(io.BytesIO):
    """Whoever reads it is interrupted by other threads."""

    def seek(self, place: int, whence: int = 0) -> int:
        found = super().seek(place, whence)
        time.sleep(0.002)
        return found


def test_one_undecoded_image_in_several_threads(model: Predictor) -> None:
    # its pixels as Pillow decodes them are others, so a reading that goes wrong shows
    expected = model(FILES["cmyk.jpg"]).logits.tolist()
    with Image.open(SlowFile(FILES["cmyk.jpg"])) as image, ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda _: model(image).logits.tolist(), range(12)))
        several = [prediction.logits.tolist() for prediction in model([image] * 12)]
    assert found == several == [expected] * 12


@pytest.mark.parametrize("name", ["rotated.jpg", "rotated.png"])
def test_the_orientation_that_an_image_carries_counts_once(name: str, model: Predictor) -> None:
    expected = model(FILES[name]).logits
    image = Image.open(io.BytesIO(FILES[name]))
    for upright in (image.convert("RGB"), ImageOps.exif_transpose(image), image.copy()):
        np.testing.assert_allclose(model(upright).logits, expected, rtol=1e-3)


@pytest.mark.parametrize(
    ("mode", "told"),
    [
        ("CMYK", "image.convert('RGB')"),
        ("YCbCr", "image.convert('RGB')"),
        ("HSV", "image.convert('RGB')"),
        ("LAB", "image.convert('RGB')"),
        ("RGBa", "image.convert('RGB')"),
        ("PA", "image.convert('RGB')"),
        ("I", "32-bit values is white is not known"),
        ("F", "32-bit values is white is not known"),
    ],
)
def test_modes_without_one_meaning_are_refused(mode: str, told: str, model: Predictor) -> None:
    with pytest.raises(UsageError) as error:
        model(Image.new(mode, (5, 7)))
    assert f"image: a PIL image of mode {mode}, 5x7" in str(error.value)
    assert told in str(error.value)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "RGBX", "I;16"])
def test_modes_with_one_meaning(mode: str, model: Predictor) -> None:
    image = Image.new(mode, (5, 7), 1 if mode == "1" else 0)
    value = 255 if mode in ("1", "LA", "RGBA") else 0  # transparent ones show the white
    image.info.clear()
    if mode == "RGBA":
        image.putalpha(0)
    expected = model(np.full((7, 5, 3), value, np.uint8))
    assert model(image).logits.tolist() == expected.logits.tolist()


def test_a_transparent_colour_of_16_bits_is_refused_where_pillow_has_lost_it(
    model: Predictor,
) -> None:
    image = sixteen_bits()
    image.info["transparency"] = 77
    with pytest.raises(UsageError, match="transparent colour of 16 bits: pass its path or bytes"):
        model(image)


def test_images_that_pillow_cannot_decode(model: Predictor, pictures: Path, tmp_path: Path) -> None:
    with Image.open(pictures / "rgb.png") as image:
        pass
    with pytest.raises(BadImage, match="Pillow cannot decode it"):
        model(image)
    (tmp_path / "cut.png").write_bytes(FILES["rgb.png"][:200])
    with Image.open(tmp_path / "cut.png") as cut:
        found = model([cut, pictures / "rgb.png"])
        assert found[1].error is None
        assert str(found[0].error).startswith(
            "corrupt or truncated: its chunk at byte 33 has 2,347"
        )
        with pytest.raises(BadImage, match=r"cut\.png: corrupt or truncated"):
            model(cut)


# --- what is no image


WRONG: list[tuple[Any, str]] = [
    (None, "None is no image; expected a path or URL"),
    (3, "int 3 is no image"),
    ("", "'' is not a path"),
    (io.BytesIO(b"x"), "image.read()"),
    ({"a": 1}, "list(images)"),
    (array_module.array("B", [1, 2]), "list(images)"),
    (torch.zeros(3, 4, 5), "a tensor's axes have to be in that order"),
    ((n for n in "ab"), "predictor.stream(images)"),
    (np.zeros((0, 10, 3), np.uint8), "an array of uint8 [0, 10, 3] has no pixel"),
    (np.zeros((10, 0), np.uint8), "an array of uint8 [10, 0] has no pixel"),
    (np.full((4, 5, 3), 0.5, np.float32), "float32 [4, 5, 3], values 0.5 to 0.5: expected uint8"),
    (np.zeros((4, 5, 3)), "(255 * image).round().astype('uint8')"),
    (np.zeros((4, 5), np.uint16), "(image >> 8).astype('uint8')"),
    (np.zeros((4, 5), np.int64), "image.astype('uint8')"),
    (np.zeros((4, 5), bool), "255 * image.astype('uint8')"),
    (np.zeros((3, 40, 50), np.uint8), "channels come first: pass image.transpose(1, 2, 0)"),
    (np.zeros((1, 40, 50), np.uint8), "channels come first"),
    (np.zeros((40, 50, 2), np.uint8), "expected 3 channels (RGB), 4 (RGBA) or 1 (grey), not 2"),
    (np.zeros((8, 40, 50, 3), np.uint8), "is a batch: pass a list of its images, list(images)"),
    (np.zeros(40, np.uint8), "image.tobytes()"),
    (np.zeros((), np.uint8), "array of uint8 []: expected a path"),
    (np.array(["a.jpg", "b.jpg"]), "images.tolist()"),
    (Image.new("RGB", (0, 4)), "PIL image of mode RGB, 0x4, has no pixel"),
    (np.ma.masked_less(smooth(4, 5), 99), "masked pixels: fill them, as in image.filled(0)"),
    (distcls.open_dataset("digits")[0], "is no image; pass its pixels, image(), or its path"),
]


@pytest.mark.parametrize(("image", "told"), WRONG, ids=[told for _, told in WRONG])
def test_what_is_no_image_is_said_with_its_value(image: Any, told: str, model: Predictor) -> None:
    asked: list[tuple[Callable[[Any], Any], str]] = [
        (model, "image: "),
        (model.submit, "image: "),
        (lambda one: model([FILES["rgb.png"], one]), "images[1]: "),
        (lambda one: model.features([one]), "images[0]: "),
        (lambda one: list(model.stream([one])), "image 0 of the stream: "),
    ]
    for ask, where in asked:
        with pytest.raises(UsageError) as error:
            ask(image)
        assert str(error.value).startswith(where)
        assert told in str(error.value)


def test_nothing_is_normalised_twice(model: Predictor) -> None:
    preprocess = model.card.preprocess
    once = preprocess(smooth(50, 70))
    assert model(once).logits.tolist() == model(smooth(50, 70)).logits.tolist()
    scaled = (once / 255 - preprocess.mean) / preprocess.std
    for twice in (scaled, scaled.astype(np.float32), scaled.transpose(2, 0, 1), scaled[None]):
        with pytest.raises(UsageError, match=r"values -.* to .*: expected uint8"):
            model(twice)


def test_lists_that_are_empty_or_nested(model: Predictor) -> None:
    for empty in ([], ()):
        with pytest.raises(UsageError, match=r"is empty, expected at least one image"):
            model(empty)
        with pytest.raises(UsageError, match=r"is empty, expected at least one image"):
            model.features(empty)
    with pytest.raises(UsageError, match=r"images\[0\]: list .* not lists of them"):
        model([[FILES["rgb.png"]]])  # type: ignore[list-item]


def test_folders_and_globs_are_streamed(model: Predictor, pictures: Path) -> None:
    for source in (str(pictures), pictures, str(pictures / "*.png")):
        with pytest.raises(UsageError, match=r"predictor\.stream\("):
            model(source)
        with pytest.raises(UsageError, match=r"predictor\.stream\("):
            model([FILES["rgb.png"], source])


def test_grey_in_three_shapes_and_any_memory_order(model: Predictor) -> None:
    grey = np.asarray(GREY)
    expected = model(FILES["grey.png"]).logits.tolist()
    for form in (grey, grey[..., None], np.repeat(grey[..., None], 3, 2), np.asfortranarray(grey)):
        assert model(form).logits.tolist() == expected
    assert model(grey[::-1]).logits.tolist() == model(grey[::-1].copy()).logits.tolist()
    bgr = smooth()[..., ::-1]
    assert model(bgr[..., ::-1]).logits.tolist() == model(smooth()).logits.tolist()
    assert model(bgr).logits.tolist() != model(smooth()).logits.tolist()


# --- bad images


def test_a_bad_image_is_a_row_in_a_list_and_an_exception_alone(
    model: Predictor, tmp_path: Path
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "bad.jpg").write_bytes(FILES["photograph.jpg"][:5000])
    (folder / "empty.png").write_bytes(b"")
    (folder / "good.png").write_bytes(FILES["rgb.png"])
    rows = rows_of(folder, tmp_path / "best.onnx", tmp_path / "pre.jsonl")
    names = ["bad.jpg", "empty.png", "good.png"]
    found = model([str(folder / name) for name in names])
    assert [p.error for p in found] == [row["error"] for row in rows]
    assert [p.label for p in found] == [row["label"] for row in rows]
    assert [p.image_id for p in found] == [str(folder / name) for name in names]
    bad = found[0]
    assert (bad.probability, bad.labels, bad.heads) == (None, (), {})
    assert np.isnan(bad.probabilities).all()
    with pytest.raises(BadImage, match=r"bad\.jpg: corrupt or truncated"):
        bad.top_k(1)
    for source in (folder / "bad.jpg", folder / "none.jpg", b"", b"no image"):
        with pytest.raises(BadImage):
            model(source)
    assert model.submit(b"").result(30).error == "empty file"
    with pytest.raises(BadImage, match=r"none\.jpg: cannot be read: No such file"):
        model(str(folder / "none.jpg"))


# --- streams


def test_a_generator_is_consumed_lazily(tmp_path: Path) -> None:
    taken = 0

    def images() -> Iterator[Pixels]:
        nonlocal taken
        frame = np.zeros((8, 8, 3), np.uint8)  # one buffer, filled anew for each
        for value in range(240):
            taken += 1
            frame[:] = value
            yield frame

    path = tiny_onnx.write(tmp_path / "m.onnx")
    with distcls.load(path, batch_size=4, workers=2) as predictor:
        stream = predictor.stream(images())
        assert taken == 0
        first = next(stream)
        assert taken <= 4 * 6
        rest = list(stream)
    frames = [np.full((8, 8, 3), value, np.uint8) for value in range(240)]
    expected = tiny_onnx.expected_logits(np.stack(frames))
    found = np.stack([p.logits for p in [first, *rest]])
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert not working()


def test_large_images_make_small_batches(model: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predictor_module, "BATCH_BYTES", 3 * 4 * 4 * 3)
    sizes = []
    infer = model.model.logits

    def counted(images: Pixels) -> Any:
        sizes.append(len(images))
        return infer(images)

    monkeypatch.setattr(model.model, "logits", counted)
    assert len(list(model.stream(np.zeros((4, 4, 3), np.uint8) for _ in range(10)))) == 10
    assert sorted(sizes) == [1, 3, 3, 3]
    sizes.clear()
    assert len(model([FILES["rgb.png"]] * 3)) == 3


@pytest.mark.parametrize("what", ["folder", "glob", "image", "manifest"])
def test_what_predict_takes_is_streamed_with_the_ids_of_its_rows(
    what: str, model: Predictor, pictures: Path, tmp_path: Path
) -> None:
    source = {"folder": pictures, "glob": pictures / "*.png", "image": pictures / "grey.jpg"}
    if what == "manifest":
        source["manifest"] = tmp_path / "list.csv"
        lines = ["path", *(str(pictures / name) for name in ("grey.png", "none.png", "rgb.png"))]
        source["manifest"].write_text("\n".join(lines))
    rows = rows_of(source[what], tmp_path / "best.onnx", tmp_path / "pre.jsonl")
    found = list(model.stream(str(source[what])))
    assert [(p.image_id, p.label, p.probability, p.error) for p in found] == [
        (row["image_id"], row["label"], row["probability"], row["error"]) for row in rows
    ]
    assert Predictions(found).to_dataframe()["image_id"].tolist() == [r["image_id"] for r in rows]


def test_names_that_are_not_utf8_are_those_of_predict(model: Predictor, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / os.fsdecode(b"a\xff.png")
    path.write_bytes(FILES["rgb.png"])
    row = rows_of(tmp_path / "in", tmp_path / "best.onnx", tmp_path / "pre.jsonl")[0]
    assert row["image_id"] == "a\\xff.png"
    assert model(path).image_id == f"{tmp_path}/in/{row['image_id']}"
    assert next(iter(model.stream(tmp_path / "in"))).image_id == row["image_id"]


def test_streams_that_cannot_be(model: Predictor, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file or folder"):
        model.stream(tmp_path / "nowhere")
    for single in (b"x", np.zeros((3, 4, 3), np.uint8), GREY, {"a": "b"}, None, 7):
        with pytest.raises(UsageError, match=r"predict one image with predictor\(image\)"):
            model.stream(single)  # type: ignore[arg-type]
    with (
        (tmp_path / "best.onnx").open("rb") as file,
        pytest.raises(UsageError, match=r"an open file; .* predictor\(file\.read\(\)\)"),
    ):
        model.stream(file)
    table = Predictions(model([FILES["rgb.png"]])).to_dataframe()
    with pytest.raises(UsageError, match="DataFrame is a table; pass its column of paths"):
        model.stream(table)
    with pytest.raises(UsageError, match="no image came out of this generator"):
        list(model.stream(path for path in tmp_path.glob("*.jpg")))
    with pytest.raises(UsageError, match="no image came out of this list"):
        list(model.stream([]))


def test_a_stream_that_is_left_early_ends_its_threads(model: Predictor, pictures: Path) -> None:
    for source in (pictures, [FILES["rgb.png"]] * 500):
        for _ in model.stream(source):
            break
        assert not working()


def test_errors_of_the_users_own_generator_come_through(model: Predictor) -> None:
    def images() -> Iterator[bytes]:
        yield FILES["rgb.png"]
        raise KeyError("theirs")

    with pytest.raises(KeyError, match="theirs"):
        list(model.stream(images()))
    assert not working()


# --- submit, threads, closing


def test_an_array_may_be_filled_anew_after_submit(tmp_path: Path) -> None:
    with distcls.load(tiny_onnx.write(tmp_path / "m.onnx")) as predictor:
        frame = np.zeros((8, 8, 3), np.uint8)
        futures = []
        for value in range(50):
            frame[:] = value
            futures.append(predictor.submit(frame))
        found = [future.result(30).logits for future in futures]
    frames = np.stack([np.full((8, 8, 3), value, np.uint8) for value in range(50)])
    np.testing.assert_allclose(found, tiny_onnx.expected_logits(frames), rtol=1e-5)


def test_two_threads_at_once_give_the_right_answers(model: Predictor, pictures: Path) -> None:
    shared = Image.open(io.BytesIO(FILES["photograph.jpg"]))
    forms: list[Any] = [*FILES.values(), *(pictures / name for name in FILES), shared]
    expected = [p.logits.tolist() for p in model([*forms[:-1], FILES["photograph.jpg"]])]

    def ask(seed: int) -> None:
        order = np.random.default_rng(seed).permutation(len(forms)).tolist()
        mixed = [forms[index] for index in order]
        several = [p.logits.tolist() for p in model(mixed)]
        streamed = [p.logits.tolist() for p in model.stream(iter(mixed))]
        alone = [model(form).logits.tolist() for form in mixed[:8]]
        assert several == streamed == [expected[index] for index in order]
        assert alone == several[:8]

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(ask, range(8)))


def test_nothing_works_after_close(tmp_path: Path, pictures: Path) -> None:
    predictor = distcls.load(model_file(tmp_path))
    stream = predictor.stream([FILES["rgb.png"]] * 50)
    assert next(stream).error is None
    predictor.close()
    predictor.close()
    asked: list[Callable[[], Any]] = [
        lambda: predictor(FILES["rgb.png"]),
        lambda: predictor([FILES["rgb.png"]]),
        lambda: predictor.submit(FILES["rgb.png"]),
        lambda: predictor.stream(pictures),
        lambda: predictor.features([FILES["rgb.png"]]),
        lambda: next(stream),
    ]
    for ask in asked:
        with pytest.raises(DistclsError, match=r"the predictor is closed; distcls\.load opens"):
            ask()
    assert "closed" in repr(predictor)
    assert predictor.classes == tiny_onnx.COLOURS


def test_closing_while_others_predict(tmp_path: Path) -> None:
    predictor = distcls.load(model_file(tmp_path), batch_size=4)
    expected = predictor(FILES["small.jpg"]).logits.tolist()
    began = threading.Barrier(5)
    ended: list[str] = []

    def ask(number: int) -> None:
        began.wait()
        try:
            while True:
                several = predictor([FILES["small.jpg"]] * 9) if number % 2 else []
                found = [*several, predictor(FILES["small.jpg"])]
                assert [each.logits.tolist() for each in found] == [expected] * len(found)
        except DistclsError as error:
            ended.append(str(error))

    with ThreadPoolExecutor(4) as threads:
        asking = [threads.submit(ask, number) for number in range(4)]
        began.wait()
        time.sleep(0.1)
        predictor.close()
        for each in asking:
            each.result(30)
    assert len(ended) == 4
    assert all("the predictor is closed" in message for message in ended)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_process_is_told_to_load_its_own(model: Predictor) -> None:
    """Its threads are not there: what waits for them would wait for ever."""
    model(FILES["rgb.png"])
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        signal.alarm(20)
        try:
            model(FILES["rgb.png"])
        except DistclsError as error:
            os.write(writing, str(error).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with open(reading, encoding="utf-8") as pipe:  # noqa: PTH123 - a descriptor
        told = pipe.read()
    os.waitpid(child, 0)
    assert told.startswith(f"the predictor was loaded in process {os.getpid()}, ")
    assert f"({child}); distcls.load the model in each process" in told


def test_a_predictor_is_not_pickled(model: Predictor) -> None:
    for copying in (pickle.dumps, copy.deepcopy):
        with pytest.raises(UsageError, match=r"Predictor\('.*best.onnx', .*cannot be pickled"):
            copying(model)


# --- features


def test_features_are_those_of_predict(tmp_path: Path, pictures: Path) -> None:
    path = with_features(tmp_path / "f.onnx")
    rows_of(pictures, path, tmp_path / "pre.csv", "--features", str(tmp_path / "f.parquet"))
    table = pq.read_table(tmp_path / "f.parquet").to_pydict()
    with distcls.load(path, batch_size=5) as predictor:
        found = predictor.features([pictures / name for name in table["image_id"]])
        assert (found.shape, found.dtype) == ((len(FILES), 3), np.float32)
        np.testing.assert_array_equal(found, np.float32(table["features"]))
        assert predictor.features(FILES["rgb.png"]).shape == (1, 3)
        assert predictor(FILES["rgb.png"]).features is None
        bad = [FILES["rgb.png"]] * 7 + [b"x"]
        with pytest.raises(BadImage, match=r"images\[7\]: not an image of a known format"):
            predictor.features(bad)
        with pytest.raises(BadImage, match=r"images\[0\] \(none\.jpg\): cannot be read"):
            predictor.features("none.jpg")


def test_models_without_features_say_so(model: Predictor) -> None:
    with pytest.raises(UsageError, match="was exported without them"):
        model.features([FILES["rgb.png"]])
    with (
        distcls.load(EXPORTED / "whole" / "best.pth") as predictor,
        pytest.raises(UsageError, match=r"only an exported \.onnx has them"),
    ):
        predictor.features([FILES["rgb.png"]])


# --- predictions, and lists of them


def test_a_prediction(tmp_path: Path) -> None:
    model = distcls.load(tiny_onnx.write(tmp_path / "m.onnx"), workers=1)
    found = model(np.full((9, 9, 3), (250, 120, 0), np.uint8))
    assert (found.label, found.labels, found.error, found.image_id) == ("red", ("red",), None, None)
    assert found.probabilities.dtype == np.float32
    assert found.classes == model.classes == tiny_onnx.COLOURS
    pairs = found.top_k(3)
    assert [label for label, _ in pairs] == ["red", "green", "blue"]
    assert [np.float32(number) for _, number in pairs] == found.probabilities.tolist()
    assert pairs[0] == (found.label, found.probability)
    assert found.top_k(1) == pairs[:1]
    assert [label for label, _ in model(np.zeros((9, 9), np.uint8)).top_k(3)] == [
        "red",
        "green",
        "blue",
    ]  # equal ones in the classes' order
    for wrong in (0, -1, 4, "2", 1.5, True, None):
        with pytest.raises(BadValue, match=rf"top_k: {wrong!r} is not valid, expected 1 to 3"):
            found.top_k(wrong)  # type: ignore[arg-type]
    assert found.top_k(np.int64(2)) == found.top_k(2)  # type: ignore[arg-type]


def test_predictions_print_in_one_line_each(model: Predictor, pictures: Path) -> None:
    good = model(pictures / "rgb.png")
    assert repr(good).startswith(f"Prediction({str(pictures / 'rgb.png')!r}, label='")
    assert repr(model(FILES["rgb.png"])) == (
        f"Prediction(label={good.label!r}, probability={good.probability:.4f})"
    )
    many = model([FILES["rgb.png"], b"no image"] * 30)
    assert "\n" not in repr(many[0])
    assert repr(many[1]).startswith("Prediction(error='not an image of a known format")
    assert repr(many).count("\n") == 22
    assert "... (60 in all)" in repr(many)
    assert isinstance(many[2:4], Predictions)
    assert isinstance(many[2], Prediction)
    assert repr(Predictions()) == "Predictions([])"
    long = dataclasses.replace(good, label="x" * 10_000)
    assert len(repr(long)) < 200


def test_heads_and_labels(tmp_path: Path) -> None:
    images = tiny_dataset.coloured(20)[0]
    path = tiny_onnx.write(tmp_path / "heads.onnx", multi_card(HEADS))
    with distcls.load(path) as predictor:
        for found in predictor(list(images)):
            assert found.label == "|".join(found.labels)
            assert [label for label, _ in found.heads.values()] == list(found.labels)
            joint = np.prod([number for _, number in found.heads.values()])
            np.testing.assert_allclose(joint, found.probability, rtol=1e-5)
        with pytest.raises(UsageError, match=r"has 2 heads .*; see heads and probabilities"):
            found.top_k(2)
    path = tiny_onnx.write(tmp_path / "labels.onnx", multi_card(LABELS))
    with distcls.load(path) as predictor:
        several = predictor(list(images))
        assert len({p.label for p in several}) > 1
        for found in several:
            chosen = zip(found.classes, LABELS.decide(found.logits[None])[0], strict=True)
            assert list(found.labels) == [label for label, is_there in chosen if is_there]
            assert found.heads == {}
        with pytest.raises(UsageError, match="labels; see labels and probabilities"):
            found.top_k(2)


@pytest.mark.parametrize("task", ["single", "heads", "labels"])
@pytest.mark.parametrize("options", [{}, {"probabilities": True}, {"top_k": 3}])
def test_a_dataframe_is_the_csv(
    task: str, options: dict[str, Any], pictures: Path, tmp_path: Path
) -> None:
    pandas = pytest.importorskip("pandas")
    cards = {"single": tiny_onnx.card(), "heads": multi_card(HEADS), "labels": multi_card(LABELS)}
    path = tiny_onnx.write(tmp_path / "m.onnx", cards[task])
    (tmp_path / "in").mkdir()
    for name in ("photograph.jpg", "rgb.png"):
        shutil.copy(pictures / name, tmp_path / "in")
    (tmp_path / "in" / "cut.png").write_bytes(FILES["rgb.png"][:100])
    flags = {"probabilities": ["--probabilities"], "top_k": ["--top-k", "3"]}
    given = [flag for option in options for flag in flags[option]]
    with distcls.load(path) as predictor:
        found = Predictions(predictor.stream(tmp_path / "in"))
    if options.get("top_k") and task != "single":
        with pytest.raises(UsageError, match="top_k: 3 is for a single label per image"):
            found.to_dataframe(**options)
        return
    rows_of(tmp_path / "in", path, tmp_path / "pre.csv", *given)
    expected = pandas.read_csv(tmp_path / "pre.csv")
    frame = found.to_dataframe(**options)
    assert frame["error"].notna().tolist() == [True, False, False]
    pandas.testing.assert_frame_equal(frame, expected, check_dtype=False)


def test_dataframes_that_cannot_be(model: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    found = model([FILES["rgb.png"]])
    with pytest.raises(UsageError, match="top_k: 4 is more than the model's 3 classes"):
        found.to_dataframe(top_k=4)
    with pytest.raises(BadValue, match="top_k: 0 is not valid, expected an integer of at"):
        found.to_dataframe(top_k=0)
    with distcls.load(EXPORTED / "whole" / "best.onnx") as other:
        mixed = Predictions([*found, other(FILES["rgb.png"])])
    with pytest.raises(
        UsageError, match=r"two models .* of 3 classes \(red, green, blue\) and of 10"
    ):
        mixed.to_dataframe()
    with pytest.raises(UsageError, match="there is no prediction"):
        Predictions().to_dataframe()
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(UsageError, match=r"needs pandas, .* pip install pandas"):
        found.to_dataframe()


# --- loading


def test_a_run_directory_means_its_best_model(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    with pytest.raises(UsageError, match=r"a folder without best\.onnx or best\.pth"):
        distcls.load(run)
    model_file(run)
    for path in (run, str(run), run / "best.onnx"):
        with distcls.load(path) as predictor:
            assert predictor.path == run / "best.onnx"
            assert predictor.card.preprocess.size == (32, 32)
            assert repr(predictor) == (
                f"Predictor({str(run / 'best.onnx')!r}, 3 classes, CPUExecutionProvider)"
            )
    shutil.copy(EXPORTED / "whole" / "best.pth", run)
    later = (run / "best.onnx").stat().st_mtime + 9
    os.utime(run / "best.pth", (later, later))
    with distcls.load(run) as predictor:
        assert predictor.path == run / "best.pth"
        assert len(predictor.classes) == 10


def test_models_that_cannot_be_loaded(tmp_path: Path) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"no model")
    (tmp_path / "model.h5").write_bytes(b"of another framework")
    wrong: list[tuple[Any, dict[str, Any], str]] = [
        (tmp_path / "none.onnx", {}, r"none\.onnx does not exist"),
        (tmp_path / "broken.onnx", {}, r"broken\.onnx"),
        (tmp_path / "model.h5", {}, r"expected \.onnx or \.pth"),
        (None, {}, "model: None is not a path"),
        (EXPORTED / "whole" / "best.onnx", {"provider": "cpus"}, "did you mean 'cpu'"),
        (EXPORTED / "whole" / "best.pth", {"provider": "cpu"}, "cpu runs exported models"),
        (EXPORTED / "whole" / "best.pth", {"device": "gpu"}, "device: 'gpu' cannot be used: Expec"),
        (EXPORTED / "whole" / "best.onnx", {"device": "cuda"}, "device: 'cuda' is for a .pth"),
        (EXPORTED / "whole" / "best.onnx", {"batch_size": 0}, "batch_size: 0 is not valid"),
        (EXPORTED / "whole" / "best.onnx", {"workers": 0}, "workers: 0 is not valid"),
        (EXPORTED / "whole" / "best.onnx", {"workers": "2"}, "workers: '2' is not valid"),
        (EXPORTED / "whole" / "best.onnx", {"batch_size": 1.5}, "batch_size: 1.5 is not valid"),
        (EXPORTED / "whole" / "best.onnx", {"provider": 3}, "provider: 3 is not valid"),
        (EXPORTED / "whole" / "best.pth", {"device": None}, "device: None is not valid"),
        (["a.onnx", 3], {}, "model: 3 is not a path"),
        ([], {}, r"model: \[\] is empty, expected at least one model"),
    ]
    for path, options, told in wrong:
        with pytest.raises(UsageError, match=told):
            distcls.load(path, **options)


def test_an_ensemble_is_that_of_predict(tmp_path: Path, pictures: Path) -> None:
    paths = [model_file(tmp_path / name, seed=seed) for seed, name in enumerate("ab")]
    named = ",".join(map(str, paths))
    rows = rows_of(pictures, Path(named), tmp_path / "pre.jsonl")
    alone = rows_of(pictures, paths[0], tmp_path / "alone.jsonl")
    assert [row["probability"] for row in rows] != [row["probability"] for row in alone]
    for models in (paths, tuple(map(str, paths)), [path.parent for path in paths], named):
        with distcls.load(models) as predictor:
            found = predictor([pictures / row["image_id"] for row in rows])
            assert (predictor.path, predictor.paths) == (None, tuple(paths))
            assert repr(predictor).startswith(f"Predictor({str(paths[0])!r}, {str(paths[1])!r}, ")
            with pytest.raises(UsageError, match="an ensemble of 2 models has none"):
                predictor.features(FILES["rgb.png"])
        assert [(p.label, p.probability) for p in found] == [
            (row["label"], row["probability"]) for row in rows
        ]
    with pytest.raises(UsageError, match="the models of an ensemble have the same classes"):
        distcls.load([*paths, EXPORTED / "whole" / "best.onnx"])


def test_a_predictor_is_made_by_load(tmp_path: Path) -> None:
    for path in ("best.onnx", tmp_path):
        with pytest.raises(UsageError, match=r"is a path; distcls\.load opens it"):
            Predictor(path)  # type: ignore[arg-type]


def test_what_predict_has_measured_is_taken(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("distcls.runtime.autotune.measure")
    path = model_file(tmp_path)
    request = ExecutionRequest(images=1)
    with distcls.load(path) as predictor:
        assert predictor.batch_size == 64  # nothing is measured for it
    cores = request.cores
    execution = ExecutionConfig(layout="workers", threads=1, streams=cores, batch_size=4)
    assert write_cache(cache_key(OnnxFile(path).sha256, request), execution, "made up")
    with distcls.load(path) as predictor:
        assert predictor.model.execution == execution
        assert predictor.batch_size == 4
    with distcls.load(path, batch_size=5, provider="cpu") as predictor:
        assert predictor.batch_size == 5
    assert capfd.readouterr() == ("", "")


def test_loading_prints_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with distcls.load(model_file(tmp_path)) as predictor:
        predictor(FILES["rgb.png"])
    assert capfd.readouterr() == ("", "")


# --- the page


BLOCK = re.compile(r"```python\n(.*?)```", re.S)
PAGE = BLOCK.findall((ROOT / "docs" / "python.md").read_text(encoding="utf-8"))
README = BLOCK.findall((ROOT / "README.md").read_text(encoding="utf-8"))


def test_the_examples_of_the_page(
    tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    (tmp_path / "runs" / "photos").mkdir(parents=True)
    with_features(tmp_path / "runs" / "photos" / "best.onnx")
    (tmp_path / "photos").mkdir()
    for name in ("photo.jpg", "photos/1.jpg", "photos/2.jpg"):
        (tmp_path / name).write_bytes(FILES["photograph.jpg"])
    (tmp_path / "notes.txt").write_text("no image")
    monkeypatch.chdir(tmp_path)
    variables: dict[str, Any] = {}
    of_readme = [example for example in README if "distcls.load" in example]
    predicting = PAGE[: next(place for place, text in enumerate(PAGE) if "fit(" in text)]
    for example in [*of_readme, *predicting]:
        exec(example.replace("https://example.org/photo.jpg", f"{server}/small.jpg"), variables)
    said = capsys.readouterr().out
    assert "Prediction('photo.jpg', label='" in said
    assert "notes.txt: not an image of a known format (JPEG, PNG, " in said
    assert "image: an array of float32 [3, 224, 224], values 0 to 0: expected uint8" in said
    assert variables["frame"].columns.tolist() == ["image_id", "label", "probability", "error"]
    assert "similarity 1.0" in said
    variables["predictor"].close()
    assert (len(of_readme), len(predicting)) == (1, 7)

"""Files that were seen in the wild or made by other programs, and answered wrongly once."""

from __future__ import annotations

import io
import json
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin

from distcls.batch.parts import open_parts, parts_folder
from distcls.commands.predict import main as predict
from distcls.config.load import read_yaml
from distcls.data.prepare import PrepareOptions, prepare
from distcls.errors import BadImage, DistclsError, UsageError
from distcls.imaging.decode import decode
from tests import tiny_dataset, tiny_onnx


def run_length_bmp(indices: NDArray[np.uint8], palette: NDArray[np.uint8]) -> bytes:
    """RLE8 as ImageMagick writes it: rows padded to four bytes, so that runs pass the width."""
    height, width = indices.shape
    padded = np.pad(indices, ((0, 0), (0, -width % 4)))
    body = b"".join(
        b"".join(bytes((1, int(value))) for value in row) + b"\0\0" for row in padded[::-1]
    )
    colours = b"".join(bytes((*colour[::-1].tolist(), 0)) for colour in palette)
    body += b"\0\1"
    start = 14 + 40 + len(colours)
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(body), 0, 0, len(palette), 0)
    return b"BM" + struct.pack("<IHHI", start + len(body), 0, 0, start) + info + colours + body


def test_a_bmp_of_runs_that_pass_the_width() -> None:
    rng = np.random.default_rng(0)
    palette = rng.integers(0, 256, (16, 3), dtype=np.uint8)
    indices = rng.integers(0, 16, (9, 13), dtype=np.uint8)
    found = decode(run_length_bmp(indices, palette))
    np.testing.assert_array_equal(found, palette[indices])


def test_what_follows_a_progressive_jpeg_are_no_scans() -> None:
    image = np.random.default_rng(0).integers(0, 256, (3000, 4000, 3), dtype=np.uint8)
    _, data = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_PROGRESSIVE, 1])
    film = os.urandom(8) + b"\xff\xda\0\2" * 500
    assert decode(data.tobytes() + film).shape == (3000, 4000, 3)


def test_scans_behind_an_end_in_a_comment_count() -> None:
    image = np.zeros((3000, 4000, 3), np.uint8)
    _, encoded = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_PROGRESSIVE, 1])
    data = encoded.tobytes()
    last = data.rindex(b"\xff\xda")
    hidden = b"\xff\xfe\0\6\xff\xd9\0\0" + data[last:-2] * 150
    with pytest.raises(BadImage, match="more JPEG scans than the 100"):
        decode(data[:last] + hidden + b"\xff\xd9")


def test_a_png_with_much_metadata() -> None:
    image, file = Image.new("RGB", (8, 6), (200, 30, 40)), io.BytesIO()
    texts = PngImagePlugin.PngInfo()
    texts.add_itxt("XML:com.adobe.xmp", "x" * 3_000_000, zip=True)
    image.save(file, "PNG", icc_profile=os.urandom(2_000_000), pnginfo=texts)
    assert decode(file.getvalue()).shape == (6, 8, 3)


def test_a_png_whose_metadata_is_damaged_is_said_to_be() -> None:
    file = io.BytesIO()
    Image.new("RGB", (8, 6)).save(file, "PNG")
    bad = struct.pack(">I", 4) + b"tEXta\0bc" + struct.pack(">I", zlib.crc32(b"other"))
    data = file.getvalue()
    with pytest.raises(BadImage, match="corrupt: its chunk at byte 33 has another checksum"):
        decode(data[:33] + bad + data[33:])


@pytest.mark.parametrize("compression", ["zstd", "lzma"])
def test_a_tiff_whose_compression_opencv_lacks(compression: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    file = io.BytesIO()
    try:
        Image.fromarray(pixels).save(file, "TIFF", compression=compression)
    except (OSError, KeyError, ValueError) as error:
        pytest.skip(f"this Pillow does not write it: {error}")
    np.testing.assert_array_equal(decode(file.getvalue()), pixels)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_onnx.write(tmp_path / "m.onnx")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    return tiny_dataset.write_images(tmp_path / "in", tiny_dataset.coloured(4)[0])


def test_an_output_is_none_of_the_images(
    model: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = sorted(pictures.iterdir())[0]
    before = first.read_bytes()
    out = first.with_suffix(".csv")
    for more in (["--show", "1"], ["--profile", str(first)]):
        with pytest.raises(UsageError, match="is one of the images; choose another name"):
            predict([str(pictures), "--model", str(model), "--out", str(out), "--overwrite", *more])
    assert first.read_bytes() == before
    data = tiny_dataset.write(tmp_path / "d", *tiny_dataset.coloured(6), ("a", "b", "c"))
    call = [str(data), "--model", str(model), "--overwrite", "--split", "test"]
    with pytest.raises(UsageError, match=r"pack\.bin is a file of the dataset directory"):
        predict([*call, "--out", str(tmp_path / "o.csv"), "--profile", str(data / "pack.bin")])


def test_a_pipe_and_a_link_that_leads_nowhere_among_several_inputs(
    model: Path, pictures: Path, tmp_path: Path
) -> None:
    os.mkfifo(pictures / "pipe.png")
    (pictures / "link.png").symlink_to("nowhere.png")
    good = sorted(pictures.iterdir())[0]
    files = [str(good), str(pictures / "pipe.png"), str(pictures / "link.png")]
    predict([*files, "--model", str(model), "--out", str(tmp_path / "o.csv")])
    rows = (tmp_path / "o.csv").read_text().splitlines()
    assert "not a regular file but a pipe" in rows[2]
    assert "No such file or directory" in rows[3]


@pytest.mark.parametrize("change", [{"rows": 2**40}, {"errors": 60}, {"files": {}}])
def test_a_changed_record_is_predicted_again(tmp_path: Path, change: dict[str, Any]) -> None:
    from distcls.batch.parts import Fingerprint, PartRecord

    out = tmp_path / "pre.csv"
    with open_parts(out, resume=False, overwrite=False) as parts:
        parts.begin(Fingerprint({"inputs": "x"}))
        parts.path(0, ".csv").write_text("a,b\n")
        empty: dict[str, Any] = {"errors": 0, "abstained": 0, "first_error": "", "picked": []}
        parts.finish(PartRecord(rows=1, files={}, **empty))
    record = parts_folder(out) / "00000000.json"
    values = json.loads(record.read_text())
    with open_parts(out, resume=True, overwrite=False) as parts:
        assert parts.rows == 1
    record.write_text(json.dumps({**values, **change, "abstained": 1}))
    with open_parts(out, resume=True, overwrite=False) as parts:
        assert parts.rows == 0


@pytest.mark.parametrize("column", ["path", "label"])
def test_a_parquet_manifest_whose_text_is_no_utf8(
    column: str, model: Path, pictures: Path, tmp_path: Path
) -> None:
    good = pa.array([str(path) for path in sorted(pictures.iterdir())[:3]])
    plain = pa.array([b"a", b"\xff", b"a"], pa.binary())
    bad = pa.Array.from_buffers(pa.string(), 3, plain.buffers())
    table = pa.table({"path": good, "label": pa.array(["a", "b", "a"])})
    table = table.set_column(table.column_names.index(column), column, bad)
    pq.write_table(table, tmp_path / "m.parquet")
    with pytest.raises(UsageError, match="cannot be read as Parquet: Invalid UTF8"):
        prepare(PrepareOptions(source=str(tmp_path / "m.parquet"), out=tmp_path / "d"))


def test_a_key_nested_and_dotted_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("optimizer:\n  weight_decay: 0.1\noptimizer.weight_decay: 0.2\n")
    with pytest.raises(UsageError, match=r"'optimizer\.weight_decay' is there twice"):
        read_yaml(path)


def test_a_pack_that_is_gone_is_named(tmp_path: Path) -> None:
    from distcls.data.dataset import Dataset

    data = tiny_dataset.write(tmp_path / "d", *tiny_dataset.coloured(6), ("a", "b", "c"))
    split = Dataset.open(data).split("test")
    (data / "pack.bin").unlink()
    with pytest.raises(DistclsError, match=r"pack\.bin: .*No such file or directory"):
        split.image(0)

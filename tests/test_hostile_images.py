"""Pictures that are made, or happen, to take all memory, all time or a place in the data.

Each test is a kind of picture that once did; none may cost more than its size deserves.
"""

from __future__ import annotations

import functools
import io
import os
import random
import resource
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from distcls.errors import BadImage, UsageError
from distcls.imaging import decode, decode_file
from distcls.imaging.reading import MemoryBudget, read_file
from distcls.imaging.structure import MOST_SCANS, deflate_damage
from tests.pictures import encode, smooth

PICTURE = smooth(120, 160)
NOISE = np.random.default_rng(0).integers(-12, 13, PICTURE.shape)
PHOTO = np.clip(PICTURE.astype(int) + NOISE, 0, 255).astype(np.uint8)
GLIBC = pytest.mark.skipif(sys.platform != "linux", reason="glibc's stderr")


def refused(data: bytes, limit: float = 0.5) -> str:
    """The reason, which has to come at once and without memory."""
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(BadImage) as caught:
        decode(data)
    assert time.process_time() - began < limit
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(autouse=True, scope="module")
def warm() -> None:
    for kind in ("PNG", "JPEG", "TIFF"):
        decode(encode(PICTURE, kind))


# lengths, counts and markers


@pytest.mark.row(36)
@pytest.mark.parametrize("length", [0xFFFFFFFF, 0xFFFFFF00, 0x80000000 + 9])
def test_a_png_chunk_longer_than_the_file(length: int) -> None:
    data = bytearray(encode(PICTURE, "PNG"))
    place = data.index(b"IDAT") - 4
    data[place : place + 4] = struct.pack(">I", length)
    assert "chunk" in refused(bytes(data))


@pytest.mark.row(36)
def test_a_flipped_bit_in_any_length_of_a_png() -> None:
    whole = encode(PICTURE, "PNG")
    place = whole.index(b"IDAT") - 4
    for bit in range(32):
        data = bytearray(whole)
        data[place + bit // 8] ^= 128 >> bit % 8
        refused(bytes(data))


@pytest.mark.row(36)
def test_a_png_of_millions_of_chunks() -> None:
    whole = encode(PICTURE, "PNG")
    chunk = struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", 0x35AF061E)
    assert "chunks" in refused(whole[:33] + chunk * 200_000 + whole[33:])


@pytest.mark.row(36)
def test_a_png_in_chunks_of_one_byte_is_whole() -> None:
    whole = encode(smooth(), "PNG")
    place = whole.index(b"IDAT")
    size = struct.unpack(">I", whole[place - 4 : place])[0]
    body = whole[place + 4 : place + 4 + size]
    pieces = (b"IDAT" + body[at : at + 1] for at in range(size))
    chunks = b"".join(struct.pack(">I", 1) + c + struct.pack(">I", zlib.crc32(c)) for c in pieces)
    assert np.array_equal(decode(whole[:33] + chunks + whole[-12:]), smooth())


@pytest.mark.row(36)
def test_fill_bytes_and_junk_before_the_first_marker_of_a_jpeg() -> None:
    data = encode(PICTURE, "JPEG")
    for junk in (b"\xff" * 20_000_000, b"\xff\0" * 10_000_000, b"\xff\xd8" + b"\1" * 20_000_000):
        assert "between its JPEG segments" in refused(data[:2] + junk + data[2:])
    assert decode(data[:2] + b"\xff" * 100 + data[2:]).shape == PICTURE.shape


@pytest.mark.row(36)
def test_millions_of_comments_before_the_first_scan_of_a_jpeg() -> None:
    data = encode(PICTURE, "JPEG")
    assert "segments" in refused(data[:2] + b"\xff\xfe\0\2" * 1_000_000 + data[2:])
    assert decode(data[:2] + b"\xff\xfe\0\2" * 1000 + data[2:]).shape == PICTURE.shape


def scans(number: int, side: int) -> bytes:
    """A progressive JPEG of that size which repeats its last scan so often."""
    picture = Image.new("L", (side, side), 90)
    data = encode(picture, "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * number + data[-2:]


@pytest.mark.row(36)
def test_a_jpeg_of_a_thousand_scans() -> None:
    assert "scans" in refused(scans(1000, 4000))
    assert f"more JPEG scans than the {MOST_SCANS}" in refused(scans(MOST_SCANS, 4000))
    assert decode(scans(1, 4000)).shape == (4000, 4000, 3)


@pytest.mark.row(36)
def test_a_sequential_jpeg_of_a_thousand_scans() -> None:
    picture = Image.new("RGB", (4000, 4000), (1, 2, 3))
    data = bytearray(encode(picture, "JPEG", quality=50))
    start = data.index(b"\xff\xda")
    body = data[start + 14 : -2]
    one = b"\xff\xda\0\x08\1\1\0\0\x3f\0" + body
    assert "scans" in refused(bytes(data[:start] + one[:30] * 1000 + body + data[-2:]))


@pytest.mark.row(36)
def test_a_tiny_jpeg_that_says_that_it_is_large() -> None:
    data = bytearray(encode(smooth(64, 64), "JPEG"))
    place = data.index(b"\xff\xc0") + 5
    data[place : place + 4] = struct.pack(">HH", 3000, 3000)
    with pytest.raises(BadImage, match="damaged: Corrupt JPEG data: premature end"):
        decode(bytes(data))


def chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Of a PNG: the name of each chunk, and where its content begins and ends."""
    at = 8
    while at < len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        yield data[at + 4 : at + 8], at + 8, at + 8 + length
        at += 12 + length


@pytest.mark.row(39)
@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
@pytest.mark.parametrize("separate", [False, True])
def test_of_an_animated_png_the_default_image_is_taken(mode: str, separate: bool) -> None:
    first, *frames = (Image.new(mode, (32, 24), color) for color in ("red", "lime", "blue"))
    animated = {"save_all": True, "append_images": frames, "default_image": separate}
    data = encode(first, "PNG", **animated)
    names = [name for name, _, _ in chunks(data)]
    assert names.count(b"fdAT") == 2
    for background in (None, (255, 255, 255)):
        assert decode(data, background=background)[0, 0].tolist() == [255, 0, 0]
    for _, start, end in chunks(data):  # whatever it is for
        for place in {start, max(start, end - 1), end} & set(range(len(data))):
            spoilt = bytearray(data)
            spoilt[place] ^= 16
            with pytest.raises(BadImage, match="checksum"):
                decode(bytes(spoilt))


@pytest.mark.row(39)
def test_every_checksum_of_a_png_is_compared() -> None:
    text = b"tEXtComment\0words"
    chunk = struct.pack(">I", len(text) - 4) + text + struct.pack(">I", zlib.crc32(text))
    data = encode(PICTURE, "PNG")
    data = data[:-12] + chunk + data[-12:]
    assert np.array_equal(decode(data), PICTURE)
    with pytest.raises(BadImage, match=r"its chunk at byte [\d,]+ has another checksum"):
        decode(data.replace(b"words", b"wordt"))


# memory, whatever the number of threads


@pytest.mark.row(36)
def test_the_budget_lets_one_image_begin_and_the_others_wait() -> None:
    budget, inside, most = MemoryBudget(100), 0, 0
    lock = threading.Lock()

    def take(size: int) -> None:
        nonlocal inside, most
        with budget.reserve(size):
            with lock:
                inside += size
                most = max(most, inside)
            time.sleep(0.005)
            with lock:
                inside -= size

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(take, [30, 60, 90, 10] * 10))
        assert 60 <= most <= 100
        list(pool.map(take, [500] * 4))  # larger than all of it: one at a time
    assert most == 500
    assert budget.used == 0


@pytest.mark.row(36)
def test_a_large_array_counts_until_it_is_freed_and_blocks_nobody() -> None:
    budget = MemoryBudget(100 << 20)
    kept = []
    for _ in range(4):  # more than fits: a caller may keep them all
        with budget.reserve(40 << 20) as keep:
            image = np.empty((40 << 20,), np.uint8)
            keep(image)
            kept.append(image)
    del image
    assert budget.used == 160 << 20
    kept.clear()
    assert budget.used == 0


def peak(call: Callable[[], object]) -> int:
    """Bytes by which the process grows at most meanwhile."""

    def status(field: str) -> int:
        text = Path("/proc/self/status").read_text()
        return 1024 * int(text.partition(f"{field}:")[2].split()[0])

    Path("/proc/self/clear_refs").write_text("5")  # sets the peak to what is used now
    before = status("VmRSS")
    call()
    return status("VmHWM") - before


@pytest.mark.row(36)
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux")
def test_decoding_takes_no_more_memory_than_is_reserved() -> None:
    from distcls.imaging.decode import _bytes_per_pixel, _read_header

    clear = Image.new("RGBA", (2500, 2500), (5, 6, 7, 8))
    full = clear.convert("RGB")
    files = {
        "PNG": encode(clear, "PNG", compress_level=1),
        "JPEG": encode(full, "JPEG", progressive=True, subsampling=0),
        "WebP": encode(clear, "WEBP", lossless=True, method=0, quality=0),
        "TIFF": encode(full, "TIFF", compression="tiff_adobe_deflate"),
        "GIF": encode(full.quantize(16), "GIF"),
        "PNM": encode(full, "PPM"),
    }
    for kind, data in files.items():
        for background in (None, (255, 255, 255)):
            header = _read_header(data, 10**8)
            reserved = _bytes_per_pixel(header, background) * header.height * header.width
            read = functools.partial(decode, data, background=background)
            assert peak(read) < reserved + (8 << 20), (kind, background)


MANY = """
import os, resource, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from distcls.errors import BadImage, MachineError
from distcls.imaging import decode_file, reading
reading.WAITS = (0.05, 0.1)

def load(path):
    try:
        return decode_file(path).nbytes
    except (BadImage, MachineError) as error:
        return f"{type(error).__name__}: {error}"

def load_many(path, spare):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: sum(range(1000)), range(100)))  # the threads' stacks
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + (spare << 20)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        print(*set(pool.map(load, [path] * 2)), sep="; ", flush=True)

for case in sys.argv[1:]:
    if os.fork() == 0:
        path, spare = case.split(":")
        load_many(Path(path), int(spare))
        os._exit(0)
    os.wait()
"""


@pytest.mark.row(37)
@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS")
def test_a_shortage_of_memory_is_not_the_images_fault(tmp_path: Path) -> None:
    """With room for a few at a time all are decoded; with room for none no image is blamed."""
    picture = Image.new("RGB", (3500, 3500), (9, 9, 9))
    for kind in ("PNG", "WEBP"):
        picture.save(tmp_path / kind, kind)
    cases = [f"{tmp_path / 'PNG'}:250", f"{tmp_path / 'PNG'}:20", f"{tmp_path / 'WEBP'}:20"]
    command = [sys.executable, "-c", MANY, *cases]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    enough, *short = done.stdout.splitlines()
    assert enough == "36750000", done.stderr
    assert len(short) == 2
    for line in short:
        reasons = line.split("; ")[::2]
        assert all(text.startswith("MachineError: not enough memory") for text in reasons), line


# pictures with a hole


def is_taken(data: bytes) -> bool:
    try:
        decode(data)
    except BadImage:
        return False
    return True


def holes(data: bytes, start: int) -> Iterator[tuple[str, bytes]]:
    size = len(data) - start
    first, last = start + size // 3, start + 2 * size // 3
    noise = random.Random(0).randbytes(size)
    yield "cut out", data[:first] + data[last:]
    yield "random", data[:first] + noise[: last - first].replace(b"\xff", b"\0") + data[last:]
    yield "zeros", data[:first] + bytes(last - first) + data[last:]
    yield "FF", data[:first] + b"\xff" * (last - first) + data[last:]
    yield "half and an end", data[: start + size // 2] + b"\xff\xd9"


@pytest.mark.row(39)
@GLIBC
@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"restart_marker_rows": 1}], ids=str
)
def test_jpegs_with_a_hole_are_refused(
    options: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = encode(PHOTO, "JPEG", quality=90, **options)
    for name, damaged in holes(data, data.index(b"\xff\xda") + 14):
        assert not is_taken(damaged), name
    half = data[: len(data) // 2] + b"\xff\xd9"
    monkeypatch.setenv("DISTCLS_ACCEPT_DAMAGED", "1")
    assert decode(half).shape == PHOTO.shape


@pytest.mark.row(39)
@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate", "packbits"])
def test_compressed_tiffs_with_a_hole_are_refused(compression: str) -> None:
    data = encode(PHOTO, "TIFF", compression=compression)
    decode(data)
    assert not is_taken(dict(holes(data, 200))["zeros"])


@pytest.mark.row(39)
def test_any_flipped_bit_in_the_strips_of_a_deflated_tiff(monkeypatch: pytest.MonkeyPatch) -> None:
    """libtiff decodes most of them into other pixels, and looks at no checksum."""
    small = PHOTO[:40, :50]
    data = encode(small, "TIFF", compression="tiff_adobe_deflate", tiffinfo={278: 16})
    assert np.array_equal(decode(data), small)
    with Image.open(io.BytesIO(data)) as image:
        places, sizes = image.tag_v2[273], image.tag_v2[279]
    assert len(places) == 3
    for place, size in zip(places, sizes, strict=True):
        for at in range(place, place + size, 41):
            spoilt = bytearray(data)
            spoilt[at] ^= 1 << at % 8
            assert not is_taken(bytes(spoilt)), at
        zeros = data[:place] + bytes(size) + data[place + size :]
        assert not is_taken(zeros)
    with pytest.raises(BadImage, match="damaged: its Deflate data: Error -3"):
        decode(data[: places[1] + 90] + b"\0\0" + data[places[1] + 92 :])
    monkeypatch.setenv("DISTCLS_ACCEPT_DAMAGED", "1")
    assert decode(data[: places[2] + sizes[2] - 1] + b"!" + data[places[2] + sizes[2] :]).any()


@pytest.mark.row(36)
def test_a_deflated_tiff_is_inflated_no_further_than_its_pixels() -> None:
    bomb = zlib.compress(bytes(500_000_000))
    began = time.process_time()
    assert deflate_damage(bomb, {273: (0,), 279: (len(bomb),)}, 1_000_000) == ""
    assert deflate_damage(bomb, {273: (0,) * 10_000, 279: (99,) * 10_000}, 1000) == ""
    assert time.process_time() - began < 0.1
    assert deflate_damage(bomb[:99], {273: (0,), 279: (len(bomb),)}, 1_000_000_000)
    assert deflate_damage(bomb, {273: (10**12,), 279: (10**12,)}, 1_000_000_000)


@pytest.mark.row(39)
@GLIBC
def test_a_damaged_jpeg_does_not_spoil_those_decoded_beside_it() -> None:
    """The warning of libjpeg names no file: each verdict is its own whatever the threads."""
    good = encode(PHOTO, "JPEG", quality=90)
    noisy = good[:-2] + b"\1\2\3" + good[-2:]  # a few bytes too many are harmless
    bad = good[: len(good) // 2] + b"\xff\xd9"
    rng = random.Random(0)
    images = rng.choices([good, noisy, bad], [8, 2, 2], k=600)

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(is_taken, images)) == [data is not bad for data in images]


@pytest.mark.row(36)
def test_the_size_and_the_transparency_of_a_webp_are_pillows() -> None:
    """They are read without Pillow, which takes the memory of the whole picture to open it."""
    from distcls.imaging.decode import _read_header

    opaque, clear = Image.new("RGB", (31, 17)), Image.new("RGBA", (31, 17), (1, 2, 3, 4))
    for picture in (opaque, clear):
        animated = {"save_all": True, "append_images": [picture.rotate(180), opaque]}
        for options in ({}, {"lossless": True}, {"exif": Image.Exif()}, animated):
            data = encode(picture, "WEBP", **options)
            header = _read_header(data, 1000)
            with Image.open(io.BytesIO(data)) as image:
                assert (header.width, header.height) == image.size == (31, 17)
                assert header.transparent == (image.mode == "RGBA"), options


# files that are none


@pytest.mark.row(40)
def test_what_is_not_a_regular_file_is_refused_at_once(tmp_path: Path) -> None:
    fifo, link = tmp_path / "x.jpg", tmp_path / "zero.jpg"
    os.mkfifo(fifo)
    link.symlink_to("/dev/zero")
    (tmp_path / "loop.png").symlink_to("loop.png")
    expected = {"x.jpg": "a pipe", "zero.jpg": "a device", ".": "Is a directory"}
    expected |= {"loop.png": "Too many levels", "none.png": "No such file", "\0": "null byte"}
    for name, reason in expected.items():
        with pytest.raises(BadImage, match=reason):
            decode_file(tmp_path / name)


@pytest.mark.row(40)
@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_what_the_kernel_makes_up_is_no_image(tmp_path: Path) -> None:
    """Its files are regular ones: some fail when they are read (EIO), some wait, some never end."""
    link = tmp_path / "x.png"
    for place in ("/proc/self/mem", "/proc/self/status", "/sys/kernel/mm/lru_gen/enabled"):
        link.unlink(missing_ok=True)
        link.symlink_to(place)
        began = time.monotonic()
        if link.exists():
            with pytest.raises(BadImage, match=r"one of the kernel \((proc|sysfs)\)"):
                decode_file(link)
        assert time.monotonic() - began < 1
    assert read_file("/proc/self/exe").startswith(b"\x7fELF")  # that is stored
    (tmp_path / "empty.png").touch()  # has no blocks, either
    with pytest.raises(BadImage, match="empty file"):
        decode_file(tmp_path / "empty.png")


@pytest.mark.row(36)
def test_a_file_of_more_bytes_than_an_image_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sparse = tmp_path / "sparse.png"
    sparse.write_bytes(encode(PICTURE, "PNG"))
    os.truncate(sparse, 40 << 30)
    with pytest.raises(BadImage, match=r"too large: 42,949,672,960 bytes.*DISTCLS_MAX_BYTES"):
        read_file(sparse)
    small = tmp_path / "small.png"
    small.write_bytes(encode(PICTURE, "PNG"))
    assert read_file(small) == small.read_bytes()
    assert read_file(small, 1, 3) == b"PNG"
    monkeypatch.setenv("DISTCLS_MAX_BYTES", "100")
    with pytest.raises(BadImage, match="at most 100 are read"):
        read_file(small)
    monkeypatch.setenv("DISTCLS_MAX_BYTES", "many")
    with pytest.raises(UsageError, match="DISTCLS_MAX_BYTES: 'many', expected a whole number"):
        read_file(small)


@pytest.mark.row(37)
@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_the_user_may_not_read_is_a_bad_image(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(b"x")
    path.chmod(0)
    with pytest.raises(BadImage, match="Permission denied"):
        read_file(path)


@pytest.mark.row(37)
def test_pillow_without_memory_blames_no_image() -> None:
    """Pillow's errors are caught by their dozen; that of memory is none of them."""

    class Starved(io.BytesIO):
        def read(self, *_: object) -> bytes:
            raise MemoryError

    from distcls.imaging.decode import _upright

    picture = Image.open(io.BytesIO(encode(PICTURE, "PNG")))
    picture.fp = Starved()
    with pytest.raises(MemoryError):
        _upright(picture)

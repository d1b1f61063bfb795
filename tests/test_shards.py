"""Tar shards are read in their places, in order, and cut ones are refused."""

from __future__ import annotations

import gzip
import io
import os
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from distcls.data.formats.detect import open_source
from distcls.data.formats.tar import expand_braces, members_of
from distcls.errors import BadImage, UsageError
from tests.pictures import encode

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def picture(value: int) -> bytes:
    return encode(np.full((4, 4, 3), value, np.uint8), "PNG")


def shard(
    path: Path,
    members: Sequence[tuple[str, bytes]],
    kind: int = tarfile.PAX_FORMAT,
    mtime: float = 0,
) -> Path:
    with tarfile.open(path, "w", format=kind) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), mtime
            tar.addfile(info, io.BytesIO(data))
    return path


def web_dataset(path: Path, start: int, count: int) -> Path:
    members: list[tuple[str, bytes]] = []
    for index in range(start, start + count):
        members.append((f"{index:04d}.png", picture(index)))
        members.append((f"{index:04d}.cls", str(index % 3).encode()))
        members.append((f"{index:04d}.json", b"{}"))
    return shard(path, members)


def test_shards_in_the_order_of_the_braces(tmp_path: Path) -> None:
    for number in range(4):
        web_dataset(tmp_path / f"shard-{number:03d}.tar", 10 * number, 10)
    source = open_source(f"{tmp_path}/shard-{{003..001}}.tar")
    assert len(source) == 30
    assert source.image_ids[:2] == ["shard-003/0030", "shard-003/0031"]
    assert source.image_ids[-1] == "shard-001/0019"
    assert [int(source.image(index)[0, 0, 0]) for index in (0, 9, 10, 29)] == [30, 39, 20, 19]
    assert source.true_labels is not None
    assert [source.true_labels[index] for index in (0, 1, 2)] == ["0", "1", "2"]


def test_a_glob_and_a_single_shard(tmp_path: Path) -> None:
    for number in range(3):
        web_dataset(tmp_path / f"{number}.tar", 10 * number, 2)
    assert open_source(f"{tmp_path}/*.tar").image_ids == [
        "0/0000",
        "0/0001",
        "1/0010",
        "1/0011",
        "2/0020",
        "2/0021",
    ]
    assert len(open_source(str(tmp_path / "1.tar"))) == 2


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("name", ["a.png", "ü, b\n.PNG", "x" * 90 + "/" + "y" * 90 + ".png"])
def test_names_of_all_formats(tmp_path: Path, kind: str, name: str) -> None:
    members = [("./first.jpg", picture(1)), (name, picture(2)), ("last.webp", picture(3))]
    path = shard(tmp_path / "s.tar", members, FORMATS[kind], mtime=1.5 if kind == "pax" else 0)
    source = open_source(str(path))
    assert source.image_ids == ["s/first", f"s/{name[:-4]}", "s/last"]
    assert [int(source.image(index)[0, 0, 0]) for index in range(3)] == [1, 2, 3]


def test_very_long_names(tmp_path: Path) -> None:
    name = "folder/" * 40 + "z" * 60
    for kind in ("gnu", "pax"):
        path = shard(tmp_path / f"{kind}.tar", [(f"{name}.png", picture(5))], FORMATS[kind])
        source = open_source(str(path))
        assert source.image_ids == [f"{kind}/{name}"]
        assert source.image(0)[0, 0, 0] == 5


def test_what_is_no_file_or_no_image_is_passed_over(tmp_path: Path) -> None:
    folder = tmp_path / "tree"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "a.png").write_bytes(picture(7))
    (folder / "link.png").symlink_to("sub/a.png")
    os.mkfifo(folder / "pipe.png")
    (folder / "notes.txt").write_text("none")
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        tar.add(folder, "tree")
    assert open_source(str(tmp_path / "t.tar")).image_ids == ["t/tree/sub/a"]


def test_two_images_of_one_key_keep_their_endings(tmp_path: Path) -> None:
    members = [("k.jpg", picture(1)), ("k.png", picture(2)), ("k.seg.png", picture(3))]
    source = open_source(str(shard(tmp_path / "s.tar", members)))
    assert source.image_ids == ["s/k", "s/k.png", "s/k.seg"]


def test_shards_of_the_same_name_are_told_apart(tmp_path: Path) -> None:
    for part in ("a", "b"):
        (tmp_path / part).mkdir()
        web_dataset(tmp_path / part / "0.tar", 0, 1)
    assert len(set(open_source(f"{tmp_path}/*/0.tar").image_ids)) == 2


def test_members_lie_where_they_are_said_to_lie(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    members = [(f"{i}.png", rng.bytes(int(rng.integers(0, 3000)))) for i in range(200)]
    data = shard(tmp_path / "s.tar", members).read_bytes()
    found = [
        (member.name, data[member.offset : member.offset + member.size])
        for member in members_of(tmp_path / "s.tar")
    ]
    assert found == members


@pytest.mark.parametrize(
    "size", [b"0777777777777", *((n).to_bytes(12, "big", signed=True) for n in (-1, -16, -2048))]
)
def test_a_header_of_a_size_that_cannot_be(tmp_path: Path, size: bytes) -> None:
    path = web_dataset(tmp_path / "s.tar", 0, 3)
    data = bytearray(path.read_bytes())
    data[1024 + 124 : 1024 + 136] = size[:12]
    data[1024 + 148 : 1024 + 156] = b" " * 8
    data[1024 + 148 : 1024 + 156] = b"%06o\0 " % sum(data[1024 : 1024 + 512])
    path.write_bytes(data)
    with pytest.raises(UsageError, match=r"damaged at byte|truncated at"):
        open_source(str(path))


def test_a_cut_extended_header_is_no_other_format(tmp_path: Path) -> None:
    path = shard(tmp_path / "s.tar", [("a.png", picture(1)), ("z" * 200 + ".png", picture(1))])
    data = path.read_bytes()
    for start in (0, 1024):  # as the first member, and as the second
        path.write_bytes(data[1024 - start : 1024 + 1024])
        with pytest.raises(UsageError, match="truncated at"):
            open_source(str(path))


def test_a_bad_image_is_its_own_error(tmp_path: Path) -> None:
    source = open_source(
        str(shard(tmp_path / "s.tar", [("a.png", b"text"), ("b.png", picture(3))]))
    )
    with pytest.raises(BadImage, match="not an image"):
        source.image(0)
    assert source.image(1)[0, 0, 0] == 3


def test_cut_and_damaged_shards_are_refused(tmp_path: Path) -> None:
    path = web_dataset(tmp_path / "s.tar", 0, 20)
    data = path.read_bytes()
    for cut in (700, 1024, 9000, 512 * 7):
        path.write_bytes(data[:cut])
        with pytest.raises(UsageError, match="truncated at"):
            open_source(str(path))
    path.write_bytes(data[: 512 * 6 + 10] + b"\xff" + data[512 * 6 + 11 :])
    with pytest.raises(UsageError, match=r"damaged at byte 3,072"):
        open_source(str(path))
    path.write_bytes(gzip.compress(data))
    with pytest.raises(UsageError, match="not a tar file; it is compressed"):
        open_source(str(path))
    path.write_bytes(b"")
    with pytest.raises(UsageError, match="not a tar file"):
        open_source(str(path))


def test_a_shard_that_shrinks_later(tmp_path: Path) -> None:
    path = web_dataset(tmp_path / "s.tar", 0, 20)
    source = open_source(str(path))
    path.write_bytes(path.read_bytes()[:2000])
    assert source.image(0)[0, 0, 0] == 0
    with pytest.raises(BadImage, match="was truncated"):
        source.image(19)


def test_nothing_there(tmp_path: Path) -> None:
    web_dataset(tmp_path / "s-000.tar", 0, 1)
    with pytest.raises(UsageError, match=r"s-001\.tar: no such file"):
        open_source(f"{tmp_path}/s-{{000..001}}.tar")
    with pytest.raises(UsageError, match="no images in 1 shard"):
        open_source(str(shard(tmp_path / "e.tar", [("a.txt", b"")])))
    with pytest.raises(UsageError, match=r"tar shards are named as .*/\*\.tar"):
        open_source(str(tmp_path))


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("a.tar", ["a.tar"]),
        ("s-{08..11}.tar", ["s-08.tar", "s-09.tar", "s-10.tar", "s-11.tar"]),
        ("s-{8..10}.tar", ["s-8.tar", "s-9.tar", "s-10.tar"]),
        ("{a,b}{1..2}", ["a1", "a2", "b1", "b2"]),
        ("{2..0}", ["2", "1", "0"]),
    ],
)
def test_braces(text: str, names: list[str]) -> None:
    assert expand_braces(text) == names


def test_the_digest_follows_the_shards(tmp_path: Path) -> None:
    path = web_dataset(tmp_path / "s.tar", 0, 3)
    first = open_source(str(path)).fingerprint()
    assert open_source(str(path)).fingerprint() == first
    os.utime(path, ns=(5, 5))
    assert open_source(str(path)).fingerprint() != first

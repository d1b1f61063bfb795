"""Inputs in a bucket, from a stand-in for S3 on this machine (moto)."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distcls.commands.predict import main
from distcls.data.formats import remote
from distcls.data.formats.detect import open_source
from distcls.errors import BadImage, UsageError
from tests import tiny_onnx
from tests.pictures import encode
from tests.test_writers import read

pytest.importorskip("s3fs", reason="distcls[remote] is not installed")
pytest.importorskip("moto", reason="moto[server] is not installed")

NAMES = ["a/1.png", "a/2.png", "b/10.PNG", "b/ü, x [1].png", "z.png"]


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(url, timeout=1).close()
                break
            except OSError:
                time.sleep(0.1)
        yield url
    finally:
        server.kill()
        server.wait(30)


@pytest.fixture(scope="module")
def bucket(endpoint: str) -> Iterator[Any]:
    """The file system, with the pictures in s3://photos/set."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            patch.setenv(name, value)
        remote.filesystem.cache_clear()
        system = remote.filesystem("s3")
        system.mkdir("photos")
        for value, name in enumerate(NAMES):
            picture = encode(np.full((4, 4, 3), 10 * value, np.uint8), "PNG")
            system.pipe(f"photos/set/{name}", picture)
        system.pipe("photos/set/notes.txt", b"no image")
        yield system
        remote.filesystem.cache_clear()


def values(source: Any) -> list[int]:
    return [int(source.image(index)[0, 0, 0]) for index in range(len(source))]


def test_a_prefix_a_glob_and_one_image(bucket: Any) -> None:
    source = open_source("s3://photos/set/")
    assert source.image_ids == NAMES
    assert values(source) == [0, 10, 20, 30, 40]
    assert open_source("s3://photos/set/*/1*").image_ids == ["a/1.png", "b/10.PNG"]
    assert open_source("s3://photos/**/2.png").image_ids == ["set/a/2.png"]
    assert values(open_source("s3://photos/set/a/2.png")) == [10]


def test_a_manifest_and_what_is_missing(bucket: Any) -> None:
    bucket.pipe("photos/set/list.csv", b"path,label\na/2.png,x\nmissing.png,y\n")
    source = open_source("s3://photos/set/list.csv")
    assert source.image_ids == ["a/2.png", "missing.png"]
    assert source.image(0)[0, 0, 0] == 10
    with pytest.raises(BadImage, match="not found"):
        source.image(1)
    with pytest.raises(UsageError, match="nothing found"):
        open_source("s3://photos/nowhere/")


def test_the_digest_follows_the_objects(bucket: Any) -> None:
    first = open_source("s3://photos/set/a/").fingerprint()
    assert open_source("s3://photos/set/a/").fingerprint() == first
    bucket.pipe("photos/set/a/2.png", encode(np.full((4, 4, 3), 11, np.uint8), "PNG"))
    assert open_source("s3://photos/set/a/").fingerprint() != first
    bucket.pipe("photos/set/a/2.png", encode(np.full((4, 4, 3), 10, np.uint8), "PNG"))


def test_predictions_of_a_bucket(bucket: Any, tmp_path: Path) -> None:
    model = tiny_onnx.write(tmp_path / "m.onnx")
    out = tmp_path / "pre.csv"
    flags = ["--model", str(model), "--out", str(out), "--provider", "cpu", "--quiet"]
    main(["s3://photos/set", *flags])
    rows = read(out)
    assert [row["image_id"] for row in rows] == NAMES
    assert all(row["error"] is None for row in rows)

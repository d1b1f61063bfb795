"""Inputs behind URLs, from a web server on this machine that can misbehave."""

from __future__ import annotations

import functools
import http.server
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from distcls.commands.predict import main
from distcls.data.formats import remote
from distcls.data.formats.detect import open_source
from distcls.errors import BadImage, DistclsError, UsageError
from tests import tiny_onnx
from tests.pictures import encode
from tests.test_writers import read

pytest.importorskip("aiohttp", reason="distcls[remote] is not installed")

NAMES = ["a/1.png", "a/2.png", "b/10.PNG", "b/ü, x.png", "z.png"]


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder; some names misbehave."""

    asked: ClassVar[Counter[str]] = Counter()
    refusals: ClassVar[dict[str, int]] = {}
    """How many more times a name is answered with 503."""

    def do_GET(self) -> None:
        """What the name says."""
        name = self.path.partition("?")[0].rpartition("/")[2]
        Handler.asked[name] += 1
        if Handler.refusals.get(name, 0) > 0:
            Handler.refusals[name] -= 1
            self.send_error(503)
        elif name == "forbidden.png":
            self.send_error(403)
        elif name == "slow.png":
            time.sleep(1.5)
            self.send_error(500)
        elif name == "cut.png":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b"\x89PNG")
        else:
            super().do_GET()

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for value, name in enumerate(NAMES):
        path = tmp_path / "www" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(np.full((4, 4, 3), 10 * value, np.uint8), "PNG"))
    (tmp_path / "www" / "notes.txt").write_text("no image")
    return tmp_path / "www"


@pytest.fixture
def url(tree: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(remote, "BACKOFF", (0.01, 0.02, 0.03))
    Handler.asked.clear()
    Handler.refusals.clear()
    handler = functools.partial(Handler, directory=str(tree))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


def values(source: Any) -> list[int]:
    return [int(source.image(index)[0, 0, 0]) for index in range(len(source))]


@pytest.mark.parametrize("ending", ["", "/"])
def test_a_folder_with_all_below_it(url: str, ending: str) -> None:
    source = open_source(url + ending)
    assert source.image_ids == NAMES
    assert values(source) == [0, 10, 20, 30, 40]


def test_hidden_images_are_left_out_and_counted(
    url: str, tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a/._1.png", ".trash/1.png", "__MACOSX/1.png"):
        (tree / name).parent.mkdir(exist_ok=True)
        (tree / name).write_bytes((tree / "z.png").read_bytes())
    assert open_source(url).image_ids == NAMES
    assert f"{url}: left out 3 hidden images" in capsys.readouterr().err
    assert open_source(f"{url}/**/*.png").image_ids == [n for n in NAMES if n != "b/10.PNG"]
    assert open_source(f"{url}/.trash/*.png").image_ids == ["1.png"]


def test_one_image_a_glob_and_a_query(url: str) -> None:
    source = open_source(f"{url}/a/2.png?token=secret/x")
    assert source.image_ids == ["2.png"]
    assert values(source) == [10]
    assert open_source(f"{url}/*/1*").image_ids == ["a/1.png", "b/10.PNG"]
    assert open_source(f"{url}/*.png").image_ids == ["z.png"]
    assert open_source(f"{url}/**/*.png").image_ids == ["a/1.png", "a/2.png", "b/ü, x.png", "z.png"]
    with pytest.raises(UsageError, match="no images there"):
        open_source(f"{url}/*.jpg")


def test_manifests_there_and_here(url: str, tree: Path, tmp_path: Path) -> None:
    (tree / "list.csv").write_text('path,label\na/1.png,x\n"b/ü, x.png",y\nmissing.png,z\n')
    source = open_source(f"{url}/list.csv")
    assert source.image_ids == ["a/1.png", "b/ü, x.png", "missing.png"]
    assert list(source.true_labels or []) == ["x", "y", "z"]
    assert [int(source.image(index)[0, 0, 0]) for index in (0, 1)] == [0, 30]
    with pytest.raises(BadImage, match="cannot be fetched: not found"):
        source.image(2)
    here = tmp_path / "here.csv"
    here.write_text(f"path\n{url}/z.png\nwww/a/2.png\nftp://nowhere/a.png\n")
    mixed = open_source(str(here))
    assert [int(mixed.image(index)[0, 0, 0]) for index in (0, 1)] == [40, 10]
    with pytest.raises(BadImage, match="expected a path, or http"):
        mixed.image(2)


def test_a_failing_server_is_asked_again(url: str) -> None:
    Handler.refusals["z.png"] = 3
    assert values(open_source(f"{url}/z.png")) == [40]
    assert Handler.asked["z.png"] == 4
    Handler.refusals["1.png"] = 9
    with pytest.raises(BadImage, match="cannot be fetched: 503"):
        open_source(f"{url}/a/1.png").image(0)
    assert Handler.asked["1.png"] == 4


@pytest.mark.parametrize(
    ("name", "told", "times"),
    [("none.png", "not found", 1), ("forbidden.png", "403", 1), ("cut.png", "", 4)],
)
def test_errors_that_stay(url: str, name: str, told: str, times: int) -> None:
    with pytest.raises(BadImage, match=f"cannot be fetched: {told}"):
        open_source(f"{url}/{name}").image(0)
    assert Handler.asked[name] == times


def test_a_slow_server_has_a_time_limit(url: str) -> None:
    source = open_source(f"{url}/slow.png", timeout=0.1)
    began = time.monotonic()
    with pytest.raises(BadImage, match=r"no whole answer within 0\.1 s"):
        source.image(0)
    assert time.monotonic() - began < 1.4


def test_every_object_is_fetched_once_and_not_far_ahead(url: str, tree: Path) -> None:
    data = (tree / "z.png").read_bytes()
    for index in range(300):
        (tree / "a" / f"m{index:03d}.png").write_bytes(data)
    source = open_source(f"{url}/a/m*.png")
    assert len(source) == 300
    for index in range(100):
        source.image(index)
    time.sleep(0.3)
    fetched = [name for name in Handler.asked if name.startswith("m")]
    assert 100 <= len(fetched) <= 100 + remote.PREFETCH
    assert {Handler.asked[name] for name in fetched} == {1}
    source.image(5)  # once more, as for a picture
    assert Handler.asked["m005.png"] == 2


def test_a_failed_download_is_a_row(url: str, tmp_path: Path) -> None:
    model = tiny_onnx.write(tmp_path / "m.onnx")
    out = tmp_path / "pre.csv"
    listed = tmp_path / "list.csv"
    listed.write_text(f"path\n{url}/a/1.png\n{url}/none.png\n{url}/z.png\n")
    main([str(listed), "--model", str(model), "--out", str(out), "--provider", "cpu", "--quiet"])
    rows = read(out)
    assert [row["error"] for row in rows] == [None, "cannot be fetched: not found", None]
    assert [row["image_id"] for row in rows] == [
        f"{url}/{n}" for n in ("a/1.png", "none.png", "z.png")
    ]


def test_nobody_there() -> None:
    with pytest.raises(DistclsError, match="cannot be listed"):
        open_source("http://127.0.0.1:9/")


def test_what_is_not_read_from_afar(url: str) -> None:
    with pytest.raises(UsageError, match="read from disks"):
        open_source(f"{url}/shard-000.tar")
    with pytest.raises(UsageError, match=r"unknown scheme 'htp://'; did you mean 'http'"):
        open_source("htp://example.org/a.png")

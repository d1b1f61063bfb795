"""Folders, lists, servers and machines that hang, lie or fail: one line, and bounds.

The machine's faults are caused by strace, which lets chosen system calls fail or wait.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import gzip
import http.server
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from distcls import log
from distcls.data.dataset import Dataset
from distcls.data.formats import remote
from distcls.data.formats.detect import open_labelled, open_source
from distcls.data.formats.tar import expand_braces
from distcls.data.source import OpenOptions, most_bad
from distcls.errors import BadImage, DistclsError, UsageError
from tests import tiny_onnx
from tests.faults.preparing import call, command, refused
from tests.pictures import encode, smooth

STRACE = shutil.which("strace")


def traced(*options: str) -> list[str]:
    return [STRACE or "", "-f", "-qq", "-o", "/dev/null", *options]


def _can_trace() -> bool:
    if STRACE is None:
        return False
    return subprocess.run([*traced(), "true"], capture_output=True, check=False).returncode == 0


needs_strace = pytest.mark.skipif(not _can_trace(), reason="strace cannot trace here")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two classes of ten pictures."""
    for label in ("a", "b"):
        for number in range(10):
            path = tmp_path / "photos" / label / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encode(smooth(seed=100 * ord(label) + number), "JPEG"))
    return tmp_path / "photos"


# the machine's faults


@pytest.mark.row(37)
@needs_strace
@pytest.mark.parametrize(("fault", "text"), [("EIO", "Input/output error"), ("EMFILE", "Too many")])
def test_a_fault_of_the_machine_ends_the_run_and_names_the_file(
    fault: str, text: str, photos: Path, tmp_path: Path
) -> None:
    options = ["-P", str(photos / "a" / "3.jpg"), "-e", f"inject=openat:error={fault}"]
    arguments = command(photos, "--out", tmp_path / "out", "--quiet")
    done = subprocess.run(
        [*traced(*options), *arguments], capture_output=True, text=True, check=False, timeout=100
    )
    assert done.returncode == 1, done.stderr
    [line] = done.stderr.splitlines()
    assert line.startswith(f"error: a/3.jpg: cannot be read: {text}")
    assert not (tmp_path / "out").exists()


@pytest.mark.row(37)
@needs_strace
def test_a_fault_that_passes_leaves_no_image_out(photos: Path, tmp_path: Path) -> None:
    options = ["-P", str(photos / "a" / "3.jpg"), "-P", str(photos / "b" / "5.jpg")]
    options += ["-e", "inject=openat:error=ESTALE:when=1"]
    arguments = command(photos, "--out", tmp_path / "out", "--quiet")
    done = subprocess.run(
        [*traced(*options), *arguments], capture_output=True, text=True, check=False, timeout=100
    )
    assert (done.returncode, done.stderr) == (0, "")
    with (tmp_path / "out" / "rejected.csv").open() as rows:
        assert len(list(csv.reader(rows))) == 1


@contextlib.contextmanager
def hanging(
    photos: Path, *arguments: object, limit: int = 2
) -> Iterator[tuple[Callable[[], int], Callable[[], str]]]:
    """A command in which reading one file hangs: its process's id, and its next line of error.

    strace would wait for the system call to return, so it is killed at the end.
    """
    options = ["-P", str(photos / "a" / "3.jpg"), "-e", "inject=read:delay_enter=60000000"]
    environment = {**os.environ, "DISTCLS_READ_TIMEOUT": str(limit)}
    with subprocess.Popen(
        [*traced(*options), *command(*arguments)],
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    ) as process:
        assert process.stderr is not None
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")

        def child() -> int:
            return int(children.read_text().split()[0])

        try:
            yield child, process.stderr.readline
        finally:
            pids = [*map(int, children.read_text().split()), process.pid]
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


@pytest.mark.row(40)
@needs_strace
def test_a_read_that_hangs_ends_the_run_and_names_the_file(photos: Path, tmp_path: Path) -> None:
    began = time.monotonic()
    with hanging(photos, photos, "--out", tmp_path / "out", "--quiet") as (_, line):
        said = line()
        assert time.monotonic() - began < 30
    assert said.startswith(f"error: {photos}/a/3.jpg: not read within 2 s, the storage hangs")
    assert not (tmp_path / "out").exists()


@pytest.mark.row(40)
@needs_strace
def test_one_ctrl_c_ends_a_command_whose_read_hangs(photos: Path, tmp_path: Path) -> None:
    with hanging(photos, photos, "--out", tmp_path / "out", "--quiet", limit=99) as (child, line):
        deadline = time.monotonic() + 60
        while not any(tmp_path.glob(".out*")) and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.3)
        began = time.monotonic()
        os.kill(child(), signal.SIGINT)
        assert line() == "error: interrupted\n"
        assert time.monotonic() - began < 1.5


# folders


@pytest.mark.row(40)
def test_pipes_and_devices_in_a_folder_are_bad_images(photos: Path, tmp_path: Path) -> None:
    os.mkfifo(photos / "a" / "pipe.png")
    os.mkfifo(photos / "a" / "pipe")
    (photos / "b" / "zero.jpg").symlink_to("/dev/zero")
    done = call(photos, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    with (tmp_path / "out" / "rejected.csv").open() as rows:
        reasons = {row[0]: row[2] for row in csv.reader(rows)}
    assert reasons["a/pipe.png"] == "cannot be read: not a regular file but a pipe"
    assert reasons["b/zero.jpg"] == "cannot be read: not a regular file but a device"


# a share of bad images


def spoil(photos: Path, number: int) -> None:
    """All but the first two."""
    for path in sorted(photos.glob("*/*.jpg"))[2 : 2 + number]:
        path.write_bytes(b"no picture" if path.name < "5" else b"")


@pytest.mark.row(38)
def test_prepare_stops_above_a_share_of_bad_images(photos: Path, tmp_path: Path) -> None:
    spoil(photos, 10)  # a few, whatever their share
    assert call(photos, "--out", tmp_path / "ten").returncode == 0
    spoil(photos, 12)
    line = refused(call(photos, "--out", tmp_path / "out"))
    assert "of 20 images cannot be read (" in line
    assert " not an image of a known format" in line
    assert " empty file, first '" in line
    assert "--max-bad 1 leaves out any number of them" in line
    assert not (tmp_path / "out").exists()
    done = call(photos, "--out", tmp_path / "out", "--max-bad", "0.6")
    assert done.returncode == 0
    assert "12 of 20 images cannot be read" in done.stderr


@pytest.mark.row(38)
def test_train_stops_likewise(photos: Path, tmp_path: Path) -> None:
    from distcls.training.config import TrainConfig
    from distcls.training.inputs import prepared

    spoil(photos, 12)
    config = TrainConfig(data=photos, out=tmp_path / "run")
    with pytest.raises(UsageError, match=r"data: .* 11 of the first .*--max-bad 1 leaves .* them$"):
        prepared(config, tmp_path / "run" / "dataset")
    with pytest.raises(UsageError, match=r"max_bad: 2.0 is not valid"):
        TrainConfig(data=photos, max_bad=2)
    config = TrainConfig(data=photos, out=tmp_path / "run", max_bad=0.6)
    folder = prepared(config, tmp_path / "run" / "dataset").data
    assert Dataset.open(folder).info["rejected"] == 12


@pytest.mark.row(38)
def test_a_fraction_that_is_given_allows_no_more(photos: Path, tmp_path: Path) -> None:
    spoil(photos, 1)
    for fraction in ("0", "0.04"):
        line = refused(call(photos, "--out", tmp_path / "out", "--max-bad", fraction))
        assert "of 20 images cannot be read (1 " in line
    assert call(photos, "--out", tmp_path / "out", "--max-bad", "0.05").returncode == 0
    assert [most_bad(0.29, 1, 100), most_bad(None, 0.29, 100), most_bad(None, 0.5, 9)] == [
        *(29, 29, 10)
    ]


@pytest.mark.row(38)
def test_predict_tells_of_a_share_of_bad_images(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from distcls.commands.predict import main

    model = tiny_onnx.write(tmp_path / "best.onnx")
    spoil(photos, 12)
    arguments = [str(photos), "--model", str(model), "--out", str(tmp_path / "pre.csv")]
    with pytest.raises(DistclsError) as caught:
        main([*arguments, "--provider", "cpu"])
    assert caught.value.exit_code == 1
    assert "12 of 20 images have an error in place of a prediction, first a/2.jpg: " in str(
        caught.value
    )
    assert len((tmp_path / "pre.csv").read_text().splitlines()) == 21
    more = ["--provider", "cpu", "--overwrite"]
    main([*arguments, *more, "--max-bad", "0.6"])
    spoil(photos, 1)
    for path in sorted(photos.glob("*/*.jpg"))[3:]:
        path.unlink()
    main([*arguments, *more])
    with pytest.raises(DistclsError, match="1 of 3 images have an error"):
        main([*arguments, *more, "--max-bad", "0"])
    assert "12 errors" in capsys.readouterr().err


# lists and tables


@pytest.mark.row(41)
def test_a_line_that_can_be_no_image_is_a_row_with_its_error(tmp_path: Path) -> None:
    (tmp_path / "good.png").write_bytes(encode(smooth(), "PNG"))
    names = ["good.png", "b\0.jpg", "http://[::1/x.jpg", "x" * 5000 + ".jpg", "y" * 5000]
    (tmp_path / "list.csv").write_text("path\n" + "\n".join(names) + "\n")
    source = open_source(str(tmp_path / "list.csv"))
    assert source.fingerprint()
    assert source.image(0).shape == (24, 36, 3)
    for index, reason in enumerate(("null byte", "expected a path", "too long", "too long")):
        with pytest.raises(BadImage, match=reason):
            source.image(index + 1)


@pytest.mark.row(41)
def test_tables_of_many_columns_and_labels_of_many_digits(tmp_path: Path) -> None:
    many = ",".join(f"column{number}" for number in range(100_000))
    (tmp_path / "many.csv").write_text(f"path,label,{many}\na.png,1{',' * 100_000}\n")
    began = time.monotonic()
    assert len(open_source(str(tmp_path / "many.csv"))) == 1
    with pytest.raises(UsageError) as caught:
        open_source(str(tmp_path / "many.csv"), options=OpenOptions(path_column="columm99999"))
    assert len(str(caught.value)) < 1000
    (tmp_path / "none.csv").write_text(f"{many}\n{',' * 99_999}\n")
    with pytest.raises(UsageError, match=r"column29, \.\.\.; choose one") as caught:
        open_source(str(tmp_path / "none.csv"))
    assert time.monotonic() - began < 5
    (tmp_path / "digits.csv").write_text(f"path,label\na.png,{'1' * 5000}\nb.png,2\n")
    assert len(open_labelled(str(tmp_path / "digits.csv")).classes) == 2


def pax(record: bytes, kind: bytes) -> bytes:
    """A tar of one image behind an extended header."""

    def member(name: str, content: bytes, kind: bytes = tarfile.REGTYPE) -> bytes:
        header = tarfile.TarInfo(name)
        header.size, header.type = len(content), kind
        return header.tobuf(tarfile.USTAR_FORMAT) + content + bytes(-len(content) % 512)

    return member("p", record, kind) + member("a.png", encode(smooth(), "PNG")) + bytes(1024)


@pytest.mark.row(41)
@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE])
@pytest.mark.parametrize(
    "record",
    [
        *(b"9" * 5000 + b" path=x\n", b"0 path=x\n", b"3 path=x\n", b"-5 path=x\n", b"9 path=ab"),
        *(b"10 size=x\n", b"11 size=-5\n", b"5011 size=" + b"9" * 5001 + b"\n", b" " * 600),
        *(b"26 size=999999999999999999\n", b"22 GNU.sparse.major=1\n", b"15 path=a\0.png\n"),
        *(b"13 path=\xff\xfe.\n", b"12 comment=\n" * 100_000, b"16 mtime=" + b"9" * 6 + b"\n"),
    ],
    ids=lambda record: repr(record[:20]),
)
def test_extended_headers_of_a_tar(tmp_path: Path, record: bytes, kind: bytes) -> None:
    """Its images are read as they are, or the file is refused in one line, or they are bad."""
    path = tmp_path / "s.tar"
    path.write_bytes(pax(record, kind))
    began = time.process_time()
    try:
        source = open_source(str(path))
        shape = source.image(0).shape
    except (UsageError, BadImage) as error:
        shape = None
        reason = str(error)
    assert time.process_time() - began < 2
    assert shape == (24, 36, 3) or (shape is None and "\n" not in reason)


@pytest.mark.row(37)
@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS")
@pytest.mark.parametrize("megabytes", [150, 350, pytest.param(500, marks=pytest.mark.slow)])
def test_libraries_that_find_no_memory_are_not_missing(tmp_path: Path, megabytes: int) -> None:
    """Importing them fails with an ImportError, as if they were not installed."""
    limit = megabytes << 20
    done = subprocess.run(
        command("digits", "--out", tmp_path / "out"),
        preexec_fn=functools.partial(resource.setrlimit, resource.RLIMIT_AS, (limit, limit)),
        env=os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: out of memory, or a limit of the system: ")
    assert done.stderr.count("\n") == 1
    assert "not installed" not in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.row(41)
def test_braces_that_make_too_many_names() -> None:
    for text in ("x-{0..99999999999}.tar", "x" + "{a,b}" * 40 + ".tar", "{a" * 200 + ".tar"):
        with pytest.raises(UsageError, match="more than 100,000 names"):
            expand_braces(text)
    assert expand_braces("x-{08..10}{a,b}") == [
        f"x-{n}{c}" for n in ("08", "09", "10") for c in "ab"
    ]


@pytest.mark.row(36)
def test_an_idx_file_that_unpacks_to_a_thousand_times_its_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISTCLS_MAX_BYTES", "1_000_000")
    number = 20_000
    for role, header, size in (
        ("images-idx3", struct.pack(">4B3I", 0, 0, 8, 3, number, 10, 10), 100),
        ("labels-idx1", struct.pack(">4BI", 0, 0, 8, 1, number), 1),
    ):
        with gzip.open(tmp_path / f"train-{role}-ubyte.gz", "wb") as handle:
            handle.write(header + bytes(size * number))
    with pytest.raises(UsageError, match="bytes that unpack to 2,000,000, more than images do"):
        open_source(str(tmp_path))


@pytest.mark.row(41)
def test_no_message_moves_the_cursor(capsys: pytest.CaptureFixture[str]) -> None:
    log.warn("photos/\x1b[2Jx\r\n\u202egnp.jpg cannot be read")
    line = "warning: photos/\\x1b[2Jx\\r\\n\\u202egnp.jpg cannot be read\n"
    assert capsys.readouterr().err == line


# servers


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers without end, packed a thousand times, or not at all."""

    def do_GET(self) -> None:
        """What the path says."""
        with contextlib.suppress(OSError):
            if "silent" in self.path:
                time.sleep(5)
                return
            self.send_response(200)
            if "packed" in self.path:
                self.send_header("Content-Encoding", "gzip")
            if self.path.endswith("/"):
                self.send_header("Content-Type", "text/html")
            self.end_headers()
            part = gzip.compress(bytes(50_000_000)) if "packed" in self.path else bytes(1 << 20)
            for _ in range(1 if "packed" in self.path else 1000):
                self.wfile.write(part)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


@pytest.fixture
def url(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    pytest.importorskip("aiohttp", reason="distcls[remote] is not installed")
    monkeypatch.setattr(remote, "BACKOFF", (0.01,))
    monkeypatch.setenv("DISTCLS_MAX_BYTES", "4_000_000")
    handler = functools.partial(Handler)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.02,)).start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()


@pytest.mark.row(42)
def test_answers_are_bounded_also_where_they_are_packed(url: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name in ("endless.jpg", "packed.jpg"):
        with pytest.raises(BadImage, match="at most 4,000,000 are read"):
            open_source(f"{url}/{name}").image(0)
    for name in ("endless.csv", "packed.csv", "endless/", "packed/"):
        with pytest.raises(DistclsError, match="at most 4,000,000 are read"):
            open_source(f"{url}/{name}")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 150_000


@pytest.mark.row(42)
def test_a_server_that_is_silent_when_a_folder_is_listed(url: str) -> None:
    began = time.monotonic()
    with pytest.raises(DistclsError, match=r"listed: no whole answer within 0\.5 s"):
        open_source(f"{url}/silent/", timeout=0.5)
    assert time.monotonic() - began < 3

"""Image libraries write nothing to standard error, and all else still gets there."""

from __future__ import annotations

import subprocess
import sys
import zlib
from pathlib import Path

import pytest

from tests.pictures import encode, smooth

JPEG = encode(smooth(), "JPEG", quality=90)
PNG = encode(smooth(), "PNG")


def with_chunk(name: bytes, body: bytes) -> bytes:
    """The PNG with one more chunk behind its header."""
    check = zlib.crc32(name + body).to_bytes(4, "big")
    return PNG[:33] + len(body).to_bytes(4, "big") + name + body + check + PNG[33:]


START = JPEG.index(b"\xff\xda")
TIFF = encode(smooth(), "TIFF", compression="tiff_lzw")
NOISY = {
    "profile.png": with_chunk(b"iCCP", b"x\0\0" + zlib.compress(b"junk" * 40)),
    "time.png": with_chunk(b"tIME", b"junkjun"),
    "exif.png": with_chunk(b"eXIf", b"junkjunk"),
    "extraneous.jpg": JPEG[:START] + b"\1\2\3" * 3 + JPEG[START:],
    "revision.jpg": JPEG.replace(b"JFIF\0\1\1", b"JFIF\0\7\7"),
}
"""Decodable files for which OpenCV's libraries print a warning each."""
DAMAGED = {
    "deflate.png": PNG[:60] + b"\0\1\2" + PNG[63:],
    "ends_early.jpg": JPEG[:-60] + bytes(40) + JPEG[-20:],
    "restart.jpg": JPEG[:-40] + b"\xff\xd3" + JPEG[-40:],
}
"""Files for which they print one, too, and which are refused."""

DECODE = """
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from distcls.errors import BadImage
from distcls.imaging import decode_file

def load(path):
    try:
        return decode_file(Path(path), background=(255, 255, 255)).shape
    except BadImage as error:
        return str(error).partition(";")[0]

with ThreadPoolExecutor(4) as pool:
    print(*sorted(map(str, set(pool.map(load, sys.argv[1:] * 50)))), sep="\\n")
"""

AROUND = """
import ctypes, os, sys
from pathlib import Path
from distcls.imaging.silence import silent_stderr

libc = ctypes.CDLL(None)
stream = ctypes.c_void_p.in_dll(libc, "stderr")
def write(text):
    libc.fputs(text, ctypes.c_void_p(stream.value))
before = stream.value
with silent_stderr():
    assert stream.value != before
    write(b"libpng warning: a profile\\n")
    write(b"another library: told\\n")
    print("of Python", file=sys.stderr, flush=True)
    os.write(2, b"to the descriptor\\n")
    with silent_stderr():
        write(b"Corrupt JPEG data: 3 extraneous bytes\\n")
    assert stream.value != before
assert stream.value == before
write(b"libpng warning: not while decoding\\n")
with silent_stderr():
    write(b"libpng warning: of the parent\\n")
    if os.fork() == 0:
        assert stream.value == before
        write(b"the child\\n")
        with silent_stderr():
            write(b"libpng warning: of the child\\n")
        os._exit(0)
    os.wait()
"""


HELD = """
import ctypes, threading
from distcls.imaging.silence import silent_stderr

libc = ctypes.CDLL(None)
stream = ctypes.c_void_p.in_dll(libc, "stderr")
held, leave = threading.Event(), threading.Event()

def hold(address):
    libc.flockfile(ctypes.c_void_p(address))
    held.set()
    leave.wait()
    libc.funlockfile(ctypes.c_void_p(address))

def write(text):
    libc.fputs(text, ctypes.c_void_p(stream.value))

with silent_stderr():
    write(b"libpng warning: of the middle")
    thread = threading.Thread(target=hold, args=(stream.value,))
    thread.start()
    held.wait()
    with silent_stderr():
        pass
    leave.set()
    thread.join()
    write(b"\\n")
"""

IN_TWO = """
from ctypes import CDLL, c_void_p
from distcls.imaging.silence import silent_stderr

libc = CDLL(None)
with silent_stderr():
    for text in (b"tempfile.tif: ", b"Warning, of two calls\\n"):
        libc.fputs(text, c_void_p.in_dll(libc, "stderr"))
        with silent_stderr():
            pass
"""


def run(program: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)


@pytest.fixture
def noisy(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / name for name in NOISY]
    for path in paths:
        path.write_bytes(NOISY[path.name])
    return paths


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's stderr")
@pytest.mark.parametrize("name", [*NOISY, *DAMAGED])
def test_nothing_is_written_by_the_libraries(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes((NOISY | DAMAGED)[name])
    result = run(DECODE, path)
    assert result.stderr == ""
    damaged = name in DAMAGED
    assert result.stdout.startswith(("corrupt", "damaged: ") if damaged else "(24, 36, 3)\n")
    assert len(result.stdout.splitlines()) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's stderr")
def test_what_others_write_goes_on() -> None:
    lines = run(AROUND).stderr.splitlines()
    expected = ["another library: told", "of Python", "to the descriptor"]
    assert sorted(lines[:3]) == expected
    assert lines[3:] == ["libpng warning: not while decoding", "the child"]


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's stderr")
@pytest.mark.parametrize("program", [HELD, IN_TWO])
def test_a_line_is_dropped_when_another_thread_ends_amid_it(program: str) -> None:
    assert run(program).stderr == ""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's stderr")
def test_a_closed_standard_error_is_no_matter(noisy: list[Path], tmp_path: Path) -> None:
    """A file that is opened then may get descriptor 2; the warnings must not land in it."""
    victim = tmp_path / "victim"
    program = f"import os\nos.close(2)\nheld = open({str(victim)!r}, 'w')\n" + DECODE
    assert run(program, *noisy).stdout == "(24, 36, 3)\n"
    assert victim.read_bytes() == b""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's stderr")
def test_prepare_of_noisy_files_says_nothing_when_quiet(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / "in" / name).mkdir(parents=True)
        for number in range(8):
            for file, data in NOISY.items():
                (tmp_path / "in" / name / f"{number}{file}").write_bytes(data)
    command = [sys.executable, "-m", "distcls.cli", "prepare", str(tmp_path / "in")]
    command += ["--out", str(tmp_path / "out"), "--quiet"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (result.returncode, result.stdout) == (0, "")
    lines = result.stderr.splitlines()
    known = ("are duplicates of training images", "with pixels of another and other labels")
    assert all(any(words in line for words in known) for line in lines), lines

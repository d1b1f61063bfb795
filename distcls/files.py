"""Atomic writes, locks on unfinished outputs, file names made from text, and the shipped files."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from distcls.errors import DistclsError, UsageError, did_you_mean, require
from distcls.stored import open_regular

HERE = Path(__file__).parent
ENDINGS = (".yaml", ".sh", ".py", ".conf")
"""Of the files that are shipped."""


@dataclasses.dataclass(frozen=True)
class Shipped:
    """The files of one folder that is installed with distcls; their names are without endings."""

    kind: str
    """What a file is, for error messages."""
    folder: Path

    def paths(self) -> dict[str, Path]:
        """The files by their names, sorted."""
        found = sorted(path for path in self.folder.iterdir() if path.suffix in ENDINGS)
        return {path.stem: path for path in found}

    def find(self, name: str) -> Path:
        """The file of that name, with or without its ending. Raises UsageError if there is none."""
        known = self.paths()
        for stem, path in known.items():
            if name in (stem, path.name):
                return path
        raise UsageError(f"no {self.kind} is called {name!r}{did_you_mean(name, known)}")


RECIPES = Shipped("recipe", HERE / "recipes")
"""Configs of training runs; `configs/` of a checkout is this folder."""
TEMPLATES = Shipped("template", HERE / "launch" / "templates")
"""For accelerate launch, sbatch, torchrun and Kubeflow; of `distcls serve` for Ray, Kubernetes,
KServe and nginx. `launch/` of a checkout links to them."""


def given_path(path: object, key: str) -> str:
    """A path as a program gives it, `~` expanded. Raises UsageError for what is none."""
    if not isinstance(path, str | os.PathLike) or not os.fspath(path):
        raise UsageError(f"{key}: {path!r} is not a path")
    return os.path.expanduser(os.fsdecode(path))  # noqa: PTH111 - Path's raises for unknown users


def read_bounded(path: Path, limit: int) -> bytes:
    """The bytes of a file of at most `limit` bytes; of a pipe, too, as the shell's `<(...)` gives.

    Raises OSError, EFBIG for what is larger.
    """
    with path.open("rb") as handle:
        content = handle.read(limit + 1)
    if len(content) > limit:
        raise OSError(errno.EFBIG, f"it is larger than {limit:,} bytes", str(path))
    return content


def require_outside(key: str, path: Path, folder: Path) -> None:
    """Raise BadValue if `path` is the folder itself or lies below it, under whatever name."""
    inside = os.path.realpath(path)
    top = os.path.realpath(folder)
    below = inside == top or inside.startswith(os.path.join(top, ""))  # noqa: PTH118 - text
    require(not below, key, str(path), f"a place outside of {folder}, which is read")


def require_distinct(
    writes: Mapping[str, Path | None], reads: Mapping[str, Iterable[Path]]
) -> None:
    """Raise BadValue if two of the files that are written are one, or one of them is read, under
    whatever name: a link, another spelling."""
    known: dict[object, str] = {}
    for key, paths in reads.items():
        known |= {name: key for path in paths for name in _identities(path)}
    for key, path in writes.items():
        names = [] if path is None else _identities(path)
        other = next((known[name] for name in names if name in known), None)
        require(other is None, key, str(path), f"a file other than {other}")
        known |= dict.fromkeys(names, key)


def _identities(path: Path) -> list[object]:
    """What two names of one file have in common: its place, and its inode if it exists."""
    names: list[object] = [os.path.realpath(path)]
    with contextlib.suppress(OSError, ValueError):
        found = path.stat()
        names.append((found.st_dev, found.st_ino))
    return names


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries (or a file's bytes), so that they outlive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` to write to; renamed to `path` if the block succeeds.

    What a killed process has left of the same file is removed. Raises DistclsError, naming the path
    and the free space, if the disk cannot take the file.
    """
    path = Path(path)
    with writable(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        with unfinished(path, folder=False) as temporary:
            yield temporary
            with temporary.open("rb") as handle:
                os.fsync(handle.fileno())
            temporary.chmod(
                0o666 & ~_umask()
            )  # mkstemp's 0600 would keep colleagues from reading it
            temporary.replace(path)
            sync_folder(path.parent)


def second_name(source: Path, path: Path) -> None:
    """Give the file `source` the name `path` too, atomically; a copy where a link cannot be made.

    A later `atomic_path` replaces one of the names and leaves the other as it is.
    """
    with atomic_path(path) as temporary:
        temporary.unlink()
        try:
            os.link(source, temporary)
        except OSError:  # a file system without hard links
            shutil.copyfile(source, temporary)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; renamed to `path` if the block succeeds.

    What a killed process has left of the same folder is removed. Raises UsageError if `path`
    exists: nothing is ever replaced silently.
    """
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UsageError(f"{path} exists already; choose another folder or remove it")
    with writable(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        with unfinished(path, folder=True) as temporary:
            yield temporary
            with ThreadPoolExecutor(16) as pool:  # 1,800 files: 6 s one by one, 0.2 s at once
                list(pool.map(sync_folder, [*temporary.rglob("*"), temporary]))
            temporary.chmod(0o777 & ~_umask())
            try:
                temporary.replace(path)  # rename(2) allows it for an empty folder at the path
            except OSError as error:
                if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                    raise UsageError(f"{path} exists by now: another run wrote it") from error
                raise
            sync_folder(path.parent)


@contextlib.contextmanager
def unfinished(path: Path, *, folder: bool) -> Iterator[Path]:
    """A new temporary file or folder beside `path`, locked for this process and removed at the end
    if it is still there; others of that name that no process holds are removed first."""
    remove_unfinished(path)
    prefix, suffix = f".{path.name}.", ".part"
    while True:
        if folder:
            name = tempfile.mkdtemp(suffix, prefix, path.parent)
            descriptor = os.open(name, os.O_RDONLY)
        else:
            descriptor, name = tempfile.mkstemp(suffix, prefix, path.parent)
        with contextlib.suppress(OSError):  # some network file systems have no locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.path.lexists(name):
            break
        os.close(descriptor)  # another process took it for a killed one's before it was locked
    temporary = Path(name)
    try:
        yield temporary
    finally:
        if folder:
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)
        os.close(descriptor)


def remove_unfinished(path: Path) -> None:
    """Remove the `.NAME.*.part` beside `path` that no process writes any more."""
    with contextlib.suppress(OSError):
        for each in os.scandir(path.parent):
            if each.name.startswith(f".{path.name}.") and each.name.endswith(".part"):
                _remove_unclaimed(Path(each.path))


def _remove_unclaimed(temporary: Path) -> None:
    try:
        descriptor = os.open(temporary, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)
    except OSError:
        pass  # claimed, or no way to know
    finally:
        os.close(descriptor)


_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def writable(folder: Path) -> Iterator[None]:
    """Turn the system's errors on writing below `folder` into ones that tell users what to do."""
    try:
        yield
    except PermissionError as error:
        raise UsageError(
            f"{error.filename or folder} cannot be written: permission denied"
        ) from error
    except (NotADirectoryError, FileExistsError) as error:  # mkdir's error for the same mistake
        place = Path(error.filename2 or error.filename or folder)
        file = next((each for each in (place, *place.parents) if each.is_file()), place)
        raise UsageError(f"{file} is a file, expected a folder") from error
    except IsADirectoryError as error:
        place = error.filename2 or error.filename or folder
        raise UsageError(f"{place} is a folder, expected the name of a file") from error
    except OSError as error:
        if error.errno is None:
            raise
        free = f" ({_free_space(folder)} free there)" if error.errno in _NO_SPACE else ""
        raise DistclsError(f"writing below {folder} failed: {error.strerror}{free}") from error


def require_writable(folder: Path) -> None:
    """Create `folder` and prove that a file can be written in it; UsageError if not."""
    with writable(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass


MOST_HELD = 1 << 26
"""Bytes of an array of one row an image that are held in memory; a larger one lies in a file."""


def zeros(shape: tuple[int, ...], dtype: Any) -> Any:
    """An array of zeros; a large one in a temporary file, which the system may write out when
    memory is short, and which goes with the array.

    Raises DistclsError where the temporary folder lacks the space. (It is reserved: in a sparse
    file a write to memory would end the process by a signal.)
    """
    import numpy as np

    size = math.prod(shape) * np.dtype(dtype).itemsize
    if size <= MOST_HELD:
        return np.zeros(shape, dtype)
    try:
        with tempfile.TemporaryFile(prefix="distcls-") as file:
            os.posix_fallocate(file.fileno(), 0, size)
            return np.memmap(file, dtype, "r+", shape=shape)
    except OSError as error:
        raise DistclsError(
            f"the temporary folder {tempfile.tempdir or '/tmp'} cannot take {size / 2**20:,.0f} "
            f"MiB: {error.strerror}; TMPDIR names another folder"
        ) from error


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def digest(path: Path, algorithm: str = "sha256") -> str:
    """Hexadecimal digest of a file's bytes. Raises OSError if it is no regular file."""
    with open_regular(path) as handle:
        return hashlib.file_digest(handle, algorithm).hexdigest()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _free_space(folder: Path) -> str:
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return f"{shutil.disk_usage(folder).free / 2**20:.0f} MiB"


@contextlib.contextmanager
def claimed(folder: Path, busy: str = "") -> Iterator[bool]:
    """Hold a lock on a folder; the system drops it when the process dies.

    Yields whether the folder is still the one at its path: its last holder may have removed it.
    Raises UsageError with the text `busy`, if there is one, where another process holds it.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if busy:
                raise UsageError(busy) from error
        except OSError:  # some network file systems have no locks
            pass
        yield folder.exists() and os.path.samestat(folder.stat(), os.fstat(descriptor))
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def claimed_output(folder: Path, busy: str) -> Iterator[None]:
    """Make `folder` where it is missing and hold a lock on it, as `claimed`.

    What was made is removed again, still under the lock, if it stays empty.
    """
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    with contextlib.ExitStack() as stack:
        while True:
            with writable(folder):
                folder.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):
                if stack.enter_context(claimed(folder, busy)):
                    break
            stack.close()  # the one that held it has just removed it: once more
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # no longer empty
                for each in missing:
                    each.rmdir()


_UNSAFE = re.compile(r'[\x00-\x1f\x7f<>:"/\\|?*\ud800-\udfff]')
_LONGEST = 150  # characters; file systems take 255 bytes


def safe_names(names: Iterable[str]) -> list[str]:
    """A file name for each name, in order, distinct also where upper and lower case are one.

    >>> safe_names(["T-shirt/top", "T-shirt_top", ".."])
    ['T-shirt_top', 'T-shirt_top~2', '_.']
    """
    used: dict[str, int] = {}
    safe = []
    for name in names:
        plain = _shorten(_UNSAFE.sub("_", name).rstrip(". "))
        plain = "_" + plain[1:] if plain[:1] in ("", ".") else plain
        candidate = plain
        while candidate.casefold() in used:
            used[plain.casefold()] += 1
            candidate = f"{plain}~{used[plain.casefold()]}"
        used[candidate.casefold()] = 1
        safe.append(candidate)
    return safe


def _shorten(name: str) -> str:
    """The end of a long name, the part that distinguishes files."""
    short = name[-_LONGEST:]
    while len(short.encode()) > 200:
        short = short[1:]
    return short


def csv_line(cells: Iterable[object]) -> str:
    """A line of CSV (RFC 4180, but ended by a line feed); None is an empty cell.

    Written out, because the csv module leaves a lone carriage return unquoted before Python 3.13.
    """
    return ",".join(_csv_cell(cell) for cell in cells) + "\n"


def _csv_cell(cell: object) -> str:
    if cell is None:
        return ""
    if isinstance(cell, bool):
        return str(cell).lower()
    text = str(cell)
    if any(mark in text for mark in ',"\r\n'):
        return '"' + text.replace('"', '""') + '"'
    return text

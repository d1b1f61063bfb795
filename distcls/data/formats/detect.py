"""Which format a location has, and opening it."""

from __future__ import annotations

import glob
import hashlib
import os
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args
from urllib.parse import unquote, urlsplit

from distcls.data.dataset import CLASSES, INFO, MANIFEST, PACK
from distcls.data.formats import manifest
from distcls.data.formats.folder import from_files, from_folder, matching, read_folder, state_of
from distcls.data.formats.idx import find_idx, read_digits, read_idx_folder
from distcls.data.formats.label_columns import AnswerColumns
from distcls.data.formats.manifest import ENDINGS, from_manifest
from distcls.data.formats.remote import Entries, Fetcher, filesystem_of, is_url, read
from distcls.data.formats.tar import expand_braces, from_shards
from distcls.data.source import (
    ImageSource,
    LabelledSource,
    Names,
    from_encoded,
    from_split,
    read_classes,
)
from distcls.errors import BadImage, DistclsError, UsageError
from distcls.imaging.decode import SUFFIXES

if TYPE_CHECKING:
    from distcls.data.dataset import Split

Format = Literal["auto", "digits", "idx", "fashion-mnist", "mnist", "folder", "manifest"]
FORMATS = get_args(Format)


def read_source(
    location: str,
    form: Format = "auto",
    classes: Path | None = None,
    weight_column: str | None = None,
    answers: AnswerColumns | None = None,
) -> LabelledSource:
    """Find the images of a source; none is decoded yet.

    `digits` is the bundled set, `./digits` a folder. `classes` is a file of class names in label
    order, which labels are then checked against; `weight_column` and `answers` belong to manifests.
    Raises UsageError for anything wrong.
    """
    source = _read(location, form, classes, weight_column, answers)
    named = {"weight_column": weight_column}
    if answers is not None:
        named[answers.options[0]] = answers.names[0]
    for option, column in named.items():
        if column is not None and source.kind != "manifest":
            raise UsageError(
                f"{option}: {column!r} is a column of a manifest, but {location} is none"
            )
    return source


def _read(
    location: str,
    form: Format,
    classes: Path | None,
    weight_column: str | None,
    answers: AnswerColumns | None,
) -> LabelledSource:
    if form == "digits" or (form == "auto" and location == "digits"):
        if location != "digits" or classes:
            raise UsageError("the bundled digits are `digits`, with their own classes")
        return read_digits()
    path = Path(location).expanduser()
    if not path.exists():
        raise UsageError(f"{location}: no such file or folder (digits is the bundled data set)")
    kind = form if form != "auto" else _detect(path)
    if path.is_dir() == (kind == "manifest"):
        needed = "a file" if kind == "manifest" else "a folder"
        raise UsageError(f"{location}: --format {kind} needs {needed}")
    names = read_classes(classes) if classes else None
    if kind == "manifest":
        return manifest.read_manifest(path, names, weight_column, answers)
    if kind == "folder":
        return read_folder(path, names)
    return read_idx_folder(path, "auto" if form == "auto" else kind, names)


def _detect(path: Path) -> Format:
    if path.is_file():
        if path.suffix.lower() in manifest.SUFFIXES:
            return "manifest"
        endings = " or ".join(manifest.SUFFIXES)
        raise UsageError(f"{path}: expected digits, a folder, or a manifest ending in {endings}")
    try:
        if (path / INFO).exists() and (path / MANIFEST).exists():
            raise UsageError(f"{path} is a dataset directory already; use it as --data")
        return "idx" if find_idx(path) else "folder"
    except OSError as error:
        raise UsageError(f"{path}: cannot be listed: {error.strerror}") from error


DEEPEST = 64
"""Folders below each other; a web server may make up any number of them."""

_TAGS = ("size", "ETag", "etag", "LastModified", "updated", "mtime")
"""What the stores call that which changes with an object."""

Listed = tuple[str, str]
"""URL of an object, and what the store says of its state."""


def from_url(url: str, timeout: float) -> ImageSource:
    """The images that a URL stands for.

    Raises UsageError if there is none or the kind is not read from afar, DistclsError if the store
    does not answer.
    """
    filesystem_of(url)
    web = url.startswith("http")
    plain = url.partition("?")[0] if web else url  # a query is no part of the name
    base, _, last = plain.rpartition("/")
    ending = last[last.rfind(".") :].lower() if "." in last else ""
    magic = _magic(url, web)
    if magic is not None:
        root = url[:magic].rpartition("/")[0]
        return _from_listing(url, root, _matching(url, root, web), timeout, web=web)
    if ending in SUFFIXES:
        return _from_listing(url, base, [(url, "")], timeout, web=web)
    if ending in ENDINGS:
        return from_manifest(plain, base, timeout, _manifest(url, timeout))
    if ending == ".tar":
        raise UsageError(f"{url}: tar shards are read from disks; copy them here first")
    root = url.rstrip("/")
    found = (item for item in _walk(root, web) if _is_image(item[0]))
    return _from_listing(url, root, found, timeout, web=web)


def _manifest(url: str, timeout: float) -> bytes:
    try:
        return read(url, timeout)
    except BadImage as error:  # what `read` says of any object
        raise DistclsError(f"{url}: {error}") from error


def _from_listing(
    url: str, root: str, listed: Iterable[Listed], timeout: float, *, web: bool
) -> ImageSource:
    try:
        objects = sorted(listed, key=lambda item: unquote(item[0]) if web else item[0])
    except FileNotFoundError as error:
        raise UsageError(f"{url}: there is nothing") from error
    except DistclsError:
        raise
    except Exception as error:  # each library has a tree of errors of its own
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise DistclsError(f"{url}: cannot be listed: {reason}") from error
    if not objects:
        endings = ", ".join(sorted(SUFFIXES))
        raise UsageError(f"{url}: no images there (searched for {endings})")
    urls = Names.of(name for name, _ in objects)
    below = (name[len(root) + 1 :].partition("?" if web else "\0")[0] for name, _ in objects)
    fetcher = Fetcher(lambda index: urls[index], len(urls), timeout)

    tags = hashlib.sha256("\n".join(tag for _, tag in objects).encode()).hexdigest()
    return from_encoded(
        Names.of(unquote(name) if web else name for name in below).printable(),
        fetcher.get,
        state=lambda: tags,
    )


def _matching(pattern: str, root: str, web: bool) -> Iterator[Listed]:
    """The objects that a glob means; as in a shell, * stays within a folder and ** does not."""
    from fsspec.utils import glob_translate

    matches = re.compile(glob_translate(pattern)).match
    depth = None if "**" in pattern else pattern[len(root) :].count("/")
    for url, tag in _walk(root, web, depth):
        if matches(unquote(url) if web else url):
            yield url, tag


def _walk(root: str, web: bool, depth: int | None = None) -> Iterator[Listed]:
    """All objects below a URL, at most `depth` folders deep.

    Not by fsspec's own `find`, which passes over folders that cannot be listed without a word.
    """
    system, scheme = filesystem_of(root), urlsplit(root).scheme
    folders, seen = [(root, 1)], {root}
    while folders:
        folder, level = folders.pop()
        for info in system.ls(folder, detail=True, refresh=True):
            name = str(info["name"]) if web else f"{scheme}://{info['name']}"
            if info["type"] != "directory":
                yield name, _tag(info)
            elif depth is None or level < depth:
                if level == DEEPEST:
                    raise DistclsError(f"{folder}: more than {DEEPEST} folders deep; a circle?")
                below = name.rstrip("/")
                if below.startswith(root + "/") and below not in seen:
                    seen.add(below)
                    folders.append((below, level + 1))


def _tag(info: dict[str, Any]) -> str:
    return " ".join(f"{info[key]}" for key in _TAGS if info.get(key) is not None)


def _is_image(url: str) -> bool:
    return url[url.rfind(".") :].lower() in SUFFIXES


def _magic(url: str, web: bool) -> int | None:
    """Where the wildcards of a glob begin; None if there are none.

    Of http a question mark begins a query, and brackets may be part of the host.
    """
    start = len("".join(urlsplit(url)[:2])) + len("://")
    found = [place for mark in ("*[" if web else "*[?") if (place := url.find(mark, start)) >= 0]
    return min(found, default=None)


TIMEOUT = 30.0
"""Seconds that one attempt to fetch an object may take."""


def open_input(text: str, timeout: float = TIMEOUT) -> ImageSource:
    """Find the images that `text` means; nothing is decoded yet.

    A path's name is its path below the folder, or below the part of the glob without wildcards.
    Raises UsageError if there is nothing, or no image.
    """
    path = Path(text)
    if text == "-":
        return _from_standard_input(timeout)
    if is_url(text):
        return from_url(text, timeout)
    if path.is_dir():
        return from_folder(path)
    if path.suffix.lower() in ENDINGS and path.is_file():
        return from_manifest(text, str(path.parent), timeout)
    if path.suffix.lower() == ".tar" and path.is_file():
        return from_shards([path])
    if path.is_file():
        return from_files(path.parent, [path.name])
    if "{" in text and text.endswith(".tar"):
        return from_shards(_shards(text))
    if not glob.has_magic(text):
        raise UsageError(f"{text}: no such file or folder")
    base, files = matching(text)
    if all(name.endswith(".tar") for name in files):
        return from_shards([base / name for name in files])
    return from_files(base, files)


def _shards(text: str) -> list[Path]:
    """The shards of a pattern with braces. Each has to exist: a missing one is no empty one."""
    found: list[Path] = []
    for name in expand_braces(text):
        if glob.has_magic(name):
            base, files = matching(name)
            found += [base / file for file in files]
        elif not Path(name).is_file():
            raise UsageError(f"{name}: no such file, of {text}")
        else:
            found.append(Path(name))
    return found


def _from_standard_input(timeout: float) -> ImageSource:
    """The paths or URLs on standard input, one a line; empty lines are passed over."""
    names = Names.of(_lines())
    if not len(names):
        raise UsageError("-: standard input lists no images, expected a path or URL a line")
    entries = Entries("", names, timeout)
    return from_encoded(names.printable(), entries.read, state=entries.state)


def _lines() -> Iterator[str]:
    for line in sys.stdin.buffer:
        name = os.fsdecode(line.rstrip(b"\r\n"))
        if name:
            yield name


def open_source(text: str, split: str | None = None, timeout: float = TIMEOUT) -> ImageSource:
    """The images that `text` names; of a dataset directory those of `split`, test by default.

    `timeout` is for each attempt to fetch an image, in seconds. Raises UsageError if there are
    none.
    """
    if (Path(text) / INFO).is_file():
        from distcls.data.dataset import Dataset

        dataset = Dataset.open(Path(text))
        chosen = dataset.split(split or "test")
        return from_split(chosen, dataset.classes, lambda: _state(chosen))
    if split is not None:
        raise UsageError(f"split: {text} is not a dataset directory and has no splits")
    return open_input(text, timeout)


def _state(split: Split) -> str:
    """Digest of the sizes and times of the files that a split is read from."""
    files = [split.folder / name for name in (MANIFEST, CLASSES)]
    if split.packed:
        files.append(split.folder / PACK)
    else:
        files += [split.root / path for path in split.table.column("path").to_pylist()]
    return state_of(map(str, files))

"""Which format a location has, and opening it.

A new format is one class under `@register_format`, in this file or in a module that the environment
variable DISTCLS_IMPORT names.
"""

from __future__ import annotations

import dataclasses
import glob
import itertools
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, TypeVar

from distcls import log
from distcls.data.dataset import INFO, MANIFEST, Dataset, prepare_command
from distcls.data.formats.folder import (
    FileSource,
    FolderSource,
    list_folder,
    matching_files,
)
from distcls.data.formats.idx import DigitsSource, IdxFormat, IdxSource, find_idx
from distcls.data.formats.manifest import ENDINGS, ManifestSource
from distcls.data.formats.remote import (
    ListedSource,
    RemoteSource,
    ending_of,
    filesystem_of,
    folder_of,
    is_pattern,
    is_url,
    read,
)
from distcls.data.formats.tar import TarSource, expand_braces
from distcls.data.source import (
    TIMEOUT,
    ImageSource,
    LabelledImages,
    LabelOptions,
    Names,
    OpenOptions,
)
from distcls.errors import BadImage, DistclsError, UsageError
from distcls.registry import IMPORTS, import_modules

S = TypeVar("S", bound=Callable[[str], Any])

IDX_ENTRIES = 1000
"""A folder of more entries is not searched for IDX files unless the format is given: it may hold
millions of images, and a set of IDX files has four."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Format:
    """How a format is recognised, and what opens it."""

    matches: Callable[[str], bool]
    """Whether a location is of this format; tried in the order of the table."""
    open: Callable[[str, OpenOptions], ImageSource]
    """Open a location."""
    needs: Literal["a file", "a folder", ""] = ""
    """The required type of location when the format is given by name."""
    named: bool = True
    """Whether `--format` may name it."""


_registered: dict[str, Format] = {}


def register_format(name: str, *, matches: Callable[[str], bool]) -> Callable[[S], S]:
    """Decorate an `ImageSource` made from a location: it opens what `matches`, before all others.

    `--format` takes the name. A name registered again refers to the newer class; raises ValueError
    for the name of a built-in format.
    """
    if name in ("auto", *FORMATS):
        raise ValueError(f"format {name!r} is built in")

    def add(source: S) -> S:
        _registered[name] = Format(matches=matches, open=lambda location, _: source(location))
        return source

    return add


def registered_formats() -> dict[str, Format]:
    """The formats that `register_format` added, of the modules in DISTCLS_IMPORT too."""
    import_modules(os.environ.get(IMPORTS, ""))
    return _registered


def format_names() -> list[str]:
    """What `--format` takes: auto, the built-in formats, and those that were registered."""
    named = [name for name, format in FORMATS.items() if format.named]
    return ["auto", *named, *registered_formats()]


def open_source(
    location: str,
    split: str | None = None,
    timeout: float = TIMEOUT,
    format: str = "auto",
    options: OpenOptions | None = None,
) -> ImageSource:
    """The images that `location` means; of a dataset directory those of `split`, default: test.

    `digits` is the bundled set, `./digits` a folder; `-` lists paths or URLs on standard input.
    `options` replace `timeout`. Nothing is decoded yet. Raises UsageError if there is no image, or
    not of the format given, or if `options` are for a manifest and it is none.
    """
    options = options or OpenOptions(timeout=timeout)
    source = _open(location, split, format, options)
    if not isinstance(source, ManifestSource):
        options.require_none_named(location)
    return source


def _open(location: str, split: str | None, format: str, options: OpenOptions) -> ImageSource:
    location = location if is_url(location) else os.path.expanduser(location)  # noqa: PTH111
    if (Path(location) / INFO).is_file() and format == "auto":
        return Dataset.open(Path(location)).split(split or "test")
    if split is not None:
        raise UsageError(
            f"split: {location} is not a dataset directory and has no splits; leave it out, or "
            f"make a dataset directory: {prepare_command(location)}"
        )
    if format != "auto":
        return _open_as(location, format, options)
    return format_of(location).open(location, options)


def format_of(location: str) -> Format:
    """The first format that recognises a location; nothing is opened.

    Raises UsageError if none does.
    """
    for candidate in (*registered_formats().values(), *FORMATS.values()):
        if candidate.matches(location):
            return candidate
    raise UsageError(f"{location}: no such file or folder (digits is the bundled data set)")


def open_labelled(
    location: str,
    format: str = "auto",
    options: LabelOptions | None = None,
    opening: OpenOptions | None = None,
) -> LabelledImages:
    """The images of a source with their labels, as `prepare` reads them; none is decoded yet.

    Raises UsageError for anything wrong.
    """
    path = Path(location).expanduser()
    if format == "auto" and (path / INFO).exists() and (path / MANIFEST).exists():
        raise UsageError(f"{location} is a dataset directory already; use it as --data")
    source = open_source(location, format=format, options=opening)
    options = options or LabelOptions()
    if options.splits and not isinstance(source, FolderSource):
        given = ",".join(options.splits)
        raise UsageError(f"splits: {given!r} names folders, but {location} is not a folder")
    return source.labelled(options)


def _open_as(location: str, format: str, options: OpenOptions) -> ImageSource:
    chosen = (FORMATS | registered_formats())[format]
    if not chosen.needs:
        return chosen.open(location, options)
    path = Path(location)
    if not path.exists():
        raise UsageError(f"{location}: no such file or folder")
    if path.is_dir() != (chosen.needs == "a folder"):
        raise UsageError(f"{location}: --format {format} needs {chosen.needs}")
    return chosen.open(location, options)


def _open_digits(location: str, _: OpenOptions) -> ImageSource:
    if location != "digits":
        raise UsageError("the bundled digits are `digits`, with their own classes")
    if Path(location).exists():
        log.warn("digits is the bundled data set; the folder of that name is ./digits")
    return DigitsSource()


def _open_url(url: str, options: OpenOptions) -> ImageSource:
    filesystem_of(url)
    if not is_pattern(url) and ending_of(url) in ENDINGS:
        plain = url.partition("?")[0] if url.startswith("http") else url
        try:
            content = read(url, options.timeout)
        except BadImage as error:  # what `read` reports for any object
            raise DistclsError(f"{url}: {error}") from error
        return ManifestSource(plain, folder_of(url), options, content)
    if not is_pattern(url) and ending_of(url) == ".tar":
        raise UsageError(f"{url}: tar shards are read from disks; copy them here first")
    return RemoteSource(url, options.timeout)


def _open_standard_input(_: str, options: OpenOptions) -> ImageSource:
    """The paths or URLs on standard input, one per line; empty lines are skipped."""
    names = Names.of(_lines())
    if not len(names):
        raise UsageError("-: standard input lists no images, expected one path or URL per line")
    source = ListedSource("", names, options.timeout)
    source.location = "-"
    return source


def _lines() -> Iterator[str]:
    for line in sys.stdin.buffer:
        name = os.fsdecode(line.rstrip(b"\r\n"))
        if name:
            yield name


def _is_idx(location: str) -> bool:
    if not Path(location).is_dir():
        return False
    with list_folder(Path(location)) as entries:
        few = [entry.name for entry in itertools.islice(entries, IDX_ENTRIES + 1)]
    named = any(name.endswith(("ubyte", "ubyte.gz")) for name in few)
    return named and len(few) <= IDX_ENTRIES and bool(find_idx(Path(location)))


def _idx(format: IdxFormat) -> Format:
    return Format(
        matches=_is_idx if format == "auto" else lambda _: False,
        open=lambda location, _: IdxSource(Path(location), format),
        needs="a folder",
        named=format != "auto",
    )


def _is_tar(location: str) -> bool:
    path = Path(location)
    if path.exists():
        return path.suffix.lower() == ".tar" and path.is_file()
    return "{" in location and location.endswith(".tar")


def _open_tar(location: str, _: OpenOptions) -> ImageSource:
    return TarSource(_shards(location), location)


def _shards(text: str) -> list[Path]:
    """The shards of a pattern. Each of its braces has to exist: a missing one is no empty one."""
    if Path(text).is_file():
        return [Path(text)]
    found: list[Path] = []
    for name in expand_braces(text):
        if glob.has_magic(name):
            base, files = matching_files(name)
            found += [base / file for file in files]
        elif not Path(name).is_file():
            raise UsageError(f"{name}: no such file, of {text}")
        else:
            found.append(Path(name))
    return found


def _open_pattern(pattern: str, _: OpenOptions) -> ImageSource:
    base, files = matching_files(pattern)
    if all(name.endswith(".tar") for name in files):
        return TarSource([base / name for name in files], pattern)
    return FileSource(base, files, pattern)


FORMATS: dict[str, Format] = {
    "standard input": Format(
        matches=lambda text: text == "-", open=_open_standard_input, named=False
    ),
    "url": Format(matches=is_url, open=_open_url, named=False),
    "digits": Format(matches=lambda text: text == "digits", open=_open_digits),
    "auto-idx": _idx("auto"),
    "idx": _idx("idx"),
    "fashion-mnist": _idx("fashion-mnist"),
    "mnist": _idx("mnist"),
    "folder": Format(
        matches=lambda text: Path(text).is_dir(),
        open=lambda text, _: FolderSource(Path(text)),
        needs="a folder",
    ),
    "manifest": Format(
        matches=lambda text: text.lower().endswith(ENDINGS) and Path(text).is_file(),
        open=lambda text, options: ManifestSource(text, str(Path(text).parent), options),
        needs="a file",
    ),
    "tar": Format(matches=_is_tar, open=_open_tar),
    "file": Format(
        matches=lambda text: Path(text).is_file(),
        open=lambda text, _: FileSource(Path(text).parent, [Path(text).name], text),
        named=False,
    ),
    "pattern": Format(matches=glob.has_magic, open=_open_pattern, named=False),
}
"""The built-in formats, in the order in which a location is tried."""

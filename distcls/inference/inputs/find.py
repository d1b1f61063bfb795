"""What kind of input a text means, and opening it."""

from __future__ import annotations

import glob
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from distcls.errors import UsageError
from distcls.inference.inputs.entries import Entries
from distcls.inference.inputs.files import from_files, from_folder, matching
from distcls.inference.inputs.listing import from_url
from distcls.inference.inputs.manifest import ENDINGS, from_manifest
from distcls.inference.inputs.remote import is_url
from distcls.inference.inputs.shards import expand_braces, from_shards
from distcls.inference.inputs.source import Names, Source, from_encoded

TIMEOUT = 30.0
"""Seconds that one attempt to fetch an object may take."""


def open_input(text: str, timeout: float = TIMEOUT) -> Source:
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


def _from_standard_input(timeout: float) -> Source:
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

"""`distcls audit`: look at a dataset before it is trained on, or trusted."""

from __future__ import annotations

import csv
import dataclasses
import time
from pathlib import Path
from typing import Any

from distcls import log
from distcls.audit.checks import image_findings
from distcls.audit.findings import KINDS, Finding, counted, in_order, table
from distcls.audit.scan import Scan, scan
from distcls.cli import packages_for
from distcls.config import positional
from distcls.data.image_dataset import ImageDataset, Opened, open_dataset, opened
from distcls.data.source import Rejected
from distcls.data.writer import REJECTED
from distcls.errors import DistclsError, UsageError
from distcls.files import require_writable, write_json, write_text
from distcls.imaging.preprocess import WHITE, Background, background_color

FILES = ("audit.csv", "audit.json", "audit.html")
"""What `--out` gets."""


class Findings(DistclsError):
    """There are errors, with `strict`."""

    exit_code = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class AuditOptions:
    """Options of `distcls audit`."""

    data: str = positional()
    """Dataset directory, or anything that `distcls prepare` reads. Of a packed directory the pack
    is looked at, of everything else the files."""
    out: Path | None = None
    """Folder for audit.csv, audit.json and audit.html."""
    overwrite: bool = False
    """Replace an audit in --out."""
    strict: bool = False
    """End with exit code 3 if there is any error."""
    path_column: str | None = None
    """Column of a manifest with the path of each image, as for `distcls prepare`."""
    label_column: str | None = None
    """Column of a manifest with the class of each image."""
    labels_column: str | None = None
    """Multi-label: column of a manifest with any number of labels per image."""
    root: Path | None = None
    """Folder that relative paths of a manifest start from."""
    background: Background = WHITE
    """Colour that transparent pixels are blended with; ignore discards the alpha channel."""
    json: bool = False
    """Print one JSON object with the counts."""
    quiet: bool = False
    """Print warnings and errors only."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AuditResult:
    """What was found."""

    data: str
    images: int
    splits: dict[str, int]
    classes: list[str]
    findings: list[Finding]
    """In the order of the report."""
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """The summary, as audit.json and `--json` have it."""
        return {
            "data": self.data,
            "images": self.images,
            "splits": self.splits,
            "classes": len(self.classes),
            "findings": counted(self.findings),
            "seconds": self.seconds,
        }

    def to_text(self) -> str:
        """A line for each kind of finding, with the first of them."""
        lines = []
        for severity, kinds in counted(self.findings).items():
            for kind, count in kinds.items():
                chosen = (f for f in self.findings if (f.severity, f.kind) == (severity, kind))
                first = next(chosen)
                name = f"{first.image}: " if first.image else ""
                lines.append(f"{severity:<8} {count:>7,}  {KINDS[kind]}")
                lines.append(f"{'':<17} first {name}{first.text}")
        return "\n".join(lines or ["nothing found"])


def audit(options: AuditOptions) -> AuditResult:
    """Look at all images of a dataset, and write `options.out` if given.

    Raises UsageError for data that cannot be read, an audit in `options.out`, or wrong options.
    """
    started = time.monotonic()
    check_output(options)
    with packages_for(options.data):
        data = open_dataset(options.data, **_reading(options))
    if not len(data):
        raise UsageError(f"{options.data}: there are no images")
    inside = opened(data)
    scanned = scan(inside, _background(options, inside))
    findings = in_order(image_findings(scanned, data.task, _rejected(data, inside)))
    result = AuditResult(
        data=options.data,
        images=len(data),
        splits=data.splits,
        classes=list(data.classes),
        findings=findings,
        seconds=round(time.monotonic() - started, 2),
    )
    _finish(options, result, scanned, inside)
    return result


def check_output(options: AuditOptions) -> None:
    """Raise UsageError, before any work, if the result could not be written."""
    if options.out is None:
        return
    if not options.overwrite:
        for name in FILES:
            if (options.out / name).exists():
                raise UsageError(
                    f"{options.out / name} exists already; choose another --out or add --overwrite"
                )
    require_writable(options.out)


def _reading(options: AuditOptions) -> dict[str, Any]:
    names = ("path_column", "label_column", "labels_column", "root")
    given = {name: getattr(options, name) for name in names}
    return {name: value for name, value in given.items() if value is not None}


def _background(options: AuditOptions, inside: Opened) -> Any:
    if inside.directory is not None:
        return inside.directory.background
    return background_color(options.background)


def _rejected(data: ImageDataset, inside: Opened) -> list[Rejected]:
    """What `distcls prepare` left out of a dataset directory."""
    if inside.directory is None:
        return []
    path = inside.directory.folder / REJECTED
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", errors="replace", newline="") as handle:
        rows = list(csv.DictReader(handle))
    return [
        Rejected(row.get("image_id") or "", row.get("path"), row.get("reason") or "left out")
        for row in rows
    ]


def _finish(options: AuditOptions, result: AuditResult, scanned: Scan, inside: Opened) -> None:
    splits = ", ".join(f"{count:,} {name}" for name, count in result.splits.items())
    log.say(
        f"{result.data}: {result.images:,} images{f' ({splits})' if splits else ''} of "
        f"{len(result.classes):,} classes in {result.seconds} s"
    )
    if options.out is not None:
        write_text(options.out / "audit.csv", table(result.findings))
        write_json(options.out / "audit.json", result.to_json())
        log.say(f"wrote {options.out}: {len(result.findings):,} findings")

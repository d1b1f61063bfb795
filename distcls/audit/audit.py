"""`distcls audit`: look at a dataset before it is trained on, or trusted."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distcls import log
from distcls.audit.checks import Teller, image_findings, turned_copies
from distcls.audit.drift import (
    SIGNIFICANT,
    MeasureTest,
    drift_findings,
    feature_tests,
    measure_tests,
    measures_of,
)
from distcls.audit.findings import KINDS, Finding, counted, in_order, table
from distcls.audit.fix import write_fixed
from distcls.audit.labels import Judges, label_findings
from distcls.audit.model import features_of, open_features, turned_pairs
from distcls.audit.page import audit_page, draw_label_errors
from distcls.audit.scan import scan
from distcls.cli import packages_for
from distcls.config import positional
from distcls.data.dataset import require_apart
from distcls.data.image_dataset import Opened, open_dataset, opened
from distcls.data.source import SPLITS, ImageRecord, Rejected, as_text, is_text, require_text
from distcls.data.writer import REJECTED
from distcls.errors import DistclsError, UsageError, legible, plain, reason_of, require
from distcls.files import (
    atomic_path,
    claimed_output,
    require_distinct,
    require_writable,
    write_json,
)
from distcls.imaging.preprocess import WHITE, Background, background_color
from distcls.runtime.model import WithFeatures
from distcls.task import Task

FILES = ("audit.json", "audit.csv", "audit.html", "label_errors.png")
"""What `--out` gets; the last one with label errors only."""
PENDING = "label errors: the audit was ended before its models were trained"
"""What audit.json says until they are."""
LONGEST = 300
"""Characters of a finding's text that are printed."""


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
    """Folder for audit.csv, audit.json and audit.html, with label_errors also label_errors.png."""
    overwrite: bool = False
    """Replace an audit in --out."""
    model: Path | None = None
    """Model file best.onnx, or a run directory with one: its features find mirrored and turned
    copies, and differences between the images of train, val and test that no measure shows."""
    label_errors: bool = False
    """Train `folds` models, each without a part of the images, and list the labels of these parts
    that they contradict. Takes as long as these runs; needs torch."""
    folds: int = 4
    """With label_errors: number of parts."""
    recipe: str | None = None
    """With label_errors: YAML file of training options, or the name of a recipe (`distcls recipes`
    lists them); default: what `distcls train` chooses."""
    seed: int = 0
    """With label_errors: seed of the parts and of the runs."""
    fix: Path | None = None
    """CSV or Parquet manifest to write for `distcls prepare`, with the repairs that are proposed:
    broken images and copies left out, class names that mean one class made one, near copies in one
    group. No image is touched."""
    strict: bool = False
    """End with exit code 3 if there is any error."""
    format: str = "auto"
    """Format of the images, as for `distcls prepare`."""
    splits: tuple[str, ...] = ()
    """Folder trees: the folder of each split, as for `distcls prepare`."""
    path_column: str | None = None
    """Column of a manifest with the path of each image, as for `distcls prepare`."""
    label_column: str | None = None
    """Column of a manifest with the class of each image."""
    label_columns: tuple[str, ...] = ()
    """Multi-head: columns of a manifest, one head per column."""
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

    def __post_init__(self) -> None:
        ending = self.fix is None or self.fix.suffix.lower() in (".csv", ".parquet")
        require(self.folds >= 2, "folds", self.folds, "at least 2")
        require(self.seed >= 0, "seed", self.seed, "at least 0")
        judged = self.label_errors or self.recipe is None
        require(judged, "recipe", self.recipe, "nothing without label_errors")
        require(ending, "fix", str(self.fix), "the name of a .csv or .parquet file")


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
    failure: Exception | None = None
    """Why `fix` could not be written, or the label errors not be told."""
    measured: Sequence[MeasureTest] = ()
    """Of each split with enough images, and each measure, the test against train."""
    drift: dict[str, tuple[float, float]] | None = None
    """With a model: of each split that was tested, MMD and p-value against train."""
    judges: float | None = None
    """With label_errors: accuracy of the models that judge, on images they have not seen."""
    poor_judges: bool = False
    """Whether these models are right too seldom for their list to be worth much."""

    def to_json(self) -> dict[str, Any]:
        """The summary, as audit.json and `--json` have it."""
        return {
            "data": self.data,
            "images": self.images,
            "splits": self.splits,
            "classes": len(self.classes),
            "findings": counted(self.findings),
            "measures": {
                split: {
                    each.measure: each.to_json() for each in self.measured if each.split == split
                }
                for split in dict.fromkeys(each.split for each in self.measured)
            },
            "drift": None
            if self.drift is None
            else {split: {"mmd": value, "p": p} for split, (value, p) in self.drift.items()},
            "label_errors_accuracy": self.judges,
            "failure": None if self.failure is None else self._why(self.failure),
            "seconds": self.seconds,
        }

    @staticmethod
    def _why(failure: Exception) -> str:
        return str(failure) if isinstance(failure, DistclsError) else reason_of(failure)

    def to_text(self) -> str:
        """A line for each kind of finding, with the first of them; of drift, which is several
        things, with all."""
        lines = []
        for severity, kinds in counted(self.findings).items():
            for kind, count in kinds.items():
                found = [f for f in self.findings if (f.severity, f.kind) == (severity, kind)]
                lines.append(f"{severity:<8} {count:>7,}  {KINDS[kind]}")
                if kind == "drift":
                    lines += [f"{'':<17} {plain(each.text, LONGEST)}" for each in found]
                    continue
                name = f"{plain(found[0].image)}: " if found[0].image else ""
                lines.append(f"{'':<17} first {name}{plain(found[0].text, LONGEST)}")
        lines = lines or ["nothing found"]
        lines += _without_drift(self.measured)
        for split, (_, p) in (self.drift or {}).items():
            if p >= SIGNIFICANT:
                lines.append(
                    f"drift: {split} does not differ from train by the features, p {p:.3f}"
                )
        if self.drift == {} or (len(self.splits) > 1 and not self.measured):
            lines.append("drift: not tested, for want of 10 images in train and in another split")
        if self.judges is not None:
            lines.append(
                f"label errors: the models that judge are right for {self.judges:.1%} of the "
                "images, none of which they were trained on"
                + "; too seldom, most of these labels may be right"
                * self.poor_judges
            )
        return "\n".join(lines)


def _without_drift(measured: Sequence[MeasureTest]) -> Iterator[str]:
    """A line for each split, of the measures in which it does not differ."""
    for split in dict.fromkeys(each.split for each in measured):
        same = [each.measure for each in measured if each.split == split and not each.differs]
        if same:
            names = " and ".join(filter(None, (", ".join(same[:-1]), same[-1])))
            yield f"drift: {split} shows no marked difference from train in {names}"


def audit(options: AuditOptions) -> AuditResult:
    """Look at all images of a dataset, and write `options.out` if given.

    What fails after the images were looked at (`fix`, `label_errors`) is the result's `failure`:
    what was found is written all the same.

    Raises UsageError for data that cannot be read, an audit in `options.out` or another one that
    writes it at the same time, and wrong options.
    """
    with contextlib.ExitStack() as stack:
        if options.out is not None:
            busy = f"out: another process is writing {options.out} at this moment"
            stack.enter_context(claimed_output(options.out, busy))
        check_output(options)
        return _audited(options)


def _audited(options: AuditOptions) -> AuditResult:
    started = time.monotonic()
    model = None if options.model is None else open_features(options.model)
    with packages_for(options.data):
        data = open_dataset(options.data, **_reading(options))
    if not len(data):
        raise UsageError(f"{options.data}: there are no images")
    require_text(options.data, data.classes)
    inside = opened(data)
    inside = inside._replace(records=list(map(_named, inside.records)))
    judges = Judges(folds=options.folds, recipe=options.recipe, seed=options.seed)
    if options.label_errors:
        judges.check(data.task, inside.records)
    result, good = _looked_at(options, inside, data.task, model)
    seconds = round(time.monotonic() - started, 2)
    result = dataclasses.replace(result, seconds=seconds)
    log.say(f"{result.data}: {_about(result)} in {result.seconds} s")
    _write(options, result, inside, PENDING if options.label_errors else None)
    result = _fixed(options, result, inside, data.task)
    if options.label_errors:
        result = _judged(result, inside, data.task, good, judges)
        seconds = round(time.monotonic() - started, 2)
        result = dataclasses.replace(result, seconds=seconds)
        _write(options, result, inside)
    return result


def _looked_at(
    options: AuditOptions, inside: Opened, task: Task, model: WithFeatures | None
) -> tuple[AuditResult, NDArray[np.int64]]:
    """All that is found without training, and the positions of the images that can be read."""
    scanned = scan(inside, _background(options, inside))
    findings = list(image_findings(scanned, task, _rejected(inside)))
    splits = [record.split for record in inside.records]
    measured, tests = measure_tests(measures_of(scanned), splits), None
    if model is not None:
        features = features_of(model, inside)
        tests = feature_tests(features, splits)
        pairs = turned_pairs(scanned.thumbs, features)
        findings += turned_copies(Teller(inside.records, task), pairs, findings)
    findings += drift_findings(measured, tests or {})
    result = AuditResult(
        data=options.data,
        images=len(splits),
        splits={name: splits.count(name) for name in SPLITS if name in splits},
        classes=list(task.classes),
        findings=in_order(findings),
        seconds=0.0,
        measured=measured,
        drift=tests,
    )
    return result, np.setdiff1d(np.arange(len(splits)), list(scanned.broken))


def _judged(
    result: AuditResult, inside: Opened, task: Task, good: NDArray[np.int64], judges: Judges
) -> AuditResult:
    """The result with the label errors, or with why there are none."""
    try:
        judged = label_findings(inside, task, good, judges)
    except Exception as error:  # what was found is worth as much without it
        if result.failure is not None:
            log.warn(str(result.failure))
        return dataclasses.replace(result, failure=error)
    findings = in_order([*result.findings, *judged.findings])
    return dataclasses.replace(
        result, findings=findings, judges=judged.accuracy, poor_judges=judged.poor
    )


def _named(record: ImageRecord) -> ImageRecord:
    """The record, its id such that it can be written to a file."""
    if is_text(record.image_id):
        return record
    return dataclasses.replace(record, image_id=as_text(record.image_id))


def check_output(options: AuditOptions) -> None:
    """Raise UsageError, before any work, if the result could not be written."""
    outputs = [] if options.out is None else [options.out / name for name in FILES]
    written = dict.fromkeys(outputs, "out")
    data = Path(options.data)
    for path in outputs:
        require_distinct({"out": path}, {"data": [data]})
    if options.fix is not None:
        written |= {options.fix: "fix"}
        require_distinct({"fix": options.fix}, {"out": outputs})
        require_apart("fix", options.fix, data)
    for path, key in written.items():
        if path.exists() and not options.overwrite:
            raise UsageError(f"{path} exists already; choose another --{key} or add --overwrite")
        require_writable(path.parent)


def _reading(options: AuditOptions) -> dict[str, Any]:
    names = ("format", "splits", "path_column", "label_column", "label_columns", "labels_column")
    given = {name: getattr(options, name) for name in (*names, "root")}
    return {name: value for name, value in given.items() if value not in (None, (), "auto")}


def _background(options: AuditOptions, inside: Opened) -> Any:
    if inside.directory is not None:
        return inside.directory.background
    return background_color(options.background)


def _rejected(inside: Opened) -> list[Rejected]:
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


def _about(result: AuditResult) -> str:
    splits = ", ".join(f"{count:,} {name}" for name, count in result.splits.items())
    return (
        f"{result.images:,} images{f' ({splits})' if splits else ''} of "
        f"{len(result.classes):,} classes"
    )


def _write(
    options: AuditOptions, result: AuditResult, inside: Opened, pending: str | None = None
) -> None:
    """Write the files of `out`, all of them or none; `pending` is what is still missing."""
    if options.out is None:
        return
    summary = result.to_json() | ({} if pending is None else {"failure": pending})
    title = f"Audit of {legible(result.data)}"
    with contextlib.ExitStack() as stack:
        summarised, listed, shown = (
            stack.enter_context(atomic_path(options.out / name)) for name in FILES[:3]
        )
        write_json(summarised, summary)
        with listed.open("w", encoding="utf-8", newline="") as handle:
            handle.writelines(table(result.findings))
        page = audit_page(title, f"{_about(result)}.", result.findings, inside)
        shown.write_text(page, encoding="utf-8")
        _draw(options.out / FILES[3], result, inside)
    more = "" if pending is None else ", label errors follow"
    log.say(f"wrote {options.out}: {log.counted(len(result.findings), 'finding')}{more}")


def _draw(path: Path, result: AuditResult, inside: Opened) -> None:
    """Write the picture of the label errors, or remove that of an audit that is replaced."""
    wrong = [each for each in result.findings if each.kind == "label_error"]
    try:
        if wrong and result.judges is not None:
            draw_label_errors(wrong, inside, path, result.judges)
            return
    except UsageError as error:
        log.warn(f"{path.name} is left out: {error}")
    path.unlink(missing_ok=True)


def _fixed(options: AuditOptions, result: AuditResult, inside: Opened, task: Task) -> AuditResult:
    """The result, its repairs written."""
    if options.fix is None:
        return result
    try:
        left_out = write_fixed(options.fix, result.findings, inside, task)
    except DistclsError as error:  # what was found is worth as much without it
        return dataclasses.replace(result, failure=error)
    log.say(f"wrote {options.fix}: {log.counted(left_out, 'image')} left out")
    return result

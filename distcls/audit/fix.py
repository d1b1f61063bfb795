"""`--fix`: a manifest with the repairs that the findings propose; no image is touched."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distcls.audit.findings import Finding
from distcls.data.image_dataset import Opened
from distcls.errors import UsageError
from distcls.files import atomic_path, csv_line, write_text
from distcls.task import Task

DROPPED = ("broken", "duplicate", "leak", "conflict", "near_leak")
"""Kinds of findings whose image is left out; of a conflict the other image, too."""
NEAR = ("near_duplicate", "near_conflict")
"""Kinds whose images are put into one group, where images have no split yet."""


def write_fixed(path: Path, findings: Sequence[Finding], inside: Opened, task: Task) -> int:
    """Write a manifest for `distcls prepare`, CSV or Parquet by the ending; how many images it
    leaves out.

    Copies of an image go, in test's favour, and both of two with different labels; class names
    that mean one class become one; near copies share a `group`, which prepare keeps in one split.
    Raises UsageError for images that are no files.
    """
    root = inside.root
    if root is None or any(record.path is None for record in inside.records):
        raise UsageError(
            "fix: the images are no files, which a manifest could list; distcls prepare "
            "--write-images makes some"
        )
    dropped = _dropped(findings)
    names = {each.label: each.related for each in findings if each.kind == "class_name"}
    groups = _groups(findings, inside)
    rows, others = [], inside.columns()
    for at, record in enumerate(inside.records):
        if at in dropped:
            continue
        row: dict[str, Any] = {"image_id": record.image_id, "path": str(root / str(record.path))}
        row |= {name: values[at] for name, values in others.items()}
        row |= _labels(task, record.label, record.labels, names)
        row |= {"split": record.split, "weight": record.weight, "group": groups.get(at)}
        rows.append(row)
    if not rows:
        raise UsageError("fix: no image would be left")
    columns = [name for name in rows[0] if any(row[name] is not None for row in rows)]
    if path.suffix.lower() == ".csv":
        cells = ([row[name] for name in columns] for row in rows)
        write_text(path, "".join(map(csv_line, [columns, *cells])))
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        with atomic_path(path) as temporary:
            table = pa.table({name: [row[name] for row in rows] for name in columns})
            pq.write_table(table, temporary)
    return len(inside.records) - len(rows)


def _dropped(findings: Sequence[Finding]) -> set[int]:
    found = {each.position for each in findings if each.kind in DROPPED}
    found |= {each.related_position for each in findings if each.kind == "conflict"}
    return {at for at in found if at is not None}


def _groups(findings: Sequence[Finding], inside: Opened) -> dict[int, str]:
    """The group of each image that has one: its own, else that of its near copies."""
    records = inside.records
    groups = {at: each.group for at, each in enumerate(records) if each.group is not None}
    if groups or any(record.split is not None for record in records):
        return groups
    first: dict[int, int] = {}

    def root_of(at: int) -> int:
        while first.setdefault(at, at) != at:
            at = first[at]
        return at

    for each in findings:
        if each.kind in NEAR and each.position is not None and each.related_position is not None:
            first[root_of(each.position)] = root_of(each.related_position)
    return {at: f"near {records[root_of(at)].image_id}" for at in list(first)}


def _labels(
    task: Task, label: int, labels: tuple[int, ...] | None, names: dict[str, str]
) -> dict[str, str]:
    """The columns of an image's labels."""
    if task.heads and labels is not None:
        pairs = zip(task.heads, labels, strict=True)
        return {head.name: head.classes[place] for head, place in pairs}
    if task.single:
        found = task.classes[label]
        return {"label": names.get(found, found)}
    chosen = [task.classes[place] for place in labels or ()]
    return {"labels": "|".join(dict.fromkeys(names.get(name, name) for name in chosen))}

"""The files of a dataset directory, other than the pack."""

from __future__ import annotations

import csv
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from distcls import __version__
from distcls.data.dataset import SCHEMA
from distcls.data.labels import FIELD, LABELS
from distcls.data.layout import CLASSES, FORMAT, INFO, MANIFEST, PACK
from distcls.data.names import safe_names
from distcls.data.pack import PackWriter
from distcls.data.plan import Plan
from distcls.data.sources.source import Record, Source
from distcls.data.split import SPLITS
from distcls.files import digest

REJECTED = "rejected.csv"


def write_manifest(
    part: Path, plan: Plan, pack: PackWriter | None, paths: list[str | None]
) -> None:
    """Write the manifest. The pack's images are those of `plan`, in its order.

    Rows stand split by split. Where an image had to change its split they are then in another order
    than the pack, and `Split.uniform` is None; all else works.
    """
    order = sorted(range(len(plan)), key=lambda index: SPLITS.index(plan.splits[index]))
    records = plan.records
    nothing: list[Any] = [None] * len(plan)
    columns: dict[str, list[Any]] = {
        "image_id": [record.image_id for record in records],
        "path": list(paths),
        "label": [record.label for record in records],
        "split": plan.splits,
        "offset": pack.offsets() if pack else nothing,
        "height": [height for height, _ in pack.shapes] if pack else nothing,
        "width": [width for _, width in pack.shapes] if pack else nothing,
        "channels": [pack.channels] * len(plan) if pack else nothing,
    }
    schema = SCHEMA
    if any(record.weight is not None for record in records):
        schema = schema.append(pa.field("weight", pa.float64()))
        columns["weight"] = [record.weight for record in records]
    if any(record.group is not None for record in records):
        schema = schema.append(pa.field("group", pa.string()))
        columns["group"] = [record.group for record in records]
    if any(record.labels is not None for record in records):
        schema = schema.append(FIELD)
        columns[LABELS] = [list(record.labels or ()) for record in records]
    ordered = {name: [values[index] for index in order] for name, values in columns.items()}
    pq.write_table(pa.table(ordered, schema=schema), part / MANIFEST)


def write_info(
    part: Path,
    source: Source,
    plan: Plan,
    pack: PackWriter | None,
    *,
    root: str | None,
    rejected: int,
    options: dict[str, Any],
) -> dict[str, Any]:
    """Write classes.json and dataset.json; return the latter. Manifest and pack must be there."""
    hashed = [MANIFEST, PACK] if pack else [MANIFEST]
    info = {
        "format": FORMAT,
        "kind": source.kind,
        "source": source.location,
        "root": root,
        "packed": pack is not None,
        "pack_bytes": pack.size if pack else 0,
        "counts": {name: plan.splits.count(name) for name in SPLITS if name in plan.splits},
        "class_counts": _class_counts(source, plan),
        "rejected": rejected,
        "seed": options["seed"],
        "options": options,
        "sha256": {name: digest(part / name) for name in hashed},
        "version": __version__,
    }
    # plain writes: the folder is renamed into place as a whole
    _write_json(part / CLASSES, source.resolved_targets.to_json())
    _write_json(part / INFO, info)
    return info


def write_rejected(part: Path, rejected: Sequence[tuple[Record, str]], root: Path | None) -> None:
    """Write rejected.csv, with its header alone if nothing was rejected."""
    path = part / REJECTED
    with path.open("w", encoding="utf-8", errors="backslashreplace", newline="") as handle:
        # all quoted: a bare carriage return in a file name would otherwise end the row
        writer = csv.writer(handle, quoting=csv.QUOTE_ALL, lineterminator="\n")
        writer.writerow(("image_id", "path", "reason"))
        for record, reason in rejected:
            writer.writerow((record.image_id, (root or Path()) / (record.path or ""), reason))


def copy_paths(source: Source, plan: Plan) -> list[str]:
    """Where --write-images puts each image: images/SPLIT/CLASS/ID.png."""
    folders = safe_names(source.classes)
    by_class: dict[int, list[int]] = defaultdict(list)
    for index, record in enumerate(plan.records):
        by_class[record.label].append(index)
    paths = [""] * len(plan)
    for label, indices in by_class.items():
        # distinct in the class, so that an image may still change its split
        names = safe_names(plan.records[index].image_id for index in indices)
        for index, name in zip(indices, names, strict=True):
            paths[index] = f"images/{plan.splits[index]}/{folders[label]}/{name}.png"
    return paths


def move_copies(part: Path, paths: Sequence[str], before: Plan, after: Plan) -> list[str]:
    """Follow images that changed their split; the paths as they are now."""
    moved = []
    for path, old, new in zip(paths, before.splits, after.splits, strict=True):
        target = path.replace(f"images/{old}/", f"images/{new}/", 1)
        if target != path:
            (part / target).parent.mkdir(parents=True, exist_ok=True)
            (part / path).rename(part / target)
        moved.append(target)
    return moved


def _class_counts(source: Source, plan: Plan) -> dict[str, dict[str, int]]:
    counts: dict[str, dict[str, int]] = {name: {} for name in source.classes}
    for record, split in zip(plan.records, plan.splits, strict=True):
        for place in source.positions(record):
            row = counts[source.classes[place]]
            row[split] = row.get(split, 0) + 1
    return counts


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

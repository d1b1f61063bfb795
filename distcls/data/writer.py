"""Writing a dataset directory: images decoded once, in order, the pack, and the files beside it."""

from __future__ import annotations

import csv
import json
import math
import os
import shutil
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from numpy.typing import NDArray

from distcls import __version__
from distcls.data.columns import COLUMNS, LABELS, ManifestColumns
from distcls.data.dataset import CLASSES, FORMAT, INFO, MANIFEST, PACK, Dataset
from distcls.data.integrity import remember_pack, sealed, verify_pack
from distcls.data.source import (
    NO_TEXT,
    SPLITS,
    ImageRecord,
    Images,
    ImageSource,
    LabelledImages,
    Rejected,
    is_text,
)
from distcls.data.split import SplitAssignment
from distcls.errors import BadImage, MachineError
from distcls.files import digest, safe_names
from distcls.imaging import Color
from distcls.imaging.reading import leave, result_of
from distcls.system import available_cores

if TYPE_CHECKING:
    import pyarrow as pa

Loaded = NDArray[np.uint8] | BadImage

_REQUIRED = ("image_id", "label", "split")


def load_all(
    source: ImageSource, records: Sequence[ImageRecord], copies: Sequence[Path] | None
) -> Iterator[Loaded]:
    """Yield each record's image, grey [height, width] or RGB [height, width, 3], or what is wrong.

    With `copies` each image is also written there as PNG. Raises OSError if one cannot be, and
    MachineError where the machine cannot read or decode.
    """
    if copies is None and not source.encoded:
        yield from (load(source, record, None) for record in records)
        return
    workers = min(available_cores(), 16)
    places: Sequence[Path | None] = copies or [None] * len(records)
    tasks = iter(zip(records, places, strict=True))
    # OpenCV decodes without holding the GIL
    pool = ThreadPoolExecutor(workers, thread_name_prefix="distcls-decode")
    waiting: deque[Future[Loaded]] = deque()
    try:
        for record, copy in islice(tasks, 2 * workers):
            waiting.append(pool.submit(load, source, record, copy))
        while waiting:
            loaded = result_of(waiting[0])
            waiting.popleft()
            for record, copy in islice(tasks, 1):
                waiting.append(pool.submit(load, source, record, copy))
            yield loaded
            del loaded  # a large one makes room for the next
    except BaseException as error:
        leave(pool, waiting, error)
        raise
    pool.shutdown()


def load(source: ImageSource, record: ImageRecord, copy: Path | None) -> Loaded:
    """One image, and its copy as PNG; a bad one is returned, not raised."""
    if not is_text(record.image_id):
        return BadImage(NO_TEXT)
    pixels: Images
    uniform = source.uniform
    if uniform is not None and uniform.shape[-1] == 1:
        pixels = source.rows([record.index])[0, ..., 0]  # grey as it is
    else:
        try:
            pixels = source.image(record.index)
        except BadImage as error:
            return error
        except MachineError as error:
            raise MachineError(f"{record.image_id}: {error}") from error
    if copy is not None:
        write_png(copy, pixels)
    return pixels


def write_png(path: Path, pixels: NDArray[np.uint8]) -> None:
    """Write uint8 [height, width] or RGB [height, width, 3]. Raises OSError if it cannot be."""
    ordered = pixels if pixels.ndim == 2 else pixels[..., ::-1]
    _, data = cv2.imencode(".png", np.ascontiguousarray(ordered))
    path.write_bytes(data.tobytes())


_CHUNK = 1 << 24


class PackWriter:
    """Appends images to a file; grey while all are grey, RGB from the first coloured one on.

    Gives up, and removes the file, once it would hold more than `most_bytes` or `most_pixels`.
    """

    def __init__(
        self, path: Path, *, most_bytes: float = math.inf, most_pixels: float = math.inf
    ) -> None:
        self.channels = 1
        self.shapes: list[tuple[int, int]] = []
        """Height and width of each image, in the order they were added."""
        self._path = path
        self._most_bytes = most_bytes
        self._most_pixels = most_pixels
        self.pixels = 0
        """Height times width, summed over the images."""
        self._file = path.open("wb")
        self._abandoned = False

    def __enter__(self) -> PackWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    @property
    def abandoned(self) -> bool:
        """Whether the images turned out too many or too large to be packed."""
        return self._abandoned

    @property
    def size(self) -> int:
        """Bytes of the pack."""
        return self.pixels * self.channels

    def add(self, pixels: NDArray[np.uint8]) -> None:
        """Append one image, [height, width] or RGB [height, width, 3]."""
        if self._abandoned:
            return
        if self.channels == 1 and pixels.ndim == 3:
            if is_grey(pixels):
                pixels = pixels[..., 0]
            else:
                self._widen()
        elif self.channels == 3 and pixels.ndim == 2:
            pixels = np.repeat(pixels[..., None], 3, axis=-1)
        self.shapes.append((pixels.shape[0], pixels.shape[1]))
        self.pixels += pixels.shape[0] * pixels.shape[1]
        if self.size > self._most_bytes or self.pixels > self._most_pixels:
            self.abandon()
        else:
            self._file.write(np.ascontiguousarray(pixels).data)

    def offsets(self) -> list[int]:
        """Where each image starts, in bytes."""
        sizes = [height * width * self.channels for height, width in self.shapes]
        return [0, *np.cumsum(sizes, dtype=np.int64).tolist()][: len(sizes)]

    def abandon(self) -> None:
        """Remove the file; images added later are ignored."""
        self._abandoned = True
        self._file.close()
        self._path.unlink()

    def _widen(self) -> None:
        """Convert the images written so far from grey to RGB."""
        self.channels = 3
        self._file.close()
        wide = self._path.with_name(self._path.name + ".rgb")
        with self._path.open("rb") as grey, wide.open("wb") as out:
            while chunk := grey.read(_CHUNK):
                out.write(np.repeat(np.frombuffer(chunk, np.uint8), 3).data)
        wide.replace(self._path)
        self._file = self._path.open("ab")


def is_grey(pixels: NDArray[np.uint8]) -> bool:
    """Whether the three channels of [height, width, 3] are equal."""
    red = pixels[..., 0]
    return bool((red == pixels[..., 1]).all() and (red == pixels[..., 2]).all())


REJECTED = "rejected.csv"
NEAR = 2
"""Folders that a relative path to the images goes up at most."""


def manifest_schema() -> pa.Schema:
    """The columns that every manifest.parquet has; see `distcls.data.columns.COLUMNS`."""
    import pyarrow as pa  # an extra of the inference install

    types = {"label": pa.int32(), "offset": pa.int64()}
    types |= dict.fromkeys(("height", "width", "channels"), pa.int32())
    return pa.schema(
        [
            pa.field(name, types.get(name, pa.string()), nullable=name not in _REQUIRED)
            for name in COLUMNS
        ]
    )


def write_manifest(
    folder: Path,
    assignment: SplitAssignment,
    pack: PackWriter | None,
    paths: list[str | None],
    kept: ManifestColumns | None,
) -> None:
    """Write the manifest. The pack's images are those of `assignment`, in its order.

    `kept` are other columns that it gets, by the records' `index`.

    Rows are ordered by split. Where an image had to change its split they are then in another order
    than the pack, and `Split.uniform` is None; everything else works.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    order = sorted(range(len(assignment)), key=lambda index: SPLITS.index(assignment.splits[index]))
    records = assignment.records
    nothing: list[Any] = [None] * len(assignment)
    columns: dict[str, list[Any]] = {
        "image_id": [record.image_id for record in records],
        "path": list(paths),
        "label": [record.label for record in records],
        "split": assignment.splits,
        "offset": pack.offsets() if pack else nothing,
        "height": [height for height, _ in pack.shapes] if pack else nothing,
        "width": [width for _, width in pack.shapes] if pack else nothing,
        "channels": [pack.channels] * len(assignment) if pack else nothing,
    }
    schema = manifest_schema()
    if any(record.weight is not None for record in records):
        schema = schema.append(pa.field("weight", pa.float64()))
        columns["weight"] = [record.weight for record in records]
    if any(record.group is not None for record in records):
        schema = schema.append(pa.field("group", pa.string()))
        columns["group"] = [record.group for record in records]
    if any(record.labels is not None for record in records):
        schema = schema.append(pa.field(LABELS, pa.list_(pa.int32()), nullable=False))
        columns[LABELS] = [list(record.labels or ()) for record in records]
    ordered = {name: [values[index] for index in order] for name, values in columns.items()}
    table = pa.table(ordered, schema=schema)
    if kept is not None:
        others = kept.take([records[place].index for place in order])
        for name in others.column_names:
            table = table.append_column(name, others.column(name))
    pq.write_table(table, folder / MANIFEST)


def write_info(
    folder: Path,
    source: LabelledImages,
    assignment: SplitAssignment,
    pack: PackWriter | None,
    *,
    root: str | None,
    relative: str | None,
    rejected: int,
    left_out: dict[str, int],
    background: Color | None,
    transparent: int,
    repeated: dict[str, int],
    options: dict[str, Any],
) -> dict[str, Any]:
    """Write classes.json and dataset.json; return the latter. Manifest and pack must be there."""
    # plain writes: the folder is renamed into place as a whole
    _write_json(folder / CLASSES, source.task.to_json())
    hashed = [CLASSES, MANIFEST, PACK] if pack else [CLASSES, MANIFEST]
    info: dict[str, Any] = {
        "format": FORMAT,
        "kind": source.format,
        "source": source.location,
        "source_fingerprint": source.source.fingerprint(),
        "root": root,
        "relative_root": relative,
        "packed": pack is not None,
        "pack_bytes": pack.size if pack else 0,
        "counts": {
            name: assignment.splits.count(name) for name in SPLITS if name in assignment.splits
        },
        "class_counts": _class_counts(source, assignment),
        "rejected": rejected,
        "left_out": left_out,
        "background": background,
        "transparent": transparent,
        "repeated": repeated,
        "seed": options["seed"],
        "options": options,
        "sha256": {name: digest(folder / name) for name in hashed},
        "version": __version__,
    }
    return _write_info(folder, info)


def _write_info(folder: Path, info: dict[str, Any]) -> dict[str, Any]:
    """Write dataset.json with its own digest; what was written. The pack needs no other look."""
    info = sealed(info, INFO)
    _write_json(folder / INFO, info)
    if info["packed"] and PACK in info["sha256"]:
        remember_pack(folder / PACK, info["sha256"][PACK])
    return info


def write_rejected(folder: Path, rejected: Sequence[Rejected], root: Path | None) -> None:
    """Write rejected.csv, with its header alone if nothing was rejected."""
    path = folder / REJECTED
    with path.open("w", encoding="utf-8", errors="backslashreplace", newline="") as handle:
        # all quoted: a bare carriage return in a file name would otherwise end the row
        writer = csv.writer(handle, quoting=csv.QUOTE_ALL, lineterminator="\n")
        writer.writerow(("image_id", "path", "reason"))
        for row in rejected:
            where = (root or Path()) / row.path if row.path else ""
            writer.writerow((row.image_id, where, row.reason))


def relative_root(out: Path, root: Path | None) -> str | None:
    """The path from a dataset directory to its images, if they lie below it, beside or near it.

    So both may be moved together.
    """
    if root is None:
        return None
    path = os.path.relpath(root, out.resolve())
    return path if Path(path).parts[: NEAR + 1].count(os.pardir) <= NEAR else None


def write_moved(folder: Path, dataset: Dataset, root: Path, relative: str | None) -> dict[str, Any]:
    """Write the files of a dataset directory once more, its images being below `root`."""
    info = {**dataset.info, "root": str(root), "relative_root": relative}
    if dataset.packed:
        verify_pack(dataset.folder / PACK, info.get("sha256", {}).get(PACK))
    for name in (MANIFEST, CLASSES, PACK, REJECTED):
        if (dataset.folder / name).exists():
            shutil.copyfile(dataset.folder / name, folder / name)
    known = info.get("sha256", {})  # what was damaged before must not be right from now on
    there = [name for name in (CLASSES, MANIFEST, PACK) if (folder / name).exists()]
    info["sha256"] = {name: known.get(name) or digest(folder / name) for name in there}
    return _write_info(folder, info)


def write_resplit(
    folder: Path, dataset: Dataset, splits: Sequence[str], *, seed: int, options: dict[str, Any]
) -> None:
    """Write a dataset directory with the images of another one in other splits, [N].

    Its pack is a link to the other's, its files stay where they are.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    place, column = dataset.table.column_names.index("split"), dataset.table.schema.field("split")
    table = dataset.table.set_column(place, column, pa.array(splits, column.type))
    order = sorted(range(len(splits)), key=lambda index: SPLITS.index(splits[index]))
    pq.write_table(table.take(order), folder / MANIFEST)
    shutil.copyfile(dataset.folder / CLASSES, folder / CLASSES)
    info = {**dataset.info, "seed": seed, "options": options, "relative_root": None}
    if dataset.has_files:
        info["root"] = str(dataset.files_root(str(table.column("path")[0])).resolve())
    # what was counted for the other splits
    info = {key: info[key] for key in info if key not in ("class_counts", "repeated")}
    info["counts"] = {name: splits.count(name) for name in SPLITS if name in splits}
    digests = {name: digest(folder / name) for name in (CLASSES, MANIFEST)}
    if dataset.packed:
        verify_pack(dataset.folder / PACK, dataset.info.get("sha256", {}).get(PACK))
        (folder / PACK).symlink_to((dataset.folder / PACK).resolve())
        verified = info.get("sha256", {}).get(PACK)
        digests |= {} if verified is None else {PACK: verified}
    _write_info(folder, {**info, "sha256": digests})


def copy_paths(source: LabelledImages, assignment: SplitAssignment) -> list[str]:
    """Path of each image under --write-images: images/SPLIT/CLASS/ID.png."""
    folders = safe_names(source.classes)
    by_class: dict[int, list[int]] = defaultdict(list)
    for index, record in enumerate(assignment.records):
        by_class[record.label].append(index)
    paths = [""] * len(assignment)
    for label, indices in by_class.items():
        # distinct in the class, so that an image may still change its split
        names = safe_names(assignment.records[index].image_id for index in indices)
        for index, name in zip(indices, names, strict=True):
            paths[index] = f"images/{assignment.splits[index]}/{folders[label]}/{name}.png"
    return paths


def move_copies(
    folder: Path, paths: Sequence[str], before: SplitAssignment, after: SplitAssignment
) -> list[str]:
    """Follow images that changed their split; the paths as they are now."""
    moved = []
    for path, old, new in zip(paths, before.splits, after.splits, strict=True):
        target = path.replace(f"images/{old}/", f"images/{new}/", 1)
        if target != path:
            (folder / target).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).rename(folder / target)
        moved.append(target)
    return moved


def _class_counts(source: LabelledImages, assignment: SplitAssignment) -> dict[str, dict[str, int]]:
    counts: dict[str, dict[str, int]] = {name: {} for name in source.classes}
    for record, split in zip(assignment.records, assignment.splits, strict=True):
        for place in source.positions(record):
            row = counts[source.classes[place]]
            row[split] = row.get(split, 0) + 1
    return counts


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

"""A dataset directory, opened: each split is an `ImageSource`, from a pack or from files.

manifest.parquet   image_id, path, label, split; where packed: offset, height, width, channels
classes.json       class names in label order; or the task, with its heads or labels
dataset.json       source, root of the paths (absolute or from here), relative_root (the same from
                   here, where near), counts, hashes, version
pack.bin           decoded uint8 images, one after the other (optional)

The pack is a custom format because it is read through one memory map: a batch of images of one
size is one gather of rows, where the cells of Parquet, LMDB or tar are copied one by one.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import os
import re
import shlex
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from distcls import log, stored
from distcls.data.columns import COLUMNS, LABELS, kept_names
from distcls.data.integrity import (
    Rows,
    read_info,
    read_json,
    read_manifest,
    require_digest,
    verify_pack,
)
from distcls.data.source import SPLITS, Images, ImageSource, Names, state_of, to_rgb
from distcls.errors import (
    BadImage,
    BadValue,
    DistclsError,
    MachineError,
    UsageError,
    did_you_mean,
)
from distcls.files import require_distinct, require_outside
from distcls.imaging import Color, decode_file
from distcls.imaging.decode import Downscale
from distcls.imaging.preprocess import background_text
from distcls.imaging.reading import read_file
from distcls.task import Task

Value = TypeVar("Value")

if TYPE_CHECKING:
    import pyarrow as pa

FORMAT = 1
IN_RUN = "dataset"
"""Folder in a run directory with the dataset that the run prepared."""
MANIFEST, CLASSES, INFO, PACK = "manifest.parquet", "classes.json", "dataset.json", "pack.bin"


def read_labels(table: pa.Table, task: Task, where: Path) -> NDArray[np.int64]:
    """Class in each head, int64 [N, heads]; or 0 and 1 for each label, int64 [N, labels].

    Raises UsageError, naming `where` and the image, for numbers that are no class and for rows of
    the wrong length.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    column = table.column(LABELS)
    lists = pa.types.is_list(column.type) and pa.types.is_integer(column.type.value_type)
    values = pc.list_flatten(column) if lists else None
    if values is None or column.null_count or values.null_count:
        raise UsageError(
            f"{where}: column {LABELS!r} holds {column.type}, expected lists of whole numbers, no "
            "null"
        )
    lengths = np.asarray(pc.list_value_length(column).to_numpy(), np.int64)
    flat = np.asarray(values.to_numpy(), np.int64)
    rows = np.repeat(np.arange(len(lengths)), lengths)
    heads = len(task.heads)
    if heads and (lengths != heads).any():
        row = int(np.flatnonzero(lengths != heads)[0])
        raise UsageError(f"{_name(table, row, where)} {lengths[row]} labels for {heads} heads")
    places = np.arange(len(flat)) % heads if heads else np.zeros(len(flat), np.int64)
    limits = np.array([span.stop - span.start for span in task.slices])[places]
    bad = np.flatnonzero((flat < 0) | (flat >= limits))
    if len(bad):
        row, label = int(rows[bad[0]]), int(flat[bad[0]])
        raise UsageError(f"{_name(table, row, where)} label {label}, which is not a class")
    if heads:
        return flat.reshape(-1, heads)
    given = np.zeros((len(lengths), len(task.classes)), np.int64)
    given[rows, flat] = 1
    return given


def _name(table: pa.Table, row: int, where: Path) -> str:
    return f"{where}: row {row}, {table.column('image_id')[row].as_py()!r} has"


@dataclasses.dataclass(frozen=True)
class Split(ImageSource):
    """The images of one split, in manifest order."""

    name: str
    folder: Path
    root: Path
    table: pa.Table
    packed: bool
    task: Task
    """The task of its labels."""
    background: Color | None = None
    """The colour that transparent pixels are blended with, in the pack or when a file is read; None
    ignores alpha."""
    transparent: bool = False
    """Whether some of the dataset's images may have transparent pixels."""

    def __len__(self) -> int:
        """Number of images."""
        return int(self.table.num_rows)

    @functools.cached_property
    def image_ids(self) -> list[str]:
        """See `ImageSource`; unique in the dataset."""
        return list(self.table.column("image_id").to_pylist())

    @functools.cached_property
    def labels(self) -> NDArray[np.int64]:
        """Class index of each image [N]; in each head [N, heads]; or 0 and 1 [N, labels].

        Raises UsageError for labels that are none.
        """
        if self.task.single:
            return np.asarray(self.table.column("label").to_numpy(), np.int64)
        return read_labels(self.table, self.task, self.folder / MANIFEST)

    @functools.cached_property
    def true_labels(self) -> list[str]:
        """See `ImageSource`."""
        if self.task.single:
            return [self.task.classes[label] for label in self.labels]
        return self.task.texts(self.labels)

    @property
    def kept(self) -> pa.Table:
        """The columns of the manifest that `prepare` kept, [N]; see `distcls.data.columns`."""
        return self.table.select(kept_names(self.table))

    @functools.cached_property
    def weights(self) -> NDArray[np.float64] | None:
        """How much each image counts in training, [N]; None if the manifest has no weights.

        Raises UsageError for a weight below 0 or none at all.
        """
        if "weight" not in self.table.column_names:
            return None
        import pyarrow as pa

        column = self.table.column("weight")
        if not (pa.types.is_floating(column.type) or pa.types.is_integer(column.type)):
            where = self.folder / MANIFEST
            raise UsageError(f"{where}: column 'weight' holds {column.type}, expected numbers")
        weights = np.asarray(column.to_numpy(), np.float64)
        bad = np.flatnonzero(~(np.isfinite(weights) & (weights >= 0)))
        if len(bad):
            where, weight = self.image_ids[bad[0]], weights[bad[0]]
            raise UsageError(
                f"{self.folder / MANIFEST}: {where!r} has the weight {weight}, expected a number "
                "of at least 0"
            )
        return weights

    def first(self, count: int | None) -> Split:
        """The first images of the split; all of them for None."""
        return (
            self if count is None else dataclasses.replace(self, table=self.table.slice(0, count))
        )

    def relabelled(self, labels: NDArray[np.int64], task: Task, kept: NDArray[np.bool_]) -> Split:
        """The images that are `kept` [N], with labels of another task.

        `labels` are those of the images that are kept, [n, 1], [n, heads] or 0 and 1 [n, labels].
        """
        import pyarrow as pa

        name, column = "label", pa.array(labels[:, 0], pa.int32())
        if not task.single:
            rows, columns = np.nonzero(labels if task.kind == "multi_label" else labels >= 0)
            values = columns if task.kind == "multi_label" else labels.ravel()
            ends = np.cumsum(np.bincount(rows, minlength=len(labels)))
            offsets = pa.array([0, *ends.tolist()], pa.int32())
            name, column = LABELS, pa.ListArray.from_arrays(offsets, pa.array(values, pa.int32()))
        table = self.table.filter(kept)
        table = table.set_column(table.column_names.index(name), name, column)
        return dataclasses.replace(self, table=table, task=task)

    @functools.cached_property
    def uniform(self) -> Images | None:
        """See `ImageSource`: a view [N, H, W, 1 or 3] of the pack.

        There is one if they have one shape and lie one after the other, so a batch is one gather.
        """
        if not self.packed or not len(self):
            return None
        offsets, shapes = self._places
        size = int(np.prod(shapes[0]))
        if (shapes != shapes[0]).any() or (np.diff(offsets) != size).any():
            return None
        flat = self._pack[offsets[0] : offsets[0] + size * len(self)]
        return flat.reshape(len(self), *shapes[0])

    def rows(self, indices: Sequence[int] | NDArray[np.int64]) -> Images:
        """See `ImageSource`; 1.5 us an image of 28x28 in random order, of the mapping 0.15."""
        places = np.asarray(indices, np.int64)
        offsets, shapes = self._places
        found = np.empty((len(places), *shapes[0]), np.uint8)
        if not len(places):
            return found
        size = found[0].nbytes
        flat = found.reshape(-1).data
        starts = [0, *(np.flatnonzero(np.diff(places) != 1) + 1).tolist(), len(places)]
        for start, stop in itertools.pairwise(starts):  # images that lie one after the other
            self._pack_file.read(flat[start * size : stop * size], int(offsets[places[start]]))
        return found

    @property
    def encoded(self) -> bool:
        """See `ImageSource`: the images of a pack are decoded."""
        return not self.packed

    def read(self, index: int) -> bytes:
        """See `ImageSource`; BadImage with the file's path."""
        return super().read(index) if self.packed else self._with_path(index, read_file)

    def image(self, index: int, downscale: Downscale | None = None) -> Images:
        """See `ImageSource`; BadImage with the file's path.

        `downscale` is that of `decode`, for files; a pack has its images in full size.
        """
        if not self.packed:
            decoder = functools.partial(
                decode_file, downscale=downscale, background=self.background
            )
            return self._with_path(index, decoder)
        offsets, shapes = self._places
        pixels = np.empty(shapes[index], np.uint8)
        self._pack_file.read(pixels.reshape(-1).data, int(offsets[index]))
        return to_rgb(pixels)

    def on_background(self, color: Color | None) -> Split:
        """See `ImageSource`; warns if its pack was made with another colour."""
        if clash := self.clash(color):
            _warn_of_background(clash)
        same = self.packed or color == self.background
        return self if same else dataclasses.replace(self, background=color)

    def clash(self, color: Color | None) -> str | None:
        """Why its pack does not do for a model with this background; None if it does."""
        if not self.packed or color == self.background or not self.transparent:
            return None
        own, other = background_text(self.background), background_text(color)
        return (
            f"background {other}: {self.folder / PACK} was made with {own} for transparent images; "
            f"prepare it again with --background {other}"
        )

    def state(self) -> str:
        """See `ImageSource`: sizes and times of the files that the split is read from."""
        files = [self.folder / name for name in (MANIFEST, CLASSES)]
        if self.packed:
            files.append(self.folder / PACK)
        else:
            files += [self.root / path for path in self._paths]
        return state_of(map(str, files))

    def _with_path(self, index: int, read: Callable[[Path], Value]) -> Value:
        path = self.root / self._paths[index]
        try:
            return read(path)
        except (BadImage, MachineError) as error:
            raise type(error)(f"{path}: {error}") from error

    @functools.cached_property
    def _pack(self) -> NDArray[np.uint8]:
        try:
            return np.memmap(self.folder / PACK, np.uint8, mode="r")
        except OSError as error:  # it was there when the dataset was opened
            path, reason = self.folder / PACK, error.strerror or error
            raise DistclsError(f"{path}: cannot be read any more: {reason}") from error

    @functools.cached_property
    def _pack_file(self) -> _PackFile:
        return _PackFile(self.folder / PACK)

    @functools.cached_property
    def _places(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        columns = (self.table.column(name).to_numpy() for name in ("height", "width", "channels"))
        shapes = np.stack([np.asarray(column, np.int64) for column in columns], axis=1)
        return np.asarray(self.table.column("offset").to_numpy(), np.int64), shapes

    @functools.cached_property
    def _paths(self) -> list[str]:
        return list(self.table.column("path").to_pylist())


class _PackFile:
    """A pack, read piece by piece from any thread; sent to another process it is opened there."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:  # it was there when the dataset was opened
            reason = error.strerror or error
            raise DistclsError(f"{path}: cannot be read any more: {reason}") from error
        weakref.finalize(self, os.close, self._file)
        self._size = os.fstat(self._file).st_size

    def read(self, into: memoryview, offset: int) -> None:
        """Fill `into` from `offset` on. Raises DistclsError if the file ends before."""
        at = 0
        while at < len(into):
            try:
                count = os.preadv(self._file, [into[at:]], offset + at)
            except OSError as error:
                raise DistclsError(f"{self._path}: cannot be read: {error.strerror}") from error
            if count == 0:
                size = os.fstat(self._file).st_size
                raise DistclsError(
                    f"{self._path} was truncated from {self._size:,} to {size:,} bytes while it "
                    "was read; prepare it again"
                )
            at += count

    def __reduce__(self) -> tuple[type[_PackFile], tuple[Path]]:
        return _PackFile, (self._path,)


def is_dataset(folder: Path) -> bool:
    """Whether it is a dataset directory, whole or damaged."""
    return (folder / INFO).is_file() or (folder / MANIFEST).is_file()


def require_apart(key: str, path: Path, data: Path) -> None:
    """Raise BadValue if the output `path` is what is read, or lies in the folder of it: of a run
    directory that of its dataset."""
    own = data / IN_RUN
    folder = own if is_dataset(own) and not is_dataset(data) else data
    if folder.is_dir():
        require_outside(key, path, folder)
    else:
        require_distinct({key: path}, {"data": [data]})


@dataclasses.dataclass(frozen=True, kw_only=True)
class SplitFingerprint:
    """The rows of a split in their order, wherever the dataset lies; digests as hexadecimals."""

    images: int
    ids: str
    labels: str
    weights: str | None
    """None without weights."""

    @classmethod
    def of(cls, split: Split) -> SplitFingerprint:
        """That of a split. Raises UsageError for labels or weights that are none."""
        weights = split.weights
        return cls(
            images=len(split),
            ids=Names.of(split.image_ids).digest(),
            labels=_digest_of(split.labels.astype("<i8")),
            weights=None if weights is None else _digest_of(weights.astype("<f8")),
        )

    def differences(self, now: SplitFingerprint, name: str) -> list[str]:
        """How the split `name` has changed, in words."""
        if now.images != self.images:
            return [f"{name} has {now.images:,} images, then {self.images:,}"]
        if now.ids != self.ids:
            order = "other ones, or in another order"
            return [f"{name} has {now.images:,} images as then, but {order}"]
        found = [] if now.labels == self.labels else [f"images of {name} have other labels"]
        return found if now.weights == self.weights else [*found, f"{name} has other weights"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataFingerprint:
    """What training takes from a dataset directory, wherever it lies and whenever it was written.

    The content of images outside a pack is not in it: reading them all would take too long.
    """

    kind: str
    """That of the task."""
    classes: tuple[str, ...]
    train: SplitFingerprint
    val: SplitFingerprint
    pack_bytes: int | None
    """None without a pack."""
    pack: str | None
    """SHA-256 of the pack, where dataset.json has it."""

    @classmethod
    def from_plain(cls, values: Any) -> DataFingerprint:
        """The inverse of `dataclasses.asdict`. Raises ValueError for anything else."""
        values = _fields_of(cls, values)
        for name in ("train", "val"):
            values[name] = SplitFingerprint(**_fields_of(SplitFingerprint, values[name]))
        split_digests = [(s.ids, s.labels, s.weights) for s in (values["train"], values["val"])]
        ids, labels, weights = zip(*split_digests, strict=True)
        counts = [values["train"].images, values["val"].images, values["pack_bytes"] or 0]
        names = values["classes"]
        valid = (
            all(map(_is_digest, (*ids, *labels)))
            and all(each is None or _is_digest(each) for each in (*weights, values["pack"]))
            and all(type(count) is int and 0 <= count < 2**63 for count in counts)
            and isinstance(names, list | tuple)
            and all(isinstance(name, str) for name in (*names, values["kind"]))
        )
        if not valid:
            raise ValueError("a value of the wrong type")
        return cls(**{**values, "classes": tuple(names)})

    def differences(self, now: DataFingerprint) -> list[str]:
        """How the data has changed since this fingerprint, in words; empty if it has not."""
        found = [] if now.kind == self.kind else [f"its task is {now.kind}, was {self.kind}"]
        if now.classes != self.classes:
            found.append(_changed_classes(self.classes, now.classes))
        found += self.train.differences(now.train, "train")
        found += self.val.differences(now.val, "val")
        if self.pack_bytes is not None and now.pack_bytes is not None:
            if now.pack_bytes != self.pack_bytes:
                found.append(f"its pack has {now.pack_bytes:,} bytes, then {self.pack_bytes:,}")
            elif self.pack and now.pack and now.pack != self.pack:
                found.append("its pack holds other pixels")
        return found


def _fields_of(cls: Any, values: Any) -> dict[str, Any]:
    """The values, if they are those of the dataclass's fields and no others; else ValueError."""
    names = {field.name for field in dataclasses.fields(cls)}
    if not isinstance(values, dict) or set(values) != names:
        raise ValueError(f"not the fields {', '.join(sorted(names))}")
    return dict(values)


def _is_digest(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) is not None


def _digest_of(values: NDArray[np.int64] | NDArray[np.float64]) -> str:
    return hashlib.sha256(values.tobytes()).hexdigest()


def _changed_classes(before: Sequence[str], now: Sequence[str]) -> str:
    """Which class names have changed, in words."""
    gone = [name for name in before if name not in set(now)]
    new = [name for name in now if name not in set(before)]
    moved = [pair for pair in zip(before, now, strict=False) if pair[0] != pair[1]]
    if not gone and not new:
        first, second = moved[0]
        return f"its classes are in another order: {_quoted(second)} is where {_quoted(first)} was"
    if len(before) == len(now) and len(moved) == len(gone):
        pairs = [f"{_quoted(second)} was {_quoted(first)}" for first, second in moved]
        return f"its classes have other names: {_some(pairs)}"
    parts = [
        f"{word} {_some([_quoted(name) for name in names])}"
        for word, names in (("without", gone), ("with", new))
        if names
    ]
    return f"its {len(now):,} classes are the previous {len(before):,} {' and '.join(parts)}"


def _quoted(name: str) -> str:
    return repr(name if len(name) <= 40 else f"{name[:40]}...")


def _some(items: Sequence[str], most: int = 5) -> str:
    rest = f" and {len(items) - most:,} more" if len(items) > most else ""
    return ", ".join(items[:most]) + rest


class Dataset:
    """An opened dataset directory."""

    def __init__(self, folder: Path, task: Task, info: dict[str, Any], table: pa.Table) -> None:
        self.folder = folder
        self.task = task
        self.info = info
        self.table = table

    @classmethod
    def open(cls, folder: Path, prepare_flags: str = "") -> Dataset:
        """Open what `distcls prepare` wrote. Raises UsageError if it is not whole, not known, or
        not what its checksums say.

        For images that are no dataset directory the error says what to type, with `prepare_flags`.
        """
        folder = Path(folder)
        if not is_dataset(folder) and is_dataset(folder / IN_RUN):  # a run directory
            folder = folder / IN_RUN
        if not folder.exists():
            raise UsageError(f"{folder}: no such dataset directory; distcls prepare makes one")
        if not is_dataset(folder):
            raise UsageError(
                f"{folder} is not a dataset directory; prepare it: "
                + prepare_command(str(folder), prepare_flags)
            )
        info = read_info(folder / INFO)
        digests = info.get("sha256", {})
        _check_pack(folder, info)
        task = _read_task(folder / CLASSES, digests.get(CLASSES))
        columns = {*COLUMNS} if task.single else {*COLUMNS, LABELS}
        table = read_manifest(folder / MANIFEST, digests.get(MANIFEST), columns)
        rows = Rows(table, folder / MANIFEST)
        size = info["pack_bytes"] if info["packed"] else None
        rows.check(task, SPLITS, size, signed=MANIFEST in digests)
        return cls(folder, task, info, table)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of all classes, of heads as HEAD:CLASS."""
        return self.task.classes

    @property
    def packed(self) -> bool:
        """Whether the decoded images lie in a pack."""
        return bool(self.info["packed"])

    @property
    def has_files(self) -> bool:
        """Whether the images also exist as files of their own."""
        return self.info["root"] is not None

    @property
    def background(self) -> Color | None:
        """What transparent pixels were blended with; None: alpha was ignored, as always
        in directories of earlier versions."""
        color = self.info.get("background")
        return None if color is None else tuple(color)

    def counts(self) -> dict[str, int]:
        """Images per split, for the splits that have any."""
        names = self.table.column("split").to_pylist()
        return {split: names.count(split) for split in SPLITS if split in names}

    def split(self, name: str, *, use_pack: bool | None = None) -> Split:
        """One split. `use_pack` None takes the pack where there is one.

        Raises UsageError for a split that does not exist, a way of reading that is not there, or a
        pack that is not what its checksum says.
        """
        counts = self.counts()
        if name not in counts:
            raise UsageError(f"{self.folder}: no split {name!r}{did_you_mean(name, counts)}")
        packed = self.packed if use_pack is None else use_pack
        if packed and not self.packed:
            raise UsageError(f"{self.folder} has no pack; prepare it again with --pack on")
        if not packed and not self.has_files:
            raise UsageError(f"{self.folder} has its images only in the pack; pack cannot be off")
        if packed:
            verify_pack(self.folder / PACK, self.info.get("sha256", {}).get(PACK))
        rows = np.asarray(self.table.column("split").to_numpy(zero_copy_only=False)) == name
        table = self.table.filter(rows)
        root = self.folder if packed else self.files_root(str(table.column("path")[0]))
        return Split(
            name,
            self.folder,
            root,
            table,
            packed,
            self.task,
            background=self.background,
            transparent=bool(self.info.get("transparent", True)),
        )

    def files_root(self, first: str) -> Path:
        """The folder of the images: where they were, or as far from here as they were then.

        Raises UsageError, with the remedy, if it is gone and with it the image `first`.
        """
        before = self.folder / str(self.info["root"])  # an absolute root replaces the folder
        if before.is_dir() or (before / first).exists():
            return before
        near = self.info.get("relative_root")
        if isinstance(near, str) and (self.folder / near / first).exists():
            return self.folder / near
        raise UsageError(
            f"{self.folder}: its images were in {before}, which does not exist; if they have "
            f"moved: distcls prepare {self.folder} --root THEIR_FOLDER --out NEW_DATASET"
        )


@functools.cache
def _warn_of_background(clash: str) -> None:
    log.warn(clash)


def prepare_command(source: str, flags: str = "") -> str:
    """The command that makes a dataset directory of a folder or a manifest, to be typed."""
    out = Path("datasets") / Path(source).resolve().stem
    return shlex.join(["distcls", "prepare", source, "--out", str(out), *flags.split()])


def fingerprint_of(dataset: Dataset, train: Split, val: Split) -> DataFingerprint:
    """The fingerprint of a run's data, from its splits."""
    pack = dataset.info.get("sha256", {}).get(PACK)
    return DataFingerprint(
        kind=dataset.task.kind,
        classes=dataset.classes,
        train=SplitFingerprint.of(train),
        val=SplitFingerprint.of(val),
        pack_bytes=int(dataset.info["pack_bytes"]) if dataset.packed else None,
        pack=pack if dataset.packed else None,
    )


def _check_pack(folder: Path, info: dict[str, Any]) -> None:
    if not info["packed"]:
        return
    size = (folder / PACK).stat().st_size if (folder / PACK).is_file() else 0
    if size != info["pack_bytes"]:
        raise UsageError(
            f"{folder / PACK}: {size} bytes, expected {info['pack_bytes']}; prepare it again"
        )


def _read_task(path: Path, expected: str | None) -> Task:
    try:
        task = Task.from_json(read_json(path))
    except (stored.Unfit, BadValue) as error:
        raise UsageError(
            f"{path}: neither names of classes nor heads or labels: {error}"
        ) from error
    if expected is not None:
        require_digest(path, stored.read_bytes(path), expected)
    return task

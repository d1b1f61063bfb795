"""`open_dataset` and `ImageDataset`: labelled images for programs, of whatever `prepare` reads."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, SupportsIndex, overload

import numpy as np

from distcls import log
from distcls.cli import import_pandas, packages_for
from distcls.config import build, options_layer
from distcls.data.columns import LABELS, ManifestColumns, kept_names
from distcls.data.dataset import (
    IN_RUN,
    MANIFEST,
    Dataset,
    Split,
    is_dataset,
    prepare_command,
    read_labels,
)
from distcls.data.formats.detect import open_labelled
from distcls.data.prepare import PrepareOptions, prepare
from distcls.data.source import (
    SPLITS,
    ImageRecord,
    Images,
    ImageSource,
    as_text,
    is_text,
    read_class_names,
    require_text,
)
from distcls.errors import BadImage, MachineError, UsageError, did_you_mean, shown
from distcls.files import given_path
from distcls.imaging.preprocess import background_color
from distcls.task import Task

if TYPE_CHECKING:
    import pandas
    import pyarrow as pa

StrPath = str | os.PathLike[str]

READING = (
    *("format", "classes", "splits", "path_column", "label_column", "root", "weight_column"),
    *("label_columns", "text_column", "labels_column", "separator", "keep_columns", "background"),
)
"""The options of `distcls prepare` that say how images and labels are read."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Example:
    """One labelled image of an `ImageDataset`. Nothing is read before `image` is called."""

    image_id: str
    """The image's name, unique in the dataset: of a folder's image the path below the folder."""
    label: str
    """The class; the classes of all heads, or the labels, as `Prediction.label` has them."""
    labels: tuple[str, ...]
    """The class, the class of each head, or all labels, none or more."""
    target: int | tuple[int, ...]
    """Index of the class in `ImageDataset.classes`; multi-head: the class in each head;
    multi-label: 0 or 1 for each label."""
    split: str | None
    """train, val or test; None where the images are not divided."""
    path: Path | None
    """The image's file; None where it is none, such as in tar shards."""
    weight: float | None
    """How much the image counts in training; None without weights."""
    group: str | None
    """Images of one group (a patient, a scene) are in one split; None without groups."""
    _read: Callable[[], Images]
    _columns: Callable[[], dict[str, Any]]

    @property
    def columns(self) -> dict[str, Any]:
        """The values of the manifest's other columns: texts, numbers, true or false; None where
        there is none. See `keep_columns` of `distcls prepare`."""
        return self._columns()

    def image(self) -> Images:
        """The decoded image, uint8 [height, width, 3] in RGB, read anew at each call.

        Transparent pixels are blended with the dataset's background. Raises BadImage, with the
        image's name, if it cannot be read or decoded.
        """
        try:
            return self._read()
        except (BadImage, MachineError) as error:
            name = "" if self.image_id in str(error) else f"{self.image_id}: "
            raise type(error)(f"{name}{error}") from error

    def __repr__(self) -> str:
        split = "" if self.split is None else f", split={self.split!r}"
        return f"Example({self.image_id!r}, label={self.label!r}{split})"


class ImageDataset(Sequence[Example]):
    """Labelled images, as `open_dataset` returns them: a sequence of `Example`.

    `len`, iteration, an index and slices work as those of a list; a slice is an `ImageDataset`. The
    images themselves stay on the disk. May be used by any number of threads, and is pickled for
    other processes, such as a DataLoader's workers, without any image.
    """

    def __init__(
        self,
        records: Sequence[ImageRecord],
        sources: Sources,
        *,
        task: Task,
        location: str,
        root: Path | None,
        left_out: int = 0,
        directory: Dataset | None = None,
    ) -> None:
        """`sources` has the source of each split, in which a record's index counts; `root` is the
        folder of the records' paths."""
        self._records = records
        self._sources = sources
        self._root = root
        self._directory = directory
        self.task = task
        """The task: single-label, multi-head or multi-label, and its classes."""
        self.location = location
        """The path that was opened."""
        self.left_out = left_out
        """Files that were found and are not in it: without a label, unreadable, or no image."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names; the index is that of the label. Of heads as HEAD:CLASS."""
        return self.task.classes

    @property
    def splits(self) -> dict[str, int]:
        """Number of images of each split; empty where the images are not divided."""
        names = [record.split for record in self._records]
        return {name: names.count(name) for name in SPLITS if name in names}

    def split(self, name: str) -> ImageDataset:
        """The images of one split: train, val or test. Raises UsageError if there are none."""
        chosen = [record for record in self._records if record.split == name]
        if not chosen:
            hint = did_you_mean(str(name), self.splits) or "; its images are not divided"
            raise UsageError(f"{self.location}: no split {name!r}{hint}")
        return self._of(chosen)

    def to_dataframe(self) -> pandas.DataFrame:
        """The manifest as a pandas DataFrame: a row for each image, which is not read.

        The columns are image_id, path, label, of heads label:HEAD, and split; with weights and
        groups weight and group; then the manifest's other ones. Raises UsageError if pandas is not
        installed.
        """
        make_frame = import_pandas().DataFrame
        examples = list(self)
        columns: dict[str, list[Any]] = {
            "image_id": [example.image_id for example in examples],
            "path": [None if each.path is None else str(each.path) for each in examples],
            "label": [example.label for example in examples],
        }
        for place, head in enumerate(self.task.heads):
            columns[f"label:{head.name}"] = [example.labels[place] for example in examples]
        for name in ("split", "weight", "group"):
            values = [getattr(example, name) for example in examples]
            if name == "split" or any(value is not None for value in values):
                columns[name] = values
        return make_frame(columns | self._column_values())

    def __len__(self) -> int:
        return len(self._records)

    @overload
    def __getitem__(self, index: SupportsIndex) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> ImageDataset: ...
    def __getitem__(self, index: SupportsIndex | slice) -> Example | ImageDataset:
        if isinstance(index, slice):
            return self._of(self._records[index])
        try:
            place = index.__index__()
        except (AttributeError, TypeError):  # arrays and tensors of several numbers have it, too
            raise UsageError(
                f"{shown(index)} is no index of images, expected an integer or a slice; for "
                "several images: [data[i] for i in indices]"
            ) from None
        if not -len(self) <= place < len(self):
            raise IndexError(f"index {place} of {len(self):,} images ({self.location})")
        return self._example(self._records[place])

    def __iter__(self) -> Iterator[Example]:
        return map(self._example, self._records)

    def __repr__(self) -> str:
        splits = "".join(f", {name} {count:,}" for name, count in self.splits.items())
        return (
            f"ImageDataset({self.location!r}, {len(self):,} images, {self.task.summary()}{splits})"
        )

    def _of(self, records: Sequence[ImageRecord]) -> ImageDataset:
        return ImageDataset(
            records,
            self._sources,
            task=self.task,
            location=self.location,
            root=self._root,
            left_out=self.left_out,
            directory=self._directory,
        )

    def _example(self, record: ImageRecord) -> Example:
        task = self.task
        own = (record.label,) if record.labels is None else record.labels
        target: int | tuple[int, ...] = record.label if task.single else own
        if task.kind == "multi_label":
            target = tuple(int(place in own) for place in range(len(task.classes)))
        return Example(
            image_id=record.image_id,
            label=task.text((target,) if isinstance(target, int) else target),
            labels=tuple(task.classes[place] for place in task.flat(own))
            if not task.heads
            else tuple(head.classes[at] for head, at in zip(task.heads, own, strict=True)),
            target=target,
            split=record.split,
            path=None if self._root is None or record.path is None else self._root / record.path,
            weight=record.weight,
            group=record.group,
            _read=functools.partial(self._read, record),
            _columns=functools.partial(self._columns_of, record),
        )

    def _columns_of(self, record: ImageRecord) -> dict[str, Any]:
        kept = self._sources.kept(record.split)
        if kept is None:
            return {}
        return {name: kept.column(name)[record.index].as_py() for name in kept.column_names}

    def _column_values(self) -> dict[str, list[Any]]:
        """The values of the other columns, of each image."""
        places: dict[str | None, list[int]] = {}
        for place, record in enumerate(self._records):
            places.setdefault(record.split if self._directory else None, []).append(place)
        found: dict[str, list[Any]] = {}
        for split, own in places.items():
            kept = self._sources.kept(split)
            if kept is None:
                continue
            taken = kept.take([self._records[place].index for place in own])
            for name in taken.column_names:
                values = found.setdefault(name, [None] * len(self))
                for place, value in zip(own, taken.column(name).to_pylist(), strict=True):
                    values[place] = value
        return found

    def _read(self, record: ImageRecord) -> Images:
        return self._sources(record.split).image(record.index)


def open_dataset(path: StrPath, **options: Any) -> ImageDataset:
    """Open labelled images: a dataset directory, or whatever `distcls prepare` takes.

        data = distcls.open_dataset("photos/")
        print(data.classes, data.splits, len(data))
        for example in data:
            print(example.image_id, example.label, example.image().shape)

    Args:
        path: a dataset directory or a run directory with one; a folder with one folder per class
            (CLASS/*.jpg or SPLIT/CLASS/*.jpg), a folder of IDX files, a CSV or Parquet manifest,
            tar shards, or `digits`, which is bundled with scikit-learn.
        options: how images and labels are read if it is not a dataset directory, as the options of
            `distcls prepare`: `format`, `classes` (a file of class names), `splits`, `path_column`,
            `label_column`, `root`, `weight_column`, `label_columns`, `text_column`,
            `labels_column`, `separator`, `keep_columns` and `background`.

    Returns:
        The images, of which none is read yet.

    Raises:
        UsageError: for a path that is not there, images without labels, wrong labels, an unknown
            option or a wrong value.
    """
    location = given_path(path, "data")
    unknown = next((name for name in options if name not in READING), None)
    if unknown is not None:
        raise UsageError(f"options: unknown key {unknown!r}{did_you_mean(unknown, READING)}")
    folder = Path(location)
    with packages_for(location), log.hushed():
        if is_dataset(folder) or is_dataset(folder / IN_RUN):
            if options:
                name, value = next(iter(options.items()))
                raise UsageError(
                    f"{name}: {value!r} is for images, {location} is a dataset directory"
                )
            return _of_directory(Dataset.open(folder), location)
        return _of_source(location, options)


def prepare_dataset(source: StrPath, out: StrPath, **options: Any) -> ImageDataset:
    """Write a dataset directory, as `distcls prepare` does, and open it.

        data = distcls.prepare_dataset("photos/", "datasets/photos", val_fraction=0.2)
        result = distcls.fit(data=data.location)

    Args:
        source: whatever `open_dataset` takes but a dataset directory.
        out: the dataset directory to write, which must not exist.
        options: the options of `distcls prepare`, such as `val_fraction`, `test_fraction` (1 for a
            test set), `seed`, `limit`, `pack` or `quiet`.

    Returns:
        The images of the new directory.

    Raises:
        UsageError: for a source or a folder that cannot work, an unknown option or a wrong value.
        DistclsError: if writing fails, such as on a full disk.
    """
    given = {"source": given_path(source, "source"), "out": given_path(out, "out"), **options}
    parsed = build(PrepareOptions, options_layer(PrepareOptions, given))
    with packages_for(parsed.source), log.hushed(parsed.quiet):
        prepare(parsed)
        return _of_directory(Dataset.open(parsed.out), str(parsed.out))


def split_of(data: ImageDataset, name: str | None) -> Split:
    """The images of `data` in one split as an image source; by default in its only one, or test.

    Raises UsageError for images of no dataset directory, and where there is none of that split.
    """
    if data._directory is None:
        raise UsageError(
            f"{data.location} is not a dataset directory; for a test set of all its images: "
            f"distcls.prepare_dataset({data.location!r}, OUT, test_fraction=1)"
        )
    splits = data.splits
    name = name or (next(iter(splits)) if len(splits) == 1 else "test")
    indices = [record.index for record in data.split(name)._records]
    whole = data._directory.split(name)
    return dataclasses.replace(whole, table=whole.table.take(indices))


def split_of_files(location: Path, name: str) -> Split:
    """The labelled image files of class folders, or of a manifest, as a split; nothing is written.

    Where the source says which images are for testing and so on, those of `name`, else all for
    test. Raises UsageError for images that are no files of their own, and for another split.
    """
    import pyarrow as pa

    from distcls.data.writer import manifest_schema

    found = open_labelled(str(location))
    if found.format != "folder" and found.rejected:
        first = found.rejected[0]
        log.warn(
            f"{location}: {log.counted(len(found.rejected), 'image')} left out, first "
            f"{first.image_id}: {first.reason}"
        )
    require_text(found.location, found.classes)
    root = found.root
    if root is None or any(record.path is None for record in found.records):
        command = prepare_command(str(location), "--test-fraction 1")
        raise UsageError(
            f"{location}: its images are no files; make a dataset directory: {command}"
        )
    named = {record.split for record in found.records if record.split is not None}
    records = [record for record in found.records if record.split == name or not named]
    if not records or (not named and name != "test"):
        choices = sorted(named) or ["test"]
        raise UsageError(f"{location}: no split {name!r}{did_you_mean(name, choices)}")
    schema = manifest_schema().append(pa.field("group", pa.string()))
    columns: dict[str, list[Any]] = dict.fromkeys(schema.names, [None] * len(records))
    if unnamed := [each for each in records if not is_text(f"{each.image_id}{each.path}")]:
        raise UsageError(
            f"{location}: {log.counted(len(unnamed), 'image')} with a name that is not UTF-8, "
            f"first {as_text(unnamed[0].image_id)}; rename or remove them"
        )
    for column in ("image_id", "path", "label", "group"):
        columns[column] = [getattr(record, column) for record in records]
    columns["split"] = [name] * len(records)
    if not found.task.single:
        schema = schema.append(pa.field(LABELS, pa.list_(pa.int32())))
        columns[LABELS] = [list(record.labels or ()) for record in records]
    table = pa.table(columns, schema=schema)
    if found.columns is not None:
        kept = found.columns.take([record.index for record in records])
        for column in kept.column_names:
            table = table.append_column(column, kept.column(column))
    return Split(name, location, root, table, False, found.task, transparent=True)


class Opened(NamedTuple):
    """What an `ImageDataset` reads its images from."""

    records: Sequence[ImageRecord]
    """The index of a record counts in the source of its split."""
    source_of: Callable[[str | None], ImageSource]
    root: Path | None
    """The folder that the records' paths start from; None where the images are no files."""
    directory: Dataset | None
    columns: Callable[[], dict[str, list[Any]]]
    """Reads the manifest's other columns: the values of each record."""


def opened(data: ImageDataset) -> Opened:
    """The records and sources of a dataset, for commands that read the files themselves."""
    return Opened(data._records, data._sources, data._root, data._directory, data._column_values)


class Sources(Protocol):
    """The images of a dataset, by split."""

    def __call__(self, split: str | None) -> ImageSource:
        """Those of a split, as a source."""

    def kept(self, split: str | None) -> pa.Table | None:
        """The manifest's other columns, of each image of that source."""


@dataclasses.dataclass(frozen=True)
class _OnlySource:
    """The source of images that are not divided."""

    source: ImageSource
    columns: ManifestColumns | None

    def __call__(self, split: str | None) -> ImageSource:
        return self.source

    def kept(self, split: str | None) -> pa.Table | None:
        return None if self.columns is None else self.columns.table


class _SplitSources:
    """The sources of a dataset directory, by split; each process opens its own."""

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset
        self._opened: dict[str, Split] = {}
        self._kept: dict[str, pa.Table] = {}

    def __call__(self, split: str | None) -> ImageSource:
        name = str(split)
        if name not in self._opened:
            self._opened[name] = self._dataset.split(name)
        return self._opened[name]

    def kept(self, split: str | None) -> pa.Table | None:
        """Without opening the images of the split."""
        name, table = str(split), self._dataset.table
        if name not in self._kept:
            rows = np.asarray(table.column("split").to_numpy(zero_copy_only=False)) == name
            self._kept[name] = table.select(kept_names(table)).filter(rows)
        return self._kept[name]

    def __reduce__(self) -> tuple[Any, ...]:
        return _SplitSources, (self._dataset,)


def _of_source(location: str, options: Mapping[str, Any]) -> ImageDataset:
    given = {**options, "source": location, "out": "."}
    parsed = build(PrepareOptions, options_layer(PrepareOptions, given))
    classes = None if parsed.classes is None else read_class_names(parsed.classes)
    labels = parsed.label_options(classes)
    found = open_labelled(location, parsed.format, labels, parsed.opening)
    source = found.source.on_background(background_color(parsed.background))
    return ImageDataset(
        found.records,
        _OnlySource(source, found.columns),
        task=found.task,
        location=location,
        root=found.root,
        left_out=len(found.source.left_out) + len(found.rejected),
    )


def _of_directory(dataset: Dataset, location: str) -> ImageDataset:
    table, task = dataset.table, dataset.task
    names = ("image_id", "path", "label", "split", "weight", "group", LABELS)
    absent = [None] * table.num_rows
    ids, paths, labels, splits, weights, groups, several = (
        table.column(name).to_pylist() if name in table.column_names else absent for name in names
    )
    if not task.single:
        read_labels(table, task, dataset.folder / MANIFEST)  # raises for what is no label
    counted = dict.fromkeys(splits, 0)
    records = []
    for values in zip(ids, paths, labels, splits, weights, groups, several, strict=True):
        image_id, path, label, split, weight, group, own = values
        records.append(
            ImageRecord(
                index=counted[split],
                image_id=image_id,
                label=label,
                split=split,
                path=path,
                weight=weight,
                group=group,
                labels=None if own is None else tuple(own),
            )
        )
        counted[split] += 1
    left_out = dataset.info.get("rejected", 0) + sum(dataset.info.get("left_out", {}).values())
    return ImageDataset(
        records,
        _SplitSources(dataset),
        task=task,
        location=location,
        root=_files_of(dataset, paths),
        left_out=left_out,
        directory=dataset,
    )


def _files_of(dataset: Dataset, paths: Sequence[str | None]) -> Path | None:
    """The folder of the images' files; None where there are none, or a pack and they are gone."""
    first = next((path for path in paths if path is not None), None)
    if not dataset.has_files or first is None:
        return None
    try:
        return dataset.files_root(first)
    except UsageError:
        if not dataset.packed:
            raise
        return None

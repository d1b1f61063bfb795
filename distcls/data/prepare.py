"""`distcls prepare`: from a source to a dataset directory."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from distcls import log
from distcls.config import bare, positional
from distcls.data import writer
from distcls.data.dataset import INFO, PACK, Dataset
from distcls.data.formats.detect import format_names, open_labelled
from distcls.data.formats.folder import by_ending, ending_of_name
from distcls.data.source import (
    ImageSource,
    LabelledImages,
    LabelOptions,
    OpenOptions,
    Rejected,
    most_bad,
    read_class_names,
    require_fraction,
    require_text,
    with_decoder,
)
from distcls.data.split import (
    Resampling,
    SplitAssignment,
    check_training_images,
    conflicts,
    for_evaluation,
    repeated_in_training,
    require_one_way,
    restore_training_images,
    split_images,
    untrained_classes,
)
from distcls.data.writer import PackWriter, load_all
from distcls.errors import BadImage, BadValue, UsageError, require
from distcls.files import atomic_folder
from distcls.imaging import Color, decode
from distcls.imaging.decode import may_be_transparent
from distcls.imaging.preprocess import (
    WHITE,
    Background,
    background_color,
    background_text,
    require_color,
)
from distcls.task import class_list, same_names

DIGESTED_WHOLE = 100_000
"""Values of an image up to which all of them are digested."""
VAL_FRACTION, TEST_FRACTION = 0.1, 0.2
"""Defaults of `val_fraction` and `test_fraction`."""
MAX_BAD = 0.1
"""Default of `max_bad`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrepareOptions:
    """Options of `distcls prepare`."""

    source: str = positional()
    """`digits` (bundled with scikit-learn), a folder of IDX files (MNIST, FashionMNIST), a folder
    with one folder per class, a CSV or Parquet manifest, or tar shards with KEY.cls labels."""
    out: Path
    """Dataset directory to write; it must not exist."""
    format: str = "auto"
    """Format of the source: auto (detects it), digits, idx, mnist, fashion-mnist, folder, manifest,
    tar, or one of your own that DISTCLS_IMPORT registers. mnist and fashion-mnist verify the
    published MD5 checksums, idx does not."""
    classes: Path | None = None
    """File of class names in label order (JSON list, or one per line); other labels are errors."""
    splits: tuple[str, ...] = ()
    """Folder trees: the folder of each split, as in train=seg_train,test=seg_test/images (a split
    may have two); none: all folders are classes. By default the names of the folders decide;
    ambiguous ones are refused."""
    path_column: str | None = None
    """Column of the manifest with the path of each image; default: the first of path, file,
    filename, file_name, image, image_id."""
    label_column: str | None = None
    """Column of the manifest with the class of each image; default: the first of label, class,
    category, target."""
    root: Path | None = None
    """Folder that relative paths of a manifest start from; default: that of the manifest. For a
    dataset directory: the folder that its images have moved to; OUT is then the same dataset with
    the new paths."""
    weight_column: str | None = None
    """Column of the manifest with the weight of each image in training; default: `weight` where
    there is one."""
    label_columns: tuple[str, ...] = ()
    """Multi-head: columns of the manifest, such as colour,shape; one head per column."""
    text_column: str | None = None
    """Multi-head: column of the manifest with a text, such as a captcha's; one head per character,
    shorter texts are padded."""
    labels_column: str | None = None
    """Multi-label: column of the manifest with any number of labels per image, or none."""
    separator: str | None = None
    """With labels_column: separator of the labels; default: |."""
    keep_columns: tuple[str, ...] = ()
    """Other columns of the manifest that are kept with the images, such as camera,site, for
    `distcls evaluate --by`; none keeps none. Default: all, if there are at most 64, that hold
    texts of at most 256 characters, numbers, dates, or true and false."""
    val_fraction: float | None = None
    """Fraction of each class for validation, where the source has no validation split; default:
    0.1."""
    test_fraction: float | None = None
    """Fraction of each class for testing, where the source has no test split; default: 0.2, or 0 if
    the source has a validation split. 1 makes a test set of all images, for `distcls evaluate`."""
    folds: int | None = None
    """Cross-validation: split the training images into this many stratified folds; `fold` is the
    validation split, the others are the training split."""
    fold: int | None = None
    """With folds: the fold to validate on, counted from 1."""
    bootstrap: int | None = bare("1")
    """Bootstrap sample: training images drawn with replacement, with the number of draws as the
    weight; images never drawn (37 %) are the validation split. The value is the number of the
    sample, 1 by default; each number draws another sample of the same images."""
    split_by: Literal["hash", "draw"] = "hash"
    """How images are divided for validation and testing: hash (by their content: images that are
    added later move no other from its split, and copies are in one; sizes are near the fractions)
    or draw (sizes are exact, every image may change its split when some are added)."""
    seed: int = 0
    """Seed of the splits (also of folds and bootstrap samples) and of `limit`."""
    limit: int | None = None
    """Use at most this many images, drawn evenly over splits and classes."""
    write_images: bool = False
    """Also write OUT/images/SPLIT/CLASS/ID.png."""
    pack: Literal["auto", "on", "off"] = "auto"
    """Store the decoded images in one file; auto: if they take at most 4 GiB and have at most
    256x256 pixels on average."""
    max_bad: float | None = None
    """Fraction of the images that may be unreadable; they are left out and listed in rejected.csv.
    Above it nothing is written. 0 allows none, 1 any number; default: 0.1, and 10 images of any
    number."""
    background: Background = WHITE
    """Colour that transparent pixels are blended with, as red, green and blue from 0 to 255; ignore
    discards the alpha channel. Training and predictions use the same."""
    json: bool = False
    """Print one JSON object with the counts."""
    quiet: bool = False
    """Print warnings and errors only."""

    def __post_init__(self) -> None:
        names = format_names()
        require(self.format in names, "format", self.format, f"one of {', '.join(names)}")
        require_one_way(self.folds, self.fold, self.bootstrap, self.val_fraction)
        val, test = self.val_fraction, self.resolved_test_fraction
        require(val is None or 0 <= val < 1, "val_fraction", val, "at least 0 and below 1")
        require(0 <= test <= 1, "test_fraction", test, "at least 0 and at most 1")
        total = self.resolved_val_fraction + test
        rest = "together with test_fraction below 1, training gets the rest"
        alone = test == 1 and total == 1 and self.resampling is None
        require(total < 1 or alone, "val_fraction", self.resolved_val_fraction, rest)
        require_fraction("max_bad", self.max_bad)
        require_color("background", background_color(self.background))
        require(self.seed >= 0, "seed", self.seed, "at least 0")
        require(self.limit is None or self.limit >= 1, "limit", self.limit, "at least 1")
        labels = self.label_options(None)
        if labels.columns and self.label_column is not None:
            expected = f"null with {labels.options[0]}: they are mutually exclusive"
            raise BadValue("label_column", self.label_column, expected)
        if labels.columns and self.write_images:
            expected = f"false with {labels.options[0]}: it makes one folder per class"
            raise BadValue("write_images", self.write_images, expected)

    def label_options(self, classes: tuple[str, ...] | None) -> LabelOptions:
        """How labels are read, with the class names of the file `classes`."""
        return LabelOptions(
            classes=classes,
            weight_column=self.weight_column,
            label_columns=self.label_columns,
            text_column=self.text_column,
            labels_column=self.labels_column,
            separator=self.separator,
            splits=self.splits,
            keep_columns=self.keep_columns,
        )

    @property
    def opening(self) -> OpenOptions:
        """How the source is opened."""
        return OpenOptions(
            path_column=self.path_column, label_column=self.label_column, root=self.root
        )

    @property
    def resolved_test_fraction(self) -> float:
        """The fraction that is cut off for testing, as given or by default."""
        return TEST_FRACTION if self.test_fraction is None else self.test_fraction

    @property
    def resolved_val_fraction(self) -> float:
        """The fraction that is cut off for validation, as given or by default."""
        if self.resampling is not None or (self.val_fraction is None and self.test_fraction == 1):
            return 0.0
        return VAL_FRACTION if self.val_fraction is None else self.val_fraction

    @property
    def resampling(self) -> Resampling | None:
        """How the training images are divided instead."""
        folds, fold, bootstrap = self.folds, self.fold, self.bootstrap
        if folds is None and bootstrap is None:
            return None
        return Resampling(folds=folds or 1, fold=fold or 1, bootstrap=bootstrap)


PACK_MOST_BYTES = 4 << 30
"""`--pack auto` packs at most this much."""
PACK_MEAN_PIXELS = 256 * 256
"""`--pack auto` packs images of at most this size on average."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepared:
    """What was written, and how much of it."""

    out: str
    kind: str
    classes: list[str]
    counts: dict[str, int]
    """Images per split."""
    rejected: int
    """Images that could not be read; listed in rejected.csv."""
    left_out: dict[str, int]
    """What was left out before, by reason; listed there too."""
    packed: bool
    pack_bytes: int
    no_pack: str | None
    """Why there is no pack; None if there is one."""
    seconds: float
    transparent: int = 0
    """Images with transparency, blended with the background."""
    columns: tuple[str, ...] = ()
    """Other columns of the manifest that were kept."""
    columns_left_out: dict[str, str] = dataclasses.field(default_factory=dict)
    """Those that were not, and why."""


def prepare(options: PrepareOptions) -> Prepared:
    """Write a dataset directory. Raises UsageError for bad input, DistclsError for a full disk."""
    import pyarrow  # noqa: F401 - an extra; without it the work below would be for nothing

    started = time.monotonic()
    require_absent(options.out)
    if options.root is not None and (Path(options.source) / INFO).is_file():
        return _move(options, options.root, started)
    classes = None if options.classes is None else read_class_names(options.classes)
    source = open_labelled(
        options.source, options.format, options.label_options(classes), options.opening
    )
    _check_sense(source, options)
    kept = source.columns
    columns = () if kept is None else tuple(kept.table.column_names)  # read before any image is
    assignment = split_images(
        source,
        val_fraction=options.resolved_val_fraction,
        test_fraction=_test_fraction(source, options),
        limit=options.limit,
        seed=options.seed,
        resampling=options.resampling,
        by_hash=options.split_by == "hash",
    )
    with atomic_folder(options.out) as folder:
        info, rejected = _fill(folder, source, assignment, options)
    prepared = Prepared(
        out=str(options.out),
        kind=source.format,
        classes=list(source.classes),
        counts=info["counts"],
        rejected=info["rejected"],
        left_out=info["left_out"],
        packed=info["packed"],
        pack_bytes=info["pack_bytes"],
        no_pack=info["no_pack"],
        seconds=round(time.monotonic() - started, 2),
        transparent=info["transparent"],
        columns=columns,
        columns_left_out={} if kept is None else kept.left_out,
    )
    _summarise(prepared, source, rejected, options)
    return prepared


def _test_fraction(source: LabelledImages, options: PrepareOptions) -> float:
    divided = options.test_fraction is None and any(each.split == "val" for each in source.records)
    return 0.0 if divided else options.resolved_test_fraction


def _move(options: PrepareOptions, root: Path, started: float) -> Prepared:
    """Write a dataset directory once more, its images being below `root`."""
    for field in dataclasses.fields(options):
        if field.name not in ("source", "out", "root", "json", "quiet"):
            value = getattr(options, field.name)
            expected = f"nothing with root and the dataset directory {options.source}"
            require(value == field.default, field.name, value, expected)
    dataset = Dataset.open(Path(options.source))
    if not dataset.has_files:
        raise UsageError(f"root: {options.source} has its images only in the pack")
    root = root.resolve()
    paths: list[str] = dataset.table.column("path").to_pylist()
    missing = [path for path in paths if not (root / path).is_file()]
    if len(missing) == len(paths):
        raise UsageError(f"root: none of {len(paths)} images exists, first {root / paths[0]}")
    with atomic_folder(options.out) as folder:
        near = writer.relative_root(options.out, root)
        info = writer.write_moved(folder, dataset, root, near)
    if missing:
        log.warn(f"{len(missing):,} of {len(paths):,} images are not in {root}, first {missing[0]}")
    log.say(f"wrote {options.out}: {options.source} with its images in {root}")
    return Prepared(
        out=str(options.out),
        kind=info["kind"],
        classes=list(dataset.classes),
        counts=dataset.counts(),
        rejected=info["rejected"],
        left_out=info.get("left_out", {}),
        packed=info["packed"],
        pack_bytes=info["pack_bytes"],
        no_pack=None if info["packed"] else f"as in {options.source}",
        seconds=round(time.monotonic() - started, 2),
        transparent=info.get("transparent", 0),
    )


def require_absent(out: Path) -> None:
    """Raise early, before anything is read, where `atomic_folder` would raise at the end."""
    if os.path.lexists(out) and not (out.is_dir() and not any(out.iterdir())):
        raise UsageError(f"{out} exists already; choose another folder or remove it")


def _check_sense(source: LabelledImages, options: PrepareOptions) -> None:
    require_text(source.location, source.classes)
    if options.test_fraction != 1 and (shortage := source.task.shortage()):
        raise UsageError(f"{source.location}: {shortage}; a classifier needs at least two")
    if source.root is None and options.pack == "off" and not options.write_images:
        raise UsageError(
            f"--pack off: the images of {source.format} are not files; add --write-images to make "
            "some"
        )
    if source.format == "folder" and options.out.resolve().is_relative_to(Path(source.location)):
        raise UsageError(f"out {options.out} is inside the source {source.location}")


def _fill(
    folder: Path, source: LabelledImages, assignment: SplitAssignment, options: PrepareOptions
) -> tuple[dict[str, Any], list[Rejected]]:
    """Decode every image into `folder`, and describe the result there; those not readable."""
    copies = writer.copy_paths(source, assignment) if options.write_images else None
    for parent in {(folder / path).parent for path in copies or ()}:
        parent.mkdir(parents=True)
    with ExitStack() as stack:
        pack = _open_pack(stack, folder, source, len(assignment), options)
        blended, transparent = _blended(source.source, background_color(options.background))
        digests, rejected = _decode(
            folder, source, assignment, pack, copies, blended=blended, max_bad=options.max_bad
        )
        readable = list(digests)
    opened, pack = pack, _finish_pack(pack, len(readable), source, options)
    before = assignment.take(readable)
    tested = for_evaluation(assignment)
    after = before if tested else restore_training_images(before)
    if not tested:
        check_training_images(after, source)
    if not tested and (lost := untrained_classes(after, source)):
        some = f"{len(lost)} of {len(source.classes)} classes have no training images"
        log.warn(f"{some} and cannot be learned, first {lost[0]!r}")
    paths: list[str | None] = [record.path for record in after.records]
    root = None if source.root is None else str(source.root)
    if copies is not None:
        moved = writer.move_copies(folder, [copies[i] for i in readable], before, after)
        if source.root is None:  # the copies are the only files there are
            paths, root = [*moved], "."
    writer.write_manifest(folder, after, pack, paths, source.columns)
    before_reading = [*source.source.left_out, *source.rejected]
    writer.write_rejected(folder, [*rejected, *before_reading], source.root)
    by_id = {assignment.records[i].image_id: digest for i, digest in digests.items()}
    repeated = repeated_in_training(after, by_id)
    _warn_of_repeated(repeated, after)
    _warn_of_labels(source, after, by_id)
    recorded = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in dataclasses.asdict(options).items()
        if name not in ("source", "out", "json", "quiet")
    }
    info = writer.write_info(
        folder,
        source,
        after,
        pack,
        root=root,
        relative=None if root == "." else writer.relative_root(options.out, source.root),
        rejected=len(rejected),
        left_out=dict(Counter(row.reason for row in before_reading)),
        background=background_color(options.background),
        transparent=len(transparent),
        repeated={split: len(pairs) for split, pairs in repeated.items()},
        options=recorded,
    )
    return {**info, "no_pack": None if pack else _why_no_pack(opened)}, rejected


def _blended(source: ImageSource, color: Color | None) -> tuple[ImageSource, list[int]]:
    """The images, transparent ones on a colour, and a list that grows by one for each of these."""
    transparent: list[int] = []

    def decode_and_note(data: bytes) -> NDArray[np.uint8]:
        image = decode(data, background=color)
        if may_be_transparent(data):
            transparent.append(1)
        return image

    return (with_decoder(source, decode_and_note) if source.encoded else source), transparent


def _decode(
    folder: Path,
    source: LabelledImages,
    assignment: SplitAssignment,
    pack: PackWriter | None,
    copies: list[str] | None,
    *,
    blended: ImageSource,
    max_bad: float | None,
) -> tuple[dict[int, bytes], list[Rejected]]:
    """Digests of the readable images, which are then in the pack, by index; and the bad ones with
    reasons. Raises UsageError once more are bad than the fraction `max_bad` allows."""
    paths = None if copies is None else [folder / path for path in copies]
    images = load_all(blended, assignment.records, paths)
    readable: dict[int, bytes] = {}
    rejected: list[Rejected] = []
    most = most_bad(max_bad, MAX_BAD, len(assignment))
    with log.Progress("reading", len(assignment)) as progress:
        for index, image in enumerate(images):
            progress.update()
            if isinstance(image, BadImage):
                record = assignment.records[index]
                rejected.append(Rejected(record.image_id, record.path, str(image)))
            if readable and len(rejected) > most:
                raise UsageError(_too_many_bad(source, rejected, index + 1, len(assignment)))
            if isinstance(image, BadImage):
                continue
            readable[index] = pixel_digest(image)
            if pack is not None:
                pack.add(image)
    if not readable:
        first = rejected[0]
        hint = f"; paths start from {source.root}, --root names another folder"
        raise UsageError(
            f"{source.location}: none of {len(rejected)} images is readable; "
            f"first {first.image_id!r}: {first.reason}{hint * (source.format == 'manifest')}"
        )
    return readable, rejected


def _too_many_bad(
    source: LabelledImages, rejected: Sequence[Rejected], done: int, images: int
) -> str:
    first: dict[str, str] = {}
    for row in rejected:
        first.setdefault(row.reason, row.image_id)
    counts = Counter(row.reason for row in rejected).most_common(3)
    reasons = "; ".join(f"{count:,} {reason}, first {first[reason]!r}" for reason, count in counts)
    return (
        f"{source.location}: {len(rejected):,} of the first {done:,} of {images:,} images cannot "
        f"be read ({reasons}); nothing is written: --max-bad 1 leaves out any number of them"
    )


def pixel_digest(image: NDArray[np.uint8]) -> bytes:
    """A digest of an image's pixels, the same for the same pixels; 16 bytes.

    Of large images it takes every third row and column, and the sum of all: ten times as fast.
    """
    total = hashlib.blake2b(repr(image.shape).encode(), digest_size=16)
    if image.size < DIGESTED_WHOLE:
        total.update(image.tobytes())
    else:
        total.update(image[::3, ::3].tobytes())
        total.update(str(int(image.sum(dtype=np.int64))).encode())
    return total.digest()


def _warn_of_repeated(
    repeated: Mapping[str, Sequence[tuple[str, str]]], assignment: SplitAssignment
) -> None:
    for split, pairs in repeated.items():
        count = assignment.splits.count(split)
        name, other = pairs[0]
        log.warn(
            f"{len(pairs):,} of {count:,} {split} images are duplicates of training images, "
            f"first {name!r} of {other!r} (same pixels): scores on {split} will be too high"
        )


def _warn_of_labels(
    source: LabelledImages, assignment: SplitAssignment, digests: Mapping[str, bytes]
) -> None:
    """Say that labels contradict each other, by pixels or by the names of classes."""
    labels = {
        record.image_id: (record.label, *(record.labels or ())) for record in assignment.records
    }
    if pairs := conflicts(labels, digests):
        name, other = pairs[0]
        log.warn(
            f"{log.counted(len(pairs), 'image')} with pixels of another and other labels, first "
            f"{name!r} and {other!r}; distcls audit lists them"
        )
    for names in same_names(source.classes):
        log.warn(
            f"classes {' and '.join(map(repr, names))} differ in case, blanks or Unicode form "
            "only: are they one?"
        )


def _open_pack(
    stack: ExitStack, folder: Path, source: LabelledImages, images: int, options: PrepareOptions
) -> PackWriter | None:
    if options.pack == "off":
        return None
    if options.pack == "on" or source.root is None:
        return stack.enter_context(PackWriter(folder / PACK))
    # past this many pixels the mean is too large, whatever comes
    most_pixels = PACK_MEAN_PIXELS * images
    return stack.enter_context(
        PackWriter(folder / PACK, most_bytes=PACK_MOST_BYTES, most_pixels=most_pixels)
    )


def _finish_pack(
    pack: PackWriter | None, images: int, source: LabelledImages, options: PrepareOptions
) -> PackWriter | None:
    """The pack, or None if the images turned out too large for it."""
    if pack is None or pack.abandoned:
        return None
    choice = options.pack == "auto" and source.root is not None
    if choice and pack.pixels > PACK_MEAN_PIXELS * images:
        pack.abandon()
        return None
    return pack


def _why_no_pack(opened: PackWriter | None) -> str:
    if opened is None:
        return "--pack off"
    if opened.size > PACK_MOST_BYTES:
        limit = f"they would take more than {PACK_MOST_BYTES / 2**30:g} GiB decoded"
    else:
        side = round(PACK_MEAN_PIXELS**0.5)
        limit = f"they have more than {side}x{side} pixels on average"
    return f"{limit}; --pack on packs them all the same"


def _summarise(
    prepared: Prepared,
    source: LabelledImages,
    rejected: Sequence[Rejected],
    options: PrepareOptions,
) -> None:
    counts = ", ".join(f"{count:,} {split}" for split, count in prepared.counts.items())
    total = sum(prepared.counts.values())
    classes = source.task.summary()
    say = log.say if not options.quiet else lambda _: None
    say(f"{prepared.kind}: {total:,} images of {classes}: {counts}")
    say(f"classes: {class_list(prepared.classes)}")
    own = sum(record.split == "train" for record in source.records)
    if own and (taken := own - prepared.counts.get("train", 0)) > 0 and options.limit is None:
        say(
            f"of the {own:,} images in the source's training split {taken:,} are held out "
            "(--val-fraction, --test-fraction)"
        )
    if prepared.columns:
        say(f"columns of the manifest that are kept: {class_list(prepared.columns)}")
    if prepared.columns_left_out:
        faults = (f"{name} ({why})" for name, why in [*prepared.columns_left_out.items()][:8])
        say(f"columns that are not kept: {'; '.join(faults)}")
    if prepared.packed:
        say(f"pack: {prepared.pack_bytes / 2**20:.1f} MiB of decoded images")
    else:
        say(f"no pack, images are decoded on every use ({prepared.no_pack})")
    if prepared.transparent:
        color = background_color(options.background)
        where = "without their alpha" if color is None else f"on {background_text(color)}"
        say(f"{prepared.transparent:,} images with transparency are shown {where}")
    listed = Path(prepared.out) / writer.REJECTED
    if rejected:
        endings = Counter(ending_of_name(row.path or "") for row in rejected)
        log.warn(
            f"{len(rejected)} of {total + len(rejected)} images cannot be read "
            f"({by_ending(endings)}); see {listed}"
        )
    if prepared.left_out:
        reasons = "; ".join(f"{n:,} {reason}" for reason, n in [*prepared.left_out.items()][:8])
        say(f"left out: {reasons}; see {listed}")
    if set(prepared.counts) == {"test"}:
        say("all images are in the test split: use it with distcls evaluate, not for training")
    for split in ("val", "test") if "train" in prepared.counts else ():
        chosen = split == "test" and options.test_fraction == 0
        if split not in prepared.counts and not chosen:
            log.warn(f"there are no images for {split}")
    say(f"wrote {options.out} in {prepared.seconds} s")

"""`distcls prepare`: from a source to a dataset directory."""

from __future__ import annotations

import dataclasses
import os
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tqdm import tqdm

from distcls import log
from distcls.data import write
from distcls.data.layout import PACK
from distcls.data.load import load_all
from distcls.data.pack import PackWriter
from distcls.data.plan import Plan, check_training_images, plan_splits, repair, unlearnt
from distcls.data.prepare_options import PrepareOptions
from distcls.data.sources.detect import read_source
from distcls.data.sources.source import Record, Source
from distcls.data.stale import claimed, remove_stale_parts
from distcls.errors import BadImage, UsageError
from distcls.files import atomic_folder

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
    packed: bool
    pack_bytes: int
    seconds: float


def prepare(options: PrepareOptions) -> Prepared:
    """Write a dataset directory. Raises UsageError for bad input, DistclsError for a full disk."""
    started = time.monotonic()
    require_absent(options.out)
    weights = options.weight_column
    source = read_source(options.source, options.format, options.classes, weights, options.answers)
    _check_sense(source, options)
    plan = plan_splits(
        source,
        val_fraction=options.resolved_val_fraction,
        test_fraction=options.test_fraction,
        limit=options.limit,
        seed=options.seed,
        resampling=options.resampling,
    )
    remove_stale_parts(options.out)
    with atomic_folder(options.out) as part, claimed(part):
        info = _fill(part, source, plan, options)
    prepared = Prepared(
        out=str(options.out),
        kind=source.kind,
        classes=list(source.classes),
        counts=info["counts"],
        rejected=info["rejected"],
        packed=info["packed"],
        pack_bytes=info["pack_bytes"],
        seconds=round(time.monotonic() - started, 2),
    )
    _summarise(prepared, source, options)
    return prepared


def require_absent(out: Path) -> None:
    """Refuse early, before anything is read, what `atomic_folder` refuses in the end."""
    if os.path.lexists(out) and not (out.is_dir() and not any(out.iterdir())):
        raise UsageError(f"{out} exists already; choose another folder or remove it")


def _check_sense(source: Source, options: PrepareOptions) -> None:
    try:
        "".join((source.location, *source.classes)).encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"{source.location!r}: names of folders and classes must be UTF-8"
        ) from error
    if shortage := source.resolved_targets.shortage():
        raise UsageError(f"{source.location}: {shortage}; a classifier needs at least two")
    if source.root is None and options.pack == "off" and not options.write_images:
        raise UsageError(
            f"--pack off: the images of {source.kind} are no files; add --write-images to make some"
        )
    if source.kind == "folder" and options.out.resolve().is_relative_to(Path(source.location)):
        raise UsageError(f"out {options.out} lies inside the source {source.location}")


def _fill(part: Path, source: Source, plan: Plan, options: PrepareOptions) -> dict[str, Any]:
    """Decode every image into the folder `part`, and describe the result there."""
    copies = write.copy_paths(source, plan) if options.write_images else None
    for folder in {(part / path).parent for path in copies or ()}:
        folder.mkdir(parents=True)
    with ExitStack() as stack:
        pack = _open_pack(stack, part, source, len(plan), options)
        kept, rejected = _decode(part, source, plan, pack, copies)
    pack = _settle(pack, len(kept), source, options)
    survivors = plan.take(kept)
    whole = repair(survivors)
    check_training_images(whole, source)
    if lost := unlearnt(whole, source):
        some = f"{len(lost)} of {len(source.classes)} classes have no training images"
        log.warn(f"{some} and cannot be learnt, first {lost[0]!r}")
    paths: list[str | None] = [record.path for record in whole.records]
    root = None if source.root is None else str(source.root)
    if copies is not None:
        moved = write.move_copies(part, [copies[i] for i in kept], survivors, whole)
        if source.root is None:  # the copies are the only files there are
            paths, root = [*moved], "."
    write.write_manifest(part, whole, pack, paths)
    write.write_rejected(part, rejected, source.root)
    recorded = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in dataclasses.asdict(options).items()
        if name not in ("source", "out", "json", "quiet")
    }
    return write.write_info(
        part, source, whole, pack, root=root, rejected=len(rejected), options=recorded
    )


def _decode(
    part: Path, source: Source, plan: Plan, pack: PackWriter | None, copies: list[str] | None
) -> tuple[list[int], list[tuple[Record, str]]]:
    """Positions of the readable images, which are then in the pack, and the others with reasons."""
    targets = None if copies is None else [part / path for path in copies]
    images = load_all(plan.records, source.root, targets)
    bar = tqdm(images, total=len(plan), unit="img", disable=not log.show_progress(), leave=False)
    kept: list[int] = []
    rejected: list[tuple[Record, str]] = []
    for index, image in enumerate(bar):
        if isinstance(image, BadImage):
            rejected.append((plan.records[index], str(image)))
            continue
        kept.append(index)
        if pack is not None:
            pack.add(image)
    if not kept:
        record, reason = rejected[0]
        raise UsageError(
            f"{source.location}: none of {len(rejected)} images is readable; "
            f"first {record.image_id!r}: {reason}"
        )
    return kept, rejected


def _open_pack(
    stack: ExitStack, part: Path, source: Source, images: int, options: PrepareOptions
) -> PackWriter | None:
    if options.pack == "off":
        return None
    if options.pack == "on" or source.root is None:
        return stack.enter_context(PackWriter(part / PACK))
    # past this many pixels the mean is too large, whatever comes
    most_pixels = PACK_MEAN_PIXELS * images
    return stack.enter_context(
        PackWriter(part / PACK, most_bytes=PACK_MOST_BYTES, most_pixels=most_pixels)
    )


def _settle(
    pack: PackWriter | None, images: int, source: Source, options: PrepareOptions
) -> PackWriter | None:
    """The pack if it is kept."""
    if pack is None or pack.abandoned:
        return None
    choice = options.pack == "auto" and source.root is not None
    if choice and pack.pixels > PACK_MEAN_PIXELS * images:
        pack.abandon()
        return None
    return pack


def _summarise(prepared: Prepared, source: Source, options: PrepareOptions) -> None:
    counts = ", ".join(f"{count:,} {split}" for split, count in prepared.counts.items())
    total = sum(prepared.counts.values())
    classes = source.resolved_targets.summary()
    log.say(f"{prepared.kind}: {total:,} images of {classes}: {counts}")
    if prepared.packed:
        log.say(f"pack: {prepared.pack_bytes / 2**20:.1f} MiB of decoded images")
    else:
        log.say("no pack: the images are decoded whenever they are used")
    if prepared.rejected:
        log.warn(
            f"{prepared.rejected} of {total + prepared.rejected} images cannot be read; "
            f"see {options.out / write.REJECTED}"
        )
    for split in ("val", "test"):
        if split not in prepared.counts:
            log.warn(f"there are no images for {split}")
    log.say(f"wrote {options.out} in {prepared.seconds} s")

"""Batch prediction: one row for each input, in input order, an error included."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from distcls import log
from distcls.config import positional
from distcls.errors import UsageError, require
from distcls.figures import new_figure
from distcls.files import atomic_path, require_writable
from distcls.inference.inputs import Source
from distcls.inference.model import Model
from distcls.inference.pipeline import stream
from distcls.inference.rows import Rows
from distcls.inference.show import Gallery
from distcls.inference.writers import check_ending, open_writer


@dataclasses.dataclass(frozen=True, kw_only=True)
class PredictOptions:
    """What `distcls predict` is asked."""

    input: str = positional()
    """Folder (searched with all below it), glob, image, manifest (.csv or .parquet with a column
    path, file, filename, image or image_id) or dataset directory."""
    model: Path
    """Model file: best.onnx, or a checkpoint best.pth."""
    out: Path = Path("pre.csv")
    """File to write; .csv, .jsonl or .parquet by its ending."""
    split: str | None = None
    """Split of a dataset directory; test unless given."""
    batch_size: int = 64
    """Images the model takes at a time."""
    top_k: int = 1
    """Classes to name for each image, the likeliest first; 1 of a model of heads or labels."""
    probabilities: bool = False
    """Add a column p:CLASS with the probability of each class."""
    show: int = 0
    """Draw that many random images with their predictions as a PNG."""
    show_out: Path | None = None
    """The PNG that --show writes; the name of --out with .png unless given."""
    seed: int = 0
    """Chooses the images of --show."""
    limit: int | None = None
    """Take the first images only."""
    workers: int | None = None
    """Threads that decode; one a core unless given."""
    overwrite: bool = False
    """Replace --out if it exists."""
    json: bool = False
    """Print one JSON object on standard output, for machines."""
    quiet: bool = False
    """Say nothing but warnings and errors."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "top_k"):
            value = getattr(self, name)
            require(value >= 1, name, value, "at least 1")
        require(self.show >= 0, "show", self.show, "at least 0")
        for name in ("limit", "workers"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, value, "at least 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PredictResult:
    """What was done."""

    images: int
    errors: int
    seconds: float
    provider: str
    out: Path
    shown: Path | None

    @property
    def images_per_second(self) -> float:
        """Images over seconds, decoding and writing included."""
        return self.images / max(self.seconds, 1e-9)

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "images": self.images,
            "errors": self.errors,
            "seconds": round(self.seconds, 3),
            "images_per_second": round(self.images_per_second, 1),
            "provider": self.provider,
            "out": str(self.out),
            "shown": None if self.shown is None else str(self.shown),
        }


def check_output(options: PredictOptions) -> None:
    """Raise UsageError, before any work, if the results could not be written."""
    check_ending(options.out)
    targets = [options.out] + [_show_path(options)] * (options.show > 0)
    for target in targets:
        if target.is_dir():
            raise UsageError(f"out: {target} is a folder, expected the name of a file")
        if target.exists() and not options.overwrite:
            raise UsageError(f"{target} exists already; choose another --out or add --overwrite")
    if options.show:
        new_figure(1, 1)  # tells now if matplotlib is missing
    for target in targets:
        require_writable(target.parent)


def predict(model: Model, source: Source, options: PredictOptions) -> PredictResult:
    """Predict all images of `source` and write `options.out`.

    A bad image is a row with its reason in the column `error`. Raises UsageError, and writes
    nothing, if there is no readable image at all.
    """
    targets = model.card.resolved_targets
    rows = Rows(targets, top_k=options.top_k, probabilities=options.probabilities)
    count = min(len(source), options.limit or len(source))
    gallery = Gallery(options.show, count, options.seed)
    began = time.monotonic()
    with atomic_path(options.out) as part:
        errors, first = _write(
            part, model, source, options, indices=range(count), rows=rows, gallery=gallery
        )
        if errors == count:
            raise UsageError(f"{options.input}: none of {count} images is readable; {first}")
    seconds = time.monotonic() - began
    shown = _show_path(options) if options.show else None
    if shown is not None:
        # a truth in figures may be a class's number, but of several answers it is their text
        gallery.draw(source, targets.classes if targets.single else (), shown)
    return PredictResult(
        images=count,
        errors=errors,
        seconds=seconds,
        provider=model.provider,
        out=options.out,
        shown=shown,
    )


def _write(
    path: Path,
    model: Model,
    source: Source,
    options: PredictOptions,
    *,
    indices: range,
    rows: Rows,
    gallery: Gallery,
) -> tuple[int, str]:
    """Write the rows of all `indices`; the number of errors and the first one."""
    size, workers = options.batch_size, options.workers
    chunks = stream(source, model, indices=indices, batch_size=size, workers=workers)
    errors, first = 0, ""
    with (
        contextlib.closing(chunks),
        open_writer(path, rows.names, options.out.suffix, rows.numbers) as write,
        tqdm(total=len(indices), unit="img", disable=not log.show_progress()) as bar,
    ):
        for chunk in chunks:
            table = rows(chunk, source.image_ids)
            write(table)
            gallery.offer(chunk, table)
            for index, error in zip(chunk.indices, chunk.errors, strict=True):
                if error is not None:
                    first = first or f"{source.image_ids[index]}: {error}"
                    errors += 1
            bar.update(len(chunk.indices))
    return errors, first


def _show_path(options: PredictOptions) -> Path:
    return options.show_out or options.out.with_suffix(".png")

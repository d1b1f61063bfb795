"""The options of batch prediction, and its result."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

from distcls.config import positional
from distcls.data.source import TIMEOUT, OpenOptions, require_fraction
from distcls.errors import UsageError, require
from distcls.files import require_distinct
from distcls.model_card import best_model, model_choice, model_paths
from distcls.prediction import require_coverage
from distcls.runtime.providers import ExecutionRequest, require_provider

Tta = Literal["none", "flip"]
Engine = Literal["local", "ray"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PredictOptions:
    """Options of `distcls predict`."""

    input: str | tuple[str, ...] = positional()
    """Folder (searched recursively), glob, image, manifest (.csv or .parquet with a column path,
    file, filename, file_name, image or image_id, or --path-column), dataset directory, tar shards
    (photos-{000..003}.tar or a glob), http://, https://, s3:// or gs:// (an image, folder, glob or
    manifest), or - for a list on standard input, one path or URL per line. With several inputs, the
    image ids begin with the input as given."""
    model: str
    """Model file: best.onnx, or a checkpoint best.pth; a run directory means its best.onnx, or its
    best.pth if that is newer. Several files, as in a.onnx,b.onnx, are an ensemble: the mean of
    their probabilities."""
    out: Path = Path("pre.csv")
    """File to write, .csv, .jsonl or .parquet; - writes the rows to standard output."""
    out_format: Literal["csv", "jsonl"] | None = None
    """Format of the rows on standard output; default: csv."""
    features: Path | None = None
    """Parquet file for the features of each image, the input of the network's last layer."""
    split: str | None = None
    """Split of a dataset directory; default: test."""
    path_column: str | None = None
    """Column of a manifest with the path or URL of each image."""
    root: Path | None = None
    """Folder that relative paths of a manifest start from; default: that of the manifest."""
    batch_size: int | None = None
    """Batch size; default: chosen with the provider (64 for a .pth)."""
    provider: str = "auto"
    """Execution provider of an ONNX model: auto (the fastest installed one whose predictions match
    those of the CPU), cpu, openvino, cuda, tensorrt."""
    top_k: int = 1
    """Number of classes per image, in order of probability; 1 for multi-head and multi-label
    models."""
    probabilities: bool = False
    """Add a column p:CLASS with the probability of each class."""
    threshold: float | None = None
    """Minimum probability of a class, for each head separately; below it the label is empty and the
    column `abstained` is true. Not for multi-label models, which have a threshold per label."""
    coverage: float | None = None
    """Add a column `set` with the classes of the prediction set, which holds the true one with this
    probability, as in 0.9; of a model that `distcls calibrate --coverage` has fitted to it. Of
    labels those that an image has, and a column `unsure` with those that it may have or not."""
    tta: Tta = "none"
    """Test-time augmentation: flip averages the probabilities of each image and its mirror
    image."""
    show: int = 0
    """Draw this many random images with their predictions into a PNG."""
    show_out: Path | None = None
    """The PNG that --show writes; default: the name of --out with .png."""
    seed: int = 0
    """Seed of the random images of --show."""
    explain: Path | None = None
    """Folder to write a PNG for each image to, with what in it speaks for the prediction: Grad-CAM
    of a .pth, an occlusion map of other models, which takes some 270 passes an image; --limit
    bounds the images."""
    limit: int | None = None
    """Predict the first images only."""
    workers: int | None = None
    """Decoding threads; default: one per core."""
    engine: Engine = "local"
    """Where to compute: local, this machine; ray, the nodes of a Ray cluster (that of RAY_ADDRESS),
    all of which need access to input and model."""
    scaled_decode: bool = False
    """Decode large JPEGs at 1/2, 1/4 or 1/8 of their size where they are scaled down anyway:
    faster, with slightly different pixels; refused if that changes predictions."""
    profile: Path | None = None
    """PNG to write: the time spent in decoding, waiting, inference and writing."""
    fetch_timeout: float = TIMEOUT
    """Timeout in seconds of each attempt to download an image; there are four."""
    classes: Path | None = None
    """For ONNX files not exported by distcls: file with the class names, one per line or a JSON
    list; --size, --mean and --std give the preprocessing."""
    size: tuple[int, int] | None = None
    """With --classes: height and width of the model's input; default: those of the file."""
    mean: tuple[float, float, float] | None = None
    """With --classes: mean of each RGB channel, of values scaled to 0..1; default: 0,0,0."""
    std: tuple[float, float, float] | None = None
    """With --classes: standard deviation of each RGB channel, likewise; default: 1,1,1."""
    max_bad: float | None = None
    """Fraction of the images that may have an error in place of a prediction. The output is written
    in any case; above it the exit code is 1. 0 allows none; default: 0.5, and 10 images of any
    number."""
    part_rows: int = 4096
    """Rows per part; an interrupted run resumes after its last finished part. Rounded up to whole
    batches."""
    resume: bool = False
    """Continue an interrupted run; its inputs, model and options have to be the same."""
    overwrite: bool = False
    """Replace --out if it exists, and discard an unfinished run."""
    json: bool = False
    """Print the result as one JSON object on standard output."""
    quiet: bool = False
    """Print warnings and errors only."""

    def __post_init__(self) -> None:
        require_provider(self.provider, or_auto=True)
        for name in ("top_k", "part_rows"):
            value = getattr(self, name)
            require(value >= 1, name, value, "at least 1")
        for name in ("show", "seed"):
            value = getattr(self, name)
            require(value >= 0, name, value, "at least 0")
        for name in ("batch_size", "limit", "workers"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, value, "at least 1")
        chance = self.threshold
        require(chance is None or 0 < chance <= 1, "threshold", chance, "above 0 and at most 1")
        held = self.coverage
        require_coverage(held)
        require(self.fetch_timeout > 0, "fetch_timeout", self.fetch_timeout, "seconds above 0")
        means = "an ensemble" if len(self.models) > 1 else f"--tta {self.tta}"
        if held is not None and (len(self.models) > 1 or self.tta != "none"):
            raise UsageError(
                f"coverage: prediction sets are fitted to the probabilities of one model, and "
                f"{means} has others; leave out one of the two"
            )
        require_fraction("max_bad", self.max_bad)
        both = self.resume and self.overwrite
        require(not both, "resume", True, "false with --overwrite, which starts over")
        self._check_standard_output()
        table = self.features
        require(bool(self.inputs), "input", self.input, "at least one")
        parquet = table is None or table.suffix.lower() == ".parquet"
        require(parquet, "features", str(table), "the name of a .parquet file")
        alone = table is None or (self.tta == "none" and len(self.models) == 1)
        require(alone, "features", str(table), "one model and no --tta")
        require(bool(self.models), "model", self.model, "the name of a model file")
        self._check_files()
        for name in ("size", "mean", "std"):
            given = getattr(self, name) is not None
            require(not given or self.classes is not None, name, getattr(self, name), _GENERIC)

    def _check_files(self) -> None:
        writes = {
            "out": None if self.to_standard_output else self.out,
            "features": self.features,
            "show_out": self.picture if self.show else None,
            "profile": self.profile,
        }
        inputs = [Path(text) for text in self.inputs if "://" not in text]
        classes = [] if self.classes is None else [self.classes]
        require_distinct(writes, {"model": self.models, "input": inputs, "classes": classes})

    def _check_standard_output(self) -> None:
        known = self.to_standard_output or self.out_format is None
        require(
            known,
            "out_format",
            self.out_format,
            "no value without --out -; the ending of --out decides",
        )
        if not self.to_standard_output:
            return
        require(not self.json, "json", True, "false with --out -, which prints the rows there")
        require(not self.resume, "resume", True, "false with --out -, which keeps nothing")
        named = not self.show or self.show_out is not None
        require(named, "show_out", None, "the name of a .png file with --out -")

    @property
    def to_standard_output(self) -> bool:
        """Whether the rows are printed instead of written to a file."""
        return str(self.out) == "-"

    @property
    def ending(self) -> str:
        """Ending of the output's format, such as `.csv`."""
        return f".{self.out_format or 'csv'}" if self.to_standard_output else self.out.suffix

    @property
    def inputs(self) -> tuple[str, ...]:
        """All inputs, in order."""
        return (self.input,) if isinstance(self.input, str) else self.input

    @property
    def models(self) -> tuple[Path, ...]:
        """The model files; the name of an existing file may hold a comma.

        Raises UsageError for a folder without a model.
        """
        return tuple(map(best_model, model_paths(self.model)))

    def model_choices(self) -> list[str]:
        """A line for each run directory among the models: which file it means."""
        named = zip(model_paths(self.model), self.models, strict=True)
        return [line for path, found in named if (line := model_choice(path, found))]

    @property
    def opening(self) -> OpenOptions:
        """How the input is opened."""
        return OpenOptions(timeout=self.fetch_timeout, path_column=self.path_column, root=self.root)

    def execution_request(self, images: int) -> ExecutionRequest:
        """The execution request, for a source of this many images."""
        return ExecutionRequest.of(self, images)

    @property
    def picture(self) -> Path:
        """The PNG that --show writes."""
        return self.show_out or self.out.with_suffix(".png")


_GENERIC = "no value without --classes: files exported by distcls have their own"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PredictResult:
    """The result of a batch prediction."""

    images: int
    errors: int
    first_error: str
    """The first image with an error, and its reason; empty if there is none."""
    abstained: int
    resumed: int
    """Images that an earlier run, which was interrupted, had predicted."""
    seconds: float
    provider: str
    profile: dict[str, float | int]
    """Seconds of this run by phase (see `distcls.runtime.pipeline.Profiler`)."""
    out: Path
    features: Path | None
    shown: Path | None

    @property
    def images_per_s(self) -> float:
        """Images of this run over its seconds, decoding and writing included."""
        return (self.images - self.resumed) / max(self.seconds, 1e-9)

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "images": self.images,
            "errors": self.errors,
            "abstained": self.abstained,
            "resumed": self.resumed,
            "seconds": round(self.seconds, 3),
            "images_per_s": round(self.images_per_s, 1),
            "provider": self.provider,
            "profile": self.profile,
            "out": str(self.out),
            "features": None if self.features is None else str(self.features),
            "shown": None if self.shown is None else str(self.shown),
        }

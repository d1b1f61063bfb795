"""`calibrate`: temperatures into the card of a model file, and into an exported graph."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from distcls import log
from distcls.cli import packages_for
from distcls.config import build, options_layer, positional
from distcls.data.dataset import IN_RUN, Dataset, Split, is_dataset, prepare_command
from distcls.errors import UsageError, plain, require
from distcls.evaluation.calibration import (
    Abstention,
    Unreached,
    abstain_for_accuracy,
    abstain_for_answers,
    fit_temperatures,
    prediction_sets,
    spread_of_coverage,
)
from distcls.evaluation.classes import match_classes, shown_names
from distcls.evaluation.intervals import wilson
from distcls.evaluation.outputs import Outputs, blocks
from distcls.evaluation.overlap import dataset_of
from distcls.evaluation.scores import calibration_bins
from distcls.evaluation.shards import Evaluated, evaluate_split
from distcls.files import atomic_path, given_path
from distcls.model_card import BEST_ONNX, BEST_PTH, PREFIX, ModelCard, best_model, model_choice
from distcls.prediction import prediction_sets as set_members
from distcls.prediction import require_coverage
from distcls.predictor import Predictor, load_model
from distcls.runtime.providers import ExecutionRequest
from distcls.task import Task

FEW = 200
"""Images below which a warning is said."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CalibrateOptions:
    """Options of `distcls calibrate`."""

    model: Path = positional()
    """Model file, best.onnx or best.pth, which is changed in place; of a run directory both."""
    data: Path | None = None
    """Dataset directory; default: the one that the model was trained on."""
    split: str = "val"
    """Split of the dataset that is fitted to: train, val or test."""
    coverage: tuple[float, ...] = ()
    """Also fit prediction sets that hold the true class with this probability, as in 0.9, or
    several, as in 0.9,0.95; for `distcls predict --coverage`. Of labels: yes, no or unsure."""
    precision: float | None = None
    """Also find the threshold above which this fraction of the predictions is right, as in 0.99;
    for `distcls predict --threshold`."""
    answered: float | None = None
    """Also find the threshold that this fraction of the images reaches, as in 0.8."""
    batch_size: int | None = None
    """Batch size; default: 64."""
    limit: int | None = None
    """Fit to the first images only."""
    workers: int | None = None
    """Decoding threads; default: one per core."""
    json: bool = False
    """Print the result as one JSON object on standard output."""
    quiet: bool = False
    """Print the result, warnings and errors only."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "limit", "workers"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, value, "at least 1")
        for value in self.coverage:
            require_coverage(value)
        unique = len(set(self.coverage)) == len(self.coverage)
        require(unique, "coverage", self.coverage, "each one once")
        for name in ("precision", "answered"):
            value = getattr(self, name)
            fits = value is None or 0 < value <= 1
            require(fits, name, value, "above 0 and at most 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CalibrationResult:
    """What was fitted, and what it did to the images that it was fitted to."""

    files: tuple[Path, ...]
    """The files that were changed."""
    data: str
    split: str
    images: int
    names: tuple[str, ...]
    """Heads or labels, one for each temperature; of a single label an empty one."""
    temperatures: tuple[float, ...]
    ece: tuple[float, float]
    """Expected calibration error before, of the plain logits, and after."""
    loss: tuple[float, float]
    """Cross-entropy in nats before and after."""
    sets: tuple[dict[str, Any], ...] = ()
    """For each `coverage`: `least_probability`, for each head, of a class in the set; of labels of
    each yes, and then of each no. `size` is the mean number of classes, or of unsure labels."""
    thresholds: tuple[dict[str, float], ...] = ()
    """For `precision` and `answered`: the threshold, and what it does."""

    def to_json(self) -> dict[str, Any]:
        """Plain values, as `distcls calibrate --json` prints them."""
        return {"files": [str(path) for path in self.files], "data": self.data} | self.record()

    def record(self) -> dict[str, Any]:
        """What the model card keeps; a path would reveal details of this machine."""
        return {
            "temperatures": list(self.temperatures),
            "split": self.split,
            "images": self.images,
            "ece": list(self.ece),
            "loss": list(self.loss),
            "sets": list(self.sets),
            "thresholds": list(self.thresholds),
        }

    def to_text(self) -> str:
        """The result for people."""
        pairs = list(zip(self.names, self.temperatures, strict=True))
        shown = ", ".join(f"{plain(name)} {value:.4f}".strip() for name, value in pairs[:10])
        more = f" and {len(pairs) - 10:,} more" if len(pairs) > 10 else ""
        lines = [
            f"temperature  {shown}{more}",
            f"ECE          {self.ece[0]:.4f} before, {self.ece[1]:.4f} after",
            f"loss         {self.loss[0]:.4f} before, {self.loss[1]:.4f} after",
        ]
        for entry in self.sets:
            lines.append(f"sets         {self._of_sets(entry)}")
        for entry in self.thresholds:
            lines.append(
                f"threshold    {entry['threshold']:.6g}: {entry['answered']:.2%} of the images are "
                f"answered{_number(entry)}, {entry['accuracy']:.2%} of these right"
            )
        return "\n".join([*lines, f"on {self.images:,} images of {self.split}, fitted to them"])

    def _of_sets(self, entry: dict[str, Any]) -> str:
        """What prediction sets of one coverage are, in words."""
        limits = entry["least_probability"]
        if len(limits) > len(self.names):
            return (
                f"hold the answer, yes or no, for {entry['coverage']:.4g} of the images that have "
                f"a label and of those that have not; {entry['size']:.2f} labels of an image are "
                "unsure on average"
            )
        pairs = list(zip(self.names, limits, strict=True))
        least = ", ".join(f"{plain(name)} {value:.4g}".strip() for name, value in pairs[:10])
        least += f", {len(limits) - 10:,} more heads" if len(limits) > 10 else ""
        of, a_head = (" of each head for", " a head") if self.names != ("",) else (" of", "")
        return (
            f"hold the true class{of} {entry['coverage']:.4g} of the images, {entry['size']:.2f} "
            f"classes{a_head} on average: those of probability {least} and more"
        )


def _number(entry: dict[str, float]) -> str:
    """How many images are answered; calibrations of earlier versions do not say."""
    return f" ({entry['images']:,.0f})" if "images" in entry else ""


def calibrate_model(
    model: str | os.PathLike[str],
    data: str | os.PathLike[str] | None = None,
    *,
    split: str = "val",
    coverage: Sequence[float] = (),
    precision: float | None = None,
    answered: float | None = None,
    batch_size: int | None = None,
    limit: int | None = None,
    workers: int | None = None,
    quiet: bool = False,
) -> CalibrationResult:
    """Fit temperatures to a split and keep them in the model file, as `distcls calibrate` does.

        result = distcls.calibrate_model("runs/photos", coverage=[0.9])
        print(result.temperatures, result.ece)

    Args:
        model: a best.onnx or best.pth, which is changed, or a run directory, where both are.
        data: a dataset directory; by default the one that the model was trained on.
        split: the images that are fitted to, which the model was not trained on.
        coverage: also fit prediction sets that hold the true class with these probabilities.
        precision: also find the threshold above which this fraction of the predictions is right.
        answered: also find the threshold that this fraction of the images reaches.
        batch_size: images that are computed together; by default 64.
        limit: take the first images only.
        workers: decoding threads; by default one per core.
        quiet: print warnings and errors only.

    Returns:
        The temperatures, with the calibration error before and after.

    Raises:
        UsageError: for a model or data that cannot be read or do not fit each other, for labels
            that no temperature fits, for a wrong value, and where `onnx` is not installed.
        DistclsError: if an image cannot be decoded.
    """
    given = {**locals(), "model": given_path(model, "model")}
    options = build(CalibrateOptions, options_layer(CalibrateOptions, given))
    with packages_for(str(options.model)), log.hushed(options.quiet):
        return calibrate(options)


def calibrate(options: CalibrateOptions) -> CalibrationResult:
    """Fit, and write the model file, or both of a run directory.

    Predictions stay as they are, and so do the logits that files give; probabilities change.
    Raises as `calibrate_model`.
    """
    if log.world_size() > 1:
        raise UsageError("calibrate runs in one process; start it without a launcher")
    files = _files(options.model)
    found = files[-1]
    if line := model_choice(options.model, found):
        log.say(line)
    if found.suffix.lower() == ".onnx":
        import onnx  # noqa: F401 - missing, it is said before anything is computed
    request = ExecutionRequest(
        provider="auto", batch_size=options.batch_size, workers=options.workers, images=1
    )
    model = load_model(found, "auto", request)
    predictor = Predictor(model, batch_size=options.batch_size, workers=options.workers)
    folder = options.data or dataset_of(options.model)
    split = _open(folder, options)
    matched = match_classes(split.first(options.limit), predictor.task, str(folder)).split
    evaluated = evaluate_split(predictor, matched, lambda vector: vector)
    card, result = _fitted(options, model.card, evaluated, str(folder))
    for path in files:
        write_card(path, card)
    return dataclasses.replace(result, files=tuple(files))


def _open(folder: Path, options: CalibrateOptions) -> Split:
    if folder.exists() and not is_dataset(folder) and not is_dataset(folder / IN_RUN):
        command = prepare_command(str(folder), "--test-fraction 1")
        raise UsageError(
            f"{folder} is not a dataset directory; if the model was not trained on its images: "
            f"{command}, and --split test"
        )
    split = Dataset.open(folder).split(options.split)
    if options.split == "train":
        log.warn("split: a model is surer of the images that it was trained on than of others")
    return split


def _fitted(
    options: CalibrateOptions, card: ModelCard, evaluated: Evaluated, data: str
) -> tuple[ModelCard, CalibrationResult]:
    """The card with what was fitted; the result names no file yet."""
    labels, logits = evaluated.split.labels, evaluated.logits
    task, unknown = fit_temperatures(card.task, logits, labels)
    if len(labels) < FEW:
        log.warn(f"{log.counted(len(labels), 'image')} are few to calibrate on")
    if unknown:
        of = "" if unknown == [""] else f", for {shown_names(unknown)}"
        log.warn(
            f"the temperature stays 1{of}: on these images no other one is better by more than "
            "chance"
        )
    before, after = evaluated.outputs(card.task.plain), evaluated.outputs(task)
    errors = calibration_bins(before).error, calibration_bins(after).error
    if errors[1] > errors[0]:
        log.warn(
            f"ECE is worse after calibration, {errors[1]:.4f} instead of {errors[0]:.4f}, though "
            "the loss is better; of few images, or of hardly any mistakes, ECE says little"
        )
    sets = []
    for coverage in options.coverage:
        least = prediction_sets(after, coverage)
        _warn_of_rare(after.task, coverage, least)
        _warn_of_spread(after, coverage)
        entry = {"coverage": coverage, "least_probability": least}
        sets.append(entry | {"size": _mean_size(after, least)})
    thresholds = _thresholds(options, after)
    kept = _kept(options, card, task)
    assert task.temperatures is not None
    several = task.classes if task.kind == "multi_label" else [head.name for head in task.heads]
    result = CalibrationResult(
        files=(),
        data=data,
        split=options.split,
        images=len(after),
        names=tuple(several) or ("",),
        temperatures=task.temperatures,
        ece=errors,
        loss=(float(before.loss.mean()), float(after.loss.mean())),
        sets=tuple(sets or kept["sets"]),
        thresholds=tuple(thresholds or kept["thresholds"]),
    )
    return dataclasses.replace(card, task=task, calibration=result.record()), result


def _thresholds(options: CalibrateOptions, outputs: Outputs) -> list[dict[str, float]]:
    """What `precision` and `answered` ask for; says what is not reached."""
    found = []
    if options.precision is not None:
        try:
            entry = abstain_for_accuracy(outputs, options.precision)
        except Unreached as error:
            log.warn(f"{error}; no threshold for it is kept")
        else:
            found.append({"precision": options.precision, **_plain(entry)})
            right = round(entry.accuracy * entry.images)
            low, high = wilson(right, entry.images)
            if low < options.precision:
                log.warn(
                    f"precision: of the {log.counted(entry.images, 'image')} that are answered "
                    f"{entry.accuracy:.2%} are right, of others it may be {low:.2%} to {high:.2%}"
                )
    if options.answered is not None:
        entry = abstain_for_answers(outputs, options.answered)
        found.append({"answered_at_least": options.answered, **_plain(entry)})
    return found


def _kept(options: CalibrateOptions, card: ModelCard, task: Task) -> dict[str, list[Any]]:
    """Sets and thresholds of an earlier calibration that are not fitted anew: they are of
    probabilities, so that they hold with the same temperatures only. Says what is dropped."""
    before: dict[str, Any] = card.calibration or {}
    found: dict[str, list[Any]] = {"sets": [], "thresholds": []}
    earlier = np.array(before.get("temperatures", []))
    now = np.array(task.temperatures)
    same = earlier.shape == now.shape and np.allclose(earlier, now, rtol=1e-4)
    asked = {"sets": options.coverage, "thresholds": (options.precision, options.answered)}
    words = {"sets": ("prediction sets", "--coverage")}
    words["thresholds"] = ("thresholds", "--precision or --answered")
    for name, flags in asked.items():
        entries = before.get(name, [])
        if any(flags) or not entries:
            continue
        what, flag = words[name]
        if same:
            found[name] = list(entries)
            log.say(f"{what} of the calibration before are kept, as the temperatures are the same")
        else:
            log.warn(
                f"{what} of the calibration before are dropped, as they are of other "
                f"temperatures; {flag} fits new ones"
            )
    return found


def _mean_size(outputs: Outputs, least: Sequence[float]) -> float:
    """Classes in the prediction set of an image, the mean over the heads too; unsure labels."""
    total, width = 0, outputs.probabilities.shape[1]
    for rows in blocks(len(outputs), width):
        sets = set_members(outputs.task, outputs.probabilities[rows], least)
        total += sum(map(len, itertools.chain.from_iterable(sets[-len(outputs.task.slices) :])))
    return total / len(outputs) / len(outputs.task.slices)


def _warn_of_rare(task: Task, coverage: float, least: Sequence[float]) -> None:
    """Say which labels too few images have, or have not, to say anything of them."""
    if task.kind == "multi_label":
        limits = np.array(least).reshape(2, -1)
        rare = [task.classes[at] for at in np.flatnonzero((limits == 0).any(axis=0))]
        if rare:
            log.warn(
                f"coverage: too few images have, or lack, {log.counted(len(rare), 'label')} for "
                f"{coverage:g}, so that yes, or no, is in all their sets: {shown_names(rare)}"
            )


def _warn_of_spread(outputs: Outputs, coverage: float) -> None:
    """Say how far the coverage of a fit to few images may be off."""
    count, mean, deviation = spread_of_coverage(outputs, coverage)
    if count < FEW:
        rare = " with a label, or without it," if outputs.task.kind == "multi_label" else ""
        log.warn(
            f"coverage: sets that are fitted to {log.counted(count, 'image')}{rare} hold "
            f"the truth of {mean:.2f} ± {deviation:.2f} of others (mean and standard deviation of "
            "such fits)"
        )


def _plain(found: Abstention) -> dict[str, float]:
    return dataclasses.asdict(found)


def _files(given: Path) -> list[Path]:
    """The files to write: of a run directory its best.pth first, so that it is not the newer one.

    Raises UsageError where its best.onnx is another model. Their times do not tell: copying
    changes them, and so does a calibration that ended between the two.
    """
    checkpoint, exported = given / BEST_PTH, given / BEST_ONNX
    if not given.is_dir() or not checkpoint.is_file() or not exported.is_file():
        return [best_model(given)]
    from distcls.models.checkpoint import read_checkpoint
    from distcls.runtime.onnx_file import OnnxFile

    card = ModelCard.from_metadata(OnnxFile(exported).metadata, str(exported))
    if _origin(card) != _origin(read_checkpoint(checkpoint)[0]):
        raise UsageError(
            f"model: {checkpoint} and {exported} are different models; distcls export --ckpt "
            f"{given} --overwrite makes one of the other, or name the file"
        )
    return [checkpoint, exported]


def _origin(card: ModelCard) -> dict[str, Any]:
    """What the card of an export has in common with that of its checkpoint."""
    plain = dataclasses.replace(card, task=card.task.plain, calibration=None, certificate=None)
    values = plain.to_json()
    dataset = Path(card.training.get("dataset") or "").name  # an export has no path
    values |= {"version": None, "training": {**card.training, "dataset": dataset}}
    return dict(json.loads(json.dumps(values)))


def write_card(path: Path, card: ModelCard) -> None:
    """Give a model file the task and the calibration of a card; all else in it stays.

    Raises UsageError for a graph whose probabilities are not computed from its logits.
    """
    if path.suffix.lower() == ".pth":
        from distcls.models.checkpoint import write_calibration

        write_calibration(path, card)
        return
    import onnx

    from distcls.export.graph import write
    from distcls.runtime.onnx_file import KEY, METADATA_KEY, OnnxFile

    file = OnnxFile(path)
    own = ModelCard.from_metadata(file.metadata, str(path))
    changed = dataclasses.replace(own, task=card.task, calibration=card.calibration)
    named = {PREFIX + key for key in own.to_json()} | {KEY, METADATA_KEY}
    more = {name: value for name, value in file.metadata.items() if name not in named}
    graph = onnx.load_model_from_string(file.content)
    try:
        with atomic_path(path) as temporary:
            write(temporary, graph, changed, more)
    except ValueError as error:
        raise UsageError(f"{path}: cannot be calibrated: {error}") from error

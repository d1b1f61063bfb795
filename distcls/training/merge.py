"""Several trained models in one: the mean of their weights, measured on validation.

Uniform, or a greedy soup (Wortsman et al.: Model soups, 2022, algorithm 1): from the best model on,
each next one joins if the mean is then no worse. It costs nothing in prediction, unlike an
ensemble, but the runs have to lie in one valley of the loss: epochs of one run, or runs fine-tuned
from the same weights. Runs from scratch with other seeds do not, and the measurement says so.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from distcls import log
from distcls.data.dataset import Dataset, Split
from distcls.errors import UsageError
from distcls.evaluation.evaluate import EvaluationResult, evaluate_model
from distcls.evaluation.overlap import training_images, warn_of_training_images
from distcls.files import claimed_output
from distcls.imaging import Preprocess
from distcls.log import say, warn
from distcls.model_card import BEST_PTH, ModelCard, best_model
from distcls.models.checkpoint import open_checkpoint, read_checkpoint, save_checkpoint
from distcls.models.classifier import Classifier
from distcls.plotting import metric_title
from distcls.predictor import Predictor
from distcls.system import available_cores
from distcls.training.batch_norm import BatchNorm
from distcls.training.config import MonitorConfig, require_free
from distcls.training.loader import Loader

BATCH = 128
"""Images of a batch whose statistics batch norm counts."""
MOST_BATCHES = 200
"""Batches that are counted; more change the statistics in the third digit."""

STRUCTURE = ("name", "stem_stride", "pool")
"""Keys of the architecture that decide what the weights mean; those of training may differ."""

Weights = dict[str, Tensor]
Better = tuple[Path, EvaluationResult]
"""A model that is better alone."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MergeResult:
    """What was merged, and the figures on validation."""

    out: Path
    """The new best.pth."""
    data: Path
    """The dataset directory."""
    metric: str
    scores: dict[str, float]
    """Of each model alone, by its file."""
    merged: tuple[str, ...]
    """The files whose weights are in the mean."""
    score: float
    """Of the mean."""
    images: int
    """Validation images."""

    def to_json(self) -> dict[str, Any]:
        """For --json."""
        plain = {"out": str(self.out), "data": str(self.data), "merged": list(self.merged)}
        return {**dataclasses.asdict(self), **plain}


class Merging:
    """Models of one architecture, their common network, and the data that they are measured on."""

    def __init__(self, files: Sequence[Path], data: Path, monitor: MonitorConfig) -> None:
        """Raises UsageError for files that do not fit each other, naming the first difference."""
        self._files, self._data, self._monitor = files, data, monitor
        cards, self._weights = zip(*map(read_checkpoint, files), strict=True)
        self.card: ModelCard = cards[0]
        for file, card, weights in zip(files[1:], cards[1:], self._weights[1:], strict=True):
            if difference := _difference(self.card, card, self._weights[0], weights):
                raise UsageError(f"{file}: {difference} {files[0]}; only like models are averaged")
        self._opened = open_checkpoint(files[0])
        self._predictor = Predictor(self._opened)
        self._train = Dataset.open(data).split("train") if self._norms else None
        self._warn_of_training_images(cards)

    def alone(self, index: int) -> EvaluationResult:
        """The model at `index`, on validation, with the statistics that it was trained with."""
        self._opened.model.load_state_dict(self._weights[index])
        return self._evaluated()

    def mean(self, indices: Sequence[int]) -> EvaluationResult:
        """The mean of the models at `indices`, its batch norms counted anew, on validation."""
        self._opened.model.load_state_dict(averaged([self._weights[i] for i in indices]))
        if self._train is not None and len(indices) > 1:
            recount(self._opened.model, self._train, self.card.preprocess)
        return self._evaluated()

    def better(self, new: EvaluationResult, old: EvaluationResult) -> bool:
        """Whether `new` is at least as good."""
        pair = {"new": new, "old": old}
        scores = {name: self.score(each) for name, each in pair.items()}
        losses = {name: each.loss for name, each in pair.items()}
        return self._monitor.best_of(scores, losses) == "new"

    @property
    def figure(self) -> str:
        """The monitored metric."""
        return self._monitor.figure

    def score(self, result: EvaluationResult) -> float:
        """Its value of the monitored metric. Raises UsageError where the task has none."""
        figures = result.metrics.scalars()
        if self._monitor.figure not in figures:
            known = ", ".join(figures)
            raise UsageError(f"metric: {self._monitor.metric!r}: this task has {known}")
        return figures[self._monitor.figure]

    def save(self, out: Path, result: EvaluationResult, files: Sequence[Path]) -> None:
        """Write the network as it is now."""
        training = {
            "dataset": str(self._data.resolve()),
            "weights": "merged",
            "merged": [str(file) for file in files],
            "validation": result.metrics.scalars(),
        }
        task = dataclasses.replace(self.card.task, thresholds=result.metrics.thresholds)
        card = dataclasses.replace(self.card, task=task, training=training, certificate=None)
        save_checkpoint(out, self._opened.model, card)

    def close(self) -> None:
        """End the threads that read the images."""
        self._predictor.close()

    def _warn_of_training_images(self, cards: Sequence[ModelCard]) -> None:
        """Where validation images were trained on by one of the models."""
        ids = Dataset.open(self._data).split("val").image_ids
        for file, card in zip(self._files, cards, strict=True):
            known = card.training.get("dataset")
            found = training_images(file, self._data, "val", ids, known)
            warn_of_training_images(str(file), len(found), len(ids))

    @property
    def _norms(self) -> list[nn.Module]:
        return list(_norms(self._opened.model))

    def _evaluated(self) -> EvaluationResult:
        self._opened.model.eval()
        return evaluate_model(self._predictor, self._data, split="val", quiet=True)


def merge(
    runs: Sequence[Path],
    out: Path,
    *,
    data: Path | None = None,
    greedy: bool = False,
    monitor: MonitorConfig | None = None,
) -> MergeResult:
    """Average the best models of `runs` (run directories or .pth files) into `out`/best.pth.

    `data` is the dataset directory with the validation images, and the training images that batch
    norm's statistics are counted on; by default that of the first run. The best by `monitor` is
    kept; of a `greedy` soup it is never worse than the best model alone.

    Raises UsageError for models of different architectures, classes or preprocessing, and for an
    `out` that holds a run.
    """
    monitor = monitor or MonitorConfig()
    files = _files(runs)
    data = data or _data_of(files[0])
    require_free(out, "none")
    with (
        claimed_output(out, f"out: another run is writing {out} at this moment"),
        contextlib.closing(Merging(files, data, monitor)) as merging,
    ):
        alone = [merging.alone(index) for index in range(len(files))]
        scores = {str(file): merging.score(each) for file, each in zip(files, alone, strict=True)}
        title = metric_title(monitor.figure)
        for name, each in zip(scores, alone, strict=True):
            say(f"{name}: {_scored(title, scores[name], each)}")
        if greedy:
            taken, result = _greedy(merging, files, alone)
        else:
            taken = list(range(len(files)))
            result = merging.mean(taken)
        merged = [files[index] for index in taken]
        merging.save(out / BEST_PTH, result, merged)
        found = MergeResult(
            out=out / BEST_PTH,
            data=data,
            metric=monitor.figure,
            scores=scores,
            merged=tuple(map(str, merged)),
            score=merging.score(result),
            images=result.count,
        )
        best = _ranked(merging, alone)[0]
        worse = len(merged) > 1 and not merging.better(result, alone[best])
        _tell(found, title, result, (files[best], alone[best]) if worse else None)
    return found


def _greedy(
    merging: Merging, files: Sequence[Path], alone: Sequence[EvaluationResult]
) -> tuple[list[int], EvaluationResult]:
    """The models of the soup and its figures; the network then has its weights."""
    order = _ranked(merging, alone)
    taken, result = order[:1], alone[order[0]]
    for index in order[1:]:
        tried = merging.mean([*taken, index])
        joins = merging.better(tried, result)
        words = "it joins" if joins else "it is left out"
        if merging.score(tried) == merging.score(result):
            words += " (equal, so the loss decides)"
        title = metric_title(merging.figure)
        say(f"with {files[index]}: {_scored(title, merging.score(tried), tried)}, {words}")
        if joins:
            taken, result = [*taken, index], tried
    return taken, merging.mean(taken)


def _ranked(merging: Merging, alone: Sequence[EvaluationResult]) -> list[int]:
    """The models' places, the best first; of equal ones the earlier."""

    def compare(one: int, other: int) -> int:
        return -1 if merging.better(alone[one], alone[other]) else 1

    return sorted(range(len(alone)), key=functools.cmp_to_key(compare))


def _scored(title: str, score: float, result: EvaluationResult) -> str:
    """A score, and the loss that decides between equal ones."""
    loss = "" if title == "loss" else f" (loss {result.loss:.4f})"
    return f"{title} {score:.4f}{loss}"


def _tell(found: MergeResult, title: str, result: EvaluationResult, better: Better | None) -> None:
    """Say what was written, and which model alone is better, if one is."""
    models = f"the mean of {log.counted(len(found.merged), 'model')}"
    if len(found.merged) == 1:
        models = f"{found.merged[0]} alone, as no mean with another is better"
    say(
        f"wrote {found.out}: {models}, {_scored(title, found.score, result)} on "
        f"{log.counted(found.images, 'validation image')}"
    )
    if better is not None:
        file, alone = better
        warn(
            f"the mean is worse than {file} alone "
            f"({_scored(title, found.scores[str(file)], alone)}); the runs "
            "to average are those fine-tuned from the same weights; --greedy leaves out what "
            "harms, an ensemble (predict --model A,B) averages predictions instead"
        )


def averaged(weights: Sequence[Mapping[str, Tensor]]) -> Weights:
    """The mean of state dicts of the same keys and shapes, computed in float64; whole numbers, such
    as batch norm's counts, are those of the first."""
    first, found = weights[0], {}
    for name, tensor in first.items():
        if not tensor.is_floating_point():
            found[name] = tensor.clone()
            continue
        total = torch.zeros_like(tensor, dtype=torch.float64)
        for each in weights:
            total += each[name].double()
        found[name] = (total / len(weights)).to(tensor.dtype)
    return found


@torch.no_grad()
def recount(model: Classifier, split: Split, preprocess: Preprocess) -> None:
    """Count the running statistics of all batch norms anew, over the training images.

    The mean of several models has activations of its own (Izmailov et al.: Averaging Weights Leads
    to Wider Optima, 2018, section 3.2). The images are those of prediction, without augmentation.
    """
    norms = list(_norms(model))
    momenta = [norm.momentum for norm in norms]
    model.eval()  # dropout stays off
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over the batches
        norm.train()
    order = np.random.default_rng(0).permutation(len(split))
    parts = np.array_split(order, max(1, len(order) // BATCH))[:MOST_BATCHES]
    loader = Loader(split, preprocess, workers=available_cores(), prefetch=2)
    device = next(model.parameters()).device
    with log.Progress("counting statistics", sum(map(len, parts))) as progress:
        for batch in loader.batches(parts):
            model(batch.images.to(device))
            progress.update(len(batch.labels))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.eval()


def _norms(model: nn.Module) -> list[Any]:
    """Its batch norms with running statistics."""
    return [
        module
        for module in model.modules()
        if isinstance(module, BatchNorm) and module.track_running_stats
    ]


def _files(runs: Sequence[Path]) -> list[Path]:
    """The checkpoints of the runs."""
    if len(runs) < 2:
        raise UsageError("runs: one model has no mean; give two or more run directories or .pth")
    files = [best_model(run, exported=False, key="runs") for run in runs]
    for file in files:
        if not file.exists():
            raise UsageError(f"runs: {file} does not exist")
        if file.suffix.lower() != ".pth":
            raise UsageError(f"runs: {file}: an exported model has no weights to average; its .pth")
    names = [file.resolve() for file in files]
    if len(set(names)) < len(names):
        twice = next(file for file, name in zip(files, names, strict=True) if names.count(name) > 1)
        raise UsageError(f"runs: {twice} is given twice")
    return files


def _data_of(file: Path) -> Path:
    card, _ = read_checkpoint(file)
    data = card.training.get("dataset")
    if not isinstance(data, str) or not Path(data).exists():
        raise UsageError(f"data: {file} was trained on {data}, which does not exist; give --data")
    return Path(data)


def _difference(first: ModelCard, other: ModelCard, own: Weights, weights: Weights) -> str:
    """In which way another model is unlike the first, in words; empty if it is alike."""
    for key in STRUCTURE:
        before, after = (each.architecture.get(key) for each in (first, other))
        if before != after:
            return f"model.{key} is {after!r}, and {before!r} in"
    if first.classes != other.classes:
        missing = sorted(set(first.classes) ^ set(other.classes))
        names = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        return f"has other classes ({names or 'in another order'}) than"
    for field in dataclasses.fields(Preprocess):
        before, after = (getattr(each.preprocess, field.name) for each in (first, other))
        if before != after:
            return f"input.{field.name} is {after}, and {before} in"
    for name in {**own, **weights}:
        shapes = [list(each[name].shape) if name in each else None for each in (own, weights)]
        if shapes[0] != shapes[1]:
            return f"its {name} is of shape {shapes[1]}, and {shapes[0]} in"
    return ""

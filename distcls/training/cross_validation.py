"""Cross-validation: a run for each fold, the spread of their scores, out-of-fold predictions.

The folds are those of `distcls prepare --folds`: stratified, groups kept together. They divide the
training and validation images of a dataset; its test images take no part.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from distcls import log
from distcls.data.columns import LABELS
from distcls.data.dataset import IN_RUN, MANIFEST, Dataset, is_dataset
from distcls.data.integrity import read_info
from distcls.data.source import ImageRecord
from distcls.data.split import Resampling, resample
from distcls.data.writer import write_resplit
from distcls.errors import Stopped, UsageError
from distcls.evaluation.metrics import Metrics, metric_state
from distcls.files import atomic_folder, atomic_path, claimed_output, write_json
from distcls.log import say
from distcls.model_card import BEST_PTH, FIRST_FOLD, OUT_OF_FOLD
from distcls.models.checkpoint import open_checkpoint
from distcls.plotting import metric_title
from distcls.prediction import RowBuilder
from distcls.predictor import Predictor
from distcls.training.config import TrainConfig
from distcls.training.inputs import prepared
from distcls.training.run import TrainResult, train

PREDICTIONS, SUMMARY = OUT_OF_FOLD, "cv.json"
DATASET_INFO = "dataset.json"
CONFIDENCE = 0.95


@dataclasses.dataclass(frozen=True, kw_only=True)
class CvResult:
    """The scores of the folds, and what they say of the recipe."""

    out: Path
    metric: str
    scores: list[float]
    """Best score of each fold's run."""
    best_epochs: list[int]
    mean: float
    std: float
    """Standard deviation over the folds."""
    interval: tuple[float, float]
    """Of the mean, with 95 % confidence; see `interval_of`."""
    out_of_fold: dict[str, float]
    """Figures over the predictions of all folds together."""
    images: int
    """Images that were predicted out of fold."""
    predictions: Path
    seconds: float
    """Seconds spent training."""

    def to_json(self) -> dict[str, Any]:
        """For --json, and the content of cv.json."""
        plain = {"out": str(self.out), "predictions": str(self.predictions)}
        return {**dataclasses.asdict(self), "interval": list(self.interval), **plain}


def cross_validate(config: TrainConfig, folds: int) -> CvResult:
    """Train a run for each of `folds` folds in `config.out`, or go on where that was stopped.

    `config` is that of each run; `out` gets `fold-1/` and so on, the dataset if `data` has to be
    prepared, cv.json and out_of_fold.parquet. Raises UsageError as `train` does, and if `out` holds
    folds of other data or of another number; Stopped where a signal ended a run.
    """
    if log.world_size() > 1:
        raise UsageError("cv trains its runs in one process; start it without a launcher")
    out = config.out
    # without the keys that a subclass has beside those of a run
    config = TrainConfig(**{key.name: getattr(config, key.name) for key in fields(TrainConfig)})
    with claimed_output(out, f"out: another process is writing {out} at this moment"):
        # what was prepared before is taken again, also if the source is gone or has changed since
        resumed = dataclasses.replace(config, out=out / FIRST_FOLD, resume="auto")
        dataset = Dataset.open(prepared(resumed, out / IN_RUN).data)
        runs = list(_runs(config, dataset, folds))
        results = []
        for number, run in enumerate(runs, 1):
            say(f"fold {number} of {folds}: {run.out}")
            try:
                results.append(train(run))
            except Stopped as stopped:
                before = str(stopped).partition(";")[0]
                raise Stopped(
                    f"fold {number} of {folds} {before}; the same command continues"
                ) from stopped
        metrics = _predict([run.out for run in runs], dataset, config, out / PREDICTIONS)
        found = _result(config, results, metrics)
        write_json(out / SUMMARY, found.to_json())
    return found


def _runs(config: TrainConfig, dataset: Dataset, folds: int) -> Iterator[TrainConfig]:
    """The config of each fold's run, its dataset directory written."""
    manifest = (dataset.folder / MANIFEST).read_bytes()
    made_of = {"folds": folds, "manifest": hashlib.sha256(manifest).hexdigest()}
    records = _records(dataset)
    before = ["train" if each.split == "val" else str(each.split) for each in records]
    for fold in range(1, folds + 1):
        out = config.out / f"fold-{fold}"
        options = {**made_of, "fold": fold, "seed": config.seed}
        how = Resampling(folds=folds, fold=fold)
        if not is_dataset(out / IN_RUN):
            _, splits = resample(records, before, how, seed=config.seed, classes=dataset.classes)
            with atomic_folder(out / IN_RUN) as folder:
                write_resplit(folder, dataset, splits, seed=config.seed, options=options)
        elif (found := read_info(out / IN_RUN / DATASET_INFO).get("options")) != options:
            found = found if isinstance(found, dict) else {}
            differs = next(key for key in options if found.get(key) != options[key])
            words = "other data" if differs == "manifest" else f"--{differs} {found.get(differs)}"
            raise UsageError(f"out: {out} was made of {words}; choose another --out")
        yield dataclasses.replace(config, data=out / IN_RUN, out=out, resume="auto")


def _records(dataset: Dataset) -> list[ImageRecord]:
    """The manifest's rows as what folds are made of."""
    table = dataset.table
    names = ["image_id", "label", "split", *({"group", LABELS} & {*table.column_names})]
    rows = table.select(names).to_pylist()
    return [
        ImageRecord(
            index=index,
            image_id=row["image_id"],
            label=row["label"],
            split=row["split"],
            group=row.get("group"),
            labels=tuple(row[LABELS]) if LABELS in row else None,
        )
        for index, row in enumerate(rows)
    ]


def _predict(runs: Sequence[Path], dataset: Dataset, config: TrainConfig, path: Path) -> Metrics:
    """Write the prediction of each image by the run that has not seen it; their metrics.

    The columns are those of `distcls predict --probabilities`, with `fold` and `truth`.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    state = metric_state(dataset.task, config.monitor.beside)
    total = dataset.table.num_rows - dataset.counts().get("test", 0)
    with (
        atomic_path(path) as part,
        contextlib.ExitStack() as stack,
        log.Progress("predicting out of fold", total) as progress,
    ):
        writer: Any = None
        for fold, run in enumerate(runs, 1):
            predictor = stack.enter_context(Predictor(open_checkpoint(run / BEST_PTH)))
            split = Dataset.open(run / IN_RUN).split("val")
            rows = RowBuilder(predictor.task, probabilities=True)
            for chunk in predictor.chunks(split):
                places = np.array(chunk.indices)
                if bad := next(filter(None, chunk.errors), None):
                    name = split.image_ids[chunk.indices[chunk.errors.index(bad)]]
                    raise UsageError(f"{name}: {bad}; repair the data first")
                state.update(chunk.logits, split.labels[places])
                columns = rows(chunk, split.image_ids)
                truth = [split.true_labels[place] for place in chunk.indices]
                named = {"image_id": columns.pop("image_id"), "fold": [fold] * len(truth)}
                columns.pop("error")
                table = pa.table({**named, "truth": truth, **columns})
                if writer is None:
                    writer = stack.enter_context(pq.ParquetWriter(part, table.schema))
                writer.write_table(table.cast(writer.schema))
                progress.update(len(truth))
    return state.compute()


def _result(config: TrainConfig, results: Sequence[TrainResult], metrics: Metrics) -> CvResult:
    scores = [each.best_score for each in results]
    return CvResult(
        out=config.out,
        metric=config.monitor.figure,
        scores=scores,
        best_epochs=[each.best_epoch for each in results],
        mean=statistics.fmean(scores),
        std=statistics.stdev(scores),
        interval=_within_range(interval_of(scores), config),
        out_of_fold=metrics.scalars(),
        images=metrics.count,
        predictions=config.out / PREDICTIONS,
        seconds=math.fsum(each.seconds for each in results),
    )


def interval_of(scores: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of the mean score of k folds, by the corrected resampled t-test.

    The training sets of two folds share most of their images, so their scores vary together, and
    std / sqrt(k) would be too small: the variance is multiplied by 1/k + 1/(k - 1) instead (Nadeau,
    Bengio: Inference for the Generalization Error, 2003).
    """
    from scipy.stats import t

    count, mean = len(scores), statistics.fmean(scores)
    error = statistics.stdev(scores) * math.sqrt(1 / count + 1 / (count - 1))
    half = float(t.ppf((1 + CONFIDENCE) / 2, count - 1)) * error
    return mean - half, mean + half


def _within_range(interval: tuple[float, float], config: TrainConfig) -> tuple[float, float]:
    """The interval without what the metric cannot be; of a few folds it may be wider."""
    low, high = interval
    if config.monitor.beside:
        return interval  # a metric of the user's own
    return max(0.0, low), high if config.monitor.figure == "loss" else min(1.0, high)


def lines(found: CvResult) -> list[str]:
    """The result for people: a line for each fold, and the summary."""
    title = metric_title(found.metric)
    rows = zip(found.scores, found.best_epochs, strict=True)
    folds = [
        f"fold {number}  {title} {score:.4f}  epoch {epoch}"
        for number, (score, epoch) in enumerate(rows, 1)
    ]
    low, high = found.interval
    pooled = found.out_of_fold.get(found.metric, math.nan)
    return [
        *folds,
        f"mean    {title} {found.mean:.4f}, standard deviation {found.std:.4f}, 95 % interval "
        f"{low:.4f} to {high:.4f}",
        f"out of fold, {found.images:,} images: {title} {pooled:.4f}; {found.predictions}",
    ]

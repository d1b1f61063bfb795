"""A training run, from its config to its best model.

`train` reads from top to bottom: open the data, build the model, make the engine (optimiser and
schedule are its own), resume or start; then for each epoch train, evaluate, decide and save.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from distcls import log
from distcls.cli import import_pandas
from distcls.config import build, options_layer
from distcls.config.schema import duration_in_steps
from distcls.errors import DistclsError, Stopped, UsageError, require
from distcls.evaluation.metrics import Metrics
from distcls.files import claimed_output, remove_unfinished
from distcls.imaging import Preprocess
from distcls.log import say, warn
from distcls.model_card import ModelCard
from distcls.models import factory
from distcls.models.classifier import Classifier
from distcls.models.config import AUTO, ModelConfig, is_published
from distcls.models.matching import apply_weights
from distcls.plotting import metric_title
from distcls.registry import same_reference
from distcls.stored import Unfit
from distcls.training.checkpointing import (
    CheckpointManager,
    EpochModel,
    Resumption,
    TrainingState,
    recorded_config,
)
from distcls.training.config import RUN_FILES, TrainConfig, chosen, require_free, require_places
from distcls.training.distributed import (
    any_process,
    explain_lost_processes,
    from_main,
    random_numbers_kept,
    set_project_folder,
    start,
    sum_over_processes,
    sums_over_processes,
)
from distcls.training.engine import Engine
from distcls.training.hooks import Callbacks
from distcls.training.inputs import (
    TrainingInput,
    choose_preprocess,
    choose_weights,
    discard_unused,
    open_input,
    place,
)
from distcls.training.logging import (
    Records,
    RunProgress,
    Stopwatch,
    banner,
    epoch_line,
    open_tracker,
    require_tracker,
)
from distcls.training.memory import compile_step, explain_out_of_memory, fit_into_memory
from distcls.training.resolve import (
    of_this_process,
    require_usable,
    resolved,
    with_recorded_recipe,
)
from distcls.training.schedule import make_schedule
from distcls.training.signals import StopSignals
from distcls.training.stability import EpochChecks
from distcls.training.stall import StallAdvice
from distcls.training.weight_averaging import select_weights

if TYPE_CHECKING:
    import pandas

    from distcls.predictor import Predictor

WITHOUT_WEIGHTS = {"pretrained": None, "pretrained_sha256": None}
"""What a model file's architecture has of the weights that its run started from."""
FEW = 20
"""Validation images below which a run warns."""
POLL_EVERY = 10
"""Steps between two all-reduces by which processes agree whether to save or stop."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainResult:
    """How a run ended."""

    out: Path
    """The run directory."""
    best_epoch: int
    """Epoch of best.pth, counted from 1."""
    best_score: float
    """Its value of the monitored metric."""
    epochs: int
    """Epochs trained."""
    seconds: float
    """Seconds spent training and evaluating."""
    history: list[dict[str, float]] = dataclasses.field(repr=False)
    """A row for each epoch, as in history.csv."""

    def load(self, **options: Any) -> Predictor:
        """The best model, ready to predict; `options` are those of `distcls.load`."""
        from distcls.predictor import load

        return load(self.out, **options)

    def to_dataframe(self) -> pandas.DataFrame:
        """The history as a pandas DataFrame, a row for each epoch, indexed by `epoch`.

        Its columns are those of history.csv. Raises UsageError if pandas is not installed.
        """
        return import_pandas().DataFrame(self.history).set_index("epoch")

    def to_json(self) -> dict[str, Any]:
        """For --json."""
        fields = [field.name for field in dataclasses.fields(self) if field.name != "history"]
        return {**{name: getattr(self, name) for name in fields}, "out": str(self.out)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """A run under way: what its epochs are trained with."""

    config: TrainConfig
    accelerator: Accelerator
    data: TrainingInput
    preprocess: Preprocess
    engine: Engine
    state: TrainingState
    checkpoints: CheckpointManager
    records: Records
    progress: RunProgress
    signals: StopSignals
    checks: EpochChecks
    stall: StallAdvice
    callbacks: Callbacks | None
    """The user's, on the main process alone."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The evaluation at the end of an epoch."""

    metrics: dict[str, Metrics]
    """On validation, of each of the evaluated weights: raw, EMA, averaged."""
    scores: dict[str, float]
    """Their values of the monitored metric."""
    chosen: str
    """The weights with the best score."""
    score: float
    """The best score, on every process that of the main one."""
    loss: float
    """Of the chosen weights, likewise of the main process."""


def fit(
    config: TrainConfig | None = None, /, *, transform: Any = None, **options: Any
) -> TrainResult:
    """Train as `distcls train` does, from a script or a notebook.

        result = distcls.fit(data="photos/", out="runs/photos", epochs=20)
        print(result.best_score, result.load()("photo.jpg"))

    May be called again in the same process, whose random numbers of PyTorch stay as they are. In a
    script that `accelerate launch` starts, every process calls it.

    Args:
        config: the config; by default `options` are all there is.
        transform: a training transform of your own, `augment.transform`.
        options: the keys of `TrainConfig`, a section as a dict (`optimizer={"weight_decay": 0.1}`)
            or its `name` alone (`model="efficientnet_b0"`). They replace the values of `config`.
            A model, loss, metric or callback of your own may be given as the function, class or
            object itself (`callbacks=[...]`) instead of its name.

    Returns:
        How the run ended, with its history; the files are in `result.out`.

    Raises:
        UsageError: for options, data or an output folder that cannot work, before the first step.
        Stopped: if Ctrl-C or a signal ended the run; `resume="auto"` continues.
    """
    if config is not None and not isinstance(config, TrainConfig):
        raise UsageError(
            f"config: {config!r} is no TrainConfig; TrainConfig.from_yaml reads a file, and a "
            "folder of images is given as fit(data=...)"
        )
    if config is None and "data" not in options:
        raise UsageError("data is missing: a folder of images, or a dataset directory")
    if not isinstance(options.get("data", ""), str | os.PathLike):
        raise UsageError(
            f"data: {type(options['data']).__name__} is no path: give that of a folder, a manifest "
            "or a dataset directory (to_csv writes a DataFrame; an ImageDataset has a location)"
        )
    if transform is not None:
        options["augment.transform"] = transform
    layers = [] if config is None else [options_layer(TrainConfig, vars(config))]
    config = build(TrainConfig, *layers, options_layer(TrainConfig, options))
    require(not config.json, "json", config.json, "false: the result is returned")
    with log.hushed(config.quiet), random_numbers_kept():
        return train(config)


_one_at_a_time = threading.RLock()
"""Held by the thread that trains."""


def train(config: TrainConfig) -> TrainResult:
    """Train according to the config and write the run directory.

    Raises UsageError for a config, dataset or output folder that cannot work, before the first
    step, and where another run writes the run directory; Stopped when a signal ended the run and
    its state is saved.
    """
    if not _one_at_a_time.acquire(blocking=False):
        raise UsageError(
            "another thread of this process trains at this moment, and both would share the random "
            "numbers and threads of PyTorch; wait for its end, or use another process"
        )
    try:
        return _train_alone(config)
    finally:
        _one_at_a_time.release()


def _train_alone(config: TrainConfig) -> TrainResult:
    require_places(config)
    require_usable(config)
    require_tracker(config.tracker)
    with explain_lost_processes(config.collective_timeout, begun=False):
        accelerator = start(config)
        asked, config = config, from_main(lambda: place(config))
        try:
            with claim_run_directory(config, accelerator):
                state = _train(config, accelerator)
        except BaseException:
            if accelerator.is_main_process:
                discard_unused(asked, config.out)
            raise
    # not end_training(): it ends the process group, and whatever this process does next with it
    for tracker in accelerator.trackers:
        tracker.finish()
    return TrainResult(
        out=config.out,
        best_epoch=state.best_epoch,
        best_score=state.best_score or 0.0,
        epochs=state.epoch,
        seconds=state.seconds,
        history=[dict(row) for row in state.history],
    )


def _train(config: TrainConfig, accelerator: Accelerator) -> TrainingState:
    """All epochs of the run, in a run directory that is its own; the state at its end."""
    set_project_folder(accelerator, config.out)
    data = open_input(config)
    given, config, model, preprocess, reasons = set_up(config, data, accelerator.mixed_precision)
    epochs = chosen(config.epochs)
    engine = Engine(config, accelerator, data, model, preprocess)
    main = accelerator.is_main_process
    checkpoints = CheckpointManager(config, given=given, data=data.fingerprint, main_process=main)
    state = _resume(engine, checkpoints, config, data)
    if end := _why_at_its_end(config, state):
        say(f"nothing to do: {end}")
        return state
    if config.auto_micro_batch:
        fit_into_memory(engine)
    if config.compile:
        compile_step(engine)
    accelerator.wait_for_everyone()  # all have read the run directory before it is written to
    with (
        open_run(
            config,
            accelerator,
            data=data,
            preprocess=preprocess,
            engine=engine,
            checkpoints=checkpoints,
            state=state,
        ) as run,
        explain_out_of_memory(config, engine),
        explain_lost_processes(config.collective_timeout),
    ):
        lines = banner(config, accelerator, data, preprocess, engine.summary())
        for line in [*lines, *reasons, *of_this_process(config)]:
            say(line)
        if len(data.val_samples) < FEW:
            warn(few_images(len(data.val_samples)))
        call_back(run, "on_train_start")
        while not (
            state.epoch >= epochs or state.out_of_patience(config.monitor) or state.stopped_by
        ):
            began = time.perf_counter()
            figures = train_steps(run)
            evaluation = evaluate(run)
            best = decide(run, figures, evaluation, time.perf_counter() - began)
            save_epoch(run, evaluation, best=best)
            [stop] = any_process(run.signals.received is not None)
            if stop and state.epoch < epochs:
                _stop(run)
        call_back(run, "on_train_end")
    if state.stopped_by:
        say(f"stopped by the callback {state.stopped_by} after epoch {state.epoch} of {epochs}")
    elif state.epoch < epochs:
        metric = metric_title(config.monitor.figure)
        waited = log.counted(chosen(config.monitor.patience) or 0, "epoch")
        say(f"stopped early: no better {metric} in {waited}")
    return state


def few_images(count: int) -> str:
    """What is said of scores of so few validation images."""
    return (
        f"{log.counted(count, 'validation image')}: scores of so few say little, and which epoch "
        "is best is chance; add images, or use all in turn with distcls cv"
    )


def _why_at_its_end(config: TrainConfig, state: TrainingState) -> str:
    """Why nothing is left to train, and how to go on; empty if something is."""
    if state.epoch >= chosen(config.epochs):
        return f"all {state.epoch} epochs are done; --epochs N with more continues"
    if state.epoch and state.out_of_patience(config.monitor):
        patience, metric = config.monitor.patience, metric_title(config.monitor.figure)
        return (
            f"stopped early after epoch {state.epoch} of {config.epochs}, no better "
            f"{metric} in {log.counted(state.epochs_since_best, 'epoch')} (monitor.patience "
            f"{patience}); --monitor.patience N with more than "
            f"{state.epochs_since_best}, or null, continues"
        )
    if any(same_reference(state.stopped_by, name) for name in config.callbacks):
        return (
            f"the callback {state.stopped_by} stopped it after epoch {state.epoch} of "
            f"{config.epochs}; without that in `callbacks` it continues"
        )
    state.stopped_by = None
    return ""


def call_back(run: Run, event: str) -> None:
    """Call the user's callbacks on the main process; all processes have to call this.

    Whether one asks to stop becomes part of the state. An error in one ends all processes.
    """
    state = run.state
    if not run.config.callbacks:
        return

    def call() -> str | None:
        assert run.callbacks is not None
        facts = {"epoch": state.epoch, "step": state.step, "history": state.history}
        best = {"best_epoch": state.best_epoch, "best_score": state.best_score}
        return run.callbacks.call(event, **facts, **best)

    asked = from_main(call)
    if event != "on_train_end":
        state.stopped_by = asked


def train_steps(run: Run) -> dict[str, float]:
    """Train to the end of the epoch: learning rate, mean loss, top-1 and speed."""
    config, engine, state = run.config, run.engine, run.state
    sums = _sums_so_far(run)
    lap, epoch, number, lr = Stopwatch(), Stopwatch(), state.epoch + 1, 0.0
    run.progress.begin_epoch(state.epoch, state.epoch_step)
    for report in engine.train_epoch(state.epoch, state.epoch_step):
        state.step, lr = report.step, report.lr
        state.epoch_step += 1
        sums += report.sums
        lap.count(report)
        epoch.count(report)
        run.progress.step(report)
        if report.step % config.log_every == 0:
            loss, (speed, wait) = sum_over_processes(report.loss), lap.lap()
            run.records.step(number, report, loss, speed, wait)
        run.records.anomalies(number, report.anomalies)
        if state.epoch_step < engine.steps_per_epoch:  # the end of the epoch saves, and stops
            _save_or_stop(run, sums)
    speed, wait = epoch.lap()
    run.stall.count(epoch.seconds)
    loss_sum, right, counted = sums_over_processes(sums)
    return {
        "lr": lr,
        "train_loss": loss_sum / len(run.data.train_samples),
        "train_top1": right / max(1.0, counted * engine.decisions),
        "images_per_s": speed,
        "data_wait": wait,
    }


def _sums_so_far(run: Run) -> torch.Tensor:
    """`StepReport.sums` of the unfinished epoch's steps so far; the main process holds all."""
    state, device = run.state, run.accelerator.device
    so_far = [state.loss_sum, state.right_sum, float(state.counted)]
    own = so_far if run.accelerator.is_main_process else [0.0, 0.0, 0.0]
    # counts of images have to stay exact; Apple's GPUs have no float64
    exact = torch.float32 if device.type == "mps" else torch.float64
    return torch.tensor(own, dtype=exact, device=device)


def _save_or_stop(run: Run, sums: torch.Tensor) -> None:
    """Save or stop within the epoch, if any process has a reason to; all do it at the same step."""
    state, every = run.state, run.config.checkpoint.every_steps
    alone = run.accelerator.num_processes == 1
    if not (alone or state.step % POLL_EVERY == 0 or (every and state.step % every == 0)):
        return
    due = run.checkpoints.due(state.step)
    stop, save = any_process(run.signals.received is not None, due)
    if stop or save:
        # the state must not hold a step that is not read yet
        run.records.anomalies(state.epoch + 1, run.engine.poll_anomalies())
        state.loss_sum, state.right_sum, counted = sums_over_processes(sums)
        state.counted = round(counted)
        run.checkpoints.save(state, run.engine.state_dict())
    if stop:
        _stop(run)


def evaluate(run: Run) -> Evaluation:
    """Evaluate the weights at the end of the epoch and choose those to save."""
    monitor = run.config.monitor
    metrics = run.engine.evaluate(run.progress.evaluated)
    scores = {name: found.scalars()[monitor.figure] for name, found in metrics.items()}
    losses = {name: found.scalars()["loss"] for name, found in metrics.items()}
    best = monitor.best_of(scores, losses)
    # the main process's figures, so that all processes draw the same conclusions from them
    score, loss = broadcast_object_list([scores[best], losses[best]])
    return Evaluation(metrics=metrics, scores=scores, chosen=best, score=score, loss=loss)


def decide(run: Run, figures: dict[str, float], evaluation: Evaluation, seconds: float) -> bool:
    """Finish the epoch, which took `seconds`: whether it is the best so far.

    `figures` are those of `train_steps`. It goes to the schedule, the log and the history.
    """
    config, state, monitor = run.config, run.state, run.config.monitor
    state.epoch += 1
    state.epoch_step, state.loss_sum, state.right_sum, state.counted = 0, 0.0, 0.0, 0
    state.seconds += seconds
    several = len(evaluation.scores) > 1
    scalars = evaluation.metrics[evaluation.chosen].scalars() | {"loss": evaluation.loss}
    columns = {f"val_{name}": value for name, value in scalars.items()}
    if several:
        scores = evaluation.scores.items()
        columns |= {f"val_{monitor.figure}_{name}": value for name, value in scores}
    row = {"epoch": state.epoch, "step": state.step, **figures, **columns, "seconds": seconds}
    state.history.append(row)
    best = state.judge(evaluation.score, monitor)
    mark = "" if not best else f"best ({evaluation.chosen})" if several else "best"
    left = run.progress.left_after_epoch()
    say(epoch_line(row, chosen(config.epochs), mark, left, monitor.figure))
    chosen_metrics = evaluation.metrics[evaluation.chosen]
    problems = run.checks.problems(state.history, chosen_metrics, chosen(config.lr))
    for problem in [*problems, *run.stall.problems()]:
        warn(problem)
    rate = run.engine.end_epoch(state.step, improved=best)
    if rate is not None:
        say(f"no better {metric_title(monitor.figure)}: learning rate reduced to {rate:.3g}")
    return best


def save_epoch(run: Run, evaluation: Evaluation, *, best: bool) -> None:
    """Write the files of the epoch just finished, and call the callbacks; the training state comes
    last, with what they asked for."""
    run.records.require_in_place()
    tensors = run.engine.state_dict()
    run.records.line("epoch", **run.state.history[-1])
    weights = select_weights(tensors, evaluation.chosen)
    card = _card(run, evaluation)
    model = EpochModel(weights=weights, card=card, score=evaluation.score, best=best)
    run.checkpoints.save_epoch(
        run.state, tensors, model, before_state=lambda: call_back(run, "on_epoch_end")
    )
    run.records.curves(run.state.history, run.state.best_epoch)


def _stop(run: Run) -> None:
    """Wait until the state is on disk, then raise Stopped, on all processes."""
    run.checkpoints.wait()
    run.accelerator.wait_for_everyone()
    cause = run.signals.received.name if run.signals.received else "another process"
    raise Stopped(
        f"stopped by {cause} after step {run.state.step}, state saved; --resume auto continues"
    )


def set_up(
    config: TrainConfig, data: TrainingInput, precision: str
) -> tuple[TrainConfig, TrainConfig, Classifier, Preprocess, list[str]]:
    """The config as given and resolved, the network and its preprocessing, as config, weights and
    images have it; and in words what `auto` became.

    A resumed run gets its tensors from its state, so no weights are downloaded for it.
    """
    recorded = recorded_config(config)
    resumed = recorded is not None
    if recorded is not None:
        config = dataclasses.replace(config, model=with_recorded_weights(config.model, recorded))
        config = with_recorded_recipe(config, recorded)
        if missing := [name for name in recorded.get("callbacks") or () if not config.callbacks]:
            warn(f"callbacks: the run had {', '.join(missing)}, and goes on without")
    weights = choose_weights(config, data.train, download=not resumed)
    known = weights.preprocess if weights is not None else None
    preprocess = choose_preprocess(config.input, data.train, known)
    torch.manual_seed(config.seed)  # the initial weights, the same on every process
    model = factory.build(config.model, len(data.classes), preprocess)
    if weights is not None and not resumed:
        match, partial = config.model.pretrained_match, config.model.allow_partial
        for line in apply_weights(model, weights, match=match, allow_partial=partial).lines():
            say(line)
    full, reasons = resolved(
        config, data=data, preprocess=preprocess, model=model, precision=precision, weights=weights
    )
    return config, full, model, preprocess, reasons


def with_recorded_weights(model: ModelConfig, recorded: dict[str, Any]) -> ModelConfig:
    """A resumed run's network with the weights that the run was started with in place of `auto`.

    `recorded` is the run's config by dotted keys.
    """
    name, sha256 = (recorded.get(f"model.{key}") for key in ("pretrained", "pretrained_sha256"))
    if model.pretrained == AUTO:
        model = dataclasses.replace(model, pretrained=name)
    same = model.pretrained == name or is_published(model.pretrained)
    if same and name is not None and model.pretrained_sha256 is None:
        model = dataclasses.replace(model, pretrained_sha256=sha256)
    return model


def _resume(
    engine: Engine, checkpoints: CheckpointManager, config: TrainConfig, data: TrainingInput
) -> TrainingState:
    """The state to resume from, its tensors loaded into the engine, or a new one."""
    found = checkpoints.resume()
    if found is None:
        return TrainingState(data=data.fingerprint)
    state = found.state
    steps = engine.steps_per_epoch
    if state.epoch_step >= steps or state.step != state.epoch * steps + state.epoch_step:
        raise UsageError(
            f"{found.path}: its step {state.step} is not step {state.epoch_step} after "
            f"{state.epoch} epochs of {steps} steps; the training images have changed, or the "
            "file is damaged"
        )
    if state.data is None or state.data.pack is None:  # else the data of now, but for a pack
        state.data = data.fingerprint
    if found.epochs != config.epochs and state.epoch < chosen(config.epochs):
        for line in _change_length(config, found, steps):
            say(line)
    with _explain_unfitting(found.path):
        engine.load_state_dict(found.tensors)
    batching = engine.micro_batching
    batching.accumulate = state.accumulate or batching.accumulate
    batching.evaluation_batch = state.evaluation_batch or batching.evaluation_batch
    batching.require_possible()  # the state may come from a run with fewer processes
    return state


@contextlib.contextmanager
def _explain_unfitting(path: Path) -> Iterator[None]:
    """Turn what torch raises for tensors of another network into a UsageError."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        kind = "" if isinstance(error, Unfit) else f"{type(error).__name__}: "
        reason = textwrap.shorten(f"{kind}{error}", 300)
        raise UsageError(f"{path}: its tensors do not fit this run: {reason}") from error


def _change_length(config: TrainConfig, found: Resumption, steps: int) -> list[str]:
    """Have a run of `steps` steps per epoch go on with another number of epochs than it began with;
    what that changes, a line each.

    All that follows the length of the run (schedule, frozen layers, mean of the last epochs) is a
    function of the step and the length: from here on it is that of a run with the new one.
    """
    state, before, now = found.state, found.epochs, chosen(config.epochs)
    rates = []
    for epochs, step in ((before, max(0, state.step - 1)), (now, state.step)):
        schedule = make_schedule(config.schedule, chosen(config.lr), steps, epochs)
        with _explain_unfitting(found.path):
            schedule.load_state_dict(found.tensors["schedule"])
        rates.append(schedule.checked_rate(step))
    lines = [
        f"epochs: {now} instead of {before}; from step {state.step + 1} on the learning rate is "
        f"that of the {config.schedule.name} schedule of {now} epochs ({now * steps} steps): "
        f"{rates[1]:.3g} there, after {rates[0]:.3g}"
    ]
    frozen = config.freeze.backbone or "0 steps"
    until = [duration_in_steps(frozen, steps, steps * epochs) for epochs in (before, now)]
    if until[0] != until[1] and state.step < max(until):
        lines.append(f"freeze.backbone: {frozen} of {now} epochs is until step {until[1]}")
    average, last = found.tensors.get("average") or {}, config.average.last_epochs or 0
    taken, first = average.get("taken", 0), max(now - last, state.epoch)
    if average and (taken or first > now - last):
        average["taken"] = 0  # the next epoch in the mean replaces what is there
        lines.append(
            f"average.last_epochs: the mean of {taken} epochs so far is dropped, a new one takes "
            f"epochs {first + 1} to {now} ({now - first} of {last})"
        )
    return lines


@contextlib.contextmanager
def claim_run_directory(config: TrainConfig, accelerator: Accelerator) -> Iterator[None]:
    """Hold the run directory for this run alone, by a lock of the main process.

    Raises UsageError on all processes if another run holds it, or has left one there meanwhile.
    """
    with contextlib.ExitStack() as stack:
        problem: DistclsError | None = None
        if accelerator.is_main_process:
            busy = (
                f"out: another run is writing {config.out} at this moment; wait for its end, or "
                "choose another --out"
            )
            try:
                stack.enter_context(claimed_output(config.out, busy))
                for name in (*RUN_FILES, "curves.png"):
                    remove_unfinished(config.out / name)
                require_free(config.out, config.resume)
            except DistclsError as error:
                problem = error
        # nobody may wait for a main process that is gone
        [said] = broadcast_object_list([None if problem is None else str(problem)])
        if said is not None:
            raise problem or UsageError(said)
        yield


@contextlib.contextmanager
def open_run(
    config: TrainConfig,
    accelerator: Accelerator,
    *,
    data: TrainingInput,
    preprocess: Preprocess,
    engine: Engine,
    checkpoints: CheckpointManager,
    state: TrainingState,
) -> Iterator[Run]:
    """The run with its files open on the main process, and signals caught on all."""
    with contextlib.ExitStack() as stack:
        # first in, last out: a signal must not kill the run while the files below are closed
        signals = stack.enter_context(StopSignals())
        main = accelerator.is_main_process
        track = open_tracker(config, accelerator, state.step) if main else None
        records = Records(config, state.step, track, main_process=main)
        stack.enter_context(contextlib.closing(records))
        stack.enter_context(contextlib.closing(checkpoints))
        _remember_micro_batching(config, engine, state, records)
        progress = RunProgress(config, data, engine.steps_per_epoch)
        stack.enter_context(contextlib.closing(progress))
        yield Run(
            config=config,
            accelerator=accelerator,
            data=data,
            preprocess=preprocess,
            engine=engine,
            state=state,
            checkpoints=checkpoints,
            records=records,
            progress=progress,
            signals=signals,
            stall=StallAdvice(engine.loading, config),
            checks=EpochChecks(data.classes if data.task.single else (), config.monitor.figure),
            callbacks=Callbacks(config) if main else None,
        )


def _remember_micro_batching(
    config: TrainConfig, engine: Engine, state: TrainingState, records: Records
) -> None:
    """Record the micro-batching in the state, so that a resumed run uses the same."""
    batching = engine.micro_batching
    sizes = {"accumulate": batching.accumulate, "evaluation_batch": batching.evaluation_batch}
    known = {name: getattr(state, name) for name in sizes}
    if config.auto_micro_batch and sizes != known:
        records.line("micro_batch", step=state.step, images=batching.size, **sizes)
    state.accumulate, state.evaluation_batch = sizes.values()


def _card(run: Run, evaluation: Evaluation) -> ModelCard:
    """The model card of the chosen weights."""
    config, state = run.config, run.state
    metrics = evaluation.metrics[evaluation.chosen]
    return ModelCard(
        architecture=dataclasses.asdict(config.model) | WITHOUT_WEIGHTS,
        task=dataclasses.replace(run.data.task, thresholds=metrics.thresholds),
        preprocess=run.preprocess,
        training={
            "epoch": state.epoch,
            "step": state.step,
            "dataset": str(config.data.resolve()),
            "weights": evaluation.chosen,
            "validation": metrics.scalars(),
        },
    )

"""One epoch of training and one pass of evaluation, on however many processes there are."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import reduce
from torch import Tensor, nn

from distcls import stored
from distcls.errors import UsageError
from distcls.evaluation.metrics import Metrics, MetricState, metric_state, require_metrics
from distcls.imaging import Preprocess
from distcls.log import counted, say
from distcls.models.classifier import Classifier, count_macs, count_parameters
from distcls.models.factory import stem_stride
from distcls.models.registry import own_module
from distcls.training.augment import Augment
from distcls.training.batch_norm import (
    CpuSyncBatchNorm,
    RunningStatistics,
    broadcast_buffers,
    convert_sync_batch_norm,
)
from distcls.training.config import TrainConfig, chosen
from distcls.training.cuda_graphs import GraphedModel
from distcls.training.freezing import FreezeSchedule, freeze_by_name
from distcls.training.fsdp import (
    Sharding,
    full_tensor,
    gather_full,
    load_full_optimizer_state,
    load_full_state,
)
from distcls.training.hooks import make_transforms
from distcls.training.inputs import TrainingInput
from distcls.training.loader import Batch, make_crops, make_loader
from distcls.training.losses import Objective
from distcls.training.optim import make_optimizer
from distcls.training.sampler import EpochSampler, MicroBatching, ShardedSampler
from distcls.training.schedule import Schedule, make_schedule
from distcls.training.stability import POLL_EVERY, Anomalies, LossSpikeDetector, NonFiniteGuard
from distcls.training.stall import StageTimes
from distcls.training.weight_averaging import WeightAverages

MOMENTS = 3
"""Copies of the weights that an optimiser holds at most: Ranger has two means and slow weights."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepReport:
    """One optimiser step, as the progress bar and metrics.jsonl show it."""

    step: int
    """Steps finished, over all epochs."""
    images: int
    """Images of its global batch."""
    loss: Tensor
    """This process's term of the batch's mean loss, [], on the device: reading it would wait."""
    sums: Tensor
    """Over this process's images: losses, right decisions, and the images themselves, [3], on the
    device; all 0 for a skipped step."""
    recent_loss: float | None
    """Mean loss of this epoch's last steps, over all processes; None until they are read."""
    lr: float
    data_wait: float
    """Seconds that the step waited for its images."""
    anomalies: Anomalies
    """Found since the last report, in this step and the ones before."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineSummary:
    """The size of a run's model and steps."""

    parameters: int
    macs: int
    """Multiply-accumulates of one image in one forward pass."""
    stem_stride: int | None
    sharded: bool
    """Whether the weights are sharded (FSDP)."""
    steps_per_epoch: int
    accumulate: int
    """Micro-batches of a step."""


class Engine:
    """The training step of a run and the evaluation after each epoch.

    Model, optimiser, data order and randomness are its own; a caller trains, evaluates, and saves
    or loads its state.
    """

    def __init__(
        self,
        config: TrainConfig,
        accelerator: Accelerator,
        data: TrainingInput,
        model: Classifier,
        preprocess: Preprocess,
        *,
        schedule: Schedule | None = None,
    ) -> None:
        """`schedule` is that of the config unless given. Raises UsageError if the global batch is
        too small for the processes."""
        self._config = config
        self._accelerator = accelerator
        self._data = data
        self._preprocess = preprocess
        require_metrics(data.task, config.monitor.beside)
        world_size = int(accelerator.num_processes)
        self._sampler = EpochSampler(
            samples=len(data.train_samples), batch_size=chosen(config.batch_size), seed=config.seed
        )
        self.micro_batching = MicroBatching(
            sampler=self._sampler, world_size=world_size, accumulate=config.accumulate
        )
        self.micro_batching.require_possible()
        self._prepare_model(model)
        self._schedule = schedule or make_schedule(
            config.schedule, chosen(config.lr), self.steps_per_epoch, chosen(config.epochs)
        )
        self._freezing = FreezeSchedule(
            config.freeze, self._model, self.steps_per_epoch, chosen(config.epochs)
        )
        crops = make_crops(config.augment, data.train, preprocess.size, config.seed)
        of_image, of_batch = make_transforms(config.augment)
        self._augment = Augment(
            config.augment,
            preprocess.size,
            cropped=crops is not None,
            fill=data.fill,
            transform=of_batch,
        )
        self._objective = Objective(config, data, self._augment, accelerator.device)
        reading = self._augment.reading(preprocess)
        self._train_loader = make_loader(
            config.loader,
            data.train,
            reading,
            accelerator,
            crops=crops,
            transform=of_image,
            seed=config.seed,
        )
        self._val_loader = make_loader(config.loader, data.val, preprocess, accelerator)
        self._shards = ShardedSampler(
            rank=accelerator.process_index,
            world_size=world_size,
            group_size=self._objective.group_size,
        )

    def _prepare_model(self, model: Classifier) -> None:
        """The model with what updates and checks its weights: optimiser, averages, guard."""
        config, accelerator = self._config, self._accelerator
        self._sharding = Sharding(accelerator)
        self._model = self._sharding.place(model, config.memory_format)
        if config.sync_batch_norm and accelerator.num_processes > 1:
            convert_sync_batch_norm(self._model, accelerator.device)
        self._averages = WeightAverages(config, self._model)
        freeze_by_name(config.freeze, self._model)
        optimizer = make_optimizer(
            config.optimizer, self._model, chosen(config.lr), sharded=self._sharding.on
        )
        own = own_module(config.model.name) is not None
        if (own or accelerator.num_processes > 1) and not self._sharding.on:
            self._try_model()
        # `_wrapped` is the model in its DDP or FSDP and autocast wrappers; `_model` the bare one
        self._wrapped, self._optimizer = self._sharding.prepare(
            self._model, optimizer, self._averages.models
        )
        self._training_pass = self._wrapped
        alone = accelerator.device.type == "cuda" and accelerator.num_processes == 1
        # networks of one's own may decide in Python what a pass computes
        if config.cuda_graphs and alone and not (own or config.compile or self._sharding.on):
            self._training_pass = GraphedModel(
                self._wrapped,
                self._model,
                lambda: _unchanged(self._model, accelerator.device),
            )
        self._parameters = list(self._model.parameters())
        self._guard = NonFiniteGuard(
            [self._model, *self._averages.updated_each_step],
            accelerator.device,
            config.max_nonfinite_steps,
            self._data.train.image_ids,
        )
        free = accelerator.device.type == "cpu" and accelerator.num_processes == 1
        self._spikes = LossSpikeDetector(chosen(config.batch_size), 1 if free else POLL_EVERY)
        self._statistics = RunningStatistics(
            self._model, correct_bias=config.model.batch_norm_bias_correction
        )

    def _try_model(self) -> None:
        """A pass over two images in training mode, which shows what one in evaluation did not.

        DDP waits for the gradient of every parameter: if some get none, it has to look for them in
        each step. Raises UsageError for an output that cannot be trained.
        """
        model, device, name = self._model, self._accelerator.device, self._config.model.name
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        expected = (2, len(self._data.classes))
        with _trial(model, device):
            logits = model(_random_pixels(2, self._preprocess.size, device))
            shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            if shape != expected:
                raise UsageError(
                    f"model.name: {name}: in training mode its output for two images is {shape}, "
                    f"expected {expected}: a logit for each class"
                )
            if not logits.requires_grad:
                raise UsageError(
                    f"model.name: {name}: its output does not depend on its parameters: it is "
                    "detached, or computed outside of PyTorch"
                )
            found = torch.autograd.grad(logits.sum(), [p for _, p in named], allow_unused=True)
        unused = [key for (key, _), each in zip(named, found, strict=True) if each is None]
        if not unused:
            return
        names = ", ".join(key.removeprefix("backbone.") for key in unused[:3])
        say(
            f"model.name: {counted(len(unused), 'parameter')} of {name} ({names}"
            f"{', ...' * (len(unused) > 3)}) get no gradient and are not trained"
        )
        if self._accelerator.ddp_handler is not None:
            self._accelerator.ddp_handler.find_unused_parameters = True

    @property
    def decisions(self) -> int:
        """Decisions on an image: 1, or its heads or labels."""
        return self._objective.decisions

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps of an epoch."""
        return self._sampler.steps

    @property
    def loading(self) -> StageTimes:
        """Where this process's loader of training images has spent its time so far."""
        return self._train_loader.stages

    def train_epoch(self, epoch: int, first: int = 0) -> Generator[StepReport]:
        """Run the steps of `epoch` (counted from 0) from its step `first` on, yielding after each.

        Raises DistclsError for too many skipped steps in a row.
        """
        self._wrapped.train()
        done = epoch * self.steps_per_epoch
        micro_batches = self._shards.training(
            self._data.train_samples, self._sampler, epoch, first, self.micro_batching.accumulate
        )
        batches = self._train_loader.batches(micro_batches, epoch)
        with contextlib.closing(batches):
            for step in range(first, self.steps_per_epoch):
                begin, end = self._sampler.bounds(step)
                lr, waited = self._schedule.checked_rate(done + step), self._train_loader.waited
                sums = self._step(epoch, done + step, lr, end - begin, batches)
                anomalies = self.poll_anomalies(flush=step == self.steps_per_epoch - 1)
                yield StepReport(
                    step=done + step + 1,
                    images=end - begin,
                    loss=sums[0] / (end - begin),
                    sums=sums,
                    recent_loss=self._spikes.recent_mean(min(POLL_EVERY, step - first + 1)),
                    lr=lr,
                    data_wait=self._train_loader.waited - waited,
                    anomalies=anomalies,
                )
        self._averages.after_epoch(epoch, self._model)

    def poll_anomalies(self, *, flush: bool = True) -> Anomalies:
        """What went wrong in the steps that are not read yet; they wait for more unless `flush`.

        All processes have to call this. Raises DistclsError for too many skipped steps in a row.
        """
        skipped = self._guard.poll(flush=flush)
        if skipped:
            self._statistics.recount()
        return Anomalies(skipped=skipped, spikes=self._spikes.poll(flush=flush))

    def evaluate(self, advance: Callable[[int], object] | None = None) -> dict[str, Metrics]:
        """Metrics on validation of each of the evaluated weights: raw, EMA, averaged.

        Every process evaluates its shard of the samples, none is padded, and the states are added.
        `advance` is called with the number of images of each batch.
        """
        evaluated = self._averages.evaluated(self._model)
        broadcast_buffers(self._model, *evaluated.values())
        states = {name: self._metric_state() for name in evaluated}
        samples, size = self._data.val_samples, self.micro_batching.evaluation_batch
        passes = self._shards.evaluation_passes(samples, size)
        models = list(evaluated.values())
        # without autocast: the metrics have to equal those of `distcls evaluate`
        with self._sharding.evaluating(models, passes, self._preprocess.size) as forward:
            for batch in self._val_loader.batches(self._shards.evaluation(samples, size)):
                outputs = forward(batch.images.to(self._accelerator.device))
                for state, logits in zip(states.values(), outputs, strict=True):
                    state.update(logits.float().cpu().numpy(), batch.labels.numpy())
                if advance is not None:
                    advance(len(batch.labels))
        return {name: self._summed(state).compute() for name, state in states.items()}

    def end_epoch(self, step: int, *, improved: bool) -> float | None:
        """Inform the schedule of the epoch that ended after `step` steps.

        Returns the learning rate if it falls because the monitored metric did not improve.
        """
        reduced = self._schedule.after_evaluation(step, improved)
        return self._schedule.checked_rate(step) if reduced else None

    def state_dict(self) -> dict[str, Any]:
        """Everything that changes in training, for `load_state_dict` of a later run.

        All processes have to call this, with no anomaly unread; sharded weights are gathered for
        the main process alone.
        """
        scaler = self._accelerator.scaler
        state = {
            "model": self._model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "schedule": self._schedule.state_dict(),
            "recent_losses": self._spikes.recent,
            **self._averages.state_dict(),
        }
        keep = self._accelerator.is_main_process
        return gather_full(state, keep=keep) if self._sharding.on else state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the state of an earlier run. Raises one of torch's errors, or Unfit, for
        one that does not fit."""
        load_full_state(self._model, state["model"])
        load_full_optimizer_state(self._optimizer, state["optimizer"])
        if self._accelerator.scaler is not None:
            scaler_schema(state["scaler"], "scaler")
            self._accelerator.scaler.load_state_dict(state["scaler"])
        self._averages.load_state_dict(state)
        self._schedule.load_state_dict(state["schedule"])
        self._spikes.recent = state.get("recent_losses", self._spikes.recent)
        self._guard.back_up()
        self._statistics.recount()

    def summary(self) -> EngineSummary:
        """The size of the model and its steps."""
        return EngineSummary(
            parameters=count_parameters(self._model),
            macs=count_macs(self._model, self._preprocess.size),
            stem_stride=stem_stride(self._model.backbone),
            sharded=self._sharding.on,
            steps_per_epoch=self.steps_per_epoch,
            accumulate=self.micro_batching.accumulate,
        )

    def compile(self) -> None:
        """Have torch.compile compile the model in place, at its next forward pass."""
        self._model.compile()

    def trial_step(self, images: int) -> float:
        """Seconds of a forward and a backward pass over `images` images of random pixels.

        On this process alone, beside as much memory as the gradients and moments of a step take.
        It leaves no trace: batch norm's statistics, the modules' modes and the random states are
        put back, and no gradient stays.
        """
        model, device = self._model, self._accelerator.device
        with _trial(model, device):
            reserved = self._reserve()
            began = time.perf_counter()
            pixels = _random_pixels(images, self._augment.canvas, device)
            indices = np.arange(images) % len(self._data.train)
            labels = torch.from_numpy(self._data.train.labels[indices]).to(device)
            examples = self._objective.examples(0, Batch(pixels, labels, indices))
            loss = self._objective.losses(model(examples.images), examples).sum()
            trainable = [p for p in self._parameters if p.requires_grad]
            torch.autograd.grad(loss, trainable, allow_unused=True)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds = time.perf_counter() - began
            del reserved
        return seconds

    def trial_evaluation(self) -> None:
        """A forward pass over a batch of evaluation, without a trace as `trial_step`."""
        model, device = self._model, self._accelerator.device
        with _unchanged(model, device), torch.inference_mode():
            reserved = self._reserve()
            size = self.micro_batching.evaluation_batch
            pixels = _random_pixels(size, self._preprocess.size, device)
            for evaluated in self._averages.evaluated(model).values():
                Classifier.forward(evaluated.eval(), pixels)
            del reserved

    def _reserve(self) -> list[Tensor]:
        """Memory that a step has in use besides a pass: gradients accumulated so far, moments."""
        optimizer = self._optimizer.optimizer
        made = getattr(optimizer, "_base_optimizer", optimizer).state  # within timm's Lookahead
        return [
            torch.empty_like(parameter)
            for parameter in self._parameters
            if parameter.requires_grad
            for _ in range(1 if parameter in made else 1 + MOMENTS)
        ]

    def _step(
        self, epoch: int, step: int, lr: float, images: int, batches: Iterator[Batch]
    ) -> Tensor:
        """One optimiser step over `accumulate` micro-batches of this process.

        Returns `StepReport.sums`.
        """
        world_size = self._accelerator.num_processes
        # dropout's randomness belongs to the step: nothing of it has to be saved for a resume
        torch.manual_seed(_step_seed(self._config.seed, step, self._accelerator.process_index))
        self._freezing.begin(step, alone=world_size == 1)
        for group in self._optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        losses: list[Tensor] = []
        right: list[Tensor] = []
        samples: list[int] = []
        accumulate = self.micro_batching.accumulate
        for number in range(accumulate):
            # sharded gradients are reduced with each micro-batch: in full they would take the
            # memory that sharding saves
            synced = self._sharding.on or number == accumulate - 1
            local = self._accelerator.no_sync
            with contextlib.nullcontext() if synced else local(self._wrapped):
                batch = next(batches)
                micro_losses, micro_right = self._losses(epoch, batch)
                # DDP takes the mean over processes, so each has to count for all of them
                self._accelerator.backward(micro_losses.sum() * (world_size / images))
            losses.append(micro_losses.detach())
            right.append(micro_right.sum())
            samples += batch.indices.tolist()
        self._freezing.drop_gradients(step)
        bad = self._update()
        all_losses = torch.cat(losses)
        self._guard.record(step + 1, bad, all_losses, samples)
        total = all_losses.sum()
        self._spikes.record(step + 1, total / images)
        count = torch.full((), len(samples), device=total.device)
        terms = (total, torch.stack(right).sum(), count)
        exact = torch.promote_types(total.dtype, torch.float32)  # bf16 counts to 256
        sums = torch.stack([term.to(exact) for term in terms])
        # a skipped step does not count in the epoch's figures
        return torch.where(bad, 0.0, sums)

    def _losses(self, epoch: int, batch: Batch) -> tuple[Tensor, Tensor]:
        """Loss of each image of a micro-batch, and its right decisions, [B] each."""
        examples = self._objective.examples(epoch, batch)
        # compiled code and recorded graphs hold batch norm's momentum as a constant
        settling = self._statistics.before_batch()
        eager = settling and self._config.compile
        with torch.compiler.set_stance("force_eager" if eager else "default"):
            recorded = self.micro_batching.accumulate == 1 and not settling
            logits = (self._training_pass if recorded else self._wrapped)(examples.images)
        return self._objective.losses(logits, examples), self._objective.right(logits, examples)

    def _update(self) -> Tensor:
        """Clip the gradients and step optimiser and averages; whether it was skipped, bool []."""
        # without a limit the norm is still computed: it shows whether the gradients are finite
        limit = self._config.optimizer.clip_norm or math.inf
        norm = full_tensor(self._accelerator.clip_grad_norm_(self._parameters, limit))
        scaled = self._accelerator.scaler is not None
        bad = self._guard.step(norm, self._optimizer, scaled=scaled)
        self._optimizer.zero_grad()
        self._averages.after_step(self._model)
        return bad

    def _metric_state(self) -> MetricState:
        return metric_state(self._data.task, self._config.monitor.beside)

    def _summed(self, state: MetricState) -> MetricState:
        """The sum of all processes' states."""
        vector = torch.from_numpy(state.state()).to(self._accelerator.device)
        summed = self._metric_state()
        summed.merge(reduce(vector, reduction="sum").cpu().numpy())
        return summed


scaler_schema = stored.record(
    {
        "scale": stored.number(2.0**-126, 2.0**127),
        "growth_factor": stored.number(1, 1e6),
        "backoff_factor": stored.number(1e-6, 1),
        "growth_interval": stored.whole(1),
        "_growth_tracker": stored.whole(0),
    }
)
"""The state of torch's gradient scaler."""


@contextlib.contextmanager
def _unchanged(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Put back batch norm's statistics, the modules' modes and the random states afterwards."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    modes = [(module, module.training) for module in model.modules()]
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training
            with torch.no_grad():
                for buffer, saved in buffers:
                    buffer.copy_(saved)


@contextlib.contextmanager
def _trial(model: nn.Module, device: torch.device) -> Iterator[None]:
    """The model in training mode for a pass of this process alone; see `_unchanged`."""
    with _unchanged(model, device):
        model.train()
        for module in model.modules():
            if isinstance(module, nn.SyncBatchNorm | CpuSyncBatchNorm):
                module.eval()  # in training it would wait for a process out of memory
        yield


def _random_pixels(count: int, size: tuple[int, int], device: torch.device) -> Tensor:
    return torch.randint(256, (count, *size, 3), dtype=torch.uint8, device=device)


def _step_seed(seed: int, step: int, rank: int) -> int:
    words = np.random.SeedSequence([seed, step, rank]).generate_state(2, np.uint32)
    return int(words[0]) << 31 | int(words[1]) >> 1

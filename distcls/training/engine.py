"""One epoch of training and one pass of evaluation, on however many processes there are."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import reduce
from torch import Tensor

from distcls.errors import UsageError
from distcls.evaluation.metrics import AnyTally, Metrics, new_tally, tally_of
from distcls.imaging import Preprocess
from distcls.models.classifier import Classifier
from distcls.training.augment import Augment
from distcls.training.config import TrainConfig
from distcls.training.distributed import share_buffers, synchronise_norms
from distcls.training.freezing import Freezing, freeze_for_good
from distcls.training.fsdp import Sharding, fill, fill_optimizer, gathered, whole
from distcls.training.inputs import TrainingInput
from distcls.training.loader import Batch, make_loader
from distcls.training.losses import Objective
from distcls.training.optim import make_optimizer
from distcls.training.sampler import DataOrder, Shares
from distcls.training.schedule import make_schedule
from distcls.training.stability import Guard, Spikes
from distcls.training.weight_averaging import Ema, LastEpochs

EVALUATION_BATCH = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepReport:
    """One optimiser step, as the progress bar and metrics.jsonl show it."""

    step: int
    """Steps finished, over all epochs."""
    images: int
    """Images of its global batch."""
    loss: Tensor
    """This process's part of the batch's mean loss, on the device: reading it would wait."""
    lr: float
    skipped: list[int]
    """Steps found out since the last report to have been skipped, their gradients not finite."""


class Engine:
    """Model, optimiser and data of a run, and how they move on by a step."""

    def __init__(
        self,
        config: TrainConfig,
        accelerator: Accelerator,
        data: TrainingInput,
        model: Classifier,
        preprocess: Preprocess,
    ) -> None:
        self.config = config
        self.accelerator = accelerator
        self.data = data
        self.preprocess = preprocess
        self.sharding = Sharding(accelerator)
        self.model = self.sharding.place(model, config.memory_format)
        if config.sync_batch_norm and accelerator.num_processes > 1:
            synchronise_norms(self.model, accelerator.device)
        decay = config.ema.decay
        self.ema = Ema(self.model, decay) if decay is not None else None
        last = config.average.last_epochs
        self.average = LastEpochs(self.model, last=last, epochs=config.epochs) if last else None
        freeze_for_good(config.freeze, self.model)
        sharded = self.sharding.on
        optimizer = make_optimizer(config.optimizer, self.model, config.lr, sharded=sharded)
        # `parallel` is the model in its DDP and autocast wrappers; `model` stays the bare one
        averages = [each.model for each in (self.ema, self.average) if each is not None]
        self.parallel, self.optimizer = self.sharding.prepare(self.model, optimizer, averages)
        self.order = DataOrder(
            samples=len(data.train_samples), batch_size=config.batch_size, seed=config.seed
        )
        self.accumulate = config.accumulate
        self.evaluation_batch = EVALUATION_BATCH
        self.check_batch_size()
        self._parameters = list(self.model.parameters())
        self.spikes = Spikes()
        modules = [self.model] + ([] if self.ema is None else [self.ema.model])
        ids = data.train.image_ids
        self.guard = Guard(modules, accelerator.device, config.max_nonfinite_steps, ids)
        self.schedule = make_schedule(config.schedule, config.lr, self.order.steps, config.epochs)
        self.freezing = Freezing(config.freeze, self.model, self.order.steps, config.epochs)
        self.augment = Augment(config.augment, preprocess.size)
        self.objective = Objective(config, data, self.augment, accelerator.device)
        reading = self.augment.reading(preprocess)
        self.train_loader = make_loader(config.loader, data.train, reading, accelerator)
        self.val_loader = make_loader(config.loader, data.val, preprocess, accelerator)
        self.shares = Shares(
            rank=accelerator.process_index,
            world=accelerator.num_processes,
            together=self.objective.together,
        )

    def train_epoch(self, epoch: int, first: int = 0) -> Iterator[StepReport]:
        """Run the steps of `epoch` (counted from 0) from its step `first` on, yielding after each.

        Raises DistclsError for too many skipped steps in a row.
        """
        self.parallel.train()
        done = epoch * self.order.steps
        samples = self.data.train_samples
        plan = self.shares.training(samples, self.order, epoch, first, self.accumulate)
        batches = self.train_loader.batches(plan)
        with contextlib.closing(batches):
            for step in range(first, self.order.steps):
                begin, end = self.order.bounds(step)
                lr = self.schedule.rate(done + step)
                loss, skipped = self._step(epoch, done + step, lr, end - begin, batches)
                if step == self.order.steps - 1:
                    skipped += self.guard.look()
                yield StepReport(
                    step=done + step + 1, images=end - begin, loss=loss, lr=lr, skipped=skipped
                )
        if self.average is not None:
            self.average.take(epoch, self.model)

    def evaluate(self) -> dict[str, Metrics]:
        """Metrics of each of the `candidates` on validation.

        Every process takes its share of the samples, none is padded, and the tallies are added.
        """
        candidates = self.candidates
        share_buffers(self.model, *candidates.values())
        tallies = {name: new_tally(self.data.task) for name in candidates}
        plan = self.shares.evaluation(self.data.val_samples, self.evaluation_batch)
        passes = self.shares.passes(self.data.val_samples, self.evaluation_batch)
        models = list(candidates.values())
        # without autocast: the figures shall be those of `distcls evaluate`
        with self.sharding.evaluating(models, passes, self.preprocess.size) as forward:
            for batch in self.val_loader.batches(plan):
                outputs = forward(batch.images.to(self.accelerator.device))
                for tally, logits in zip(tallies.values(), outputs, strict=True):
                    tally.update(logits.float().cpu().numpy(), batch.labels.numpy())
        return {name: self._of_all(tally).metrics() for name, tally in tallies.items()}

    def any_of(self, *flags: bool) -> list[bool]:
        """For each flag, whether any process has raised it. All processes have to call this."""
        if self._world == 1:
            return list(flags)
        raised = torch.tensor(flags, dtype=torch.float32, device=self.accelerator.device)
        return [bool(count) for count in reduce(raised, reduction="sum").tolist()]

    @property
    def candidates(self) -> dict[str, Classifier]:
        """The models of which the better is saved, under their names in `weights_of`."""
        if self.average is not None and self.average.taken:
            return {"average": self.average.model}
        averages = {} if self.ema is None else {"ema": self.ema.model}
        return {**averages, "weights": self.model}

    def total(self, part: Tensor) -> float:
        """The sum of each process's part."""
        return float(reduce(part, reduction="sum"))

    def tensors(self) -> dict[str, Any]:
        """Everything that changes in training, for `load_tensors` of a later run.

        All processes have to call this; sharded weights are gathered for the main one alone.
        """
        scaler = self.accelerator.scaler
        content = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "ema": None if self.ema is None else self.ema.model.state_dict(),
            "ema_updates": None if self.ema is None else self.ema.updates,
            "schedule": self.schedule.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "recent_losses": self.spikes.recent,
        }
        keep = self.accelerator.is_main_process
        return gathered(content, keep=keep) if self.sharding.on else content

    def weights_of(self, candidate: str, tensors: dict[str, Any]) -> dict[str, Tensor]:
        """The state dict of one of the `candidates` within what `tensors` gave."""
        average = tensors["average"] or {}
        places = {"weights": tensors["model"], "ema": tensors["ema"]}
        weights: dict[str, Tensor] = {**places, "average": average.get("model")}[candidate]
        return weights

    def load_tensors(self, saved: dict[str, Any]) -> None:
        """Go on from the tensors of an earlier run."""
        fill(self.model, saved["model"])
        fill_optimizer(self.optimizer, saved["optimizer"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(saved["scaler"])
        if self.ema is not None:
            fill(self.ema.model, saved["ema"])
            self.ema.updates = saved["ema_updates"]
        if self.average is not None:
            self.average.load_state_dict(saved["average"])
        self.schedule.load_state_dict(saved["schedule"])
        self.spikes.recent = saved.get("recent_losses", self.spikes.recent)

    def check_batch_size(self) -> None:
        """Raise UsageError if a part of a step is too small for batch norm."""
        if not self.can_accumulate(self.accumulate):
            raise UsageError(
                f"batch_size: {self.config.batch_size} is too small to share among "
                f"{self._world} processes in {self.accumulate} parts each: batch "
                "normalisation needs two images in every part"
            )

    def can_accumulate(self, parts: int) -> bool:
        """Whether each of a process's `parts` of every step has two images or more."""
        return self.order.smallest_batch >= 2 * parts * self._world

    @property
    def micro_batch(self) -> int:
        """Images that a process trains on at a time, in the largest part of the largest step."""
        largest = -(-self.order.samples // self.order.steps)
        return -(-largest // (self._world * self.accumulate))

    @property
    def _world(self) -> int:
        return int(self.accelerator.num_processes)

    def _of_all(self, tally: AnyTally) -> AnyTally:
        """The sum of all processes' tallies."""
        vector = torch.from_numpy(tally.vector()).to(self.accelerator.device)
        total = reduce(vector, reduction="sum")
        return tally_of(total.cpu().numpy(), self.data.task)

    def _step(
        self, epoch: int, step: int, lr: float, images: int, batches: Iterator[Batch]
    ) -> tuple[Tensor, list[int]]:
        """One optimiser step over `accumulate` batches of this process.

        Returns this process's part of the mean loss, and the steps found out to be skipped.
        """
        # dropout's randomness belongs to the step: nothing of it has to be saved for a resume
        torch.manual_seed(_step_seed(self.config.seed, step, self.accelerator.process_index))
        self.freezing.begin(step, alone=self._world == 1)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        parts: list[Tensor] = []
        seen: list[int] = []
        for part in range(self.accumulate):
            # sharded gradients are added up in parts: whole ones would take the memory saved
            add_up = self.sharding.on or part == self.accumulate - 1
            alone = contextlib.nullcontext() if add_up else self.accelerator.no_sync(self.parallel)
            with alone:
                batch = next(batches)
                losses = self._losses(epoch, batch)
                # DDP takes the mean over processes, so each has to count for all of them
                self.accelerator.backward(losses.sum() * (self._world / images))
            parts.append(losses.detach())
            seen += batch.indices.tolist()
        self.freezing.drop_gradients(step)
        # without a limit the norm is taken all the same: it tells whether the gradients are finite
        limit = self.config.optimizer.clip_norm or math.inf
        norm = whole(self.accelerator.clip_grad_norm_(self._parameters, limit))
        scaled = self.accelerator.scaler is not None
        bad = self.guard.step(norm, self.optimizer, scaled=scaled)
        self.optimizer.zero_grad()
        if self.ema is not None:
            self.ema.update(self.model)
        losses = torch.cat(parts)
        skipped = self.guard.note(step + 1, bad, losses, seen)
        mean = losses.sum() / images
        self.spikes.note(step + 1, mean)
        # a skipped step has no part in the epoch's mean loss
        return torch.where(bad, 0.0, mean), skipped

    def _losses(self, epoch: int, batch: Batch) -> Tensor:
        """Loss of each image of a batch, [B]."""
        examples = self.objective.examples(epoch, batch)
        logits = self.sharding.logits(self.parallel, examples.images)
        return self.objective.losses(logits, examples)


def _step_seed(seed: int, step: int, rank: int) -> int:
    words = np.random.SeedSequence([seed, step, rank]).generate_state(2, np.uint32)
    return int(words[0]) << 31 | int(words[1]) >> 1

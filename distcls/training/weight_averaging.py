"""Averages of the weights: exponential moving average (EMA), and the mean of the last epochs."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from distcls.models.classifier import Classifier
from distcls.training.config import TrainConfig, chosen
from distcls.training.fsdp import load_full_state, local_shard

RAW, EMA, AVERAGE = "weights", "ema", "average"
"""Names of the weights that an epoch may evaluate, as history.csv and the model card have them."""


class Ema:
    """A second model whose weights trail the trained ones: average = d*average + (1-d)*weights.

    The decay d rises with the updates, min(decay, (1 + updates) / (10 + updates)), so that the
    initial random weights soon lose their influence (TensorFlow's ExponentialMovingAverage).
    """

    def __init__(self, model: Classifier, decay: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        self.updates = 0

    @torch.no_grad()
    def update(self, model: Classifier) -> None:
        """Update the average with the weights of one more step."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        pairs = _paired(self.model, model)
        floats = [(own, new) for own, new in pairs if own.is_floating_point()]
        torch._foreach_lerp_([own for own, _ in floats], [new for _, new in floats], 1 - decay)
        for own, new in pairs:
            if not own.is_floating_point():  # batch norm's counter
                own.copy_(new)


class LastEpochsAverage:
    """A second model: the mean of the trained one's weights at the ends of the last epochs.

    Batch norm's statistics are averaged too, as timm's `avg_checkpoints.py` does, rather than
    counted anew as for Stochastic Weight Averaging (Izmailov et al., 2018): the mean needs no
    further pass over the data.
    """

    def __init__(self, model: Classifier, *, last: int, epochs: int) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.taken = 0
        """Epochs in the mean so far."""
        self._first = epochs - last

    @torch.no_grad()
    def update(self, epoch: int, model: Classifier) -> None:
        """Take the weights at the end of `epoch` (counted from 0), if it is one of the last."""
        if epoch < self._first:
            return
        self.taken += 1
        for own, new in _paired(self.model, model):
            if own.is_floating_point():
                own.lerp_(new, 1 / self.taken)
            else:  # batch norm's counter
                own.copy_(new)


class WeightAverages:
    """The averages that a config requests, one or none, beside the model that is trained."""

    def __init__(self, config: TrainConfig, model: Classifier) -> None:
        decay, last = config.ema.decay, config.average.last_epochs
        self._ema = None if decay is None else Ema(model, decay)
        self._average = (
            LastEpochsAverage(model, last=last, epochs=chosen(config.epochs)) if last else None
        )

    @property
    def models(self) -> list[Classifier]:
        """All averages as models."""
        return [each.model for each in (self._ema, self._average) if each is not None]

    @property
    def updated_each_step(self) -> list[Classifier]:
        """Those of the `models` that change with every step."""
        return [] if self._ema is None else [self._ema.model]

    def after_step(self, model: Classifier) -> None:
        """Take the weights after a step."""
        if self._ema is not None:
            self._ema.update(model)

    def after_epoch(self, epoch: int, model: Classifier) -> None:
        """Take the weights at the end of `epoch`, counted from 0."""
        if self._average is not None:
            self._average.update(epoch, model)

    def evaluated(self, model: Classifier) -> dict[str, Classifier]:
        """The weights of which an epoch evaluates all and saves the best, by name."""
        if self._average is not None and self._average.taken:
            return {AVERAGE: self._average.model}
        averages = {} if self._ema is None else {EMA: self._ema.model}
        return {**averages, RAW: model}

    def state_dict(self) -> dict[str, Any]:
        """The averages so far, for `load_state_dict` of a resumed run."""
        ema, average = self._ema, self._average
        return {
            "ema": None if ema is None else ema.model.state_dict(),
            "ema_updates": None if ema is None else ema.updates,
            "average": None
            if average is None
            else {"model": average.model.state_dict(), "taken": average.taken},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from the averages of an earlier run."""
        if self._ema is not None:
            load_full_state(self._ema.model, state["ema"])
            self._ema.updates = state["ema_updates"]
        if self._average is not None:
            load_full_state(self._average.model, state["average"]["model"])
            self._average.taken = state["average"]["taken"]


def select_weights(state: Mapping[str, Any], name: str) -> dict[str, Tensor]:
    """The state dict of the evaluated weights of that name within `Engine.state_dict()`."""
    if name == AVERAGE:
        weights: dict[str, Tensor] = state["average"]["model"]
    else:
        weights = state[{RAW: "model", EMA: "ema"}[name]]
    return weights


def _paired(average: Classifier, model: Classifier) -> list[tuple[Tensor, Tensor]]:
    """This process's shards of both models' tensors, in the same order."""
    owns, news = average.state_dict().values(), model.state_dict().values()
    return list(zip(map(local_shard, owns), map(local_shard, news), strict=True))

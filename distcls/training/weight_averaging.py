"""Averages of the weights: exponential moving average, and the mean of the last epochs."""

from __future__ import annotations

import copy
from typing import Any

import torch

from distcls.models.classifier import Classifier
from distcls.training.fsdp import fill, local


class Ema:
    """A second model whose weights trail the trained ones: average = d*average + (1-d)*weights.

    The decay d rises with the updates, min(decay, (1 + updates) / (10 + updates)), so that the
    random weights of the beginning are soon forgotten (TensorFlow's ExponentialMovingAverage).
    """

    def __init__(self, model: Classifier, decay: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        self.updates = 0

    @torch.no_grad()
    def update(self, model: Classifier) -> None:
        """Take one more step's weights into the average."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        owns, news = self.model.state_dict().values(), model.state_dict().values()
        pairs = list(zip(map(local, owns), map(local, news), strict=True))
        floats = [(own, new) for own, new in pairs if own.is_floating_point()]
        torch._foreach_lerp_([own for own, _ in floats], [new for _, new in floats], 1 - decay)
        for own, new in pairs:
            if not own.is_floating_point():  # batch norm's counter
                own.copy_(new)


class LastEpochs:
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
    def take(self, epoch: int, model: Classifier) -> None:
        """Note the weights at the end of `epoch` (counted from 0), if it is one of the last."""
        if epoch < self._first:
            return
        self.taken += 1
        owns, news = self.model.state_dict().values(), model.state_dict().values()
        for own, new in zip(map(local, owns), map(local, news), strict=True):
            if own.is_floating_point():
                own.lerp_(new, 1 / self.taken)
            else:  # batch norm's counter
                own.copy_(new)

    def state_dict(self) -> dict[str, Any]:
        """The mean so far, for `load_state_dict` of a resumed run."""
        return {"model": self.model.state_dict(), "taken": self.taken}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Go on from the mean of an earlier run."""
        fill(self.model, saved["model"])
        self.taken = saved["taken"]

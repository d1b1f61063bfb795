"""The plain mean of the weights over the last epochs of a run."""

from __future__ import annotations

import copy
from typing import Any

import torch

from distcls.models.classifier import Classifier
from distcls.training.shards import fill, local


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

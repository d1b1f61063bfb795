"""Exponential moving average of the weights."""

from __future__ import annotations

import copy

import torch

from distcls.models.classifier import Classifier
from distcls.training.shards import local


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

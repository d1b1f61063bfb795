"""The first images of an epoch exactly as the network is given them, and what they are to teach."""

from __future__ import annotations

import contextlib
import dataclasses

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distcls.models import factory
from distcls.models.pretrained import find_weights
from distcls.plotting import shorten
from distcls.system import available_cores
from distcls.task import Task
from distcls.training.augment import Augment
from distcls.training.config import DistillConfig, TrainConfig
from distcls.training.inputs import choose_preprocess, open_input
from distcls.training.loader import Loader
from distcls.training.losses import Examples, Objective
from distcls.training.sampler import DataOrder, Shares

LETTERS = 20
"""Of a class's name, where several share an image."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preview:
    """Images with their labels, in the order of training."""

    images: Tensor
    """[N, H, W, 3] in 0..255, uint8 or float32: before the model normalises them."""
    labels: list[str]
    """What each is to teach: `cat`, `cat 0.7 + dog 0.3`; on a line below `weight 2`."""
    steps: int
    """Steps of the epoch that they are from, counted from its first."""

    def pixels(self) -> NDArray[np.uint8]:
        """The images rounded and cut to what can be drawn."""
        found = self.images.float().round().clamp(0, 255).to(torch.uint8)
        return np.asarray(found.numpy(), np.uint8)


def preview(config: TrainConfig, *, epoch: int, count: int) -> Preview:
    """The first `count` images of `epoch` (counted from 0), fewer if it has no more.

    They are those of a run with this config, on any number of processes: the same images in the
    same order with the same random changes, on the device that would train. Whole batches are
    computed, as mixing has to know its neighbours. Raises UsageError as `train` would.
    """
    factory.require_known(config.model.name)
    data = open_input(config)
    weights = find_weights(config.model)
    known = None if weights is None else weights.preprocess
    preprocess = choose_preprocess(config.input, data.train, known)
    augment = Augment(config.augment, preprocess.size)
    # a teacher looks at the same images and changes none
    config = dataclasses.replace(config, distill=DistillConfig())
    objective = Objective(config, data, augment, _training_device())
    order = DataOrder(
        samples=len(data.train_samples), batch_size=config.batch_size, seed=config.seed
    )
    shares = Shares(rank=0, world=1, together=objective.together)
    plan = shares.training(data.train_samples, order, epoch, 0, config.accumulate)
    loader = Loader(
        data.train,
        augment.reading(preprocess),
        workers=config.loader.workers or available_cores(),
        ahead=1,
        timeout=config.loader.timeout,
    )
    images: list[Tensor] = []
    labels: list[str] = []
    with contextlib.closing(loader.batches(part for part in plan if len(part))) as batches:
        for batch in batches:
            examples = objective.examples(epoch, batch)
            images.append(examples.images.cpu())
            labels += _texts(examples, data.train.task)
            if len(labels) >= count:
                break
    chosen = torch.cat(images)[:count]
    ends = [order.bounds(step)[1] for step in range(order.steps)]
    steps = 1 + sum(end < len(chosen) for end in ends)
    return Preview(images=chosen, labels=labels[:count], steps=steps)


def label_text(target: Tensor, task: Task) -> str:
    """One image's label in words, its shares with two decimals.

    `target` is a class, int64 []; a class in each head, int64 [heads]; 0 or 1 for each label,
    [labels]; or each class's share, float32 [classes].
    """
    if not target.is_floating_point():
        return task.text(target.reshape(-1).tolist()) or "(no label)"
    shares = [round(share, 2) for share in target.tolist()]
    if set(shares) <= {0.0, 1.0}:  # not mixed
        whole = np.array([shares], np.float32)
        answer = shares if task.kind == "multi_label" else task.decide(whole)[0].tolist()
        return task.text([int(part) for part in answer]) or "(no label)"
    named = sorted(zip(shares, task.classes, strict=True), key=lambda pair: -pair[0])
    return " + ".join(f"{shorten(name, LETTERS)} {share:g}" for share, name in named if share)


def _texts(examples: Examples, task: Task) -> list[str]:
    """The label of each image, with its weight where that is not 1."""
    texts = [label_text(target, task) for target in examples.targets.cpu()]
    if examples.weights is None:
        return texts
    weights = [f"{weight:.3g}" for weight in examples.weights.tolist()]
    return [
        text if weight == "1" else f"{text}\nweight {weight}"
        for text, weight in zip(texts, weights, strict=True)
    ]


def _training_device() -> torch.device:
    """The one that accelerate would choose for one process."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")

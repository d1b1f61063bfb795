"""The first images of an epoch exactly as the network gets them, with their targets."""

from __future__ import annotations

import contextlib
import dataclasses

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distcls.imaging import Preprocess
from distcls.log import say
from distcls.plotting import shorten
from distcls.system import available_cores
from distcls.task import Task
from distcls.training.augment import Augment
from distcls.training.config import DistillConfig, TrainConfig, chosen
from distcls.training.hooks import make_transforms
from distcls.training.inputs import TrainingInput, choose_preprocess, choose_weights, open_input
from distcls.training.loader import Loader, make_crops
from distcls.training.losses import Examples, Objective
from distcls.training.recipe import fill_recipe
from distcls.training.resolve import require_usable
from distcls.training.sampler import EpochSampler, ShardedSampler

LETTERS = 20
"""Most characters shown of a class name, where an image has more than one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preview:
    """Images with their labels, in the order of training."""

    images: Tensor
    """[N, H, W, 3] in 0..255, uint8 or float32: before the model normalises them."""
    labels: list[str]
    """The target of each: `cat`, `cat 0.7 + dog 0.3`; on a line below `weight 2`."""
    steps: int
    """Steps of the epoch that they are from, counted from its first."""

    def pixels(self) -> NDArray[np.uint8]:
        """The images rounded and cut to what can be drawn."""
        found = self.images.float().round().clamp(0, 255).to(torch.uint8)
        return np.asarray(found.numpy(), np.uint8)


def preview(config: TrainConfig, *, epoch: int, count: int) -> Preview:
    """The first `count` images of `epoch` (counted from 0), fewer if it has no more.

    They are those of a run with this config, on any number of processes: the same images in the
    same order with the same augmentation, on the device that would train. Full batches are
    computed, as mixup needs an image's neighbour. Published weights are not downloaded: only their
    preprocessing counts, as in a run that has them. Raises UsageError as `train` does.
    """
    require_usable(config)
    data = open_input(config)
    weights = choose_weights(config, data.train, download=False)
    known = None if weights is None else weights.preprocess
    if weights is not None:
        say(f"preprocessing of {weights.source}")
    preprocess = choose_preprocess(config.input, data.train, known)
    config, _ = fill_recipe(
        config,
        images=len(data.train_samples),
        task=data.task,
        size=preprocess.size,
        pretrained=weights is not None,
    )
    loader, objective = _loader_and_objective(config, data, preprocess)
    sampler = EpochSampler(
        samples=len(data.train_samples), batch_size=chosen(config.batch_size), seed=config.seed
    )
    shards = ShardedSampler(rank=0, world_size=1, group_size=objective.group_size)
    micro_batches = shards.training(data.train_samples, sampler, epoch, 0, config.accumulate)
    images: list[Tensor] = []
    labels: list[str] = []
    with contextlib.closing(loader.batches(filter(len, micro_batches), epoch)) as batches:
        for batch in batches:
            examples = objective.examples(epoch, batch)
            images.append(examples.images.cpu())
            labels += _texts(examples, data.train.task)
            if len(labels) >= count:
                break
    first = torch.cat(images)[:count]
    ends = [sampler.bounds(step)[1] for step in range(sampler.steps)]
    steps = 1 + sum(end < len(first) for end in ends)
    return Preview(images=first, labels=labels[:count], steps=steps)


def _loader_and_objective(
    config: TrainConfig, data: TrainingInput, preprocess: Preprocess
) -> tuple[Loader, Objective]:
    """What reads the images, and what augments them."""
    crops = make_crops(config.augment, data.train, preprocess.size, config.seed)
    of_image, of_batch = make_transforms(config.augment)
    augment = Augment(
        config.augment,
        preprocess.size,
        cropped=crops is not None,
        fill=data.fill,
        transform=of_batch,
    )
    # a teacher sees the same images and changes none
    config = dataclasses.replace(config, distill=DistillConfig())
    objective = Objective(config, data, augment, _training_device())
    loader = Loader(
        data.train,
        augment.reading(preprocess),
        workers=config.loader.workers or available_cores(),
        prefetch=1,
        timeout=config.loader.timeout,
        crops=crops,
        transform=of_image,
        seed=config.seed,
    )
    return loader, objective


def label_text(target: Tensor, task: Task) -> str:
    """One image's label as text, soft targets with two decimals.

    `target` is a class, int64 []; a class in each head, int64 [heads]; 0 or 1 for each label,
    [labels]; or the weight of each class, float32 [classes].
    """
    if not target.is_floating_point():
        return task.text(target.reshape(-1).tolist()) or "(no label)"
    weights = [round(weight, 2) for weight in target.tolist()]
    if set(weights) <= {0.0, 1.0}:  # not mixed
        row = np.array([weights], np.float32)
        label = weights if task.kind == "multi_label" else task.decide(row)[0].tolist()
        return task.text([int(value) for value in label]) or "(no label)"
    named = sorted(zip(weights, task.classes, strict=True), key=lambda pair: -pair[0])
    return " + ".join(f"{shorten(name, LETTERS)} {weight:g}" for weight, name in named if weight)


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

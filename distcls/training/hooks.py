"""What a user's code does in a run of ours: own transforms of training images, and callbacks.

A transform is one of these, by what it is; `docs/python.md` has an example of each:

- a function of (image, rng): one image uint8 [H, W, 3] in RGB, and a NumPy generator;
- an albumentations transform, of one image;
- a transform of torchvision (v2), or a PyTorch module, of one image uint8 [3, H, W];
- an object with `draws`, a number, called with (images, draws): a batch uint8 [B, H, W, 3] on the
  training device, and float32 [B, draws] in [0, 1).

Its randomness is a function of (seed, epoch, image), so that neither a resume nor the number of
processes or threads changes what the network sees. That of an image runs in the loader's threads.
"""

from __future__ import annotations

import copy
import inspect
import random
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from distcls.errors import UsageError, did_you_mean
from distcls.evaluation.metrics import METRICS
from distcls.imaging.preprocess import Image
from distcls.registry import attribute_of, kind_of, positional
from distcls.training.config import LOSSES, OPTIMIZERS, AugmentConfig, TrainConfig, chosen
from distcls.training.schedule import SCHEDULES

KEY = "augment.transform"
TRIES = 16
"""Calls of a transform before the first step, which show its mistakes."""

Apply = Callable[[Image, int], Any]
"""From an image, uint8 [H, W, 3], and its seed to what the transform returns."""


class ImageTransform:
    """A user's transform of one image, uint8 RGB [H, W, 3] to the same shape, by a seed.

    It may be called in several threads: each has a copy of the user's object.
    """

    def __init__(self, name: str, value: Any, adapt: Callable[[Any], Apply]) -> None:
        self._name, self._value, self._adapt = name, value, adapt
        self._threads = threading.local()

    def __call__(self, image: Image, seed: int) -> Image:
        """The image changed. Raises UsageError for another shape or type."""
        apply: Apply | None = getattr(self._threads, "apply", None)
        if apply is None:
            apply = self._threads.apply = self._adapt(self._copied())
        found = apply(image, seed)
        if isinstance(found, np.ndarray) and found.dtype == np.uint8 and found.shape == image.shape:
            return found
        raise _unusable(self._name, found, image.shape)

    def _copied(self) -> Any:
        try:
            return copy.deepcopy(self._value)
        except TypeError as error:
            raise UsageError(
                f"{KEY}: {self._name} cannot be copied for a thread: {error}"
            ) from error

    def try_on(self, image: Image) -> None:
        """Call it on an image with some seeds, so that it shows its mistakes before the first step.

        Raises UsageError for what it returns, for other results with the same seed, and for draws
        from the global random numbers of Python or NumPy, which no resumed run could repeat.
        """
        before = _global_states()
        found = [self(image.copy(), seed) for seed in range(TRIES)]
        if _global_states() != before:
            raise UsageError(
                f"{KEY}: {self._name} draws from the global random numbers of random or "
                "numpy.random, which a resumed run could not repeat; take them from the second "
                "argument of a function of (image, rng)"
            )
        again = [self(image.copy(), seed) for seed in range(TRIES)]
        if any(not np.array_equal(*pair) for pair in zip(found, again, strict=True)):
            raise UsageError(
                f"{KEY}: {self._name} gives other pixels for the same image and random numbers, so "
                "that a resumed run could not repeat them; they have to follow from its arguments"
            )


class BatchTransform:
    """A user's transform of a batch, on the training device."""

    def __init__(self, name: str, value: Any) -> None:
        self._name, self._value = name, value
        self.draws: int = value.draws

    def try_on(self, size: tuple[int, int], device: torch.device) -> None:
        """Call it on images of noise, so that it shows its mistakes before the first step.

        Raises UsageError for what it returns, and where an image's result follows from anything but
        its pixels and draws: from the rest of the batch, or from random numbers of its own.
        """
        generator = torch.Generator().manual_seed(0)
        shape = (TRIES, *size, 3)
        images = torch.randint(256, shape, dtype=torch.uint8, generator=generator).to(device)
        draws = torch.rand(TRIES, self.draws, generator=generator).to(device)
        found = self(images.clone(), draws)
        alone = torch.cat(
            [self(i[None].clone(), d[None]) for i, d in zip(images, draws, strict=True)]
        )
        if ((found.int() - alone.int()).abs() > 1).any():  # kernels may round otherwise
            raise UsageError(
                f"{KEY}: {self._name} gives an image other pixels alone than in a batch: they have "
                "to follow from the image and its draws, or resumed runs and other numbers of "
                "processes would train on other images"
            )

    def __call__(self, images: Tensor, draws: Tensor) -> Tensor:
        """Change images uint8 [B, H, W, 3] by draws [B, `draws`] in [0, 1), on the same device.

        Raises UsageError for another shape or type.
        """
        found = self._value(images, draws)
        if isinstance(found, Tensor) and found.dtype == torch.uint8 and found.shape == images.shape:
            return found
        raise _unusable(self._name, found, images.shape)


def make_transforms(config: AugmentConfig) -> tuple[ImageTransform | None, BatchTransform | None]:
    """The user's transform, if any: of an image, or of a batch.

    Raises UsageError for what is none.
    """
    made = None if config.transform is None else _make_transform(config.transform)
    if isinstance(made, BatchTransform):
        return None, made
    return made, None


def _make_transform(name: str) -> ImageTransform | BatchTransform:
    value = attribute_of(name, KEY)
    if isinstance(value, type):
        try:
            value = value()
        except TypeError as error:
            raise UsageError(f"{KEY}: {name} is a class that takes arguments: {error}") from error
    if not callable(value):
        raise UsageError(f"{KEY}: {name} is {kind_of(value)}, which cannot be called")
    library = type(value).__module__.partition(".")[0]
    if hasattr(value, "draws"):
        if type(value.draws) is not int or value.draws < 0:
            raise UsageError(f"{KEY}: {name} has draws {value.draws!r}, expected 0 or more")
        return BatchTransform(name, value)
    if callable(getattr(value, "set_random_seed", None)):
        return ImageTransform(name, value, _of_albumentations)
    if library == "albumentations":
        raise UsageError(f"{KEY}: {name} is of an albumentations that takes no seed; it needs 2.0")
    if library == "torchvision" or isinstance(value, nn.Module):
        return ImageTransform(name, value, _of_torch)
    least, most = positional(value)
    if not least <= 2 <= most:
        raise UsageError(
            f"{KEY}: {name} takes {least} argument(s), expected (image, rng): an image uint8 "
            "[H, W, 3] and a numpy.random.Generator"
        )
    return ImageTransform(name, value, _of_function)


def _of_function(function: Any) -> Apply:
    return lambda image, seed: function(image, np.random.default_rng(seed))


def _of_albumentations(transform: Any) -> Apply:
    def apply(image: Image, seed: int) -> Any:
        transform.set_random_seed(seed)
        return transform(image=image)["image"]

    return apply


def _of_torch(transform: Any) -> Apply:
    def apply(image: Image, seed: int) -> Any:
        with _SeededDraws(seed):
            found = transform(torch.from_numpy(image).permute(2, 0, 1))
        if isinstance(found, Tensor) and found.dtype == torch.uint8 and found.ndim == 3:
            return found.permute(1, 2, 0).numpy()
        return found

    return apply


class _SeededDraws(TorchDispatchMode):
    """Has the operations of this thread draw from a generator of their own.

    torchvision draws from PyTorch's global one, which all threads share: an image's numbers would
    depend on what other threads draw, and so would the dropout of the training step.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._generator = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """See `TorchDispatchMode`."""
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded in func.tags and kwargs.get("generator") is None:
            func, kwargs = _with_generator(func), {**kwargs, "generator": self._generator}
        return func(*args, **kwargs)


def _with_generator(function: Any) -> Any:
    """The overload of a random operation that takes a generator: its own, if it does."""
    wanted = _arguments(function)
    wanted.pop("generator", None)
    packet = function.overloadpacket
    for other in (function, *(getattr(packet, name) for name in packet.overloads())):
        others = _arguments(other)
        if others.pop("generator", None) is not None and others == wanted:
            return other
    raise UsageError(
        f"{KEY}: {function} takes no generator, so its random numbers cannot be those of the image"
    )


def _arguments(function: Any) -> dict[str, str]:
    """The arguments of an operation, by name, with their types."""
    return {each.name: str(each.type) for each in function._schema.arguments}


def _unusable(name: str, found: Any, shape: Sequence[int]) -> UsageError:
    """Why the result of a transform cannot be used, and what to do."""
    advice = ""
    if isinstance(found, np.ndarray | Tensor):
        what = f"{str(found.dtype).removeprefix('torch.')} {list(found.shape)}"
        if found.dtype in (np.uint8, torch.uint8):
            advice = "; the size is `input.size`, and `augment.resized_crop` cuts random crops"
        else:
            advice = "; leave out Normalize, ToTensor and ToDtype: the network normalises itself"
    else:
        what = f"a value {kind_of(found)}"
    return UsageError(
        f"{KEY}: {name} returned {what}, expected uint8 of the shape of its input, "
        f"{list(shape)}{advice}"
    )


def _global_states() -> tuple[Any, ...]:
    kind, keys, place, *rest = np.random.get_state(legacy=True)
    return random.getstate(), kind, np.asarray(keys).tobytes(), place, *rest


EVENTS = ("on_train_start", "on_epoch_end", "on_train_end")
"""The methods that a callback may have, any of them."""


class CallbackRun:
    """The run that a callback is given."""

    config: TrainConfig
    """The config with every default filled in."""
    out: Path
    """The run directory; best.pth in it is that of the best epoch so far."""
    epoch: int
    """Epochs finished."""
    step: int
    """Optimiser steps finished."""
    history: list[dict[str, float]]
    """The figures of every epoch so far, those before a resume included, as in history.csv."""
    best_epoch: int
    best_score: float | None
    """Of the monitored metric."""

    def __init__(self, config: TrainConfig) -> None:
        self.config, self.out = config, config.out
        self.stopping = False

    @property
    def epochs(self) -> int:
        """Epochs that the run is to have."""
        return chosen(self.config.epochs)

    def stop(self) -> None:
        """Have the run end after this epoch, on all processes."""
        self.stopping = True


class Callbacks:
    """The user's callbacks, called in their order; on the main process alone."""

    def __init__(self, config: TrainConfig) -> None:
        """Make those that are classes. Raises UsageError for one that is no callback."""
        self._run = CallbackRun(config)
        self._made: list[tuple[str, Any]] = []
        for name in config.callbacks:
            value = require_callback(name)
            self._made.append((name, value() if isinstance(value, type) else value))

    def call(self, event: str, **facts: Any) -> str | None:
        """Call that method of each; the name of the first that asks to stop.

        `facts` are what `CallbackRun` has besides the config. Raises UsageError for one that
        returns anything but a bool or None; what it raises itself is left as it is.
        """
        asked = None
        for name, callback in self._made:
            method = getattr(callback, event, None)
            if event == "on_epoch_end" and not any(hasattr(callback, each) for each in EVENTS):
                method = callback
            if method is None:
                continue
            history = [dict(row) for row in facts.get("history", ())]  # theirs to change
            vars(self._run).update(facts, history=history, stopping=False)
            figures = [dict(self._run.history[-1])] if event == "on_epoch_end" else []
            found = method(self._run, *figures)
            if found is not None and not isinstance(found, bool | np.bool_):
                raise UsageError(
                    f"callbacks: {event} of {name} returned {found!r}, expected True to stop the "
                    "run, False or None"
                )
            if (found or self._run.stopping) and asked is None:
                asked = name
        return asked


def _require_arguments(name: str, value: Any, *, has_any: bool) -> None:
    """Raise UsageError for a callback that cannot be called with what its event gives."""
    for event in EVENTS if has_any else ("on_epoch_end",):
        method = getattr(value, event, None) if has_any else value
        given = ("run", "metrics") if event == "on_epoch_end" else ("run",)
        unbound = isinstance(value, type) and inspect.isfunction(
            inspect.getattr_static(value, event, None)
        )
        least, most = positional(method)
        if callable(method) and not least <= len(given) + unbound <= most:
            raise UsageError(
                f"callbacks: {event} of {name} takes {least - unbound} argument(s), expected "
                f"({', '.join(given)})"
            )


def require_callback(name: str) -> Any:
    """The callback of that name: an object or class with any of `EVENTS`, or a function.

    Raises UsageError for what is none.
    """
    value = attribute_of(name, "callbacks")
    for method in dir(value):
        if method.startswith("on_") and callable(getattr(value, method)) and method not in EVENTS:
            raise UsageError(f"callbacks: {name} has {method!r}{did_you_mean(method, EVENTS)}")
    has_any = any(callable(getattr(value, event, None)) for event in EVENTS)
    if isinstance(value, type) and has_any and positional(value)[0]:
        raise UsageError(
            f"callbacks: {name} is a class that takes arguments; name an object of it, as in "
            f"{name.partition(':')[2].lower()} = {name.partition(':')[2]}(...)"
        )
    if has_any or (callable(value) and not isinstance(value, type)):
        _require_arguments(name, value, has_any=has_any)
        return value
    raise UsageError(
        f"callbacks: {name} is {kind_of(value)}, expected an object with any of "
        f"{', '.join(EVENTS)}, or a function of (run, metrics)"
    )


def own_parts(config: TrainConfig) -> dict[str, str]:
    """What a run has of the user's own beside the network, by its names in the config."""
    parts = {
        "loss": LOSSES.own_name(config.loss.name),
        "metric": METRICS.own_name(config.monitor.metric),
        "optimiser": OPTIMIZERS.own_name(config.optimizer.name),
        "schedule": SCHEDULES.own_name(config.schedule.name),
        "transform": config.augment.transform,
        "callbacks": ", ".join(config.callbacks),
    }
    return {part: name for part, name in parts.items() if name}

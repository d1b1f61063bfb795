"""Frozen layers: the backbone for a while, or layers by name for the whole run."""

from __future__ import annotations

from fnmatch import fnmatchcase

from torch import nn

from distcls.config.schema import duration_in_steps
from distcls.errors import UsageError, did_you_mean
from distcls.models.classifier import head_parameters
from distcls.training.batch_norm import BatchNorm
from distcls.training.config import FreezeConfig


def freeze_by_name(config: FreezeConfig, model: nn.Module) -> None:
    """Take the parameters that `names` match out of training; before the optimiser is made.

    Raises UsageError for a pattern that matches nothing, and if nothing is left to train.
    """
    parameters = {name.removeprefix("backbone."): p for name, p in model.named_parameters()}
    for pattern in config.names:
        found = [p for name, p in parameters.items() if _matches(name, pattern)]
        if not found:
            modules = [name.removeprefix("backbone.") for name, _ in model.named_modules() if name]
            hint = did_you_mean(pattern, modules)
            raise UsageError(f"freeze.names: no parameter matches {pattern!r}{hint}")
        for parameter in found:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise UsageError("freeze.names: nothing is left to train; remove a pattern")


class FreezeSchedule:
    """Which parameters learn in each step, a pure function of the step.

    A frozen batch norm keeps its running statistics and normalises by them: those of the new images
    would not fit the layers above it.
    """

    def __init__(
        self, config: FreezeConfig, model: nn.Module, steps_per_epoch: int, epochs: int
    ) -> None:
        duration = config.backbone or "0 steps"
        self._until = duration_in_steps(duration, steps_per_epoch, steps_per_epoch * epochs)
        named = dict(model.named_parameters())
        head = head_parameters(model)
        self._backbone = [p for name, p in named.items() if name not in head and p.requires_grad]
        still = {id(p) for p in named.values() if not p.requires_grad}
        self._norms: list[nn.Module] = []
        self._norms_by_name: list[nn.Module] = []
        for name, module in model.named_modules():
            own = [id(parameter) for parameter in module.parameters(recurse=False)]
            if not isinstance(module, BatchNorm):
                continue
            if own and still.issuperset(own):
                self._norms_by_name.append(module)
            elif not any(key.startswith(f"{name}.") for key in head):
                self._norms.append(module)

    def begin(self, step: int, *, alone: bool) -> None:
        """Freeze the parameters due in `step` (counted from 0) of a model in training mode.

        DDP waits for the gradient of every parameter it was made for. So unless a process is
        `alone` they are computed all the same, and `drop_gradients` removes them.
        """
        for norm in self._norms_by_name:
            norm.eval()
        if self._until == 0:
            return
        frozen = step < self._until
        for norm in self._norms:
            norm.train(not frozen)
        for parameter in self._backbone:
            parameter.requires_grad_(not (frozen and alone))

    def drop_gradients(self, step: int) -> None:
        """Remove the gradients of frozen parameters: the optimiser then has no state of them,
        and begins with a new one once it learns."""
        if step < self._until:
            for parameter in self._backbone:
                parameter.grad = None


def _matches(name: str, pattern: str) -> bool:
    """Whether a pattern names the parameter or a module that holds it."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")

"""The learning rate of each step; but for plateau, a pure function of the step."""

from __future__ import annotations

import bisect
import dataclasses
import math
import numbers
from collections.abc import Callable, Mapping
from typing import Any

from distcls.config.schema import duration_in_steps, require_duration
from distcls.errors import UsageError, require, shown
from distcls.registry import Registry, kind_of, require_takes

SCHEDULES: Registry[Any] = Registry("schedule", "schedule.name")
register_schedule = SCHEDULES.register
"""Decorate a function of (step, total_steps) that returns a fraction of `lr`, a finite number of 0
or more (a Python, NumPy or 0-dimensional tensor's), or a subclass of `Schedule`:
`@distcls.register_schedule("name", warmup="5%")`; the options are the config keys that it reads.
Raises UsageError for a name that is taken or none."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Learning rate schedule, after a warm-up.

    Null stands for the schedule's default; a key that the schedule does not read is refused.
    """

    name: str = "cosine"
    """cosine, restarts (SGDR), step, multistep, plateau, onecycle, constant, or module:attribute of
    your own."""
    warmup: str | None = None
    """Duration of the warm-up to `lr`: steps, epochs or percent of the run; default `5%`. Linear;
    onecycle warms up along half a cosine, by default for `30%`."""
    start: float | None = None
    """onecycle: initial learning rate, as a fraction of `lr`; default 0.04."""
    final: float | None = None
    """Minimum learning rate, as a fraction of `lr`: at the end of cosine (default 0.01), of each
    cycle of restarts (0) and of onecycle (4e-6); the lower bound of plateau (0)."""
    period: str | None = None
    """restarts: duration of the first cycle, which starts after the warm-up; default `20%`."""
    multiplier: int | None = None
    """restarts: length of each cycle as a multiple of the previous one; default 1."""
    every: str | None = None
    """step: duration between two reductions, from the start of the run; default `30%`."""
    milestones: tuple[str, ...] | None = None
    """multistep: time of each reduction, from the start of the run; default `50%,75%`."""
    factor: float | None = None
    """step, multistep, plateau: factor of each reduction of the learning rate; default 0.1."""
    patience: int | None = None
    """plateau: epochs without improvement of `monitor.metric` before a reduction, not counting the
    warm-up; default 3 (one more than PyTorch's `patience`)."""

    def __post_init__(self) -> None:
        SCHEDULES.check(self)
        for name in ("warmup", "period", "every"):
            if getattr(self, name) is not None:
                require_duration(name, getattr(self, name), above_zero=name != "warmup")
        if self.milestones is not None:
            require(bool(self.milestones), "milestones", self.milestones, "at least one duration")
            for milestone in self.milestones:
                require_duration("milestones", milestone, above_zero=True)
        for name in ("multiplier", "patience"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, value, "at least 1, or null")
        final, start, factor = self.final, self.start, self.factor
        require(final is None or 0 <= final <= 1, "final", final, "a fraction from 0 to 1, or null")
        valid = start is None or 0 < start <= 1
        require(valid, "start", start, "a fraction above 0 and at most 1, or null")
        require(factor is None or 0 < factor < 1, "factor", factor, "between 0 and 1, or null")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """Linear warm-up to `peak`, then a fraction of it, by default 1."""

    peak: float
    total_steps: int
    warmup_steps: int

    def rate(self, step: int) -> float:
        """Learning rate of optimiser step `step`, counted from 0."""
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        return self.peak * self.fraction(step)

    def fraction(self, step: int) -> float:
        """Learning rate of step `step`, after the warm-up, as a fraction of `peak`."""
        return 1.0

    def checked_rate(self, step: int) -> float:
        """`rate` as a float. Raises UsageError for anything but a finite number of 0 or more."""
        return _number(self.rate(step), f"{type(self).__qualname__}.rate", step)

    def after_evaluation(self, step: int, improved: bool) -> bool:
        """Take whether the evaluation after `step` steps was the best so far, the same on all
        processes. True if the learning rate is reduced because of it."""
        return False

    def state_dict(self) -> dict[str, int]:
        """The state of the learning rate besides the step."""
        return {}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue from `state_dict` of an earlier run."""


@SCHEDULES.register("cosine", warmup="5%", final=0.01)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Cosine(Schedule):
    """Half a cosine down to `final` (Loshchilov, Hutter: SGDR, 2016, without restarts)."""

    final: float

    def fraction(self, step: int) -> float:
        """See `Schedule`."""
        progress = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        return _falling(min(1.0, progress), self.final)


@SCHEDULES.register("restarts", warmup="5%", final=0.0, period="20%", multiplier=1)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Restarts(Schedule):
    """Cycles of half a cosine, each longer by `multiplier` (Loshchilov, Hutter: SGDR, 2016)."""

    period: int
    multiplier: int
    final: float

    def fraction(self, step: int) -> float:
        """See `Schedule`."""
        place, length = step - self.warmup_steps, self.period
        if self.multiplier == 1:
            place %= length
        while place >= length:
            place -= length
            length *= self.multiplier
        return _falling(place / length, self.final)


@SCHEDULES.register("step", warmup="5%", every="30%", factor=0.1)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Step(Schedule):
    """Times `factor` at a fixed interval of steps."""

    every: int
    factor: float

    def fraction(self, step: int) -> float:
        """See `Schedule`."""
        return self.factor ** (step // self.every)


@SCHEDULES.register("multistep", warmup="5%", milestones=("50%", "75%"), factor=0.1)
@dataclasses.dataclass(frozen=True, kw_only=True)
class MultiStep(Schedule):
    """Times `factor` at each milestone (He et al.: Deep Residual Learning, 2015)."""

    milestones: tuple[int, ...]
    """In ascending order."""
    factor: float

    def fraction(self, step: int) -> float:
        """See `Schedule`."""
        return self.factor ** bisect.bisect_right(self.milestones, step)


@dataclasses.dataclass
class PlateauState:
    """Counts of a plateau schedule, saved in the training state."""

    falls: int = 0
    """Reductions so far."""
    waited: int = 0
    """Evaluations without improvement since the last one, or since the last reduction."""


@SCHEDULES.register("plateau", warmup="5%", final=0.0, factor=0.1, patience=3)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Plateau(Schedule):
    """Times `factor` whenever the monitored metric has not improved for `patience` epochs."""

    patience: int
    factor: float
    final: float
    state: PlateauState = dataclasses.field(default_factory=PlateauState)

    def fraction(self, step: int) -> float:
        """See `Schedule`."""
        return max(self.final, self.factor**self.state.falls)

    def after_evaluation(self, step: int, improved: bool) -> bool:
        """See `Schedule`."""
        if improved or step <= self.warmup_steps:
            self.state.waited = 0
            return False
        self.state.waited += 1
        if self.state.waited < self.patience:
            return False
        before = self.fraction(step)
        self.state.waited = 0
        self.state.falls += 1
        return self.fraction(step) < before

    def state_dict(self) -> dict[str, int]:
        """See `Schedule`."""
        return dataclasses.asdict(self.state)

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """See `Schedule`."""
        self.state.falls, self.state.waited = state["falls"], state["waited"]


@SCHEDULES.register("onecycle", warmup="30%", start=0.04, final=4e-6)
@dataclasses.dataclass(frozen=True, kw_only=True)
class OneCycle(Schedule):
    """Half a cosine up from `start`, half a cosine down to `final` (Smith, Topin:
    Super-Convergence, 2017). The warm-up is the way up."""

    start: float
    final: float

    def rate(self, step: int) -> float:
        """See `Schedule`. The top is reached with the last step of the warm-up, as in PyTorch."""
        top = self.warmup_steps - 1
        if step < top:
            return self.peak * _falling(1 - step / top, self.start)
        progress = (step - top) / max(1, self.total_steps - 1 - top)
        return self.peak * _falling(min(1.0, progress), self.final)


@SCHEDULES.register("constant", warmup="5%")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Constant(Schedule):
    """`peak` from the warm-up on."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class OfFunction(Schedule):
    """A function of the user's: from (step, total_steps) to a fraction of `peak`."""

    name: str
    function: Callable[..., float]
    options: dict[str, Any]
    """The config keys that it was registered with, by which it is called too."""

    def fraction(self, step: int) -> float:
        """See `Schedule`. Raises UsageError for anything but a finite number of 0 or more."""
        found = self.function(step, self.total_steps, **self.options)
        return _number(found, self.name, step)


def _number(found: Any, name: str, step: int) -> float:
    """What `name` returned for `step`, as a float. Raises UsageError unless it is finite and 0 or
    more."""
    if getattr(found, "ndim", None) == 0 and hasattr(found, "item"):  # NumPy's, or a tensor
        found = found.item()
    valid = isinstance(found, numbers.Real) and not isinstance(found, bool)
    if not (valid and 0 <= found < math.inf):
        raise UsageError(
            f"schedule.name: {name} returned {shown(found)} for step {step}, expected a finite "
            "number of 0 or more"
        )
    return float(found)


EXPECTED = "expected a function of (step, total_steps) or a subclass of Schedule"


def make_schedule(
    config: ScheduleConfig, peak: float, steps_per_epoch: int, epochs: int
) -> Schedule:
    """The schedule of a run of `epochs` times `steps_per_epoch` steps.

    One of the user's is asked for the first, a middle and the last step. Raises UsageError for what
    is none, and for a rate that is no finite number of 0 or more.
    """
    total = steps_per_epoch * epochs
    entry, filled = SCHEDULES.find(config.name), SCHEDULES.filled(config)
    options = {"warmup": "0%"} | {key: getattr(filled, key) for key in entry.defaults}
    warmup = min(total, duration_in_steps(options.pop("warmup"), steps_per_epoch, total))
    for key in options.keys() & {"period", "every"}:
        options[key] = max(1, duration_in_steps(options[key], steps_per_epoch, total))
    if "milestones" in options:
        steps = [duration_in_steps(text, steps_per_epoch, total) for text in options["milestones"]]
        options["milestones"] = tuple(sorted(steps))
    length: dict[str, Any] = {"peak": peak, "total_steps": total, "warmup_steps": warmup}
    if isinstance(entry.value, type):
        if not issubclass(entry.value, Schedule):
            raise UsageError(
                f"schedule.name: {config.name} is the class {entry.value.__qualname__}, {EXPECTED}"
            )
        made: Schedule = entry.value(**length, **options)
    elif callable(entry.value):
        arguments = ", ".join(["(step, total_steps)", *options])
        require_takes("schedule.name", config.name, entry.value, arguments, 0, total, **options)
        made = OfFunction(**length, name=config.name, function=entry.value, options=options)
    else:
        raise UsageError(f"schedule.name: {config.name} is {kind_of(entry.value)}, {EXPECTED}")
    if entry.own:
        for step in sorted({0, warmup, total // 2, total - 1}):
            made.checked_rate(min(step, total - 1))
    return made


def _falling(progress: float, final: float) -> float:
    """Half a cosine from 1 down to `final` while `progress` goes from 0 to 1."""
    return final + (1 - final) * (1 + math.cos(math.pi * progress)) / 2

"""The learning rate of each step; but for plateau, a pure function of the step."""

from __future__ import annotations

import bisect
import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from distcls.config.schema import duration_in_steps, refuse_unread, require_choice, require_duration
from distcls.errors import require

USUAL: dict[str, dict[str, Any]] = {
    "cosine": {"warmup": "5%", "final": 0.01},
    "restarts": {"warmup": "5%", "final": 0.0, "period": "20%", "multiplier": 1},
    "step": {"warmup": "5%", "every": "30%", "factor": 0.1},
    "multistep": {"warmup": "5%", "milestones": ("50%", "75%"), "factor": 0.1},
    "plateau": {"warmup": "5%", "final": 0.0, "factor": 0.1, "patience": 3},
    "onecycle": {"warmup": "30%", "start": 0.04, "final": 4e-6},
    "constant": {"warmup": "5%"},
}
"""The schedules: the keys that each reads, and their values where the config says null."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Learning rate: a warm-up, then the schedule of that name.

    Null stands for what is usual with the schedule; a key that it does not read is refused.
    """

    name: str = "cosine"
    """cosine, restarts (SGDR), step, multistep, plateau, onecycle or constant."""
    warmup: str | None = None
    """How long the rate rises to `lr`: steps, epochs or percent of the run; usually `5%`. onecycle
    rises along half a cosine, usually for `30%`, the others along a line."""
    start: float | None = None
    """onecycle: rate of the first step, as a share of `lr`; usually 0.04."""
    final: float | None = None
    """Lowest rate, as a share of `lr`: at the end of cosine (usually 0.01), of each cycle of
    restarts (0) and of onecycle (4e-6); below it plateau never falls (0)."""
    period: str | None = None
    """restarts: duration of the first cycle, which begins after the warm-up; usually `20%`."""
    multiplier: int | None = None
    """restarts: how many times as long as the cycle before each cycle is; usually 1."""
    every: str | None = None
    """step: duration from one fall of the rate to the next, from the start of the run on; usually
    `30%`."""
    milestones: tuple[str, ...] | None = None
    """multistep: durations from the start of the run to each fall; usually `50%,75%`."""
    factor: float | None = None
    """step, multistep, plateau: what a fall multiplies the rate by; usually 0.1."""
    patience: int | None = None
    """plateau: epochs without improvement of `monitor.metric` after which the rate falls; those of
    the warm-up do not count; usually 3. (PyTorch counts one less.)"""

    def __post_init__(self) -> None:
        require_choice(self.name, USUAL, "schedule")
        refuse_unread(self, USUAL)
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
        require(final is None or 0 <= final <= 1, "final", final, "a share from 0 to 1, or null")
        known = start is None or 0 < start <= 1
        require(known, "start", start, "a share above 0 and at most 1, or null")
        require(factor is None or 0 < factor < 1, "factor", factor, "between 0 and 1, or null")

    def value(self, key: str) -> Any:
        """The value of a key: what is given, or else what is usual with the schedule."""
        value = getattr(self, key)
        return USUAL[self.name][key] if value is None else value


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """Linear warm-up to `peak`, then a share of it; all of it, where no subclass says otherwise."""

    peak: float
    total_steps: int
    warmup_steps: int

    def rate(self, step: int) -> float:
        """Learning rate of optimiser step `step`, counted from 0."""
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        return self.peak * self.share(step)

    def share(self, step: int) -> float:
        """Share of `peak` that step `step` takes, after the warm-up."""
        return 1.0

    def judged(self, step: int, better: bool) -> bool:
        """Learn whether the evaluation after `step` steps was the best so far.

        All processes have to say the same. True if the rate falls because of it.
        """
        return False

    def state_dict(self) -> dict[str, int]:
        """What the rate depends on besides the step."""
        return {}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on from `state_dict` of an earlier run."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cosine(Schedule):
    """Half a cosine down to `final` (Loshchilov, Hutter: SGDR, 2016, without restarts)."""

    final: float

    def share(self, step: int) -> float:
        """See `Schedule`."""
        progress = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        return _falling(min(1.0, progress), self.final)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Restarts(Schedule):
    """Cycles of half a cosine, each longer by `multiplier` (Loshchilov, Hutter: SGDR, 2016)."""

    period: int
    multiplier: int
    final: float

    def share(self, step: int) -> float:
        """See `Schedule`."""
        place, length = step - self.warmup_steps, self.period
        if self.multiplier == 1:
            place %= length
        while place >= length:
            place -= length
            length *= self.multiplier
        return _falling(place / length, self.final)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step(Schedule):
    """A fall to `factor` every so many steps."""

    every: int
    factor: float

    def share(self, step: int) -> float:
        """See `Schedule`."""
        return self.factor ** (step // self.every)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MultiStep(Schedule):
    """A fall to `factor` at each of some steps (He et al.: Deep Residual Learning, 2015)."""

    milestones: tuple[int, ...]
    """In ascending order."""
    factor: float

    def share(self, step: int) -> float:
        """See `Schedule`."""
        return self.factor ** bisect.bisect_right(self.milestones, step)


@dataclasses.dataclass
class PlateauState:
    """What plateau has seen."""

    falls: int = 0
    waited: int = 0
    """Evaluations without improvement since the last one, or since the last fall."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plateau(Schedule):
    """A fall to `factor` whenever the monitored metric has not improved for `patience` epochs."""

    patience: int
    factor: float
    final: float
    state: PlateauState = dataclasses.field(default_factory=PlateauState)

    def share(self, step: int) -> float:
        """See `Schedule`."""
        return max(self.final, self.factor**self.state.falls)

    def judged(self, step: int, better: bool) -> bool:
        """See `Schedule`."""
        if better or step <= self.warmup_steps:
            self.state.waited = 0
            return False
        self.state.waited += 1
        if self.state.waited < self.patience:
            return False
        before = self.share(step)
        self.state.waited = 0
        self.state.falls += 1
        return self.share(step) < before

    def state_dict(self) -> dict[str, int]:
        """See `Schedule`."""
        return dataclasses.asdict(self.state)

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """See `Schedule`."""
        self.state.falls, self.state.waited = state["falls"], state["waited"]


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


KINDS: dict[str, type[Schedule]] = {
    "cosine": Cosine,
    "restarts": Restarts,
    "step": Step,
    "multistep": MultiStep,
    "plateau": Plateau,
    "onecycle": OneCycle,
    "constant": Schedule,
}


def make_schedule(
    config: ScheduleConfig, peak: float, steps_per_epoch: int, epochs: int
) -> Schedule:
    """The schedule of a run of `epochs` times `steps_per_epoch` steps."""
    total = steps_per_epoch * epochs
    options = {key: config.value(key) for key in USUAL[config.name]}
    warmup = min(total, duration_in_steps(options.pop("warmup"), steps_per_epoch, total))
    for key in options.keys() & {"period", "every"}:
        options[key] = max(1, duration_in_steps(options[key], steps_per_epoch, total))
    if "milestones" in options:
        steps = [duration_in_steps(text, steps_per_epoch, total) for text in options["milestones"]]
        options["milestones"] = tuple(sorted(steps))
    return KINDS[config.name](peak=peak, total_steps=total, warmup_steps=warmup, **options)


def _falling(progress: float, final: float) -> float:
    """Half a cosine from 1 down to `final` while `progress` goes from 0 to 1."""
    return final + (1 - final) * (1 + math.cos(math.pi * progress)) / 2

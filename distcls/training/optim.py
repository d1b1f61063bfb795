"""Optimisers and their parameter groups."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from distcls.errors import DistclsError, UsageError, did_you_mean, reason_of
from distcls.models.classifier import depths, head_parameters
from distcls.registry import kind_of, parameters_of, positional, require_takes
from distcls.training.config import OPTIMIZERS, OptimizerConfig


def parameter_groups(config: OptimizerConfig, model: nn.Module) -> list[dict[str, Any]]:
    """The trainable parameters; each group's rate is the step's rate times its `lr_scale`.

    A parameter of one dimension is a bias or a norm's scale: pulling it to zero regularises
    nothing (He et al.: Bag of Tricks for Image Classification, 2018), so it is not decayed; neither
    is what a timm model itself exempts, such as position embeddings.
    """
    scales = learning_rate_scales(config, model)
    named: set[str] = getattr(getattr(model, "backbone", model), "no_weight_decay", set)()
    exempt = named | {f"backbone.{name}" for name in named}
    filled = OPTIMIZERS.filled(config)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decayed = parameter.ndim > 1 and name not in exempt
            decay = (filled.weight_decay or 0.0) if decayed else 0.0
            groups.setdefault((scales[name], decay), []).append(parameter)
    return [
        {"params": parameters, "lr_scale": scale, "weight_decay": decay}
        for (scale, decay), parameters in groups.items()
    ]


def learning_rate_scales(config: OptimizerConfig, model: nn.Module) -> dict[str, float]:
    """What each parameter's learning rate is multiplied by.

    `layer_decay` to the power of the layers above it (Clark et al.: ELECTRA, 2020; for images Bao
    et al.: BEiT, 2021), and for the head `head_lr_scale`.
    """
    depth = depths(model)
    top, decay = max(depth.values()), config.layer_decay or 1.0
    scales = {name: float(decay ** (top - layer)) for name, layer in depth.items()}
    head = 1.0 if config.head_lr_scale == "auto" else config.head_lr_scale
    for name in head_parameters(model):
        scales[name] *= head
    return scales


class SGD(torch.optim.SGD):
    """torch's SGD, whose momentum is zero at first instead of absent.

    The first step is the same. But torch's fused SGD (2.14) leaves the momentum
    uninitialised where the first step is skipped, and takes it for real in the second.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step."""
        for group in self.param_groups:
            if group["momentum"] == 0:
                continue
            for parameter in group["params"]:
                if parameter.grad is not None and "momentum_buffer" not in self.state[parameter]:
                    self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter.grad)
        return super().step(closure)


Groups = list[dict[str, Any]]


# fused optimisers skip a step on the device, without waiting for it (see `NonFiniteGuard`)
@OPTIMIZERS.register("adamw", weight_decay=0.05, beta1=0.9, beta2=0.999, eps=1e-8)
def adamw(groups: Groups, lr: float, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Adam with decoupled weight decay (Loshchilov, Hutter, 2017)."""
    return torch.optim.AdamW(groups, lr=lr, betas=_betas(config), eps=_eps(config), fused=True)


@OPTIMIZERS.register("adam", weight_decay=0.0, beta1=0.9, beta2=0.999, eps=1e-8)
def adam(groups: Groups, lr: float, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Kingma, Ba: Adam, 2014."""
    return torch.optim.Adam(groups, lr=lr, betas=_betas(config), eps=_eps(config), fused=True)


@OPTIMIZERS.register("sgd", weight_decay=1e-4, momentum=0.9, nesterov=False)
def sgd(
    groups: Groups, lr: float, config: OptimizerConfig, *, sharded: bool = False
) -> torch.optim.Optimizer:
    """Stochastic gradient descent with momentum."""
    # torch's fused SGD (2.14) is the one that takes no sharded parameters
    how = {"foreach": True} if sharded else {"fused": True}
    momentum, nesterov = config.momentum or 0.0, bool(config.nesterov)
    return SGD(groups, lr=lr, momentum=momentum, nesterov=nesterov, **how)


@OPTIMIZERS.register("rmsprop", weight_decay=1e-5, beta2=0.99, eps=1e-8, momentum=0.0)
def rmsprop(groups: Groups, lr: float, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Hinton: Neural Networks for Machine Learning, lecture 6e, 2012; `beta2` is its alpha."""
    alpha, momentum = config.beta2 or 0.0, config.momentum or 0.0
    return torch.optim.RMSprop(groups, lr=lr, alpha=alpha, eps=_eps(config), momentum=momentum)


@OPTIMIZERS.register("adabelief", weight_decay=0.05, beta1=0.9, beta2=0.999, eps=1e-16)
def adabelief(groups: Groups, lr: float, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Zhuang et al.: AdaBelief Optimizer, 2020, by timm; RAdam's rectification, which is not part
    of the paper's algorithm, is in `timm:radabelief`."""
    from timm.optim import AdaBelief

    made: torch.optim.Optimizer = AdaBelief(
        groups, lr=lr, betas=_betas(config), eps=_eps(config), rectify=False
    )
    return made


@OPTIMIZERS.register("ranger", weight_decay=0.05, beta1=0.95, beta2=0.999, eps=1e-5)
def ranger(groups: Groups, lr: float, config: OptimizerConfig) -> torch.optim.Optimizer:
    """RAdam (Liu et al.: On the Variance of the Adaptive Learning Rate and Beyond, 2019) in timm's
    Lookahead (Zhang et al.: Lookahead Optimizer: k steps forward, 1 step back, 2019), as Wright
    combined them (lessw2020/Ranger-Deep-Learning-Optimizer, 2019), without the centred gradients
    that he added in 2020.

    Every 6 steps the slow weights move halfway to the weights, which continue from there. timm's
    (1.0) start as the weights after 6 steps, the paper's as the initial weights.
    """
    from timm.optim import Lookahead

    options: dict[str, Any] = {"betas": _betas(config), "eps": _eps(config)}
    radam = torch.optim.RAdam(groups, lr=lr, decoupled_weight_decay=True, **options)
    radam.register_load_state_dict_pre_hook(_refuse_old_ranger)
    made: torch.optim.Optimizer = Lookahead(radam, alpha=0.5, k=6)
    return made


def _refuse_old_ranger(_: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Its own Lookahead's slow weights would be silently ignored."""
    if any("slow" in values for values in state["state"].values()):
        raise UsageError(
            "optimizer.name: this training state is of the ranger of distcls 0.1.0, which had "
            "another Lookahead; resume it with that version, or start over"
        )


def _betas(config: OptimizerConfig) -> tuple[float, float]:
    assert config.beta1 is not None
    assert config.beta2 is not None
    return config.beta1, config.beta2


def _eps(config: OptimizerConfig) -> float:
    assert config.eps is not None
    return config.eps


EXPECTED = (
    "expected a function of (groups, lr, config) or (params, lr), or a class of "
    "torch.optim.Optimizer"
)
TIMM = "timm:"
LOOKAHEAD = "lookahead_"
"""timm's prefix to a name that wraps that optimiser in Lookahead."""
NOT_EXACT = ("kron", "kronw", "kronc")
"""timm's optimisers that draw random numbers which their state does not hold."""


def make_optimizer(
    config: OptimizerConfig, model: nn.Module, lr: float, *, sharded: bool = False
) -> torch.optim.Optimizer:
    """The optimiser over the trainable parameters, in groups that each have an `lr_scale`.

    `sharded`: whether the parameters will be sharded afterwards, which timm's cannot step.
    Raises UsageError as `require_usable` does.
    """
    groups = parameter_groups(config, model)
    if config.name not in OPTIMIZERS:
        return _from_timm(config, groups, lr)
    entry, filled = OPTIMIZERS.find(config.name), OPTIMIZERS.filled(config)
    if entry.own:
        return _make_own(filled, entry.value, groups, lr)
    more = {"sharded": sharded} if entry.value is sgd else {}
    made: torch.optim.Optimizer = entry.value(groups, lr, filled, **more)
    return made


def _make_own(
    config: OptimizerConfig, make: Any, groups: Groups, lr: float
) -> torch.optim.Optimizer:
    """An optimiser of the user's. Raises UsageError where it cannot be made, or is none."""
    key, name = "optimizer.name", config.name
    if not callable(make):
        raise UsageError(f"{key}: {name} is {kind_of(make)}, {EXPECTED}")
    options: dict[str, Any] = {}
    given: tuple[Any, ...] = (groups, lr)
    if _takes_config(make):
        given = groups, lr, config
    elif any(each.name == "lr" for each in parameters_of(make)):
        given, options = (groups,), {"lr": lr}
    arguments = "(groups, lr, config)" if len(given) == 3 else "(params, lr)"
    require_takes(key, name, make, arguments, *given, **options)
    with _explained(f"{key}: {name} cannot be made"):
        made = make(*given, **options)
    if not isinstance(made, torch.optim.Optimizer):
        raise UsageError(
            f"{key}: {name} returned a value {kind_of(made)}, expected a torch.optim.Optimizer"
        )
    if positional(made.step)[0]:
        raise UsageError(
            f"{key}: {name} needs a closure, which computes the loss several times in a step; here "
            "a step computes the gradients once"
        )
    if any("lr_scale" not in group for group in made.param_groups):
        raise UsageError(
            f"{key}: {name} has parameter groups of its own, without lr_scale, by which each "
            "group's learning rate is multiplied; give it the groups, or take the scale over"
        )
    return made


def _try_own(config: OptimizerConfig) -> None:
    """Have an optimiser of the user's take a step, as a run does: two layers' gradients are there,
    dense, and no closure computes them again. Raises UsageError where it cannot."""
    with torch.random.fork_rng([]):
        model = nn.Sequential(nn.Conv2d(3, 2, 2), nn.Flatten(), nn.Linear(2, 2))
        made = make_optimizer(config, model, lr=1e-3)
        with torch.enable_grad():
            model(torch.ones(1, 3, 2, 2)).sum().backward()
        with _explained(f"optimizer.name: {config.name} cannot take a step"):
            made.step()


@contextlib.contextmanager
def _explained(what: str) -> Iterator[None]:
    """Turn what the user's code and its libraries raise into a UsageError."""
    try:
        yield
    except DistclsError:
        raise
    except Exception as error:
        raise UsageError(f"{what}: {reason_of(error)}") from error


def _takes_config(make: Any) -> bool:
    """Whether it is a function of (groups, lr, config), not of (groups, lr) as PyTorch's classes
    are, and what `functools.partial` makes of them."""
    if isinstance(make, functools.partial):
        return _takes_config(make.func) and "config" not in make.keywords
    if isinstance(make, type) and issubclass(make, torch.optim.Optimizer):
        return False
    least, most = positional(make)
    named = any(each.name == "config" for each in parameters_of(make))
    return least <= 3 <= most and (least == 3 or named)


def require_usable(config: OptimizerConfig) -> None:
    """Raise UsageError for an unknown optimiser, naming the nearest, for one of timm's or of the
    user's that cannot work here, and for an option that one of timm's does not read."""
    if config.name in OPTIMIZERS:
        OPTIMIZERS.check(config)
        if OPTIMIZERS.find(config.name).own:
            _try_own(config)
        return
    from timm.optim import get_optimizer_class, get_optimizer_info, list_optimizers

    known, name = list_optimizers(), _timm_name(config)
    plain = name.removeprefix(LOOKAHEAD)
    if plain not in known:
        prefix = TIMM if config.name.startswith(TIMM) else ""
        choices = (
            [*OPTIMIZERS.names(), *known] if not prefix else [prefix + choice for choice in known]
        )
        hint = did_you_mean(config.name, choices)
        raise UsageError(f"optimizer.name: unknown optimiser {config.name!r}{hint}")
    info = get_optimizer_info(plain)
    if info.second_order:
        raise UsageError(f"optimizer.name: {name} needs second derivatives; a step has the first")
    if plain in NOT_EXACT:
        raise UsageError(
            f"optimizer.name: {name} draws random numbers that its state does not hold: a resumed "
            "run would differ; choose another, such as muon"
        )
    try:
        get_optimizer_class(plain)
    except (ImportError, AssertionError) as error:  # apex's and bitsandbytes'
        raise UsageError(f"optimizer.name: {name} cannot be used here: {error}") from error
    _require_read_by_timm(config, name, info)


def _read_by_timm(info: Any) -> dict[str, bool]:
    """Which keys one of timm's optimisers reads."""
    two = info.has_betas and info.num_betas == 2
    return {
        "beta1": two,
        "beta2": two,
        "eps": info.has_eps,
        "momentum": info.has_momentum,
        "nesterov": False,
    }


def _require_read_by_timm(config: OptimizerConfig, name: str, info: Any) -> None:
    reads = _read_by_timm(info)
    options = {key: getattr(config, key) for key in reads if getattr(config, key) is not None}
    for key, value in options.items():
        if not reads[key]:
            raise UsageError(f"optimizer.{key}: {value!r} given, but {name} does not read it")
    if len({"beta1", "beta2"} & options.keys()) == 1:
        raise UsageError(f"optimizer.beta1 and beta2: {name} needs both or neither")


def filled_optimizer(config: OptimizerConfig) -> OptimizerConfig:
    """The config with each null key that the optimiser reads set to its default, those of timm's
    optimisers as far as a made one shows them."""
    if config.name in OPTIMIZERS:
        return OPTIMIZERS.filled(config)
    from timm.optim import get_optimizer_info

    name = _timm_name(config).removeprefix(LOOKAHEAD)
    reads = _read_by_timm(get_optimizer_info(name))
    settings = make_optimizer(config, nn.Linear(2, 2), lr=1.0).param_groups[0]
    beta1, beta2 = settings["betas"] if reads["beta1"] and "betas" in settings else (None, None)
    found: dict[str, Any] = {
        "weight_decay": settings.get("weight_decay"),
        "beta1": beta1,
        "beta2": beta2,
    }
    found |= {key: settings.get(key) for key in ("eps", "momentum") if reads[key]}
    unset = {key: value for key, value in found.items() if getattr(config, key) is None}
    return dataclasses.replace(config, **unset)


def _timm_name(config: OptimizerConfig) -> str:
    return config.name.removeprefix(TIMM)


def _from_timm(
    config: OptimizerConfig, groups: list[dict[str, Any]], lr: float
) -> torch.optim.Optimizer:
    from timm.optim import create_optimizer_v2

    require_usable(config)
    options = {"eps": config.eps, "momentum": config.momentum}
    options = {key: value for key, value in options.items() if value is not None}
    betas = {} if config.beta1 is None else {"betas": (config.beta1, config.beta2)}
    made: torch.optim.Optimizer = create_optimizer_v2(
        groups, opt=_timm_name(config), lr=lr, **options, **betas
    )
    return made

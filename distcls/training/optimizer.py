"""The optimiser that the config names."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from distcls.errors import UsageError, did_you_mean
from distcls.training.groups import parameter_groups
from distcls.training.optimizer_config import USUAL, OptimizerConfig
from distcls.training.optimizers import SGD, Ranger

TIMM = "timm:"
LOOKAHEAD = "lookahead_"
"""What timm takes before a name to put Lookahead around that optimiser."""
NOT_EXACT = ("kron", "kronw", "kronc")
"""Those of timm's that draw random numbers which their state does not hold."""


def make_optimizer(
    config: OptimizerConfig, model: nn.Module, lr: float, *, sharded: bool = False
) -> torch.optim.Optimizer:
    """The optimiser over the trainable parameters, in groups that each have an `lr_scale`.

    It can step parameters that are `sharded` afterwards, if that is said; timm's cannot.
    Raises UsageError as `require_usable` does.
    """
    groups = parameter_groups(config, model)
    value = config.value
    betas, eps = (value("beta1"), value("beta2")), value("eps")
    # the fused ones skip a step on the device, without waiting for it (see `Guard`)
    match config.name:
        case "adamw":
            return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)
        case "adam":
            return torch.optim.Adam(groups, lr=lr, betas=betas, eps=eps, fused=True)
        case "sgd":
            momentum, nesterov = value("momentum"), value("nesterov")
            # torch's fused SGD (2.14) is the one that takes no sharded parameters
            how = {"foreach": True} if sharded else {"fused": True}
            return SGD(groups, lr=lr, momentum=momentum, nesterov=nesterov, **how)
        case "rmsprop":
            alpha, momentum = value("beta2"), value("momentum")
            return torch.optim.RMSprop(groups, lr=lr, alpha=alpha, eps=eps, momentum=momentum)
        case "adabelief":
            return _adabelief(groups, lr=lr, betas=betas, eps=eps)
        case "ranger":
            return Ranger(groups, lr=lr, betas=betas, eps=eps)
        case _:
            return _from_timm(config, groups, lr)


def require_usable(config: OptimizerConfig) -> None:
    """Raise UsageError for an unknown optimiser, naming the nearest, for one of timm's that cannot
    work here, and for an option that one of timm's does not read."""
    if config.name in USUAL:
        return
    from timm.optim import get_optimizer_class, get_optimizer_info, list_optimizers

    known, name = list_optimizers(), _timm_name(config)
    plain = name.removeprefix(LOOKAHEAD)
    if plain not in known:
        prefix = TIMM if config.name.startswith(TIMM) else ""
        choices = [*USUAL, *known] if not prefix else [prefix + choice for choice in known]
        hint = did_you_mean(config.name, choices)
        raise UsageError(f"optimizer.name: unknown optimiser {config.name!r}{hint}")
    info = get_optimizer_info(plain)
    if info.second_order:
        raise UsageError(f"optimizer.name: {name} needs second derivatives; a step has the first")
    if plain in NOT_EXACT:
        raise UsageError(
            f"optimizer.name: {name} draws random numbers that its state does not hold: a resumed "
            "run would go on differently; choose another, such as muon"
        )
    try:
        get_optimizer_class(plain)
    except (ImportError, AssertionError) as error:  # apex's and bitsandbytes'
        raise UsageError(f"optimizer.name: {name} cannot be used here: {error}") from error
    _require_read_by_timm(config, name, info)


def _require_read_by_timm(config: OptimizerConfig, name: str, info: Any) -> None:
    two = info.has_betas and info.num_betas == 2
    reads = {
        "beta1": two,
        "beta2": two,
        "eps": info.has_eps,
        "momentum": info.has_momentum,
        "nesterov": False,
    }
    given = {key: getattr(config, key) for key in reads if getattr(config, key) is not None}
    for key, value in given.items():
        if not reads[key]:
            raise UsageError(f"optimizer.{key}: {value!r} given, but {name} does not read it")
    if len({"beta1", "beta2"} & given.keys()) == 1:
        raise UsageError(f"optimizer.beta1 and beta2: {name} takes both or none")


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


def _adabelief(groups: list[dict[str, Any]], **options: Any) -> torch.optim.Optimizer:
    """Zhuang et al.: AdaBelief Optimizer, 2020, by timm; RAdam's rectification, which is not part
    of the paper's algorithm, is had by `timm:radabelief`."""
    from timm.optim import AdaBelief

    made: torch.optim.Optimizer = AdaBelief(groups, rectify=False, **options)
    return made

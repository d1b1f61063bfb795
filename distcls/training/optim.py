"""Optimisers and their parameter groups."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from distcls.errors import UsageError, did_you_mean
from distcls.models.classifier import depths, head_parameters
from distcls.training.config import USUAL, OptimizerConfig
from distcls.training.fsdp import local_shard


def parameter_groups(config: OptimizerConfig, model: nn.Module) -> list[dict[str, Any]]:
    """The trainable parameters; each group's rate is the step's rate times its `lr_scale`.

    A parameter of one dimension is a bias or a norm's scale: pulling it to zero regularises
    nothing (He et al.: Bag of Tricks for Image Classification, 2018), so it is not decayed; neither
    is what a timm model itself exempts, such as position embeddings.
    """
    scales = learning_rate_scales(config, model)
    named: set[str] = getattr(getattr(model, "backbone", model), "no_weight_decay", set)()
    exempt = named | {f"backbone.{name}" for name in named}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decayed = parameter.ndim > 1 and name not in exempt
            decay = (config.value("weight_decay") or 0.0) if decayed else 0.0
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
    for name in head_parameters(model):
        scales[name] *= config.head_lr_scale
    return scales


class Ranger(torch.optim.RAdam):
    """RAdam (Liu et al.: On the Variance of the Adaptive Learning Rate and Beyond, 2019) with
    Lookahead (Zhang et al.: Lookahead Optimizer: k steps forward, 1 step back, 2019) around it, as
    Wright put them together (lessw2020/Ranger-Deep-Learning-Optimizer, 2019), and without the
    centred gradients that he added in 2020.

    Every `k` steps the slow weights go the share `alpha` of the way to the weights, which then
    start from there. The slow weights begin as the initial weights, as in the paper; timm's
    Lookahead (1.0) begins with those after `k` steps, so that its first pull back does nothing.
    """

    def __init__(self, params: Any, *, alpha: float = 0.5, k: int = 6, **options: Any) -> None:
        super().__init__(params, decoupled_weight_decay=True, **options)
        self.defaults |= {"alpha": alpha, "k": k}
        for group in self.param_groups:
            group.setdefault("alpha", alpha)
            group.setdefault("k", k)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step of RAdam; every `k`-th time the weights are pulled back."""
        initial = {
            parameter: parameter.clone()
            for group in self.param_groups
            for parameter in group["params"]
            if parameter not in self.state
        }
        loss = super().step(closure)
        for parameter, weights in initial.items():
            if parameter in self.state:  # it had a gradient
                self.state[parameter]["slow"] = weights
        for group in self.param_groups:
            self._pull_back(group)
        return loss

    def _pull_back(self, group: dict[str, Any]) -> None:
        due = [
            parameter
            for parameter in group["params"]
            if parameter.grad is not None and int(self.state[parameter]["step"]) % group["k"] == 0
        ]
        if due:
            slow = [local_shard(self.state[parameter]["slow"]) for parameter in due]
            fast = [local_shard(parameter) for parameter in due]
            torch._foreach_lerp_(slow, fast, group["alpha"])
            torch._foreach_copy_(fast, slow)


class SGD(torch.optim.SGD):
    """torch's SGD, whose momentum is zero at first instead of absent.

    The first step comes out the same. But torch's fused SGD (2.14) leaves the momentum
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
    # the fused ones skip a step on the device, without waiting for it (see `NonFiniteGuard`)
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

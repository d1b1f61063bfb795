"""The parameters in groups of one learning rate and one weight decay each."""

from __future__ import annotations

from typing import Any

from torch import nn

from distcls.models.layers import depths, head_parameters
from distcls.training.optimizer_config import OptimizerConfig


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

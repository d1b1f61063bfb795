"""The optimiser."""

from __future__ import annotations

import torch
from torch import nn

from distcls.training.config import OptimizerConfig


def make_optimizer(config: OptimizerConfig, model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """AdamW over the trainable parameters; norms and biases are not decayed.

    A parameter of one dimension is a bias or a norm's scale: pulling it to zero regularises
    nothing (He et al.: Bag of Tricks for Image Classification, 2018).
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)

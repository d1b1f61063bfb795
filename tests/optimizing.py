"""A small network that optimisers are tried on, the same for each."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from distcls.training.config import OptimizerConfig
from distcls.training.optim import make_optimizer

LR = 0.05
OURS = [
    OptimizerConfig(name="adamw"),
    OptimizerConfig(name="adam", weight_decay=0.01, beta1=0.8),
    OptimizerConfig(name="sgd"),
    OptimizerConfig(name="sgd", nesterov=True),
    OptimizerConfig(name="sgd", momentum=0.0),
    OptimizerConfig(name="rmsprop"),
    OptimizerConfig(name="rmsprop", momentum=0.9),
    OptimizerConfig(name="adabelief"),
    OptimizerConfig(name="ranger"),
    OptimizerConfig(name="lamb"),
    OptimizerConfig(name="timm:lookahead_adamw", weight_decay=0.01),
]


def network() -> nn.Module:
    """Two linear layers with a norm between them."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 3))


def gradients(model: nn.Module, step: int) -> list[Tensor]:
    """Put the gradients of one batch in place."""
    draws = torch.Generator().manual_seed(step)
    inputs = torch.randn(16, 4, generator=draws)
    targets = torch.stack([inputs.sum(1), inputs.prod(1), inputs[:, 0]], 1)
    model.zero_grad()
    type_ = next(model.parameters()).dtype
    ((model(inputs.to(type_)) - targets.to(type_)) ** 2).mean().backward()
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def train(model: nn.Module, one: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        gradients(model, step)
        one.step()


def made(config: OptimizerConfig, model: nn.Module) -> torch.optim.Optimizer:
    return make_optimizer(config, model, LR)


def equal(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return all(torch.equal(first, second) for first, second in pairs)

"""Every optimiser against formulas or other implementations, and what is refused of them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distcls.errors import BadValue, UsageError
from distcls.training.config import OptimizerConfig
from distcls.training.optim import require_usable
from tests.optimizing import LR, OURS, gradients, made, network, train

DECAY = 0.02


def same(one: nn.Module, other: nn.Module, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    start = network()
    for first, second, before in zip(
        one.parameters(), other.parameters(), start.parameters(), strict=True
    ):
        torch.testing.assert_close(first, second.to(first.dtype), rtol=rtol, atol=atol)
        assert not torch.allclose(first, before, rtol=1e-2)


def by_hand(model: nn.Module, decay: float = DECAY) -> list[dict[str, Any]]:
    """Groups for torch's own optimisers: only matrices are decayed."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


@pytest.mark.parametrize(
    ("options", "kind", "reference"),
    [
        ({"name": "adamw"}, torch.optim.AdamW, {}),
        (
            {"name": "adamw", "beta1": 0.8, "beta2": 0.9, "eps": 1e-3},
            torch.optim.AdamW,
            {"betas": (0.8, 0.9), "eps": 1e-3},
        ),
        ({"name": "adam"}, torch.optim.Adam, {}),
        ({"name": "sgd"}, torch.optim.SGD, {"momentum": 0.9}),
        (
            {"name": "sgd", "momentum": 0.8, "nesterov": True},
            torch.optim.SGD,
            {"momentum": 0.8, "nesterov": True},
        ),
        ({"name": "sgd", "momentum": 0.0}, torch.optim.SGD, {}),
        ({"name": "rmsprop"}, torch.optim.RMSprop, {"alpha": 0.99}),
        (
            {"name": "rmsprop", "beta2": 0.9, "momentum": 0.5},
            torch.optim.RMSprop,
            {"alpha": 0.9, "momentum": 0.5},
        ),
        ({"name": "timm:nadamw"}, None, {"opt": "nadamw"}),
        (
            {"name": "timm:adamw", "beta1": 0.8, "beta2": 0.9},
            torch.optim.AdamW,
            {"betas": (0.8, 0.9)},
        ),
        ({"name": "lion"}, None, {"opt": "lion"}),
        ({"name": "radabelief"}, None, {"opt": "radabelief"}),
        ({"name": "sgdw", "momentum": 0.5}, None, {"opt": "sgdw", "momentum": 0.5}),
    ],
)
def test_against_torch_and_timm(
    options: dict[str, Any], kind: type[torch.optim.Optimizer] | None, reference: dict[str, Any]
) -> None:
    from timm.optim import create_optimizer_v2

    one, other = network(), network()
    make: Any = create_optimizer_v2 if kind is None else kind
    train(one, made(OptimizerConfig(**options, weight_decay=DECAY), one), range(20))
    train(other, make(by_hand(other), lr=LR, **reference), range(20))
    same(one, other)


def adabelief(p: Tensor, grad: Tensor, state: dict[str, Tensor], step: int, decay: float) -> Tensor:
    """Algorithm 2 of AdaBelief (Zhuang et al., 2020), with decoupled weight decay."""
    state["m"] = 0.9 * state["m"] + 0.1 * grad
    state["s"] = 0.999 * state["s"] + 0.001 * (grad - state["m"]) ** 2 + 1e-16
    mean, spread = state["m"] / (1 - 0.9**step), state["s"] / (1 - 0.999**step)
    return p * (1 - LR * decay) - LR * mean / (spread.sqrt() + 1e-16)


def ranger(p: Tensor, grad: Tensor, state: dict[str, Tensor], step: int, decay: float) -> Tensor:
    """RAdam's algorithm 2 (Liu et al., 2019) in algorithm 1 of Lookahead (Zhang et al., 2019), but
    for the slow weights, which begin after six steps."""
    state["m"] = 0.95 * state["m"] + 0.05 * grad
    state["s"] = 0.999 * state["s"] + 0.001 * grad**2
    mean = state["m"] / (1 - 0.95**step)
    longest = 2 / (1 - 0.999) - 1
    length = longest - 2 * step * 0.999**step / (1 - 0.999**step)
    p = p * (1 - LR * decay)
    if length > 5:
        rectified = math.sqrt(
            (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
        )
        divisor = (state["s"].sqrt() + 1e-5) / math.sqrt(1 - 0.999**step)
        p = p - LR * rectified * mean / divisor
    else:
        p = p - LR * mean
    if step % 6 == 0:
        slow = state.get("slow", p)
        p = state["slow"] = slow + 0.5 * (p - slow)
    return p


@pytest.mark.parametrize("formula", [adabelief, ranger], ids=lambda formula: formula.__name__)
def test_against_the_papers_formula(formula: Any) -> None:
    one, other = network(), network().double()
    train(one, made(OptimizerConfig(name=formula.__name__, weight_decay=DECAY), one), range(27))
    states = [{"m": torch.zeros(()), "s": torch.zeros(())} for _ in other.parameters()]
    for step in range(27):
        found = gradients(other, step)
        with torch.no_grad():
            for p, grad, state in zip(other.parameters(), found, states, strict=True):
                p.copy_(formula(p, grad, state, step + 1, DECAY if p.ndim > 1 else 0.0))
    same(one, other, rtol=2e-3, atol=2e-4)


def test_norms_and_biases_are_not_decayed() -> None:
    """With gradients of zero nothing moves but what is decayed."""
    for config in OURS:
        model, before = network(), network()
        one = made(OptimizerConfig(name=config.name, weight_decay=0.5), model)
        assert {group["weight_decay"] for group in one.param_groups} == {0.0, 0.5}
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        one.step()
        moved = [
            not torch.equal(after, start)
            for after, start in zip(model.parameters(), before.parameters(), strict=True)
        ]
        wanted = [parameter.ndim > 1 for parameter in model.parameters()]
        assert moved == wanted, config.name


@pytest.mark.parametrize(
    ("options", "field", "why"),
    [
        ({"name": "sgd", "momentum": 0.0, "nesterov": True}, "nesterov", "momentum is 0"),
        ({"name": "sgd", "momentum": 1.0}, "momentum", "below 1"),
        ({"beta2": -0.1}, "beta2", "below 1"),
        ({"eps": 0.0}, "eps", "above 0"),
        ({"weight_decay": -1.0}, "weight_decay", "0 or more"),
        ({"layer_decay": 0.0}, "layer_decay", "above 0"),
        ({"layer_decay": 1.1}, "layer_decay", "at most 1"),
        ({"head_lr_scale": 0.0}, "head_lr_scale", "above 0"),
        ({"clip_norm": 0.0}, "clip_norm", "above 0"),
    ],
)
def test_what_is_refused_at_construction(options: dict[str, Any], field: str, why: str) -> None:
    with pytest.raises(BadValue, match=why) as caught:
        OptimizerConfig(**options)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"momentum": 0.9}, "^momentum: 0.9 is not valid, .* adamw does not read it"),
        ({"name": "sgd", "beta1": 0.9}, "it reads weight_decay, momentum, nesterov"),
        ({"name": "adam", "nesterov": True}, "adam does not read it"),
        ({"name": "rmsprop", "beta1": 0.5}, "rmsprop does not read it"),
        ({"name": "adamv"}, "optimizer.name: unknown optimiser 'adamv'; did you mean 'adam"),
        ({"name": "rangr"}, "did you mean 'ranger'"),
        ({"name": "timm:lamp"}, "did you mean 'timm:lamb'"),
        ({"name": "timm:lookahead_sgdd"}, "unknown optimiser 'timm:lookahead_sgdd'"),
        ({"name": "adahessian"}, "second derivatives"),
        ({"name": "kron"}, "a resumed run would differ"),
        ({"name": "lion", "eps": 1e-3}, "optimizer.eps: 0.001 given, but lion does not read it"),
        ({"name": "adan", "beta1": 0.9, "beta2": 0.99}, "optimizer.beta1: 0.9 given, but adan"),
        ({"name": "lamb", "beta1": 0.9}, "lamb needs both or neither"),
        ({"name": "lamb", "momentum": 0.9}, "lamb does not read it"),
        ({"name": "timm:sgd", "nesterov": True}, "optimizer.nesterov: True given, but sgd"),
    ],
)
def test_what_is_refused_before_the_run(options: dict[str, Any], why: str) -> None:
    with pytest.raises(UsageError, match=why):
        require_usable(OptimizerConfig(**options))


def test_what_needs_another_package_says_so() -> None:
    with pytest.raises(UsageError, match=r"fusedadam cannot be used here: .*(CUDA|[Aa]pex|APEX)"):
        require_usable(OptimizerConfig(name="fusedadam"))

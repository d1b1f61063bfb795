"""Optimisers that torch does not have, or not quite as a run needs them."""

from __future__ import annotations

from typing import Any

import torch

from distcls.training.shards import local


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
            slow = [local(self.state[parameter]["slow"]) for parameter in due]
            fast = [local(parameter) for parameter in due]
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

"""Tensors cut into a part for each process: this process's part, the whole, and back into parts."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

KERNELS = ("fused", "foreach")
"""Keys of an optimiser's groups that say how it computes, not what."""


def local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor, in the same memory; any other tensor itself.

    To be called without gradients.
    """
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor, which all processes have to ask for; any other itself."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered(value: Any, *, keep: bool) -> Any:
    """`value`, nested as it is, with the whole of each sharded tensor, in main memory.

    All processes have to call this. Where `keep` is False None stands for the whole, so that a
    process that has no use for it holds one at a time.
    """
    if isinstance(value, DTensor):
        full = value.full_tensor()
        return full.cpu() if keep else None
    if isinstance(value, dict):
        found = copy.copy(value)  # a state dict has its modules' versions with it
        found.update({key: gathered(item, keep=keep) for key, item in value.items()})
        return found
    if isinstance(value, list | tuple):
        return type(value)(gathered(item, keep=keep) for item in value)
    return value


def fill(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """`model.load_state_dict` of whole tensors, into a model that may be sharded."""
    own = model.state_dict()
    parts = copy.copy(own)  # with the modules' versions, which some ask for; a state holds none
    parts.clear()
    parts.update({name: _laid_out_like(own.get(name), item) for name, item in tensors.items()})
    model.load_state_dict(parts)


def fill_optimizer(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    """`optimizer.load_state_dict` of whole tensors, whose parameters may be sharded.

    Which kernels it computes with, and how its tensors lie in memory, stays as it is here: the
    state may come from a run that was sharded where this one is not, or the other way round.
    """
    state, groups = dict(saved["state"]), []
    for group, own in zip(saved["param_groups"], optimizer.param_groups, strict=True):
        groups.append(group | {key: own[key] for key in KERNELS if key in own})
        for index, parameter in zip(group["params"], own["params"], strict=True):
            if index in state:
                values = state[index].items()
                state[index] = {key: _laid_out_like(parameter, value) for key, value in values}
    optimizer.load_state_dict({**saved, "state": state, "param_groups": groups})


def _laid_out_like(own: Any, value: Any) -> Any:
    """`value` cut into parts and lying in memory as `own` does, if they are tensors of one shape.

    Fused kernels walk through the memory of a parameter and its moments, whatever their strides.
    """
    alike = isinstance(own, Tensor) and isinstance(value, Tensor) and own.shape == value.shape
    if not alike:
        return value
    if isinstance(own, DTensor):
        # every process has read the whole, so nothing has to be sent; the copy lets go of it
        mesh, placements = own.device_mesh, own.placements
        part = distribute_tensor(value.contiguous(), mesh, placements, src_data_rank=None)
        return part.clone()
    if own.stride() == value.stride():
        return value
    return torch.empty_like(own, dtype=value.dtype, device=value.device).copy_(value)

"""What the linear layers see of the last feature map: one mean of it, or one of each column."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from distcls.errors import UsageError
from distcls.models.classifier import Classifier


class ColumnMeans(nn.Module):
    """Mean over the height of a feature map: float [N, C, H, W] to [N, C, 1, W]."""

    def forward(self, features: Tensor) -> Tensor:
        """Take the mean."""
        return features.mean(2, keepdim=True)


def keep_columns(model: Classifier, size: tuple[int, int]) -> None:
    """Put a mean of each column in the place of the mean over all, for inputs of `size`.

    The first linear layer above it grows by as many times and is drawn anew (PyTorch's way). Raises
    UsageError where the network has no such place, or its last feature map one column only.
    """
    holder, name = _place(model.backbone)
    pool: nn.Module = getattr(holder, name)
    columns = _columns(model, pool, size)
    if columns == 1:
        raise UsageError(
            f"model.pool: columns given, but of {size[0]}x{size[1]} pixels this network's last "
            "feature map is one column wide; choose a wider input.size or model.stem_stride 1"
        )
    layer = _linear_above(model.backbone, pool)
    setattr(holder, name, ColumnMeans())
    layer.in_features *= columns
    layer.weight = nn.Parameter(layer.weight.new_empty(layer.out_features, layer.in_features))
    layer.reset_parameters()


def _place(network: nn.Module) -> tuple[nn.Module, str]:
    """The module that holds the mean over all, and the name by which it does."""
    timm = getattr(network, "global_pool", None)
    for holder, name in ((network, "avgpool"), (timm, "pool")):
        pool = getattr(holder, name, None)
        plain = isinstance(pool, nn.AdaptiveAvgPool2d) and pool.output_size in (1, (1, 1))
        if plain and isinstance(holder, nn.Module):
            return holder, name
    raise UsageError(
        "model.pool: columns given, but this network has no layer that takes the mean over all of "
        "the last feature map; mobilenet_v3_small, efficientnet_b0 and resnet18 have one"
    )


def _linear_above(network: nn.Module, pool: nn.Module) -> nn.Linear:
    """The first linear layer after `pool`, in the order in which the network holds its layers."""
    layers = iter(network.modules())
    for layer in layers:
        if layer is pool:
            break
    return next(layer for layer in layers if isinstance(layer, nn.Linear))


def _columns(model: Classifier, pool: nn.Module, size: tuple[int, int]) -> int:
    """Width of the feature map that reaches `pool`."""
    widths: list[int] = []

    def note(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        widths.append(int(inputs[0].shape[3]))

    hook = pool.register_forward_pre_hook(note)
    with torch.no_grad():
        model.eval()(torch.zeros(1, *size, 3, dtype=torch.uint8))
    hook.remove()
    model.train()
    return widths[0]

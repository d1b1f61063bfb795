"""What a fresh network is given besides its library's own: initial weights, dropout, momentum."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from distcls.errors import UsageError


def initialise(network: nn.Module, how: Literal["library", "xavier", "he"]) -> None:
    """Draw the weights of convolutions and linear layers anew, their biases being 0.

    xavier: uniform, of variance 2 / (fan in + fan out) (Glorot, Bengio: Understanding the
    difficulty of training deep feedforward neural networks, 2010). he: normal, of variance
    2 / fan in (He et al.: Delving Deep into Rectifiers, 2015). library leaves all as it is.
    """
    if how == "library":
        return
    for module in network.modules():
        if not isinstance(module, nn.Linear | _ConvNd):
            continue
        if how == "xavier":
            nn.init.xavier_uniform_(module.weight)
        else:
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def set_norm_momentum(network: nn.Module, momentum: float) -> None:
    """Let all batch norms' running statistics follow at this rate."""
    for module in network.modules():
        if isinstance(module, _BatchNorm):
            module.momentum = momentum


class DroppedLinear(nn.Linear):
    """A linear layer, [N, features] to [N, classes], that drops features before it in training.

    Its parameters have nn.Linear's names, so weights of either fit the other.
    """

    dropout: float

    @classmethod
    def of(cls, layer: nn.Linear, dropout: float) -> DroppedLinear:
        """The same layer with dropout; it holds the very tensors of `layer`."""
        # on no device: nothing is allocated, nothing drawn, and the tensors are replaced at once
        new = cls(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        new._parameters.update(layer._parameters)
        new.dropout = dropout
        return new.train(layer.training)

    def forward(self, input: Tensor) -> Tensor:
        """Drop, then multiply."""
        return super().forward(F.dropout(input, self.dropout, self.training))


def drop_before_last(network: nn.Module, classes: int, dropout: float) -> None:
    """Drop features before the last layer. Raises UsageError if that is not a linear one."""
    last = None
    for parent in network.modules():
        for name, child in parent.named_children():
            if type(child) is nn.Linear and child.out_features == classes:
                last = parent, name, child
    if last is None:
        raise UsageError(
            f"model.dropout: {dropout} given, but this network has no linear last layer to drop "
            "features before; leave it unset"
        )
    parent, name, child = last
    setattr(parent, name, DroppedLinear.of(child, dropout))

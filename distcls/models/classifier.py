"""The network as everything else sees it: pixels in, logits out."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from distcls.imaging import Preprocess


class Classifier(nn.Module):
    """A backbone with its normalisation inside, the same in training, evaluation and ONNX.

    Input: pixels, uint8 or float in 0..255, RGB [N, H, W, 3]. Seen as [N, 3, H, W], such an array
    already lies in memory as channels_last does, so no copy is made to change the layout.
    Output: logits, float [N, classes].
    """

    mean: Tensor
    inverse_std: Tensor

    def __init__(self, backbone: nn.Module, preprocess: Preprocess) -> None:
        super().__init__()
        self.backbone = backbone
        mean = torch.tensor(preprocess.mean, dtype=torch.float32).view(1, 3, 1, 1) * 255
        std = torch.tensor(preprocess.std, dtype=torch.float32).view(1, 3, 1, 1) * 255
        # not persistent: the model card carries them
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("inverse_std", 1 / std, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Normalise and classify."""
        pixels = images.permute(0, 3, 1, 2).to(self.mean.dtype)
        logits: Tensor = self.backbone((pixels - self.mean) * self.inverse_std)
        return logits


def count_parameters(model: nn.Module) -> int:
    """Number of parameters, frozen ones included."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: Classifier, size: tuple[int, int]) -> int:
    """Multiply-accumulates of one image of `size` in one forward pass."""
    was_training = model.training
    counter = FlopCounterMode(display=False)
    device = model.mean.device
    with torch.no_grad(), counter:
        model.eval()(torch.zeros(1, *size, 3, dtype=torch.uint8, device=device))
    model.train(was_training)
    return int(counter.get_total_flops()) // 2

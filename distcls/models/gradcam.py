"""Grad-CAM: where in its last feature map a network finds a class.

Selvaraju et al.: Grad-CAM, 2017. The gradient of the logits is multiplied with the features place
by place (Draelos, Carin: Use HiResCAM instead of Grad-CAM, 2020): behind a global pooling, as in
most networks, that is Grad-CAM itself, as the gradient is the same everywhere; behind a flattening
it shows what the network uses, where the mean gradient of Grad-CAM may not.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from distcls.models.checkpoint import TorchModel

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

COARSEST = 7
"""Places a side that a feature map has at least, if there is one: that of 224 pixels behind five
halvings. Of small images the last one may be 2 by 2, which shows nothing."""


class _Trace:
    """What the modules of a network gave in one forward pass, in the order in which they ended."""

    def __init__(self) -> None:
        self.features: Tensor | None = None
        """The last feature map that is not too coarse: the last output of the size of its
        convolution's."""
        self.before = 0
        """Modules with parameters of their own up to the last convolution ..."""
        self.after = 0
        """... and after it."""
        self._thread = threading.get_ident()

    def record(self, module: nn.Module, _: Any, output: Any) -> None:
        """A forward hook."""
        if threading.get_ident() != self._thread:
            return  # the same network predicts in another thread
        convolves = isinstance(module, CONVOLUTIONS)
        self.after += any(True for _ in module.parameters(recurse=False))
        if not isinstance(output, Tensor) or output.ndim != 4 or output.shape[2:].numel() == 1:
            return
        if convolves:
            self.before, self.after = self.before + self.after, 0
            if self.features is None or min(output.shape[2:]) >= COARSEST:
                self.features = output
        elif self.features is not None and output.shape[2:] == self.features.shape[2:]:
            self.features = output


@contextlib.contextmanager
def _traced(network: nn.Module) -> Iterator[_Trace]:
    trace = _Trace()
    hooks = [module.register_forward_hook(trace.record) for module in network.modules()]
    try:
        yield trace
    finally:
        for hook in hooks:
            hook.remove()


def gradcam_map(
    model: TorchModel, pixels: NDArray[np.uint8], chosen: Sequence[int]
) -> NDArray[np.float32] | None:
    """Where the network finds the classes of the logits `chosen` in a preprocessed image.

    `pixels` are uint8 [H, W, 3], at the network's size. Returns float32 [H, W] in [0, 1], zeros if
    nothing speaks for them; None for networks without a feature map to look at, such as
    transformers, whose one convolution is their first layer.
    """
    images = torch.from_numpy(np.ascontiguousarray(pixels)[None]).to(model.device).float()
    with torch.enable_grad(), _traced(model.model.backbone) as trace:
        logits = model.model(images.requires_grad_())
        features = trace.features
        if features is None or trace.after > trace.before or not features.requires_grad:
            return None
        [gradient] = torch.autograd.grad(logits[0, list(chosen)].sum(), features)
    heat = (gradient * features).detach().sum(1)[0].clamp(min=0).float().cpu().numpy()
    height, width = pixels.shape[:2]
    heat = np.nan_to_num(cv2.resize(heat, (width, height), interpolation=cv2.INTER_LINEAR))
    return (heat / heat.max() if heat.max() > 0 else heat).astype(np.float32)

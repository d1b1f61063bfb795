"""The small networks of the tutorials: `simple_cnn` and `simple_nn`, made for one input size."""

from __future__ import annotations

from torch import Tensor, nn

from distcls.models.registry import NETWORKS

SMALLEST = 10
"""Pixels per side, below which nothing is left after the convolutions of `SimpleCnn`."""


@NETWORKS.register("simple_cnn")
class SimpleCnn(nn.Module):
    """Two convolutions with pooling and a linear layer: Keras' "Simple MNIST convnet", in colour.

    Input: float [N, 3, H, W] of `size`. Output: logits [N, classes]. Raises ValueError for a size
    under 10 pixels. Source: https://keras.io/examples/vision/mnist_convnet/
    """

    def __init__(self, classes: int, size: tuple[int, int], dropout: float = 0.5) -> None:
        super().__init__()
        if min(size) < SMALLEST:
            raise ValueError(f"simple_cnn needs {SMALLEST} pixels a side or more")
        height, width = (((side - 2) // 2 - 2) // 2 for side in size)
        self.features = nn.Sequential(
            nn.Conv2d(3, 32, 3), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2),
        )  # fmt: skip
        self.classifier = nn.Sequential(
            nn.Flatten(), nn.Dropout(dropout), nn.Linear(64 * height * width, classes)
        )

    def forward(self, pixels: Tensor) -> Tensor:
        """Classify."""
        logits: Tensor = self.classifier(self.features(pixels))
        return logits


@NETWORKS.register("simple_nn")
class SimpleNn(nn.Module):
    """Three linear layers: the network of PyTorch's quickstart tutorial, in colour.

    Input: float [N, 3, H, W] of `size`. Output: logits [N, classes].
    Source: https://docs.pytorch.org/tutorials/beginner/basics/quickstart_tutorial.html
    """

    def __init__(self, classes: int, size: tuple[int, int], dropout: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(),
            nn.Linear(3 * size[0] * size[1], 512),
            nn.ReLU(),
            nn.Linear(512, 512),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(512, classes),
        )

    def forward(self, pixels: Tensor) -> Tensor:
        """Classify."""
        logits: Tensor = self.layers(pixels)
        return logits

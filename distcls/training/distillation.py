"""Knowledge distillation: a trained model's predictions as a second target of training."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from distcls.errors import UsageError
from distcls.model_card import best_model
from distcls.models.checkpoint import TorchModel
from distcls.predictor import load_model
from distcls.runtime.model import Model
from distcls.training.config import DistillConfig


class Teacher:
    """A trained model of any architecture and input size, with the same classes.

    It gets the images that the student gets, augmented and mixed, scaled to its own input size.
    """

    def __init__(self, config: DistillConfig, classes: Sequence[str], device: torch.device) -> None:
        """Load it. Raises UsageError for a file that is no model, and for other classes."""
        if config.teacher is None:
            raise ValueError("no teacher is configured")
        self._temperature = config.resolved_temperature
        self._weight = config.resolved_weight
        try:
            self._model: Model = load_model(best_model(config.teacher), str(device))
        except UsageError as error:
            raise UsageError(f"distill.teacher: {str(error).removeprefix('model: ')}") from error
        known = self._model.card.classes
        if set(known) != set(classes):
            missing = sorted(set(classes) ^ set(known))[0]
            raise UsageError(
                f"distill.teacher: {config.teacher} has {len(known)} classes, the dataset "
                f"{len(classes)}; {missing!r} is in one of them alone"
            )
        self._order = torch.tensor([known.index(name) for name in classes], device=device)
        self._size = tuple(self._model.card.preprocess.size)

    def teach(self, losses: Tensor, logits: Tensor, images: Tensor) -> Tensor:
        """Loss of each image, [B]: a mean of `losses` and of the distance to the teacher.

        The distance is temperature^2 * KL(teacher || student) of the probabilities at that
        temperature (Hinton et al.: Distilling the Knowledge in a Neural Network, 2015). Logits of
        the student [B, classes], images [B, H, W, 3] in 0..255.
        """
        teacher = self.logits(images).to(logits.dtype) / self._temperature
        own = F.log_softmax(logits / self._temperature, dim=1)
        target = F.log_softmax(teacher, dim=1)
        distance = F.kl_div(own, target, reduction="none", log_target=True).sum(1)
        return (1 - self._weight) * losses + self._weight * self._temperature**2 * distance

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """Its logits in the order of the student's classes, float [B, classes]."""
        if tuple(images.shape[1:3]) != self._size:
            pixels = images.permute(0, 3, 1, 2).float()
            scaled = F.interpolate(pixels, list(self._size), mode="bilinear", antialias=True)
            images = scaled.permute(0, 2, 3, 1)
        if isinstance(self._model, TorchModel):
            logits = self._model.model(images).float()
        else:
            if images.is_floating_point():
                images = images.round().clamp(0, 255).to(torch.uint8)
            found = self._model.logits(images.cpu().numpy())
            logits = torch.from_numpy(found).to(images.device)
        return torch.index_select(logits, 1, self._order)

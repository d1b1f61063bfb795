"""From a folder of images to a served, verified classifier.

    import distcls

    result = distcls.fit(data="photos/", out="runs/photos")
    predictor = distcls.load("runs/photos")
    print(predictor("photo.jpg"))

The names below are loaded when they are first used: importing distcls loads neither PyTorch, OpenCV
nor ONNX Runtime.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distcls.data.image_dataset import Example, ImageDataset, open_dataset, prepare_dataset
    from distcls.errors import BadImage, BadValue, DistclsError, Stopped, UsageError
    from distcls.evaluation.evaluate import EvaluationResult, evaluate_model
    from distcls.evaluation.metrics import register_metric
    from distcls.explanation.explain import explain
    from distcls.export.calibrate import CalibrationResult, calibrate_model
    from distcls.export.onnx import ExportResult, export_onnx
    from distcls.models.registry import register_model
    from distcls.prediction import Prediction, Predictions
    from distcls.predictor import Predictor, load
    from distcls.training.config import TrainConfig, register_loss, register_optimizer
    from distcls.training.run import TrainResult, fit
    from distcls.training.schedule import register_schedule

__version__ = "0.1.0"

_NAMES = {
    "distcls.data.image_dataset": ("Example", "ImageDataset", "open_dataset", "prepare_dataset"),
    "distcls.errors": ("BadImage", "BadValue", "DistclsError", "Stopped", "UsageError"),
    "distcls.evaluation.evaluate": ("EvaluationResult", "evaluate_model"),
    "distcls.evaluation.metrics": ("register_metric",),
    "distcls.export.calibrate": ("CalibrationResult", "calibrate_model"),
    "distcls.explanation.explain": ("explain",),
    "distcls.export.onnx": ("ExportResult", "export_onnx"),
    "distcls.models.registry": ("register_model",),
    "distcls.prediction": ("Prediction", "Predictions"),
    "distcls.predictor": ("Predictor", "load"),
    "distcls.training.config": ("TrainConfig", "register_loss", "register_optimizer"),
    "distcls.training.run": ("TrainResult", "fit"),
    "distcls.training.schedule": ("register_schedule",),
}
_MODULES = {name: module for module, names in _NAMES.items() for name in names}

__all__ = [
    "BadImage",
    "BadValue",
    "CalibrationResult",
    "DistclsError",
    "EvaluationResult",
    "Example",
    "ExportResult",
    "ImageDataset",
    "Prediction",
    "Predictions",
    "Predictor",
    "Stopped",
    "TrainConfig",
    "TrainResult",
    "UsageError",
    "calibrate_model",
    "evaluate_model",
    "explain",
    "export_onnx",
    "fit",
    "load",
    "open_dataset",
    "prepare_dataset",
    "register_loss",
    "register_metric",
    "register_model",
    "register_optimizer",
    "register_schedule",
]

if not TYPE_CHECKING:  # for a type checker it would make every misspelt name an Any

    def __getattr__(name: str) -> Any:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from distcls.cli import packages_for

        with packages_for(f"distcls.{name}"):
            module = importlib.import_module(_MODULES[name])
        value = getattr(module, name)
        globals()[name] = value  # found without this function from now on
        return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]

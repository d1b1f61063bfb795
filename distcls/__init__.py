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
    from distcls.errors import BadImage, BadValue, DistclsError, UsageError
    from distcls.prediction import Prediction, Predictions
    from distcls.predictor import Predictor, load
    from distcls.training.config import TrainConfig
    from distcls.training.run import TrainResult, fit

__version__ = "0.1.0"

_MODULES = {
    "load": "distcls.predictor",
    "Predictor": "distcls.predictor",
    "Prediction": "distcls.prediction",
    "Predictions": "distcls.prediction",
    "TrainConfig": "distcls.training.config",
    "TrainResult": "distcls.training.run",
    "fit": "distcls.training.run",
    **dict.fromkeys(("BadImage", "BadValue", "DistclsError", "UsageError"), "distcls.errors"),
}

__all__ = [
    "BadImage",
    "BadValue",
    "DistclsError",
    "Prediction",
    "Predictions",
    "Predictor",
    "TrainConfig",
    "TrainResult",
    "UsageError",
    "fit",
    "load",
]

if not TYPE_CHECKING:  # for a type checker it would make every misspelt name an Any

    def __getattr__(name: str) -> Any:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(_MODULES[name]), name)
        globals()[name] = value  # found without this function from now on
        return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]

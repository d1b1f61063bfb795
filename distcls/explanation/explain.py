"""What in an image a prediction rests on, by any model file; as an array, and drawn.

A best.pth is explained by Grad-CAM, all else (and networks without convolutions) by occlusion,
which needs no torch. Both say where the model looks, not whether that is right: a map that lies on
the background, a watermark or a corner shows a shortcut.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import cv2
import numpy as np

from distcls import log
from distcls.data.formats.objects import ImageInput, check, load_image
from distcls.data.source import ImageSource
from distcls.errors import BadImage, UsageError, did_you_mean, require
from distcls.explanation.occlusion import occlusion_map
from distcls.files import require_writable, safe_names
from distcls.plotting import GREY, LETTERS, Tile, draw_grid, new_figure, shorten
from distcls.predictor import Predictor, load
from distcls.runtime.model import Images, Model
from distcls.task import Floats, Task

if TYPE_CHECKING:
    from distcls.models.checkpoint import TorchModel

Method = Literal["auto", "gradcam", "occlusion"]
METHODS = ("auto", "gradcam", "occlusion")
TITLES = {"gradcam": "Grad-CAM", "occlusion": "occlusion"}
DRAWN = 224
"""Pixels per side from which images are drawn as they are; smaller ones are enlarged."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Explanation:
    """A prediction with what it rests on."""

    heat: Floats
    """How much each pixel speaks for it, float32 [H, W] in [0, 1]; zeros if none does."""
    pixels: Images
    """The image as the network gets it, uint8 RGB [H, W, 3]."""
    label: str
    """The class that is explained; of several the text of a prediction."""
    probability: float
    """Of the label, 0 to 1."""
    method: str
    """gradcam or occlusion."""


def explain(
    model: str | os.PathLike[str] | Predictor,
    image: ImageInput,
    label: str | int | None = None,
    *,
    method: Method = "auto",
) -> Floats:
    """What in an image speaks for a class, pixel by pixel.

        heat = distcls.explain("runs/photos", "photo.jpg")  # float32 [height, width]

    Args:
        model: a best.pth, a best.onnx, a run directory, or a predictor, of an ensemble too.
        image: the image, in any form that a predictor takes.
        label: the class to explain, by name or index; by default the predicted one, of multi-head
            and multi-label models all that are predicted.
        method: gradcam (a best.pth of a network with convolutions), occlusion (any model; some
            270 forward passes), or auto, which takes the first that is possible.

    Returns:
        float32 [H, W] in [0, 1], of the network's input size: the image as the model's
        preprocessing resizes and crops it. 1 is where it speaks most for the class; zeros if
        nothing does.

    Raises:
        UsageError: for a model or a class that is not there, and for what is no image.
        BadImage: for an image that cannot be read or decoded.
        DistclsError: if the model cannot compute.
    """
    predictor = model if isinstance(model, Predictor) else load(model)
    try:
        check(image)
        preprocess = predictor.card.preprocess
        pixels = preprocess(load_image(image, preprocess.background))
        return explain_pixels(predictor.model, pixels, label, method=method).heat
    finally:
        if predictor is not model:
            predictor.close()


def explain_pixels(
    model: Model, pixels: Images, label: str | int | None = None, *, method: Method = "auto"
) -> Explanation:
    """The explanation of a preprocessed image, uint8 RGB [H, W, 3] of the network's size.

    Raises UsageError and DistclsError as `explain` does. May be called by any number of threads.
    """
    require(method in METHODS, "method", method, f"one of {', '.join(METHODS)}")
    task = model.card.task
    logits = model.logits(pixels[None])[:, : len(task.classes)]
    if not np.isfinite(logits).all():
        raise BadImage("the model's output is not finite")
    chosen, text, probability = target(task, logits, label)
    heat, used = None, "occlusion"
    torch_model = _torch_model(model)
    if torch_model is not None and method != "occlusion":
        from distcls.models.gradcam import gradcam_map

        heat, used = gradcam_map(torch_model, pixels, chosen), "gradcam"
    if heat is None and method == "gradcam":
        raise UsageError(
            "method: gradcam needs a best.pth of a network whose last layers are convolutions; "
            "occlusion takes any model"
        )
    if heat is None:
        heat, used = occlusion_map(model, pixels, chosen), "occlusion"
    return Explanation(heat=heat, pixels=pixels, label=text, probability=probability, method=used)


def overlay(pixels: Images, heat: Floats) -> Images:
    """The image in grey with its explanation in colour on it, uint8 RGB [h, w, 3].

    Small images are enlarged by a whole number, to at least 224 pixels.
    """
    factor = max(1, -(-DRAWN // max(heat.shape)))
    height, width = (side * factor for side in heat.shape)
    smooth = cv2.resize(heat, (width, height), interpolation=cv2.INTER_LINEAR).clip(0, 1)
    colours = cv2.applyColorMap((255 * smooth).astype(np.uint8), cv2.COLORMAP_INFERNO)[..., ::-1]
    grey = cv2.cvtColor(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    grey = cv2.resize(grey, (width, height), interpolation=cv2.INTER_NEAREST)
    weight = (0.7 * np.sqrt(smooth))[..., None]
    return np.asarray((grey * (1 - weight) + colours * weight).round(), np.uint8)


def check_folder(folder: Path, *, replace: bool) -> None:
    """Raise UsageError, before any work, if the pictures could not be drawn or written.

    `replace` allows a folder that has files already.
    """
    if folder.is_dir() and not replace and any(folder.iterdir()):
        raise UsageError(
            f"explain: {folder} has files already; choose another folder or add --overwrite"
        )
    new_figure(1, 1)  # raises now if matplotlib is missing
    require_writable(folder)


def explain_source(
    model: Model, source: ImageSource, folder: Path, *, limit: int | None = None
) -> Iterator[Path]:
    """Draw the image beside its explanation for each readable image of a source, into `folder`.

    Yields each picture's path, NUMBER-NAME.png, after it is written. Images are read one by one;
    one that cannot be read is left out, as its row in the table has the error.
    """
    preprocess = model.card.preprocess
    source = source.on_background(preprocess.background)
    count = min(len(source), limit or len(source))
    with log.Progress("explaining", count) as progress:
        for index in range(count):
            name = source.image_ids[index]
            try:
                found = explain_pixels(model, preprocess(source.image(index)))
            except BadImage:
                progress.update()
                continue
            [safe] = safe_names([name])
            path = folder / f"{index:0{len(str(count - 1))}d}-{Path(safe).stem}.png"
            draw(found, path, name)
            progress.update()
            yield path


def draw(found: Explanation, path: Path, name: str) -> None:
    """Write the image and its explanation side by side, with label and probability, as a PNG."""
    factor = max(1, -(-DRAWN // max(found.heat.shape)))
    large = found.pixels.repeat(factor, axis=0).repeat(factor, axis=1)
    nothing = "" if found.heat.any() else "\nnothing speaks for it"
    tiles = [
        Tile(
            image=large,
            text=f"{shorten(found.label, LETTERS - 6)} {found.probability:.3f}",
            name=name,
            color=GREY,
        ),
        Tile(
            image=overlay(found.pixels, found.heat),
            text=f"{TITLES[found.method]}{nothing}",
            color=GREY,
        ),
    ]
    draw_grid(tiles, path)


def target(task: Task, logits: Floats, label: str | int | None) -> tuple[Sequence[int], str, float]:
    """The positions of the logits to explain, the text of their label, and its probability."""
    probabilities = task.probabilities(logits)
    if label is None:
        answer = task.decide(logits)
        chosen = np.flatnonzero(answer[0]) if task.kind == "multi_label" else answer[0]
        if len(chosen):
            flat = task.flat(chosen.tolist())
            return flat, task.text(answer[0]), float(task.confidence(probabilities, answer)[0])
        label = int(probabilities[0].argmax())  # no label found: the nearest one
    if isinstance(label, str):
        if label not in task.classes:
            raise UsageError(f"label: no class {label!r}{did_you_mean(label, task.classes)}")
        label = task.classes.index(label)
    valid = type(label) is int and 0 <= label < len(task.classes)
    require(valid, "label", label, f"a class by name, or an index below {len(task.classes)}")
    return [label], task.classes[label], float(probabilities[0, label])


def _torch_model(model: Model) -> TorchModel | None:
    """The model, if it is one of PyTorch; torch is loaded then."""
    if "distcls.models.checkpoint" not in sys.modules:
        return None  # nothing has opened one
    from distcls.models.checkpoint import TorchModel

    return model if isinstance(model, TorchModel) else None

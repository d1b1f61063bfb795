"""A model repository for Triton Inference Server or KServe.

    models/NAME/config.pbtxt    inputs, outputs, dynamic batching
    models/NAME/labels.txt      class names, which the server returns with the predictions
    models/NAME/1/model.onnx    the exported file as it is

A multi-head model gets one more output for each head, `probabilities:HEAD`, with its class names in
labels_0.txt and so on.

Point `tritonserver --model-repository` or the storageUri of a KServe InferenceService (model format
`triton`) at the folder. Format: https://github.com/triton-inference-server/common,
protobuf/model_config.proto.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from distcls.errors import UsageError, require
from distcls.model_card import best_model
from distcls.task import BLANK_SHOWN

if TYPE_CHECKING:
    from distcls.model_card import ModelCard
    from distcls.runtime.model import OnnxModel

CONFIG, LABELS, MODEL = "config.pbtxt", "labels.txt", "model.onnx"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_INSTANCES = {"auto": "KIND_AUTO", "cpu": "KIND_CPU", "gpu": "KIND_GPU"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TritonOptions:
    """Options of `distcls export-triton`."""

    model: Path
    """Exported model, such as best.onnx, in any precision; a run directory means its best.onnx."""
    out: Path
    """Model repository to write into; other models in it are not changed."""
    name: str | None = None
    """Name of the model for clients; default: that of the file, without its ending, or of the run
    directory."""
    version: int = 1
    """Version of the model, which names its folder."""
    max_batch_size: int = 64
    """Maximum batch size of the server."""
    max_delay_us: int = 0
    """Maximum time in microseconds that a request waits for others while an instance is free; those
    that wait for a busy one are batched in any case."""
    max_queue: int = 1024
    """Requests that may wait; beyond, the server refuses them at once. 0 is no limit."""
    queue_timeout_ms: int = 30_000
    """Milliseconds that a request may wait, then it is refused; a client may ask for less in its
    parameter `timeout`. 0 is no limit."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """Device of the instances; auto uses the GPUs if there are any."""
    instances: int = 1
    """Number of model instances, per GPU or on the CPU."""
    json: bool = False
    """Print the result as one JSON object on standard output."""
    quiet: bool = False
    """Print warnings and errors only."""

    def __post_init__(self) -> None:
        for key in ("version", "max_batch_size", "instances"):
            require(getattr(self, key) >= 1, key, getattr(self, key), "at least 1")
        for key in ("max_delay_us", "max_queue", "queue_timeout_ms"):
            value = getattr(self, key)
            require(0 <= value < 2**31, key, value, "0 to 2,147,483,647")
        expected = "letters, digits, _, - and ., beginning with a letter or digit"
        require(_NAME.fullmatch(self.title) is not None, "name", self.title, expected)

    @property
    def title(self) -> str:
        """Name of the model for clients."""
        folder = self.model.is_dir()
        return self.name or (self.model.resolve().name if folder else self.model.stem)

    @property
    def file(self) -> Path:
        """The exported model. Raises UsageError for a checkpoint."""
        found = best_model(self.model)
        if found.suffix.lower() == ".pth":
            advice = f"distcls export --ckpt {self.model} --overwrite exports it"
            raise UsageError(f"model: {found} is a checkpoint; {advice}")
        return found


def write_repository(options: TritonOptions) -> Path:
    """Write the model into the repository and return its folder there.

    Raises UsageError if the file is no exported model, or the folder exists.
    """
    from distcls.files import atomic_folder
    from distcls.runtime.model import OnnxModel

    file = options.file
    model = OnnxModel(file)
    target = options.out / options.title
    with atomic_folder(target) as temporary:
        (temporary / CONFIG).write_text(config_of(model, options), encoding="utf-8")
        (temporary / LABELS).write_text(_labels(model.card.classes), encoding="utf-8")
        heads = model.card.task.heads
        for place, head in enumerate(heads):
            (temporary / _labels_of(place)).write_text(_labels(head.classes), encoding="utf-8")
        copy = temporary / str(options.version) / MODEL
        copy.parent.mkdir()
        if heads:
            _write_with_heads(file, copy, model.card)
        else:
            shutil.copyfile(file, copy)
    return target


def _write_with_heads(source: Path, copy: Path, card: ModelCard) -> None:
    """Copy a model file, with one more output for each head."""
    import onnx

    from distcls.export.graph import add_heads, write

    graph = onnx.load(str(source))
    add_heads(graph, card.task.heads)
    write(copy, graph, card)


def config_of(model: OnnxModel, options: TritonOptions) -> str:
    """The text of config.pbtxt, protobuf's text format."""
    from distcls.runtime.model import INPUT

    card = model.card
    height, width = card.preprocess.size
    parameters: dict[str, object] = {
        "preprocess": card.preprocess.to_json(),
        "certificate": card.certificate,
    }
    if not card.task.single:
        parameters["targets"] = card.task.to_json()
    lines = [
        f"name: {_quoted(options.title)}",
        'backend: "onnxruntime"',
        f"max_batch_size: {options.max_batch_size}",
        "input [",
        f"  {{ name: {_quoted(INPUT)} data_type: TYPE_UINT8 dims: [ {height}, {width}, 3 ] }}",
        "]",
        "output [",
        ",\n".join(f"  {output}" for output in _outputs(model)),
        "]",
        *_dynamic_batching(options),
        f"instance_group [ {{ kind: {_INSTANCES[options.device]} count: {options.instances} }} ]",
        *_parameters(parameters),
    ]
    return "\n".join(lines) + "\n"


def _dynamic_batching(options: TritonOptions) -> list[str]:
    """Batches of what waits, in a queue that ends: the server's own is unlimited, in length and
    time."""
    return [
        "dynamic_batching {",
        f"  max_queue_delay_microseconds: {options.max_delay_us}",
        "  default_queue_policy {",
        "    timeout_action: REJECT",
        f"    default_timeout_microseconds: {1000 * options.queue_timeout_ms}",
        "    allow_timeout_override: true",
        f"    max_queue_size: {options.max_queue}",
        "  }",
        "}",
    ]


def _outputs(model: OnnxModel) -> list[str]:
    """The config of each output."""
    from distcls.export.graph import output_of
    from distcls.runtime.model import FEATURES, LOGITS, PROBABILITIES, WithFeatures

    card = model.card
    classes = len(card.classes)
    found = [_output(LOGITS, classes), _output(PROBABILITIES, classes, LABELS)]
    for place, head in enumerate(card.task.heads):
        found.append(_output(output_of(head), len(head.classes), _labels_of(place)))
    if FEATURES in model.output_names:
        found.append(_output(FEATURES, WithFeatures(model).width))
    return found


def _output(name: str, number: int, labels: str = "") -> str:
    own = f" label_filename: {_quoted(labels)}" if labels else ""
    return f"{{ name: {_quoted(name)} data_type: TYPE_FP32 dims: [ {number} ]{own} }}"


def _labels_of(place: int) -> str:
    """The file of the class names of a head."""
    return f"labels_{place}.txt"


def _parameters(values: dict[str, object]) -> list[str]:
    """Parameters for clients: the preprocessing, the task and the certificate."""
    return [
        f"parameters {{ key: {_quoted('distcls.' + key)} "
        f"value: {{ string_value: {_quoted(json.dumps(value))} }} }}"
        for key, value in values.items()
    ]


def _quoted(text: str) -> str:
    """A string literal of protobuf's text format."""
    plain = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    if not plain.isprintable():
        raise UsageError(f"{text!r} holds characters that a config cannot")
    return f'"{plain}"'


def _labels(classes: Sequence[str]) -> str:
    """One class per line; a line break in a name becomes a space, a blank is shown."""
    return "".join((" ".join(name.splitlines()) or BLANK_SHOWN) + "\n" for name in classes)

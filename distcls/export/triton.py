"""`python -m export.triton --model best.onnx --out DIR`: a model repository for Triton or KServe.

    models/NAME/config.pbtxt    inputs, outputs, dynamic batching
    models/NAME/labels.txt      class names, so that the server can answer with them
    models/NAME/1/model.onnx    the exported file as it is

A model of several heads gets an output more for each of them, `probabilities:HEAD`, with class
names of its own in labels_0.txt and so on.

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

from distcls import log
from distcls.cli import run
from distcls.config import parse
from distcls.errors import UsageError, require
from distcls.task import BLANK_SHOWN

if TYPE_CHECKING:
    from distcls.model_card import ModelCard
    from distcls.runtime.model import OnnxModel

CONFIG, LABELS, MODEL = "config.pbtxt", "labels.txt", "model.onnx"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_KINDS = {"auto": "KIND_AUTO", "cpu": "KIND_CPU", "gpu": "KIND_GPU"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TritonOptions:
    """What `export.triton` can be told."""

    model: Path
    """Exported model, such as best.onnx; fp16 and int8 variants as well."""
    out: Path
    """Folder of the model repository; other models in it are left alone."""
    name: str | None = None
    """What clients call the model; unset, the file's name without its ending."""
    version: int = 1
    """Number of the version's folder."""
    max_batch_size: int = 64
    """Images that the server computes at a time, at most."""
    max_delay_us: int = 2000
    """Microseconds that a request waits, at most, for others to be batched with."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """What the instances run on; auto takes the GPUs if there are any."""
    instances: int = 1
    """Copies of the model, on each GPU or on the CPU."""
    json: bool = False
    """Print one JSON object on standard output, for machines."""
    quiet: bool = False
    """Say nothing but warnings and errors."""

    def __post_init__(self) -> None:
        for key in ("version", "max_batch_size", "instances"):
            require(getattr(self, key) >= 1, key, getattr(self, key), "at least 1")
        require(self.max_delay_us >= 0, "max_delay_us", self.max_delay_us, "at least 0")
        expected = "letters, digits, _, - and ., beginning with a letter or digit"
        require(_NAME.fullmatch(self.title) is not None, "name", self.title, expected)

    @property
    def title(self) -> str:
        """What clients call the model."""
        return self.name or self.model.stem


def write_repository(options: TritonOptions) -> Path:
    """Write the model into the repository; the folder of the model.

    Raises UsageError if the file is no exported model, or the folder is there already.
    """
    from distcls.files import atomic_folder
    from distcls.runtime.model import OnnxModel

    model = OnnxModel(options.model)
    target = options.out / options.title
    with atomic_folder(target) as part:
        (part / CONFIG).write_text(config_of(model, options), encoding="utf-8")
        (part / LABELS).write_text(_labels(model.card.classes), encoding="utf-8")
        heads = model.card.task.heads
        for place, head in enumerate(heads):
            (part / _labels_of(place)).write_text(_labels(head.classes), encoding="utf-8")
        copy = part / str(options.version) / MODEL
        copy.parent.mkdir()
        if heads:
            _write_with_heads(options.model, copy, model.card)
        else:
            shutil.copyfile(options.model, copy)
    return target


def _write_with_heads(source: Path, copy: Path, card: ModelCard) -> None:
    """Copy a model file, with an output more for each head."""
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
    told: dict[str, object] = {
        "preprocess": card.preprocess.to_json(),
        "certificate": card.certificate,
    }
    if not card.task.single:
        told["targets"] = card.task.to_json()
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
        f"dynamic_batching {{ max_queue_delay_microseconds: {options.max_delay_us} }}",
        f"instance_group [ {{ kind: {_KINDS[options.device]} count: {options.instances} }} ]",
        *_parameters(told),
    ]
    return "\n".join(lines) + "\n"


def _outputs(model: OnnxModel) -> list[str]:
    """What the config says of each output."""
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
    """What clients may ask of the model's config: how to resize, and how good it is."""
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
    """A class a line; a line break in a name becomes a space, a blank is shown."""
    return "".join((" ".join(name.splitlines()) or BLANK_SHOWN) + "\n" for name in classes)


def main(arguments: Sequence[str]) -> None:
    """The command."""
    options = parse(
        TritonOptions,
        arguments,
        prog="python -m export.triton",
        about="Write an exported model into a model repository for Triton or KServe.",
    )
    log.set_quiet(options.quiet)
    folder = write_repository(options)
    log.say(f"wrote {folder}; tritonserver --model-repository {options.out} serves it")
    if options.json:
        print(json.dumps({"out": str(folder), "name": options.title, "version": options.version}))


if __name__ == "__main__":
    run(main)

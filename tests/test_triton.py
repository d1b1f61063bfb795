"""The model repository: its config parses as Triton's own message and says what the model is."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format

from distcls.commands.triton import main as main_triton
from distcls.errors import UsageError
from distcls.runtime.model import OnnxModel
from distcls.task import Head, Task
from tests import tiny_onnx
from tests.test_predict_rows import with_features

CLASSES = ("red", 'gr\nee"n', "blü \\ x")


def message() -> Any:
    """The part of Triton's ModelConfig that is written, with its field numbers and names.

    From triton-inference-server/common, protobuf/model_config.proto.
    """
    file = descriptor_pb2.FileDescriptorProto(name="m.proto", package="t", syntax="proto3")
    field = descriptor_pb2.FieldDescriptorProto
    kinds = {"str": field.TYPE_STRING, "int": field.TYPE_INT64, "enum": field.TYPE_ENUM}
    kinds["bool"] = field.TYPE_BOOL

    def add(name: str, *fields: tuple[str, int, str, bool]) -> Any:
        found = file.message_type.add(name=name)
        for label, number, kind, many in fields:
            one = found.field.add(name=label, number=number)
            one.label = field.LABEL_REPEATED if many else field.LABEL_OPTIONAL
            one.type = kinds.get(kind.partition(":")[0], field.TYPE_MESSAGE)
            if ":" in kind or kind not in kinds:
                one.type_name = ".t." + kind.partition(":")[2 if ":" in kind else 0]
        return found

    for name, values in {
        "DataType": {"TYPE_INVALID": 0, "TYPE_UINT8": 2, "TYPE_FP32": 11},
        "Kind": {"KIND_AUTO": 0, "KIND_GPU": 1, "KIND_CPU": 2},
        "Action": {"REJECT": 0, "DELAY": 1},
    }.items():
        enum = file.enum_type.add(name=name)
        for label, number in values.items():
            enum.value.add(name=label, number=number)
    tensor = [("name", 1, "str", False), ("data_type", 2, "enum:DataType", False)]
    add("Input", *tensor, ("dims", 4, "int", True))
    add("Output", *tensor, ("dims", 3, "int", True), ("label_filename", 4, "str", False))
    add(
        "Policy",
        ("timeout_action", 1, "enum:Action", False),
        ("default_timeout_microseconds", 2, "int", False),
        ("allow_timeout_override", 3, "bool", False),
        ("max_queue_size", 4, "int", False),
    )
    delay = ("max_queue_delay_microseconds", 2, "int", False)
    add("Batching", delay, ("default_queue_policy", 6, "Policy", False))
    add("Group", ("kind", 4, "enum:Kind", False), ("count", 2, "int", False))
    add("Parameter", ("string_value", 1, "str", False))
    config = add(
        "ModelConfig",
        ("name", 1, "str", False),
        ("max_batch_size", 4, "int", False),
        ("input", 5, "Input", True),
        ("output", 6, "Output", True),
        ("instance_group", 7, "Group", True),
        ("dynamic_batching", 11, "Batching", False),
        ("parameters", 14, "ModelConfig.ParametersEntry", True),
        ("backend", 17, "str", False),
    )
    entry = config.nested_type.add(name="ParametersEntry")
    entry.options.map_entry = True
    entry.field.add(name="key", number=1, type=field.TYPE_STRING, label=field.LABEL_OPTIONAL)
    value = entry.field.add(name="value", number=2, type=field.TYPE_MESSAGE)
    value.label, value.type_name = field.LABEL_OPTIONAL, ".t.Parameter"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("t.ModelConfig"))()


def write(model: Path, out: Path, *more: str) -> Path:
    main_triton(["--model", str(model), "--out", str(out), "--quiet", *more])
    return out


def test_the_repository(tmp_path: Path) -> None:
    model = tiny_onnx.write(tmp_path / "best.onnx", tiny_onnx.card(CLASSES, (8, 12)))
    more = ["--max-batch-size", "16", "--max-delay-us", "500", "--max-queue", "7"]
    more += ["--queue-timeout-ms", "250", "--device", "cpu", "--instances", "2"]
    folder = write(model, tmp_path / "models", *more) / "best"
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert files == ["1/model.onnx", "config.pbtxt", "labels.txt"]
    assert (folder / "1/model.onnx").read_bytes() == model.read_bytes()
    assert (folder / "labels.txt").read_text() == 'red\ngr ee"n\nblü \\ x\n'
    config = text_format.Parse((folder / "config.pbtxt").read_text(), message())
    assert (config.name, config.backend, config.max_batch_size) == ("best", "onnxruntime", 16)
    (image,) = config.input
    assert (image.name, image.data_type, list(image.dims)) == ("images", 2, [8, 12, 3])
    assert [(o.name, o.data_type, list(o.dims), o.label_filename) for o in config.output] == [
        ("logits", 11, [3], ""),
        ("probabilities", 11, [3], "labels.txt"),
    ]
    batching, policy = config.dynamic_batching, config.dynamic_batching.default_queue_policy
    assert (batching.max_queue_delay_microseconds, policy.max_queue_size) == (500, 7)
    assert (policy.default_timeout_microseconds, policy.timeout_action) == (250_000, 0)
    assert policy.allow_timeout_override
    assert [(group.kind, group.count) for group in config.instance_group] == [(2, 2)]
    assert '"size": [8, 12]' in config.parameters["distcls.preprocess"].string_value


def test_an_output_more_for_each_head(tmp_path: Path) -> None:
    targets = Task.of_heads([Head("1", ("a", "b", "")), Head("left side", ("x", "y"))])
    plain = tiny_onnx.card(targets.classes)
    card = dataclasses.replace(plain, task=targets)
    model = with_features(tmp_path / "best.onnx", card)
    folder = write(model, tmp_path / "models") / "best"
    assert (folder / "labels.txt").read_text().splitlines()[2:4] == ["1:", "left side:x"]
    assert (folder / "labels_0.txt").read_text() == "a\nb\n␣\n"
    assert (folder / "labels_1.txt").read_text() == "x\ny\n"
    config = text_format.Parse((folder / "config.pbtxt").read_text(), message())
    assert [(o.name, list(o.dims), o.label_filename) for o in config.output] == [
        ("logits", [5], ""),
        ("probabilities", [5], "labels.txt"),
        ("probabilities:1", [3], "labels_0.txt"),
        ("probabilities:left side", [2], "labels_1.txt"),
        ("features", [3], ""),
    ]
    told = json.loads(config.parameters["distcls.targets"].string_value)
    assert Task.from_json(told) == targets
    copy = OnnxModel(folder / "1/model.onnx")
    assert copy.card == card
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    names = ["probabilities", "probabilities:1", "probabilities:left side"]
    whole, *parts = copy.run(names, images)
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole)
    assert [part.shape for part in parts] == [(3, 3), (3, 2)]


def test_features_name_and_version(tmp_path: Path) -> None:
    model = with_features(tmp_path / "best.int8.onnx")
    folder = write(model, tmp_path / "models", "--name", "colours", "--version", "7") / "colours"
    assert (folder / "7/model.onnx").exists()
    config = text_format.Parse((folder / "config.pbtxt").read_text(), message())
    assert [(o.name, list(o.dims)) for o in config.output][-1] == ("features", [3])
    batching = config.dynamic_batching
    assert batching.max_queue_delay_microseconds == 0  # nobody waits while an instance is free
    assert batching.default_queue_policy.max_queue_size == 1024
    assert batching.default_queue_policy.default_timeout_microseconds == 30_000_000
    write(model, tmp_path / "models")
    assert sorted(path.name for path in (tmp_path / "models").iterdir()) == ["best.int8", "colours"]


def test_a_run_directory(tmp_path: Path) -> None:
    run = tmp_path / "photos"
    run.mkdir()
    (run / "best.pth").write_text("")
    with pytest.raises(
        UsageError, match=r"best\.pth is a checkpoint; distcls export --ckpt .*photos"
    ):
        write(run, tmp_path / "models")
    tiny_onnx.write(run / "best.onnx")
    assert (write(run, tmp_path / "models") / "photos/1/model.onnx").is_file()


def test_refusals(tmp_path: Path) -> None:
    model = tiny_onnx.write(tmp_path / "best.onnx")
    out = write(model, tmp_path / "models")
    before = (out / "best/config.pbtxt").read_text()
    with pytest.raises(UsageError, match="exists already"):
        write(model, out)
    assert (out / "best/config.pbtxt").read_text() == before
    for flags, told in [
        (["--name", "a/b"], "name: 'a/b' is not valid, expected letters, digits"),
        (["--max-batch-size", "0"], "max_batch_size: 0 is not valid"),
        (["--max-queue", "-1"], "max_queue: -1 is not valid, expected 0 to"),
        (["--device", "tpu"], "expected one of auto, cpu, gpu"),
    ]:
        with pytest.raises(UsageError, match=told):
            write(model, tmp_path / "other", *flags)
    with pytest.raises(UsageError, match="no such model file"):
        write(tmp_path / "missing.onnx", tmp_path / "other")
    assert not (tmp_path / "other").exists()

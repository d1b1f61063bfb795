"""Requests of the Open Inference Protocol: what is taken, what is refused and with which words."""

from __future__ import annotations

import base64
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distcls.serving.protocol import (
    InferRequest,
    Interface,
    Refused,
    format_infer,
    parse_infer,
)
from distcls.serving.work import (
    BatchFailed,
    Output,
    Work,
    pack_batch,
    pack_outputs,
    read_batch,
    unpack_outputs,
)
from distcls.task import Task

INTERFACE = Interface(
    name="m", version="3", size=(2, 2), task=Task(classes=("a", "b", "c")), features=4, most=8
)
PIXELS = list(range(12))
TENSOR = {"name": "images", "datatype": "UINT8", "shape": [1, 2, 2, 3], "data": PIXELS}
FILES = {"name": "images", "datatype": "BYTES", "shape": [1], "data": ["aGVsbG8="]}


def parse(values: Any, *blobs: bytes) -> InferRequest:
    text = json.dumps(values).encode()
    length = str(len(text)) if blobs else None
    return parse_infer(b"".join((text, *blobs)), length, INTERFACE)


def tensor(**changes: Any) -> dict[str, Any]:
    return {"inputs": [{**TENSOR, **changes}]}


def without(values: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name != key}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([], "a list"),
        ({}, "inputs is missing"),
        ({"inputs": {}}, "an object"),
        ({"inputs": [TENSOR, TENSOR]}, "2 of them"),
        (tensor(name="image"), "'image' is unknown"),
        (tensor(datatype="FP32"), "FP32"),
        (tensor(datatype=None), "None"),
        (tensor(shape=[1, 2, 3, 2]), "[N, 2, 2, 3]"),
        (tensor(shape=[0, 2, 2, 3]), "0 images"),
        (tensor(shape=[9, 2, 2, 3]), "1 to 8"),
        (tensor(shape=[-1, 2, 2, 3]), "whole numbers"),
        (tensor(shape=[True, 2, 2, 3]), "whole numbers"),
        (tensor(shape=[1.0, 2, 2, 3]), "whole numbers"),
        (tensor(shape="1,2,2,3"), "whole numbers"),
        (tensor(shape=[2**70, 2, 2, 3]), "whole numbers"),
        (tensor(data=[300, *PIXELS[1:]]), "300"),
        (tensor(data=[-1, *PIXELS[1:]]), "-1"),
        (tensor(data=[1.5, *PIXELS[1:]]), "1.5"),
        (tensor(data=[True, *PIXELS[1:]]), "True"),
        (tensor(data=[None, *PIXELS[1:]]), "None"),
        (tensor(data=["1", *PIXELS[1:]]), "'1'"),
        (tensor(data=[10**30, *PIXELS[1:]]), "0 to 255"),
        (tensor(data=PIXELS[1:]), "11 values"),
        (tensor(data=[[PIXELS]]), "lengths"),
        (tensor(data=[[[PIXELS[:3], PIXELS[3:6]], [PIXELS[6:9], 1]]]), "nesting"),
        (tensor(data=5), "a number"),
        ({"inputs": [without(TENSOR, "data")]}, "either data or"),
        (tensor(parameters={"binary_data_size": 12}), "either data or"),
        (tensor(parameters=[]), "a list"),
        (tensor(parameters={"shared_memory_region": "x"}), "shared memory"),
        ({"inputs": [{**FILES, "data": ["*"]}]}, "base64"),
        ({"inputs": [{**FILES, "data": [5]}]}, "a number"),
        ({"inputs": [{**FILES, "shape": [1, 2]}]}, "[N] or [N, 1]"),
        ({**tensor(), "id": 5}, "id"),
        ({**tensor(), "parameters": {"timeout": "1"}}, "microseconds"),
        ({**tensor(), "parameters": {"timeout": -1}}, "microseconds"),
        ({**tensor(), "parameters": {"on_error": "hide"}}, "fail or skip"),
        ({**tensor(), "parameters": {"binary_data_output": 1}}, "true or false"),
        ({**tensor(), "parameters": {"triton_x": 1}}, "reserved"),
        ({**tensor(), "parameters": {"a": []}}, "plain value"),
        ({**tensor(), "parameters": {"sequence_id": 3}}, "no state"),
        ({**tensor(), "outputs": [{"name": "logit"}]}, "did you mean 'logits'"),
        ({**tensor(), "outputs": [{}]}, "None is unknown"),
        ({**tensor(), "outputs": [5]}, "list of objects"),
        (
            {**tensor(), "outputs": [{"name": "logits", "parameters": {"classification": -1}}]},
            "classification",
        ),
        (
            {**tensor(), "outputs": [{"name": "features", "parameters": {"classification": 1}}]},
            "no classes",
        ),
    ],
)
def test_what_is_refused(values: Any, words: str) -> None:
    with pytest.raises(Refused) as caught:
        parse(values)
    assert caught.value.status == 400
    assert words in caught.value.message
    assert len(caught.value.message) < 500


@pytest.mark.parametrize(
    ("given", "blob", "words"),
    [
        ({"datatype": "UINT8", "shape": [1, 2, 2, 3], "size": 11}, bytes(11), "expected 12"),
        ({"datatype": "UINT8", "shape": [1, 2, 2, 3], "size": 12}, bytes(13), "13 bytes follow"),
        ({"datatype": "UINT8", "shape": [1, 2, 2, 3], "size": True}, bytes(12), "True"),
        ({"datatype": "BYTES", "shape": [1], "size": 3}, b"\1\0\0", "cut off"),
        ({"datatype": "BYTES", "shape": [1], "size": 6}, b"\3\0\0\0ab", "2 are left"),
        ({"datatype": "BYTES", "shape": [2], "size": 5}, b"\1\0\0\0a", "1 elements"),
    ],
)
def test_binary_data_have_exact_lengths(given: dict[str, Any], blob: bytes, words: str) -> None:
    size = given.pop("size")
    values = {"name": "images", **given, "parameters": {"binary_data_size": size}}
    with pytest.raises(Refused, match=words):
        parse({"inputs": [values]}, blob)


def test_all_ways_to_send_an_image_are_the_same() -> None:
    flat = parse({"inputs": [TENSOR]})
    nested = parse(tensor(data=np.array(PIXELS).reshape(1, 2, 2, 3).tolist()))
    head = {**without(TENSOR, "data"), "parameters": {"binary_data_size": 12}}
    binary = parse({"inputs": [head]}, bytes(PIXELS))
    raw = parse_infer(bytes(PIXELS), "0", INTERFACE)
    for request in (flat, nested, binary, raw):
        assert [(bytes(work.data), work.pixels) for work in request.works] == [
            (bytes(PIXELS), True)
        ]
    assert parse_infer(b"\xff\xd8\xff" + bytes(9), "0", INTERFACE).works[0].pixels is False
    text = base64.b64encode(b"file").decode()
    files = parse({"inputs": [{**FILES, "data": [[text], [text]], "shape": [2, 1]}]})
    assert [(bytes(work.data), work.pixels) for work in files.works] == [(b"file", False)] * 2


def test_unknown_keys_and_repeated_outputs_pass() -> None:
    outputs = [{"name": "logits"}, {"name": "logits"}, {"name": "features"}]
    request = parse({**tensor(), "model_name": "m", "outputs": outputs})
    assert [wanted.name for wanted in request.outputs] == ["logits", "features"]
    assert request.works[0].features
    assert parse(tensor()).outputs[0].name == "logits"
    assert parse({**tensor(), "parameters": {"timeout": 2_000_000}}).timeout == 2


JSONS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)
KEYS = ("name", "shape", "datatype", "data", "parameters")


@given(st.data())
def test_any_change_is_refused_or_harmless(data: st.DataObject) -> None:
    values = {"inputs": [dict(TENSOR if data.draw(st.booleans()) else FILES)], "outputs": []}
    where = data.draw(st.sampled_from((*KEYS, "inputs", "outputs", "parameters", "id")))
    if where in KEYS and data.draw(st.booleans()):
        values["inputs"][0][where] = data.draw(JSONS)
    else:
        values[where] = data.draw(JSONS)
    text = json.dumps(values).encode()
    length = data.draw(st.none() | st.just(str(len(text))) | st.text(max_size=4))
    body = text + data.draw(st.binary(max_size=4))
    try:
        found: InferRequest | Refused = parse_infer(body, length, INTERFACE)
    except Refused as refused:
        found = refused
    if isinstance(found, Refused):
        assert found.status in (400, 413)
        assert "\n" not in found.message
    else:
        assert 1 <= len(found.works) <= 8


def test_answers_say_a_bad_image_or_leave_it_out() -> None:
    good = Output(np.array([1, 2, 3], np.float32))
    bad = Output(np.full(3, np.nan, np.float32), error="no image")
    request = parse(
        {"inputs": [{**FILES, "shape": [2], "data": ["", ""]}], "outputs": [{"name": "logits"}]}
    )
    with pytest.raises(Refused, match="image 1: no image"):
        format_infer(request, [good, bad], INTERFACE)
    broken = Output(good.logits, error="not finite", fault="model")
    with pytest.raises(Refused) as caught:
        format_infer(request, [broken], INTERFACE)
    assert caught.value.status == 500
    values, length = format_infer(request, [good, good], INTERFACE)
    assert (json.loads(values)["model_version"], length) == ("3", None)


def test_batches_and_outputs_survive_the_pipe() -> None:
    batch = [Work(b"abc"), Work(bytes(12), pixels=True, keep_input=True, features=True)]
    stream = b"".join(pack_batch(batch))
    position = 0

    def read(size: int) -> bytes:
        nonlocal position
        part = stream[position : position + size]
        if len(part) < size:
            raise EOFError
        position += size
        return part

    assert read_batch(read) == batch
    assert read_batch(read) is None
    outputs = [
        Output(np.full(3, np.nan, np.float32), error="é", fault="image", decode_s=0.5, batch=2),
        Output(np.ones(3, np.float32), features=np.ones(4, np.float32), input=b"xy", batch=2),
    ]
    head, text, *arrays = pack_outputs(outputs)
    assert len(head) == 8
    found = unpack_outputs(json.loads(text), b"".join(arrays), 2)
    assert [each.error for each in found] == ["é", None]
    assert np.array_equal(found[1].logits, outputs[1].logits)
    assert np.array_equal(found[1].features, outputs[1].features)
    assert (found[0].input, found[1].input, found[0].decode_s) == (None, b"xy", 0.5)
    with pytest.raises(ValueError, match="2 answers to 3"):
        unpack_outputs(json.loads(text), b"".join(arrays), 3)
    with pytest.raises(BatchFailed, match="why"):
        unpack_outputs({"failed": "why"}, b"", 1)

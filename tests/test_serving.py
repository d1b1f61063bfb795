"""`distcls serve` over real HTTP: the right answers, and refusals that say why."""

from __future__ import annotations

import base64
import contextlib
import csv
import dataclasses
import gzip
import http.client
import io
import json
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import distcls
from distcls.commands.predict import main as predict
from distcls.explanation.explain import explain_pixels, overlay
from distcls.imaging import decode
from distcls.runtime.model import OnnxModel
from distcls.serving.app import make_app
from distcls.serving.header import pixels_of
from distcls.serving.openapi import document
from distcls.serving.options import ServeOptions
from distcls.system import available_cores
from tests.e2e.commands import ROOT
from tests.pictures import encode, smooth
from tests.serving import EXPORTED, PHOTO, WHOLE, Server, encoded, form, infer, serving, together

FILES = {
    "wide.jpg": PHOTO,
    "grey.png": encode(Image.fromarray(smooth(31, 17, 2)).convert("L"), "PNG"),
    "clear.png": encode(Image.fromarray(smooth(20, 20, 3)).convert("RGBA"), "PNG"),
    "small.webp": encode(smooth(28, 28, 4), "WEBP"),
    "broken.jpg": PHOTO[: len(PHOTO) // 2],
    "text.jpg": b"no image at all",
    "dot.png": encode(np.full((1, 1, 3), 200, np.uint8), "PNG"),
}
INFER = "/v2/models/best/infer"


@pytest.fixture(scope="module", params=["whole", "run_heads", "run_labels"])
def each(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A server of each task, and its model."""
    path = EXPORTED / str(request.param) / "best.onnx"
    with serving(tmp_path_factory.mktemp("serve"), model=path) as server:
        yield server, path


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("serve"), "--access-log") as server:
        yield server


def rows_of_predict(path: Path, folder: Path) -> dict[str, dict[str, str]]:
    """The rows of `distcls predict` for FILES, by name."""
    images = folder / "images"
    images.mkdir()
    for name, data in FILES.items():
        (images / name).write_bytes(data)
    out = folder / "pre.csv"
    call = ["--model", str(path), str(images), "--out", str(out), "--probabilities"]
    predict([*call, "--provider", "cpu", "--max-bad", "1", "--quiet"])
    with out.open(encoding="utf-8", newline="") as file:
        return {row["image_id"]: row for row in csv.DictReader(file)}


def test_predict_answers_as_the_command_does(each: Any, tmp_path: Path) -> None:
    server, path = each
    rows = rows_of_predict(path, tmp_path)
    body, headers = form(list(FILES.items()))
    answer = server.post("/predict?probabilities=true", body, headers=headers)
    assert answer.status == 200, answer
    assert answer.json["model"] == "best"
    found = {each["name"]: each for each in answer.json["predictions"]}
    assert list(found) == list(FILES)
    for name, row in rows.items():
        prediction = found[name]
        assert (prediction["error"] or "") == row["error"]
        if row["error"]:
            assert prediction["label"] is None
            continue
        assert prediction["label"] == row["label"]
        assert prediction["probability"] == float(row["probability"])
        own = {f"p:{key}": value for key, value in prediction["probabilities"].items()}
        assert own == {key: float(row[key]) for key in row if key.startswith("p:")}
        for head, of_head in prediction["heads"].items():
            assert of_head["label"] == row[f"label:{head}"]
            assert of_head["probability"] == float(row[f"probability:{head}"])
    assert sum(prediction["error"] is not None for prediction in found.values()) == 2


def test_infer_gives_the_models_own_numbers(each: Any) -> None:
    server, path = each
    model = OnnxModel(path)
    good = [data for name, data in FILES.items() if name not in ("broken.jpg", "text.jpg")]
    preprocess = model.card.preprocess
    images = np.stack([preprocess(decode(d, background=preprocess.background)) for d in good])
    logits = model.logits(images)
    expected = {"logits": logits, "probabilities": model.card.task.probabilities(logits)}
    given = {"name": "images", "datatype": "UINT8", "shape": list(images.shape)}
    wanted = [{"name": "logits"}, {"name": "probabilities", "parameters": {"binary_data": True}}]
    binary = {**given, "parameters": {"binary_data_size": images.nbytes}}
    body, headers = infer({"id": "7", "inputs": [binary], "outputs": wanted}, images.tobytes())
    of_tensors = server.post(INFER, body, headers=headers)
    body, headers = encoded(good, outputs=wanted)
    of_files = server.post(INFER, body, headers=headers)
    nested = {"inputs": [{**given, "data": images.tolist()}], "outputs": wanted}
    texts = [base64.b64encode(data).decode() for data in good]
    in_json = {"name": "images", "datatype": "BYTES", "shape": [len(good), 1], "data": texts}
    answers = [of_tensors, of_files, server.post(INFER, nested)]
    answers.append(server.post(INFER, {"inputs": [in_json], "outputs": wanted}))
    for answer in answers:
        assert answer.status == 200, answer
        length = int(answer.headers["inference-header-content-length"])
        values = json.loads(answer.body[:length])
        assert [each["name"] for each in values["outputs"]] == ["logits", "probabilities"]
        assert (values["model_name"], values["model_version"]) == ("best", "1")
        first = np.array(values["outputs"][0]["data"], np.float32)
        assert np.array_equal(first, expected["logits"].ravel())
        second = np.frombuffer(answer.body[length:], np.float32)
        assert np.array_equal(second, expected["probabilities"].ravel())
    length = int(of_tensors.headers["inference-header-content-length"])
    assert json.loads(of_tensors.body[:length])["id"] == "7"


def test_heads_are_outputs_of_their_own(tmp_path: Path) -> None:
    with serving(tmp_path, model=EXPORTED / "run_heads" / "best.onnx") as server:
        metadata = server.get("/v2/models/best").json
        names = [each["name"] for each in metadata["outputs"]]
        heads = [name for name in names if name.startswith("probabilities:")]
        assert len(heads) > 1
        wanted = [{"name": name, "parameters": {"classification": 1}} for name in heads]
        body, headers = encoded([PHOTO], outputs=wanted)
        answer = server.post(INFER, body, headers=headers).json
        row = server.post("/predict", PHOTO).json["predictions"][0]
        for output, of_head in zip(answer["outputs"], row["heads"].values(), strict=True):
            value, _, label = output["data"][0].split(":")
            assert (output["datatype"], output["shape"]) == ("BYTES", [1, 1])
            assert label == of_head["label"]
            assert float(value) == pytest.approx(of_head["probability"], abs=1e-6)


def test_classification_names_the_likeliest(server: Server) -> None:
    wanted = [{"name": "probabilities", "parameters": {"classification": 3}}]
    body, headers = encoded([PHOTO, PHOTO], outputs=wanted)
    [output] = server.post(INFER, body, headers=headers).json["outputs"]
    assert output["shape"] == [2, 3]
    top = server.post("/predict?top_k=3", PHOTO).json["predictions"][0]["top_k"]
    for text, each in zip(output["data"][:3], top, strict=True):
        value, _, label = text.split(":")
        assert label == each["label"]
        assert float(value) == pytest.approx(each["probability"], abs=1e-6)


def test_one_bad_image_refuses_a_request_and_is_named(server: Server) -> None:
    images = [PHOTO, b"no image", PHOTO]
    answer = server.post(INFER, encoded(images)[0], headers=encoded(images)[1])
    assert answer.status == 400
    assert answer.error.startswith("image 1: ")


def test_bad_images_can_be_skipped(server: Server) -> None:
    images, more = [PHOTO, b"no image", PHOTO], {"parameters": {"on_error": "skip"}}
    body, headers = encoded(images, outputs=[{"name": "logits"}], **more)
    logits, errors = server.post(INFER, body, headers=headers).json["outputs"]
    assert errors["name"] == "errors"
    assert [bool(text) for text in errors["data"]] == [False, True, False]
    rows = np.array(logits["data"], object).reshape(3, -1)
    assert all(value is None for value in rows[1])
    assert list(rows[0]) == list(rows[2])
    assert all(isinstance(value, float) for value in rows[0])


@pytest.mark.parametrize("packed", ["gzip", "deflate"])
def test_compression_both_ways(server: Server, packed: str) -> None:
    body, headers = encoded([PHOTO] * 8, outputs=[{"name": "logits"}])
    plain = server.post(INFER, body, headers=headers)
    squeezed = gzip.compress(body) if packed == "gzip" else zlib.compress(body)
    headers = {**headers, "Content-Encoding": packed, "Accept-Encoding": packed}
    answer = server.post(INFER, squeezed, headers=headers)
    assert answer.headers["content-encoding"] == packed
    unpacked = gzip.decompress(answer.body) if packed == "gzip" else zlib.decompress(answer.body)
    assert unpacked == plain.body
    refused = server.post(INFER, b"{}", headers={"Accept-Encoding": packed})
    assert "content-encoding" not in refused.headers


def test_the_input_is_shown_as_the_network_sees_it(server: Server) -> None:
    answer = server.post("/predict?input=true", FILES["wide.jpg"]).json["predictions"][0]
    head, _, text = answer["input"].partition(",")
    assert head == "data:image/png;base64"
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))
    assert np.array_equal(shown, OnnxModel(WHOLE).card.preprocess(decode(FILES["wide.jpg"])))


@pytest.mark.parametrize(
    ("sent", "status", "words"),
    [
        (("/predict", b"", {}), 400, "empty"),
        (("/predict", b"no image", {"Content-Type": "image/jpeg"}), 400, "format"),
        (("/predict?top_k=none", PHOTO, {}), 400, "top_k"),
        (("/predict?input=perhaps", PHOTO, {}), 400, "input"),
        (("/predict?model=nope", PHOTO, {}), 404, "best"),
        (("/predict?model=", PHOTO, {}), 400, "empty"),
        (("/predict?topk=3", PHOTO, {}), 400, "did you mean 'top_k'"),
        (("/predict?version=7", PHOTO, {}), 404, "version"),
        (
            ("/predict", b"file=1", {"Content-Type": "application/x-www-form-urlencoded"}),
            415,
            "curl",
        ),
        (("/predict", b"x", {"Content-Type": "multipart/form-data"}), 400, "form"),
        (("/predict", form([])[0], form([])[1]), 400, "form"),
        (("/predict", *form([("a", b"")])), 400, "empty"),
        (("/predict", *form([("a", PHOTO)] * 65)), 400, "at most 64"),
        (("/predict", PHOTO, {"Content-Encoding": "br"}), 415, "br"),
        (("/predict", PHOTO, {"Content-Encoding": "gzip"}), 400, "gzip"),
        (("/predict", gzip.compress(bytes(90 << 20)), {"Content-Encoding": "gzip"}), 413, "than"),
        (("/predict", gzip.compress(PHOTO)[:-9], {"Content-Encoding": "gzip"}), 400, "cut"),
        ((INFER, b"[" * 200_000, {}), 400, "JSON"),
        ((INFER, b"\xff\xfe", {}), 400, "JSON"),
        ((INFER, b"{}", {"Inference-Header-Content-Length": "-1"}), 400, "-1"),
        ((INFER, b"{}", {"Inference-Header-Content-Length": "3"}), 400, "0 to 2"),
        (("/v2/models/nope/infer", b"{}", {}), 404, "nope"),
        (("/v2/models/best/versions/9/infer", b"{}", {}), 404, "9"),
        (("/v2/repository/models/best/unload", b"{}", {}), 403, "--control"),
        (("/v2/systemsharedmemory/region/x/register", b"{}", {}), 501, "not supported"),
        (("/nothing", b"", {}), 404, "/docs"),
        (("/card", b"", {}), 405, "GET"),
    ],
)
def test_refusals_say_why(
    server: Server, sent: tuple[str, bytes, dict[str, str]], status: int, words: str
) -> None:
    path, body, headers = sent
    answer = server.post(path, body, headers=headers)
    assert (answer.status, words in answer.error) == (status, True), answer
    assert "\n" not in answer.error
    assert server.get("/v2/health/ready").status == 200


def test_what_a_model_is(server: Server) -> None:
    card = server.get("/card").json
    assert card["classes"] == [str(digit) for digit in range(10)]
    assert card["sha256"] == OnnxModel(WHOLE).sha256
    assert card["limits"] == {"images": 64, "body_bytes": 32 << 20, "explain": False}
    for path in (
        "/v2",
        "/v2/",
        "/v2/models",
        "/v2/models/best",
        "/v2/models/best/versions/1/config",
    ):
        assert server.get(path).status == 200
    assert server.get("/v2/health/live").json == {"live": True}
    assert server.post("/v2/repository/index").json[0]["state"] == "READY"
    assert server.get("/v2/models/b%65st/ready").json["ready"] is True


def test_statistics_and_metrics_count(server: Server) -> None:
    def counts() -> tuple[int, int, float]:
        [stats] = server.get("/v2/models/best/stats").json["model_stats"]
        page = server.get("/metrics").body.decode()
        [line] = [each for each in page.splitlines() if each.startswith("nv_inference_count{")]
        return (
            stats["inference_stats"]["success"]["count"],
            stats["inference_count"],
            float(line.split()[-1]),
        )

    before = counts()
    body, headers = form([("a", PHOTO)] * 3)
    server.post("/predict", body, headers=headers)
    server.post("/predict", b"no image")
    after = counts()
    assert (after[0] - before[0], after[1] - before[1], after[2] - before[2]) == (1, 3, 3.0)
    page = server.get("/metrics").body.decode()
    assert 'distcls_model_info{model="best"' in page
    assert 'stage="decode"' in page


def test_the_log_of_requests_is_json(server: Server) -> None:
    server.post("/predict", PHOTO, headers={"X-Request-Id": "my-own-id"})
    answer = server.post("/predict", PHOTO, headers={"X-Request-Id": "with blank"})
    assert answer.headers["x-request-id"] != "with blank"
    end = time.monotonic() + 5
    while answer.headers["x-request-id"] not in server.out:  # a thread writes it
        assert time.monotonic() < end
    entries = [json.loads(line) for line in server.out.splitlines()]
    [entry] = [each for each in entries if each["id"] == "my-own-id"]
    assert (entry["path"], entry["status"], entry["images"]) == ("/predict", 200, 1)
    assert {"queue_ms", "decode_ms", "infer_ms", "total_ms"} <= entry.keys()


def test_many_at_once_are_answered_each_with_its_own(server: Server, tmp_path: Path) -> None:
    rows = rows_of_predict(WHOLE, tmp_path)
    names = list(FILES)

    def ask(index: int) -> None:
        for step in range(12):
            name = names[(index + step) % len(names)]
            answer = server.post("/predict", FILES[name])
            if rows[name]["error"]:
                assert (answer.status, answer.error) == (400, rows[name]["error"])
            else:
                [found] = answer.json["predictions"]
                assert found["probability"] == float(rows[name]["probability"])

    assert together(16, ask) == [None] * 16


def test_the_reference_names_every_route() -> None:
    app = make_app(WHOLE)
    documented = [
        (path.format(model="m", version="1"), method.upper())
        for path, methods in document(app.options, False, [], [])["paths"].items()
        for method in methods
    ]
    left_out = (app.no_setting, app.page, app.openapi, app.docs, app.setting, app.regions)
    for pattern, route, handlers in app._routes:
        for method, handler in handlers.items():
            found = any(pattern.fullmatch(path) and method == each for path, each in documented)
            assert found or handler in left_out, f"{method} {route}"
    for path, method in documented:
        assert any(method in handlers for _, handlers, _ in app._matching(path)), path


def test_what_a_prediction_rests_on(tmp_path: Path) -> None:
    """The map is that of `distcls.explain`, to the last pixel."""
    with serving(tmp_path, "--explain") as server:
        answer = server.post("/predict?explain=true", PHOTO, headers={"Content-Type": "image/jpeg"})
        [row] = answer.json["predictions"]
        data = base64.b64decode(row["explanation"].removeprefix("data:image/png;base64,"))
        found = np.asarray(Image.open(io.BytesIO(data)))
        with distcls.load(WHOLE) as predictor:
            pixels = predictor.card.preprocess(decode(PHOTO))
            own = explain_pixels(predictor.model, pixels)
        assert (row["label"], "input" in row) == (own.label, False)
        assert np.array_equal(found, overlay(pixels, own.heat))
        assert own.heat.max() == 1
        body, headers = form([("a", PHOTO), ("b", PHOTO)])
        two = server.post("/predict?explain=true", body, headers=headers)
        assert (two.status, two.error) == (400, "explain: is for a single image")
        bad = server.post("/predict?explain=true", b"hello")
        assert bad.status == 400
        assert server.get("/card").json["limits"]["explain"]


def test_explanations_are_not_for_everybody(server: Server) -> None:
    answer = server.post("/predict?explain=true", PHOTO)
    assert (answer.status, "--explain allows them" in answer.error) == (403, True)


def test_a_token_is_wanted_but_by_probes(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("secret\n", encoding="utf-8")
    with serving(tmp_path, "--token-file", tmp_path / "token") as server:
        assert "$TOKEN" in server.said
        assert "secret" not in server.said
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic secret"}):
            answer = server.post("/predict", PHOTO, headers=headers)
            assert answer.status == 401
            assert answer.headers["www-authenticate"] == "Bearer"
        assert server.get("/metrics").status == 401
        assert server.get("/v2/health/ready").status == 200
        assert server.get("/").status == 200
        assert server.get("/docs").status == 200
        # models are not named to everybody
        assert b'"best"' not in server.get("/openapi.json").body
        right = {"Authorization": "Bearer secret"}
        assert server.post("/predict", PHOTO, headers=right).status == 200
        (tmp_path / "token").write_text("rotated\n", encoding="utf-8")
        server.process.send_signal(signal.SIGHUP)
        end = time.monotonic() + 10
        rotated = {"Authorization": "Bearer rotated"}
        while server.post("/predict", PHOTO, headers=rotated).status != 200:
            assert time.monotonic() < end
        assert server.post("/predict", PHOTO, headers=right).status == 401


def test_pages_elsewhere_only_by_their_origin(tmp_path: Path) -> None:
    origin = "https://shop.example"
    options = ("--cors", origin, "--base-path", "/vision")
    with serving(tmp_path, *options) as server:
        assert server.post("/predict", PHOTO).status == 404
        answer = server.post("/vision/predict", PHOTO, headers={"Origin": origin})
        assert answer.headers["access-control-allow-origin"] == origin
        assert "retry-after" in answer.headers["access-control-expose-headers"]
        asked = server.request("OPTIONS", "/vision/predict", headers={"Origin": origin})
        assert asked.status == 204
        assert "POST" in asked.headers["access-control-allow-methods"]
        other = server.post("/vision/predict", PHOTO, headers={"Origin": "https://evil.example"})
        assert "access-control-allow-origin" not in other.headers
        assert server.get("/vision/").status == 200
        assert server.get("/vision").headers["location"] == "/vision/"


def call(*arguments: object) -> subprocess.CompletedProcess[str]:
    call = [sys.executable, "-m", "distcls", "serve"]
    words = [*call, *(["--port", "0"] * ("--port" not in arguments)), *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, cwd=ROOT, check=False, timeout=60)


def test_an_empty_token_is_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTCLS_TOKEN", "")
    done = call("--model", WHOLE, "--check")
    assert (done.returncode, "DISTCLS_TOKEN is set and empty" in done.stderr) == (2, True)


def test_a_port_that_is_taken_is_refused(server: Server) -> None:
    done = call("--model", WHOLE, "--port", server.port)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith(f"error: port: {server.port}")


def test_check_says_what_would_be_served(tmp_path: Path) -> None:
    done = call("--model", WHOLE, "--check", "--json", "--provider", "cpu", "--quiet")
    assert done.returncode == 0, done.stderr
    [model] = json.loads(done.stdout)["models"]
    assert (model["name"], model["input"]) == ("best", [28, 28])
    assert model["workers"] == available_cores()
    assert model["memory_mb"] > 10


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), "--model"),
        (("--model", "nope.onnx"), "nope.onnx"),
        (("--model", "README.md"), "not an ONNX file"),
        (("--model", WHOLE, "--models", "."), "not both"),
        (("--models", "docs"), "holds no model"),
        (("--model", WHOLE, "--port", "70000"), "port"),
        (("--model", WHOLE, "--host", "no host"), "host"),
        (("--model", WHOLE, "--tls-cert", "x"), "--tls-key"),
        (("--model", WHOLE, "--tls-cert", "README.md", "--tls-key", "README.md"), "no pair"),
        (("--model", WHOLE, "--token-file", "nope"), "token_file"),
        (("--model", WHOLE, "--token-file", "/dev/null"), "token_file"),
        (("--model", WHOLE, "--provider", "nope"), "provider"),
        (("--model", WHOLE, "--cors", "*"), "cors"),
        (("--model", WHOLE, "--name", "a/b"), "name"),
        (("--model", WHOLE, "--max-wait", "0"), "max_wait"),
    ],
)
def test_a_wrong_command_ends_in_one_line(options: tuple[object, ...], words: str) -> None:
    done = call(*options, "--check")
    last = done.stderr.strip().splitlines()[-1]
    assert (done.returncode, words in last) == (2, True), done.stderr
    assert last.startswith("error: ")
    assert "Traceback" not in done.stderr


def test_limits_have_the_defaults_that_they_state() -> None:
    options = ServeOptions(model=WHOLE)
    assert (options.host, options.port, options.max_body, options.max_images) == (
        *("127.0.0.1", 8000),
        *(32, 64),
    )


def test_a_folder_of_models_with_versions_is_a_repository(tmp_path: Path) -> None:
    folder = tmp_path / "models"
    for place in ("digits/1/model.onnx", "digits/12/model.onnx", "digits/9/model.onnx"):
        (folder / place).parent.mkdir(parents=True)
        shutil.copy(WHOLE, folder / place)
    shutil.copy(EXPORTED / "run_heads" / "best.onnx", folder / "captchas.onnx")
    (folder / "notes.txt").write_text("none of ours", encoding="utf-8")
    with serving(tmp_path, "--models", folder, "--control", model=None) as server:
        assert server.get("/v2/models").json["models"] == ["captchas", "digits"]
        assert server.get("/v2/models/digits").json["versions"] == ["12"]
        assert server.get("/card").json["model"] == "captchas"
        assert server.post("/predict?model=digits", PHOTO).json["version"] == "12"
        assert server.get("/v2/models/digits/versions/9").status == 404

        assert server.post("/v2/repository/models/digits/unload").status == 200
        assert server.post("/predict?model=digits", PHOTO).status == 404
        assert server.get("/v2/health/ready").status == 200  # it is not wanted
        entries = {entry["name"]: entry for entry in server.post("/v2/repository/index").json}
        assert entries["digits"]["state"] == "UNAVAILABLE"
        (folder / "digits" / "13").mkdir()
        shutil.copy(WHOLE, folder / "digits" / "13" / "model.onnx")
        assert server.post("/v2/repository/models/digits/load").status == 200
        assert server.post("/predict?model=digits", PHOTO).json["version"] == "13"
        assert server.post("/v2/repository/models/nope/load").status == 404
        remote = {"parameters": {"config": "{}"}}
        assert server.post("/v2/repository/models/digits/load", remote).status == 400


def test_a_bad_model_that_a_client_loads_is_refused_with_its_reason(tmp_path: Path) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    shutil.copy(WHOLE, folder / "good.onnx")
    with serving(tmp_path, "--models", folder, "--control", model=None) as server:
        (folder / "bad.onnx").write_bytes(WHOLE.read_bytes()[:1000])
        answer = server.post("/v2/repository/models/bad/load")
        assert (answer.status, "not an ONNX file" in answer.error) == (400, True)
        assert server.post("/predict?model=bad", PHOTO).status == 503
        assert server.post("/predict", PHOTO).json["model"] == "good"
        assert server.get("/v2/health/ready").status == 200


def test_the_front_loads_no_decoder_and_no_runtime() -> None:
    program = (
        "import sys, distcls.serving.server\n"
        "heavy = {'cv2', 'onnxruntime', 'PIL', 'torch', 'pyarrow', 'yaml'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


def test_threads_give_the_same_answers(server: Server, tmp_path: Path) -> None:
    with serving(tmp_path, "--engine", "threads") as local:
        for data in FILES.values():
            ours, theirs = local.post("/predict", data), server.post("/predict", data)
            assert ours.status == theirs.status
            if ours.status == 200:
                pair = [each.json["predictions"][0] for each in (ours, theirs)]
                assert pair[0]["top_k"] == pair[1]["top_k"]
        assert local.processes() == []


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
def test_https_with_a_certificate(tmp_path: Path) -> None:
    key, cert = tmp_path / "key.pem", tmp_path / "cert.pem"
    call = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", str(key)]
    call += ["-out", str(cert), "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run(call, check=True, capture_output=True)
    with serving(tmp_path, "--tls-cert", cert, "--tls-key", key) as server:
        context = ssl.create_default_context(cafile=str(cert))
        connection = http.client.HTTPSConnection("127.0.0.1", server.port, context=context)
        connection.request("POST", "/predict", PHOTO)
        assert connection.getresponse().status == 200
        connection.close()
        assert b"HTTP/1.1 200" not in server.raw(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")


def test_nobody_has_to_read_the_log_of_requests(tmp_path: Path) -> None:
    """A pipe that is full stops no request; what could not be written is counted."""
    call = [sys.executable, "-m", "distcls", "serve", "--model", str(WHOLE), "--port", "0"]
    said = tmp_path / "said.txt"
    with said.open("wb") as stderr:
        process = subprocess.Popen(
            [*call, "--provider", "cpu", "--access-log"],
            stdout=subprocess.PIPE,
            stderr=stderr,
            cwd=ROOT,
        )
    try:
        server = Server(process, said, 60)
        for _ in range(400):  # some 160 kB of lines; a pipe holds 64
            assert server.get("/v2/health/live").status == 200
        assert server.stop() == 0
        assert re.search(r"access log: [\d,]+ lines could not be written", server.said)
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(ServeOptions)])
def test_every_option_is_read(field: str) -> None:
    folder = ROOT / "distcls"
    files = [path for path in (folder / "serving").glob("*.py") if path.name != "options.py"]
    files.append(folder / "commands" / "serve.py")
    read = [path.name for path in files if re.search(rf"\b\w+\.{field}\b", path.read_text())]
    own = (folder / "serving" / "options.py").read_text()
    assert read or f'"{field}": self.{field}' in own


def test_lists_and_json_of_millions_are_refused_before_they_are_made(server: Server) -> None:
    """8 million empty elements, and two million lists: seconds and gigabytes once."""
    blob = bytes(30 << 20)
    given = {"name": "images", "datatype": "BYTES", "shape": [1]}
    body, headers = infer(
        {"inputs": [{**given, "parameters": {"binary_data_size": len(blob)}}]}, blob
    )
    began = time.monotonic()
    answer = server.post(INFER, body, headers=headers)
    assert (answer.status, "more elements" in answer.error) == (400, True)
    for text in (b"[" + b"[]," * 2_000_000 + b"[]]", b'{"a":' + b'{"b":1},' * 1_500_000):
        answer = server.post(INFER, text)
        assert (answer.status, "values" in answer.error) == (413, True)
    assert server.post("/v2/repository/index", b"[" + b"1," * 2_000_000).status == 413
    assert time.monotonic() - began < 5


def test_a_request_of_too_many_pixels_is_refused(server: Server) -> None:
    large = encode(np.zeros((9000, 9000), np.uint8), "PNG")
    body, headers = form([(str(place), large) for place in range(3)])
    answer = server.post("/predict", body, headers=headers)
    assert (answer.status, "243 megapixels in 3 images" in answer.error) == (413, True)
    assert server.post("/predict", large).status == 200


@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "BMP", "WEBP"])
def test_the_size_of_an_image_from_its_header(format: str) -> None:
    data = encode(smooth(37, 61, 3), format)
    assert pixels_of(data) == pixels_of(memoryview(data)) == 37 * 61
    if format == "WEBP":
        assert pixels_of(encode(smooth(37, 61, 3), "WEBP", lossless=True)) == 37 * 61
    for cut in range(1, 60):  # nothing else than a number comes of any beginning
        assert pixels_of(data[:cut]) >= 0


def test_a_name_that_is_no_url_is_left_out_and_the_others_are_served(tmp_path: Path) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    for name in ("good.onnx", "two words.onnx", ".hidden.onnx"):
        shutil.copy(WHOLE, folder / name)
    with serving(tmp_path, "--models", folder, model=None) as server:
        assert server.get("/v2/models").json["models"] == ["good"]
        assert "two words.onnx is left out" in server.said


def test_a_link_keeps_its_name(tmp_path: Path) -> None:
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        shutil.copy(WHOLE, tmp_path / name / "best.onnx")
    (tmp_path / "current").symlink_to("first")
    with serving(tmp_path, "--reload", 0.1, model=tmp_path / "current") as server:
        assert server.get("/v2/models").json["models"] == ["current"]
        (tmp_path / "next").symlink_to("second")
        (tmp_path / "next").replace(tmp_path / "current")
        end = time.monotonic() + 20
        while server.get("/card").json["version"] != "2":
            assert time.monotonic() < end, server.said
            time.sleep(0.05)
        assert server.get("/v2/models").json["models"] == ["current"]


def test_servers_that_start_at_once_do_not_share_a_port(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, "-m", "distcls", "serve", "--model", str(WHOLE), "--port", str(port)]
    said = [tmp_path / "first.txt", tmp_path / "second.txt"]
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(path.open("wb")) for path in said]
        pair = [subprocess.Popen(words, stderr=file, cwd=ROOT) for file in files]
        for process in pair:
            stack.callback(process.wait, 30)
            stack.callback(process.terminate)
        end = time.monotonic() + 30
        while all(process.poll() is None for process in pair):
            assert time.monotonic() < end, "both run"
            time.sleep(0.05)
        [refused] = [place for place, process in enumerate(pair) if process.poll() is not None]
        assert pair[refused].returncode == 2
        assert f"port: {port}" in said[refused].read_text(encoding="utf-8")

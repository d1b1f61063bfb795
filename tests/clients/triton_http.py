"""tritonclient over HTTP, sync and asyncio, against a server with the model `m`.

python triton_http.py HTTP_PORT GRPC_PORT EXPECTED.npz
"""

import asyncio
import base64
import sys

import numpy as np
from tritonclient import http
from tritonclient.http import aio
from tritonclient.utils import InferenceServerException

ADDRESS, EXPECTED = f"127.0.0.1:{sys.argv[1]}", np.load(sys.argv[3], allow_pickle=True)
PIXELS, PIXEL_LOGITS = EXPECTED["pixels"], EXPECTED["pixel_logits"]
FILES, LOGITS = EXPECTED["files"], EXPECTED["logits"]
CLASSES = EXPECTED["classes"].tolist()


def tensor(pixels=PIXELS, name="images", binary=True):
    given = http.InferInput(name, list(pixels.shape), "UINT8")
    given.set_data_from_numpy(pixels, binary_data=binary)
    return [given]


def images(shape=(3,), binary=True):
    given = http.InferInput("images", list(shape), "BYTES")
    data = FILES if binary else np.array([base64.b64encode(each) for each in FILES], object)
    given.set_data_from_numpy(data.reshape(shape), binary_data=binary)
    return [given]


def fails(call, status, text):
    try:
        call()
    except InferenceServerException as error:
        found = error.status(), error.message()
        assert found[0] in (status, None), found
        assert text in found[1], found
    else:
        raise AssertionError(f"no error of {text!r}")


def sync():
    client = http.InferenceServerClient(ADDRESS)
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("m")
    assert client.is_model_ready("m", "1")
    assert not client.is_model_ready("x")
    assert client.get_server_metadata()["name"] == "distcls"
    assert client.get_model_metadata("m")["inputs"][0]["shape"] == [-1, 28, 28, 3]
    assert client.get_model_config("m")["max_batch_size"] == 64
    assert client.get_model_repository_index()[0]["state"] == "READY"
    assert client.get_system_shared_memory_status() == []
    assert client.get_cuda_shared_memory_status() == []
    assert client.get_trace_settings("m") == {}
    assert client.get_log_settings() == {}

    for binary_in in (True, False):
        for binary_out in (True, False):
            wanted = [http.InferRequestedOutput("logits", binary_data=binary_out)]
            for given, logits in (
                (tensor(binary=binary_in), PIXEL_LOGITS),
                (images(binary=binary_in), LOGITS),
                (images((3, 1), binary=binary_in), LOGITS),
            ):
                result = client.infer("m", given, outputs=wanted, request_id="q 7")
                assert np.array_equal(result.as_numpy("logits"), logits)
                assert result.get_response()["id"] == "q 7"
    result = client.infer("m", tensor())
    assert result.as_numpy("features").shape == (3, 1600)
    for sent in (None, "gzip", "deflate"):
        for received in (None, "gzip", "deflate"):
            result = client.infer(
                "m",
                tensor(),
                request_compression_algorithm=sent,
                response_compression_algorithm=received,
            )
            assert np.array_equal(result.as_numpy("logits"), PIXEL_LOGITS)
    for binary in (True, False):
        wanted = [http.InferRequestedOutput("probabilities", binary_data=binary, class_count=2)]
        found = client.infer("m", images(), outputs=wanted).as_numpy("probabilities")
        assert found.shape == (3, 2)
        for row, logits in zip(found.tolist(), LOGITS, strict=True):
            text = row[0].decode() if binary else row[0]
            _, index, label = text.split(":")
            assert int(index) == logits.argmax()
            assert label == CLASSES[int(index)]
    pending = [client.async_infer("m", tensor()) for _ in range(4)]
    for each in pending:
        assert np.array_equal(each.get_result().as_numpy("logits"), PIXEL_LOGITS)
    assert client.infer("m", tensor(), timeout=10**7, priority=1, parameters={"mine": 1})

    fails(lambda: client.infer("x", tensor()), "404", "unknown model 'x'")
    fails(lambda: client.infer("m", tensor(), "9"), "404", "unknown version '9'")
    fails(lambda: client.infer("m", tensor(name="x")), "400", "inputs: 'x' is unknown")
    fails(lambda: client.infer("m", tensor(PIXELS[:, :9])), "400", "expected [N, 28, 28, 3]")
    wrong = [http.InferRequestedOutput("logit")]
    fails(lambda: client.infer("m", tensor(), outputs=wrong), "400", "outputs: 'logit'")
    fails(lambda: client.infer("m", tensor(), sequence_id=3), "400", "sequence_id")
    shared = http.InferInput("images", [1, 28, 28, 3], "UINT8")
    shared.set_shared_memory("region", 2352)
    fails(lambda: client.infer("m", [shared]), "400", "shared memory is not supported")
    fails(lambda: client.register_system_shared_memory("r", "/r", 9), "501", "not supported")
    fails(lambda: client.update_trace_settings(settings={"trace_rate": "1"}), "501", "not supp")
    fails(lambda: client.load_model("m"), "403", "--control")
    fails(lambda: client.get_model_config("x"), "404", "unknown model 'x'")
    bad = http.InferInput("images", [2], "BYTES")
    bad.set_data_from_numpy(np.array([FILES[0], b"no image"], object))
    fails(lambda: client.infer("m", [bad]), "400", "image 1: ")
    result = client.infer("m", [bad], parameters={"on_error": "skip"})
    assert np.isnan(result.as_numpy("logits")).all(axis=1).tolist() == [False, True]

    # what perf_analyzer reads
    config, stats = client.get_model_config("m"), client.get_inference_statistics("m")
    assert config["dynamic_batching"] is not None
    assert [each["name"] for each in config["input"]] == ["images"]
    assert "logits" in [each["name"] for each in config["output"]]
    assert "sequence_batching" not in config
    assert "ensemble_scheduling" not in config
    (entry,) = stats["model_stats"]
    assert entry["inference_count"] >= entry["execution_count"] > 0
    for key in ("success", "fail", "queue", "compute_input", "compute_infer", "compute_output"):
        assert {"count", "ns"} <= entry["inference_stats"][key].keys()
    for key in ("cache_hit", "cache_miss"):
        assert entry["inference_stats"][key] == {"count": 0, "ns": 0}
    assert entry["inference_stats"]["success"]["count"] > 20
    assert entry["batch_stats"]
    assert client.get_inference_statistics()["model_stats"][0]["name"] == "m"
    client.close()


async def asynchronous():
    async with aio.InferenceServerClient(ADDRESS) as client:
        assert await client.is_server_live()
        assert await client.is_server_ready()
        assert await client.is_model_ready("m")
        assert (await client.get_model_metadata("m"))["name"] == "m"
        assert (await client.get_model_config("m"))["name"] == "m"
        assert (await client.get_inference_statistics("m"))["model_stats"]
        assert (await client.get_model_repository_index())[0]["name"] == "m"
        for sent in (None, "gzip", "deflate"):
            for received in (None, "gzip", "deflate"):
                for given, logits in ((tensor(), PIXEL_LOGITS), (images(), LOGITS)):
                    result = await client.infer(
                        "m",
                        given,
                        request_id="a",
                        request_compression_algorithm=sent,
                        response_compression_algorithm=received,
                    )
                    assert np.array_equal(result.as_numpy("logits"), logits)
        many = await asyncio.gather(*(client.infer("m", tensor()) for _ in range(16)))
        assert all(np.array_equal(each.as_numpy("logits"), PIXEL_LOGITS) for each in many)
        try:
            await client.infer("x", tensor())
        except InferenceServerException as error:
            assert "unknown model 'x'" in error.message()
        else:
            raise AssertionError("no error")


sync()
asyncio.run(asynchronous())
print("right")

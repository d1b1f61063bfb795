"""tritonclient over gRPC, sync, asyncio and streams, against a server with the model `m`.

python triton_grpc.py HTTP_PORT GRPC_PORT EXPECTED.npz
"""

import asyncio
import queue
import sys

import grpc
import numpy as np
import tritonclient.grpc as triton
from tritonclient.grpc import aio
from tritonclient.utils import InferenceServerException

ADDRESS, EXPECTED = f"127.0.0.1:{sys.argv[2]}", np.load(sys.argv[3], allow_pickle=True)
PIXELS, PIXEL_LOGITS = EXPECTED["pixels"], EXPECTED["pixel_logits"]
FILES, LOGITS = EXPECTED["files"], EXPECTED["logits"]
CLASSES = EXPECTED["classes"].tolist()


def tensor(pixels=PIXELS, name="images"):
    given = triton.InferInput(name, list(pixels.shape), "UINT8")
    given.set_data_from_numpy(pixels)
    return [given]


def images(shape=(3,)):
    given = triton.InferInput("images", list(shape), "BYTES")
    given.set_data_from_numpy(FILES.reshape(shape))
    return [given]


def fails(call, status, text):
    try:
        call()
    except InferenceServerException as error:
        assert error.status() == f"StatusCode.{status}", error
        assert text in error.message(), error
    else:
        raise AssertionError(f"no error of {text!r}")


def sync():
    client = triton.InferenceServerClient(ADDRESS)
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("m")
    assert not client.is_model_ready("x")
    metadata = client.get_server_metadata()
    assert (metadata.name, "classification" in metadata.extensions) == ("distcls", True)
    metadata = client.get_model_metadata("m")
    assert list(metadata.inputs[0].shape) == [-1, 28, 28, 3]
    assert [each.name for each in metadata.outputs] == ["logits", "probabilities", "features"]
    assert list(metadata.versions) == ["1"]
    config = client.get_model_config("m", as_json=True)["config"]
    assert config["input"] == [
        {"name": "images", "data_type": "TYPE_UINT8", "dims": ["28", "28", "3"]}
    ]
    assert config["output"][0] == {"name": "logits", "data_type": "TYPE_FP32", "dims": ["10"]}
    assert config["max_batch_size"] == 64
    assert "dynamic_batching" in config
    assert client.get_model_repository_index().models[0].state == "READY"

    for given, logits in ((tensor(), PIXEL_LOGITS), (images(), LOGITS), (images((3, 1)), LOGITS)):
        for packed in (None, "gzip", "deflate"):
            result = client.infer("m", given, request_id="q 7", compression_algorithm=packed)
            assert np.array_equal(result.as_numpy("logits"), logits)
            assert result.get_response().id == "q 7"
    wanted = [triton.InferRequestedOutput("probabilities", class_count=2)]
    found = client.infer("m", images(), outputs=wanted).as_numpy("probabilities")
    for row, logits in zip(found.tolist(), LOGITS, strict=True):
        _, index, label = row[0].decode().split(":")
        assert int(index) == logits.argmax()
        assert label == CLASSES[int(index)]
    assert client.infer("m", tensor(), timeout=10**7, priority=1, parameters={"mine": 1})

    fails(lambda: client.infer("x", tensor()), "NOT_FOUND", "unknown model 'x'")
    fails(lambda: client.infer("m", tensor(), "9"), "NOT_FOUND", "unknown version '9'")
    bad = "INVALID_ARGUMENT"
    fails(lambda: client.infer("m", tensor(name="x")), bad, "inputs: 'x' is unknown")
    fails(lambda: client.infer("m", tensor(PIXELS[:, :9])), bad, "expected [N, 28, 28, 3]")
    wrong = [triton.InferRequestedOutput("logit")]
    fails(lambda: client.infer("m", tensor(), outputs=wrong), bad, "outputs: 'logit'")
    fails(lambda: client.infer("m", tensor(), sequence_id=3), bad, "sequence_id")
    shared = triton.InferInput("images", [1, 28, 28, 3], "UINT8")
    shared.set_shared_memory("region", 2352)
    fails(lambda: client.infer("m", [shared]), bad, "shared memory is not supported")
    fails(client.get_trace_settings, "UNIMPLEMENTED", "not supported")
    fails(client.get_system_shared_memory_status, "UNIMPLEMENTED", "not supported")
    fails(lambda: client.load_model("m"), "PERMISSION_DENIED", "--control")
    fails(lambda: client.get_model_config("x"), "NOT_FOUND", "unknown model 'x'")

    (entry,) = client.get_inference_statistics("m").model_stats
    assert entry.inference_count >= entry.execution_count > 0
    assert entry.inference_stats.success.ns > 0
    assert entry.inference_stats.compute_infer.count == entry.inference_stats.success.count > 5
    assert sum(each.compute_infer.count for each in entry.batch_stats) == entry.execution_count
    streams(client)
    client.close()


def streams(client):
    """Through one stream: the callbacks come in order."""
    answers = queue.Queue()
    client.start_stream(callback=lambda result, error: answers.put(error or result))
    for number in range(20):
        client.async_stream_infer("x" if number == 5 else "m", tensor(), request_id=str(number))
    found = [answers.get(timeout=20) for _ in range(20)]
    client.stop_stream()
    assert "unknown model 'x'" in str(found.pop(5))
    for result in found:
        assert np.array_equal(result.as_numpy("logits"), PIXEL_LOGITS)
    numbers = [int(result.get_response().id) for result in found]
    assert numbers == [number for number in range(20) if number != 5]

    done = queue.Queue()
    call = client.async_infer(
        "m", tensor(), callback=lambda result, error: done.put(error or result)
    )
    assert np.array_equal(done.get(timeout=20).as_numpy("logits"), PIXEL_LOGITS)
    assert call is not None


async def asynchronous():
    async with aio.InferenceServerClient(ADDRESS) as client:
        assert await client.is_server_ready()
        assert await client.is_model_ready("m")
        assert (await client.get_model_metadata("m")).name == "m"
        many = await asyncio.gather(*(client.infer("m", images()) for _ in range(16)))
        assert all(np.array_equal(each.as_numpy("logits"), LOGITS) for each in many)
        try:
            await client.infer("x", tensor())
        except InferenceServerException as error:
            assert error.status() == "StatusCode.NOT_FOUND"
        else:
            raise AssertionError("no error")

        async def requests():
            for number in range(5):
                yield {"model_name": "m", "inputs": tensor(), "request_id": str(number)}

        numbers = []
        async for result, error in client.stream_infer(requests()):
            assert error is None
            numbers.append(result.get_response().id)
        assert numbers == ["0", "1", "2", "3", "4"]


def fields_agree():
    """The messages of the server have the fields of the client's, by name, number and type."""
    import json

    from tritonclient.grpc import model_config_pb2, service_pb2

    ours = json.loads(str(EXPECTED["messages"]))
    theirs = {**service_pb2.DESCRIPTOR.message_types_by_name}
    theirs |= {
        f"config {k}": v for k, v in model_config_pb2.DESCRIPTOR.message_types_by_name.items()
    }
    checked = 0
    for name, (path, fields) in ours.items():
        first, *inner = path.split(".")
        message = theirs[first]
        for each in inner:
            message = message.nested_types_by_name[each]
        for field, number, kind, repeated in fields:
            found = message.fields_by_name[field]
            # an enumeration is a number on the wire
            assert (found.number, found.type) == (number, 14 if field == "data_type" else kind), (
                name
            )
            assert found.is_repeated == repeated, (name, field)
            checked += 1
    assert checked > 100, checked


fields_agree()
sync()
asyncio.run(asynchronous())
assert grpc.__version__
print("right")

"""KServe's clients, REST and gRPC, against a server with the model `m`.

python kserve_clients.py HTTP_PORT GRPC_PORT EXPECTED.npz
"""

import asyncio
import sys

import grpc
import httpx
import numpy as np
from kserve import InferenceGRPCClient, InferenceRESTClient, InferInput, InferRequest, RESTConfig

HTTP, GRPC = f"http://127.0.0.1:{sys.argv[1]}", f"127.0.0.1:{sys.argv[2]}"
EXPECTED = np.load(sys.argv[3], allow_pickle=True)
PIXELS, PIXEL_LOGITS = EXPECTED["pixels"], EXPECTED["pixel_logits"]
FILES, LOGITS = EXPECTED["files"], EXPECTED["logits"]


def tensor(binary, pixels=PIXELS):
    given = InferInput("images", list(pixels.shape), "UINT8")
    given.set_data_from_numpy(pixels, binary_data=binary)
    return InferRequest(model_name="m", infer_inputs=[given], request_id="q7")


def images():
    given = InferInput("images", [3], "BYTES")
    given.set_data_from_numpy(FILES, binary_data=True)
    return InferRequest(model_name="m", infer_inputs=[given], request_id="q7")


def same(response, logits):
    assert response.id == "q7", response.id
    assert response.model_name == "m"
    found = next(each for each in response.outputs if each.name == "logits")
    assert np.array_equal(found.as_numpy().reshape(logits.shape).astype(np.float32), logits)


async def rest():
    client = InferenceRESTClient(RESTConfig(protocol="v2", timeout=30))
    assert await client.is_server_live(HTTP)
    assert await client.is_server_ready(HTTP)
    assert await client.is_model_ready(HTTP, "m")
    for binary in (True, False):
        same(await client.infer(HTTP, tensor(binary), model_name="m"), PIXEL_LOGITS)
    same(await client.infer(HTTP, images(), model_name="m"), LOGITS)
    for model, request, status, text in (
        ("x", tensor(True), 404, "unknown model 'x'"),
        ("m", tensor(True, PIXELS[:, :9]), 400, "expected [N, 28, 28, 3]"),
    ):
        try:
            await client.infer(HTTP, request, model_name=model)
        except httpx.HTTPStatusError as error:
            assert error.response.status_code == status, error
            assert text in str(error), error
        else:
            raise AssertionError("no error")
    await client.close()


async def over_grpc():
    client = InferenceGRPCClient(url=GRPC)
    assert await client.is_server_live()
    assert await client.is_server_ready()
    assert await client.is_model_ready("m")
    assert not await client.is_model_ready("x")
    for binary in (True, False):
        same(await client.infer(tensor(binary)), PIXEL_LOGITS)
    same(await client.infer(images()), LOGITS)
    wrong = tensor(True)
    wrong.model_name = "x"
    try:
        await client.infer(wrong)
    except grpc.RpcError as error:
        assert error.code() is grpc.StatusCode.NOT_FOUND
        assert "unknown model 'x'" in error.details()
    else:
        raise AssertionError("no error")
    await client.close()


asyncio.run(rest())
asyncio.run(over_grpc())
print("right")

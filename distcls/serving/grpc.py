"""The Open Inference Protocol over gRPC, on the event loop of the HTTP server.

The service is `inference.GRPCInferenceService` of KServe and Triton, and `grpc.health.v1.Health`
for probes. A message is made into the JSON object that would have come over HTTP, so that both are
checked, computed, refused and counted by the same code.

Every method takes its message as a stream, which is the same on the wire as one message: so a
token is checked, and slow clients are timed, before the message is there.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import grpc
import grpc.aio
from google.protobuf import json_format

from distcls.errors import UsageError
from distcls.serving.engine import Busy
from distcls.serving.messages import MESSAGES, parameters_of, parse
from distcls.serving.options import MB
from distcls.serving.protocol import (
    INPUT,
    Contents,
    Refused,
    check_infer,
    check_outputs,
    output_tensors,
    raw_contents,
    server_metadata,
)
from distcls.serving.repository import Version
from distcls.serving.service import Call, Service
from distcls.serving.work import Buffer
from distcls.stored import read_bytes

PREFIX = "/inference.GRPCInferenceService/"
HEALTH = "/grpc.health.v1.Health/Check"
MOST_PEM = 1 << 20
STREAM_DEPTH = 16
"""Requests of one stream that are computed at once; their answers come in order."""
CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    408: grpc.StatusCode.DEADLINE_EXCEEDED,
    413: grpc.StatusCode.INVALID_ARGUMENT,
    500: grpc.StatusCode.INTERNAL,
    501: grpc.StatusCode.UNIMPLEMENTED,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}
"""By the HTTP status of the same refusal."""
DATA_TYPES = {"TYPE_UINT8": 2, "TYPE_FP32": 11}
"""Numbers in Triton's model_config.proto."""
TYPED = {"UINT8": "uint_contents", "BYTES": "bytes_contents"}
"""Fields of contents, by the datatype."""
SERVING, NOT_SERVING = 1, 2


class _Call(Call):
    """A request over gRPC."""

    def __init__(self, path: str, context: Any) -> None:
        self._metadata = dict(context.invocation_metadata() or ())
        super().__init__("gRPC", path, self.header("x-request-id"))
        self.remaining: float | None = context.time_remaining()
        """Seconds until the client's deadline, when it began."""
        self.code = grpc.StatusCode.CANCELLED
        """How it ended; until then, that of a client that leaves."""

    def header(self, name: str) -> str:
        """The value of metadata; empty if it is not there."""
        value = self._metadata.get(name, "")
        return value if isinstance(value, str) else ""


Method = Callable[[_Call, bytes], Awaitable[Any]]


class GrpcServer:
    """The server at one port; `await start()`, later `stop()`."""

    def __init__(self, service: Service, port: int) -> None:
        """Raises UsageError if the port is not ours to take, or TLS files cannot be used."""
        self.port, options = port, service.options
        self._server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", options.max_body * MB),
                ("grpc.max_send_message_length", -1),
                ("grpc.so_reuseport", 0),
                ("grpc.server_handshake_timeout_ms", int(options.header_timeout * 1000)),
                # finds clients that vanished
                ("grpc.keepalive_time_ms", 60_000),
                # clients open another one when they need it
                ("grpc.max_connection_idle_ms", 300_000),
            ],
            maximum_concurrent_rpcs=options.max_connections,
        )
        self._server.add_generic_rpc_handlers((_Handlers(service),))
        host = f"[{options.host}]" if ":" in options.host else options.host
        address = f"{host}:{port}"
        try:
            if options.tls_cert is None or options.tls_key is None:
                self._server.add_insecure_port(address)
            else:
                pair = read_bytes(options.tls_key, MOST_PEM), read_bytes(options.tls_cert, MOST_PEM)
                self._server.add_secure_port(address, grpc.ssl_server_credentials([pair]))
        except RuntimeError as error:
            raise UsageError(f"grpc_port: {address} cannot be listened on: {error}") from error

    async def start(self) -> None:
        """Begin to listen."""
        await self._server.start()

    async def stop(self, grace: float | None = None) -> None:
        """Take nothing new; end what is under way, after so many seconds if they are given."""
        await self._server.stop(grace)


class _Handlers(grpc.GenericRpcHandler):  # type: ignore[misc]  # the library has no types
    """What the methods do."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._methods: dict[str, Method] = {
            HEALTH: self._health,
            PREFIX + "ServerLive": self._live,
            PREFIX + "ServerReady": self._ready,
            PREFIX + "ModelReady": self._model_ready,
            PREFIX + "ServerMetadata": self._server,
            PREFIX + "ModelMetadata": self._metadata,
            PREFIX + "ModelInfer": self._infer,
            PREFIX + "ModelConfig": self._config,
            PREFIX + "ModelStatistics": self._statistics,
            PREFIX + "RepositoryIndex": self._index,
            PREFIX + "RepositoryModelLoad": functools.partial(self._control, "load"),
            PREFIX + "RepositoryModelUnload": functools.partial(self._control, "unload"),
        }
        self._open = (HEALTH, PREFIX + "ServerLive", PREFIX + "ServerReady")

    def service(self, details: Any) -> Any:
        """The handler of a method; one that is unknown is refused."""
        path = details.method
        if path == PREFIX + "ModelStreamInfer":
            return grpc.stream_stream_rpc_method_handler(functools.partial(self._stream, path))
        return grpc.stream_unary_rpc_method_handler(functools.partial(self._unary, path))

    async def _unary(self, path: str, _: Any, context: Any) -> bytes | None:
        """Answer one request, whatever happens."""
        call = _Call(path, context)
        with self._counted(call):
            try:
                if path not in self._open:
                    self._service.authorize(call.header("authorization").encode())
                if path not in self._methods:
                    raise Refused(501, f"{path[:100]} is not supported by this server")
                call.route = path
                data = await self._read(context)
                call.size = len(data)
                return self._finished(call, await self._methods[path](call, data))
            except Exception as error:
                refused = self._refuse(call, error)
                trailing = (*refused.headers.items(), ("x-request-id", call.id))
                await context.abort(call.code, refused.message, trailing)
        return None

    async def _read(self, context: Any) -> bytes:
        """The message of a call; none is an empty one. Raises Refused if it comes too slowly."""
        limit = self._service.options.body_timeout
        try:
            data = await asyncio.wait_for(context.read(), limit)
        except TimeoutError:
            raise Refused(408, f"the message did not arrive within {limit:g} s") from None
        return data if isinstance(data, bytes) else b""

    async def _stream(self, path: str, requests: Any, context: Any) -> AsyncIterator[bytes]:
        """ModelStreamInfer: answers in the order of the requests, errors among them."""
        call = _Call(path, context)
        try:
            self._service.authorize(call.header("authorization").encode())
        except Refused as error:
            with self._counted(call):
                refused = self._refuse(call, error)
                await context.abort(call.code, refused.message, (*refused.headers.items(),))
        answers: asyncio.Queue[asyncio.Task[bytes] | None] = asyncio.Queue()
        places = asyncio.Semaphore(STREAM_DEPTH)

        async def read() -> None:
            async for data in requests:
                await places.acquire()
                answers.put_nowait(asyncio.ensure_future(self._one(path, data, context)))

        reading = asyncio.ensure_future(read())
        reading.add_done_callback(lambda _: answers.put_nowait(None))
        try:
            while (answer := await answers.get()) is not None:
                yield await answer
                places.release()
            await reading
        finally:
            reading.cancel()
            while not answers.empty():
                if (left := answers.get_nowait()) is not None:
                    left.cancel()

    async def _one(self, path: str, data: bytes, context: Any) -> bytes:
        """Answer one request of a stream, whatever happens."""
        call = _Call(path, context)
        call.route, call.size = path, len(data)
        reply = MESSAGES["ModelStreamInferResponse"]
        with self._counted(call):
            try:
                self._service.require_taking()
                return self._finished(call, reply(infer_response=await self._infer(call, data)))
            except Exception as error:
                message = self._refuse(call, error).message
                return bytes(reply(error_message=message).SerializeToString())

    @contextlib.contextmanager
    def _counted(self, call: _Call) -> Iterator[None]:
        """A block that answers a call: it is under way, then in the metrics and the log."""
        self._service.in_flight += 1
        try:
            yield
        finally:
            self._service.in_flight -= 1
            self._service.record(call, call.code.name)

    def _finished(self, call: _Call, answer: Any) -> bytes:
        data = bytes(answer.SerializeToString())
        call.code = grpc.StatusCode.OK
        return data

    def _refuse(self, call: _Call, error: Exception) -> Refused:
        refused = self._service.refuse(call, error)
        # clients try again at once where a server is not available
        busy = isinstance(error, Busy)
        call.code = grpc.StatusCode.RESOURCE_EXHAUSTED if busy else CODES[refused.status]
        return refused

    # what the methods do

    async def _health(self, call: _Call, data: bytes) -> Any:
        status = NOT_SERVING if self._service.not_ready else SERVING
        return MESSAGES["HealthCheckResponse"](status=status)

    async def _live(self, call: _Call, data: bytes) -> Any:
        return MESSAGES["ServerLiveResponse"](live=not self._service.repository.stuck)

    async def _ready(self, call: _Call, data: bytes) -> Any:
        return MESSAGES["ServerReadyResponse"](ready=not self._service.not_ready)

    async def _model_ready(self, call: _Call, data: bytes) -> Any:
        try:
            ready = self._service.usable(self._find(data))
        except Refused as refused:
            if refused.status not in (404, 503):
                raise
            ready = False
        return MESSAGES["ModelReadyResponse"](ready=ready)

    async def _server(self, call: _Call, data: bytes) -> Any:
        return MESSAGES["ServerMetadataResponse"](**server_metadata())

    async def _metadata(self, call: _Call, data: bytes) -> Any:
        found = self._find(data)
        return _message("ModelMetadataResponse", found.interface.metadata([found.version]))

    async def _config(self, call: _Call, data: bytes) -> Any:
        config = self._find(data).interface.config()
        for each in (*config["input"], *config["output"]):
            each["data_type"] = DATA_TYPES[each["data_type"]]
        return _message("ModelConfigResponse", {"config": config})

    async def _statistics(self, call: _Call, data: bytes) -> Any:
        asked = parse("NamedRequest", data)
        found = self._service.repository.statistics(asked.name, asked.version)
        return _message("ModelStatisticsResponse", found)

    async def _index(self, call: _Call, data: bytes) -> Any:
        asked = parse("RepositoryIndexRequest", data)
        models = self._service.repository.index(asked.ready)
        return _message("RepositoryIndexResponse", {"models": models})

    async def _control(self, action: str, call: _Call, data: bytes) -> Any:
        asked = parse("ControlRequest", data)
        names = {entry.key: None for entry in asked.parameters}
        await self._service.control(asked.model_name, action, names)
        return MESSAGES["Empty"]()

    async def _infer(self, call: _Call, data: bytes) -> Any:
        service, asked = self._service, parse("ModelInferRequest", data)
        found = service.admit(call, asked.model_name, asked.model_version)
        found.engine.require_room()
        request = check_infer(_values(asked), _contents(asked), found.interface)
        limits = [each for each in (request.timeout, call.remaining) if each is not None]
        timeout = max(0.001, min(limits)) if limits else None
        outputs = await service.compute(call, found, request.works, timeout)
        check_outputs(outputs, request.skip_errors)
        answer = MESSAGES["ModelInferResponse"](
            model_name=found.name, model_version=found.version, id=request.request_id
        )
        for wanted, datatype, array in output_tensors(request, outputs, found.interface):
            answer.outputs.add(name=wanted.name, datatype=datatype, shape=array.shape)
            answer.raw_output_contents.append(raw_contents(datatype, array))
        service.count(call, found, outputs)
        return answer

    def _find(self, data: bytes) -> Version:
        asked = parse("NamedRequest", data)
        return self._service.repository.find(asked.name, asked.version)


def _message(name: str, values: dict[str, Any]) -> Any:
    """A message of JSON's values; what gRPC has no field for is left out."""
    return json_format.ParseDict(values, MESSAGES[name](), ignore_unknown_fields=True)


def _values(asked: Any) -> dict[str, Any]:
    """A request for inference as the JSON object that it would be."""
    inputs = [
        {
            "name": each.name,
            "datatype": each.datatype,
            "shape": list(each.shape),
            "parameters": parameters_of(each.parameters),
        }
        for each in asked.inputs
    ]
    outputs = [
        {"name": each.name, "parameters": parameters_of(each.parameters)} for each in asked.outputs
    ]
    parameters = parameters_of(asked.parameters)
    return {"id": asked.id, "parameters": parameters, "inputs": inputs, "outputs": outputs}


def _contents(asked: Any) -> Contents:
    """Where the contents of the input are found: raw, or in the field of its datatype."""

    def contents(given: dict[str, Any], datatype: str) -> Buffer | list[Any]:
        raw, typed = asked.raw_input_contents, asked.inputs[0].contents
        filled = [field.name for field, _ in typed.ListFields()]
        if raw:
            if len(raw) != 1 or filled:
                message = f"raw_input_contents: {len(raw)} of them and {filled or 'no'} contents"
                raise Refused(400, f"{message}, expected one and no contents")
            return bytes(raw[0])
        expected = TYPED[datatype]
        if filled != [expected]:
            raise Refused(
                400,
                f"inputs.{INPUT}.contents: {filled or 'empty'}, expected {expected} for "
                f"{datatype}, or raw_input_contents",
            )
        return list(getattr(typed, expected))

    return contents

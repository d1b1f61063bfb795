"""The messages of the Open Inference Protocol over gRPC, with Triton's additions.

They are built in a pool of their own and there are no generated modules: `tritonclient` and
`kserve` register the same names in protobuf's default pool, and a process may hold them only once.
A message inside another is declared beside it here, which is the same on the wire.
"""

from __future__ import annotations

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError

from distcls.serving.protocol import Refused

PACKAGE = "inference"
MOST_FIELDS = 10_000
"""Fields in one message: a few bytes of it may become a hundred of memory."""
MOST_PACKED = 2 << 20
"""Bytes of a list of numbers in a message; a raw tensor is one value of any length."""

# a line is a message: its fields NAME:TYPE, numbered in order unless NAME@NUMBER; * for lists, and
# | for a choice of one
_SCHEMA = """
Empty
NamedRequest name:string version:string
ServerLiveResponse live:bool
ServerReadyResponse ready:bool
ModelReadyResponse ready:bool
ServerMetadataResponse name:string version:string extensions:string*
TensorMetadata name:string datatype:string shape:int64*
ModelMetadataResponse name:string versions:string* platform:string inputs:TensorMetadata* \
outputs:TensorMetadata*
Parameter | bool_param:bool int64_param:int64 string_param:string double_param:double \
uint64_param:uint64
NamedParameter key:string value:Parameter
Contents bool_contents:bool* int_contents:int32* int64_contents:int64* uint_contents:uint32* \
uint64_contents:uint64* fp32_contents:float* fp64_contents:double* bytes_contents:bytes*
InputTensor name:string datatype:string shape:int64* parameters:NamedParameter* contents:Contents
RequestedOutput name:string parameters:NamedParameter*
ModelInferRequest model_name:string model_version:string id:string parameters:NamedParameter* \
inputs:InputTensor* outputs:RequestedOutput* raw_input_contents:bytes*
OutputTensor name:string datatype:string shape:int64*
ModelInferResponse model_name:string model_version:string id:string outputs@5:OutputTensor* \
raw_output_contents:bytes*
ModelStreamInferResponse error_message:string infer_response:ModelInferResponse
LatestVersions num_versions:uint32
VersionPolicy latest:LatestVersions
ModelInput name:string data_type:int32 dims@4:int64*
ModelOutput name:string data_type:int32 dims:int64*
DynamicBatching max_queue_delay_microseconds@2:uint64
ModelConfig name:string platform:string version_policy:VersionPolicy max_batch_size:int32 \
input:ModelInput* output:ModelOutput* dynamic_batching@11:DynamicBatching backend@17:string
ModelConfigResponse config:ModelConfig
Duration count:uint64 ns:uint64
InferStatistics success:Duration fail:Duration queue:Duration compute_input:Duration \
compute_infer:Duration compute_output:Duration cache_hit:Duration cache_miss:Duration
BatchStatistics batch_size:uint64 compute_input:Duration compute_infer:Duration \
compute_output:Duration
ModelStatistics name:string version:string last_inference:uint64 inference_count:uint64 \
execution_count:uint64 inference_stats:InferStatistics batch_stats:BatchStatistics*
ModelStatisticsResponse model_stats:ModelStatistics*
RepositoryIndexRequest repository_name:string ready:bool
ModelIndex name:string version:string state:string reason:string
RepositoryIndexResponse models:ModelIndex*
ControlRequest repository_name:string model_name:string parameters:NamedParameter*
HealthCheckResponse status:int32
"""


def _build() -> dict[str, Any]:
    """The class of each message."""
    kinds = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(
        name="distcls/inference.proto", package=PACKAGE, syntax="proto3"
    )
    for line in filter(None, _SCHEMA.split("\n")):
        name, *fields = line.split()
        message = file.message_type.add(name=name)
        choice = fields[:1] == ["|"]
        if choice:
            message.oneof_decl.add(name="choice")
        for number, text in enumerate(fields[choice:], 1):
            label, kind = text.split(":")
            own, _, given = label.partition("@")
            field = message.field.add(name=own)
            previous = message.field[-2].number if number > 1 else 0
            field.number = int(given) if given else previous + 1
            repeated = kind.endswith("*")
            field.label = kinds.LABEL_REPEATED if repeated else kinds.LABEL_OPTIONAL
            kind = kind.removesuffix("*")
            if kind[0].isupper():
                field.type, field.type_name = kinds.TYPE_MESSAGE, f".{PACKAGE}.{kind}"
            else:
                field.type = kinds.Type.Value(f"TYPE_{kind.upper()}")
            if choice:
                field.oneof_index = 0
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    names = [message.name for message in file.message_type]
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{PACKAGE}.{name}"))
        for name in names
    }


_TEXTS = (
    descriptor_pb2.FieldDescriptorProto.TYPE_STRING,
    descriptor_pb2.FieldDescriptorProto.TYPE_BYTES,
)
MESSAGES = _build()
"""Classes of the messages, by name."""


def parse(name: str, data: bytes) -> Any:
    """A message from its bytes. Raises Refused."""
    kind = MESSAGES[name]
    if _fields(memoryview(data), kind.DESCRIPTOR, MOST_FIELDS) < 0:
        raise Refused(400, f"the message has more than {MOST_FIELDS:,} fields")
    try:
        return kind.FromString(data)
    except DecodeError as error:
        raise Refused(400, f"the message is no {name}: {str(error)[:200]}") from error


def _fields(data: memoryview, descriptor: Any, left: int) -> int:
    """How many of `left` fields remain after those of a message, all levels counted.

    Negative once there are too many. What is malformed is left to protobuf.
    """
    at, end = 0, len(data)
    while at < end and left >= 0:
        left -= 1
        tag, at = _varint(data, at)
        kind, size = tag & 7, 0
        if kind == 0:
            _, at = _varint(data, at)
        elif kind == 2:
            size, at = _varint(data, at)
        else:
            size = {1: 8, 5: 4}.get(kind, end)
        field = descriptor.fields_by_number.get(tag >> 3) if kind == 2 else None
        if field is not None and field.message_type is not None:
            left = _fields(data[at : at + size], field.message_type, left)
        elif field is not None and field.type not in _TEXTS and size > MOST_PACKED:
            most = MOST_PACKED >> 20
            raise Refused(
                413, f"{field.name}: {size:,} bytes, at most {most} MB; send raw_input_contents"
            )
        at += size
    return left


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """The number of variable length at a place, and the place after it."""
    value = shift = 0
    while at < len(data) and shift < 70:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            break
        shift += 7
    return value, at


def parameters_of(entries: Any) -> dict[str, Any]:
    """Parameters as plain values by name, as JSON has them."""
    found: dict[str, Any] = {}
    for entry in entries:
        choice = entry.value.WhichOneof("choice")
        if choice is None:
            raise Refused(400, f"parameters.{entry.key[:100]}: it has no value")
        found[entry.key] = getattr(entry.value, choice)
    return found

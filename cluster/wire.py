"""The bytes between a head and an expert worker.

A message is an ordinary protobuf message whose large fields come last. The small header is
serialised by protobuf; tag, length and raw bytes of the large fields are appended by hand, which
saves copying them into a message object. On receipt they are used where they lie. Everything that
a peer says is checked before it indexes or sizes anything.

Shape suffixes: R rows of a call, D hidden, A assignments (row, expert, weight).
"""

import warnings
from dataclasses import dataclass
from itertools import pairwise

import torch
from google.protobuf.message import DecodeError
from torch import Tensor

from cluster.errors import WireError
from cluster.pipe import Buffer
from model.config import MixtralConfig
from model.experts import Assignments
from model.units import Unit
from protos import expert_pb2

# torch warns once per process that received bytes are read only; nothing here ever writes to them.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch.frombuffer(b"\0", dtype=torch.uint8)

_DTYPE_IDS = {
    torch.float32: expert_pb2.DTYPE_FLOAT32,
    torch.bfloat16: expert_pb2.DTYPE_BFLOAT16,
    torch.float16: expert_pb2.DTYPE_FLOAT16,
}
_LENGTH_DELIMITED = 2  # protobuf's wire type of messages and bytes


@dataclass(frozen=True)
class Call:
    """Rows for some experts of one layer."""

    call_id: int
    epoch: int
    layer: int
    x_RD: Tensor
    assignments: Assignments


@dataclass(frozen=True)
class Reply:
    """A worker's answer: sums, or an error (of protos' ErrorCode) and no rows."""

    call_id: int
    incarnation: int
    sums_RD: Tensor
    error: int
    message: str
    compute_s: float


Parts = tuple[bytes | memoryview, ...]
"""A message whose bytes have not been joined. The tensors it was made of must not change."""


def joined(parts: Parts) -> bytes:
    """The message in one piece."""
    return b"".join(parts)


def encode_call(call: Call) -> Parts:
    """Serialise a call. Copies no rows, if they lie on the CPU."""
    num_rows, hidden_size = call.x_RD.shape
    units = [unit for unit, _ in call.assignments.counts]
    has_slices = any(unit.num_slices > 1 for unit in units)
    header = expert_pb2.CallHeader(
        call_id=call.call_id,
        epoch=call.epoch,
        layer=call.layer,
        num_rows=num_rows,
        hidden_size=hidden_size,
        dtype=_DTYPE_IDS[call.x_RD.dtype],
        expert_ids=[unit.expert_id for unit in units],
        expert_counts=[count for _, count in call.assignments.counts],
        slice_numbers=[unit.slice_number for unit in units] if has_slices else (),
        num_slices=[unit.num_slices for unit in units] if has_slices else (),
    )
    return _fields(
        header.SerializeToString(),
        _bytes_of(call.x_RD),
        _bytes_of(call.assignments.rows_A.to(torch.int32)),
        _bytes_of(call.assignments.weights_A),
    )


def decode_call(message: Buffer, config: MixtralConfig, dtype: torch.dtype) -> Call:
    """Read and check a call for a model of this configuration. Tensors lie in `message`.

    Raises WireError, naming the value, when anything does not add up.
    """
    header_bytes, rows, row_numbers, weights = _split(message, num_fields=4)
    header = expert_pb2.CallHeader()
    try:
        header.ParseFromString(bytes(header_bytes))
    except DecodeError as error:
        raise WireError(f"the header does not parse: {error}") from error
    if header.epoch == 0:
        raise WireError("epoch 0: the call belongs to no placement")
    if header.layer >= config.num_hidden_layers:
        raise WireError(f"layer {header.layer} of {config.num_hidden_layers}")
    if header.dtype != _DTYPE_IDS[dtype]:
        raise WireError(
            f"rows are {expert_pb2.DType.Name(header.dtype)}; here they must be {dtype}"
            if header.dtype in expert_pb2.DType.values()
            else f"dtype number {header.dtype} is unknown"
        )
    if header.hidden_size != config.hidden_size:
        raise WireError(f"hidden size {header.hidden_size}, here {config.hidden_size}")
    counts = _read_counts(header, config)
    num_assignments = sum(count for _, count in counts)
    row_numbers_A = _tensor_of("row_numbers", row_numbers, torch.int32, num_assignments)
    if (
        num_assignments
        and not 0 <= int(row_numbers_A.min()) <= int(row_numbers_A.max()) < header.num_rows
    ):
        raise WireError(f"a row number is outside the {header.num_rows} rows")
    return Call(
        call_id=header.call_id,
        epoch=header.epoch,
        layer=header.layer,
        x_RD=_tensor_of("rows", rows, dtype, header.num_rows * header.hidden_size).view(
            header.num_rows, header.hidden_size
        ),
        assignments=Assignments(
            counts=counts,
            rows_A=row_numbers_A.long(),
            weights_A=_tensor_of("weights", weights, torch.float32, num_assignments),
        ),
    )


def _read_counts(
    header: expert_pb2.CallHeader, config: MixtralConfig
) -> tuple[tuple[Unit, int], ...]:
    """How many rows each expert or slice gets. Raises WireError."""
    expert_ids, counts = list(header.expert_ids), list(header.expert_counts)
    numbers, of = list(header.slice_numbers), list(header.num_slices)
    if not numbers and not of:
        numbers, of = [0] * len(expert_ids), [1] * len(expert_ids)
    if not len(expert_ids) == len(counts) == len(numbers) == len(of):
        raise WireError(
            f"expert ids {expert_ids}, counts {counts}, slices {numbers} of {of}: must match"
        )
    units = [Unit(header.layer, *each) for each in zip(expert_ids, numbers, of, strict=True)]
    if any(before >= after for before, after in pairwise(units)):
        raise WireError(f"expert ids {expert_ids}, slices {numbers} of {of}: must ascend")
    if expert_ids and expert_ids[-1] >= config.num_local_experts:
        raise WireError(f"expert {expert_ids[-1]} of {config.num_local_experts}")
    for unit in units:
        if not unit.slice_number < unit.num_slices <= config.intermediate_size:
            raise WireError(
                f"slice {unit.slice_number} of {unit.num_slices} of expert {unit.expert_id}: "
                f"there are up to {config.intermediate_size}"
            )
    if 0 in counts:
        raise WireError(f"an expert without rows: counts {counts}")
    # No row goes to an expert twice. Else a message of nothing but numbers of one row would make us
    # gather, and compute, hundreds of times its own size.
    if counts and max(counts) > header.num_rows:
        raise WireError(f"more rows for an expert than the {header.num_rows} there are: {counts}")
    return tuple(zip(units, counts, strict=True))


def call_id_of(message: Buffer) -> int:
    """The id of a call that decode_call refused, if at least that can be read, else 0."""
    try:
        header = expert_pb2.CallHeader.FromString(bytes(_split(message, num_fields=4)[0]))
    except (WireError, DecodeError):
        return 0
    return int(header.call_id)


def encode_reply(call_id: int, incarnation: int, sums_RD: Tensor, compute_s: float) -> Parts:
    """Serialise the sums of one call, (R, D) float32."""
    num_rows, hidden_size = sums_RD.shape
    header = expert_pb2.ReplyHeader(
        call_id=call_id,
        incarnation=incarnation,
        num_rows=num_rows,
        hidden_size=hidden_size,
        compute_ns=int(compute_s * 1e9),
    )
    return _fields(header.SerializeToString(), _bytes_of(sums_RD.float()))


def encode_error(
    call_id: int, incarnation: int, error: expert_pb2.ErrorCode, message: str
) -> Parts:
    """Serialise a refusal of one call."""
    header = expert_pb2.ReplyHeader(
        call_id=call_id, incarnation=incarnation, error=error, message=message[:1_000]
    )
    return _fields(header.SerializeToString())


def decode_reply(message: Buffer) -> Reply:
    """Read and check a reply. The sums lie in `message`; whose they are, the caller must compare.

    Raises WireError when anything does not add up.
    """
    header_bytes, sums = _split(message, num_fields=2)
    header = expert_pb2.ReplyHeader()
    try:
        header.ParseFromString(bytes(header_bytes))
    except DecodeError as error:
        raise WireError(f"the header does not parse: {error}") from error
    sums_RD = _tensor_of("sums", sums, torch.float32, header.num_rows * header.hidden_size)
    return Reply(
        call_id=header.call_id,
        incarnation=header.incarnation,
        sums_RD=sums_RD.view(header.num_rows, header.hidden_size),
        error=header.error,
        message=header.message,
        compute_s=header.compute_ns / 1e9,
    )


def _bytes_of(tensor: Tensor) -> memoryview:
    """A tensor's bytes, without copying where it already lies contiguous on the CPU."""
    if tensor.device.type != "cpu":
        tensor = tensor.cpu()
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data


def _tensor_of(name: str, data: memoryview, dtype: torch.dtype, num_elements: int) -> Tensor:
    if len(data) != num_elements * dtype.itemsize:
        raise WireError(
            f"{name} has {len(data)} bytes, {num_elements} values of {dtype} take "
            f"{num_elements * dtype.itemsize}"
        )
    if not num_elements:
        return torch.empty(0, dtype=dtype)
    return torch.frombuffer(data, dtype=dtype)


def _fields(*fields: bytes | memoryview) -> Parts:
    """Fields 1, 2, ... of a message, all length-delimited."""
    parts: list[bytes | memoryview] = []
    for number, data in enumerate(fields, start=1):
        parts.append(_varint(number << 3 | _LENGTH_DELIMITED) + _varint(len(data)))
        parts.append(data)
    return tuple(parts)


def _split(message: Buffer, *, num_fields: int) -> list[memoryview]:
    """The inverse of `_fields`, without copying. A field that is left out is empty."""
    view = memoryview(message)
    fields = [view[:0]] * num_fields
    offset, last = 0, 0
    while offset < len(view):
        tag, offset = _read_varint(view, offset)
        length, offset = _read_varint(view, offset)
        number, wire_type = tag >> 3, tag & 7
        if wire_type != _LENGTH_DELIMITED or not last < number <= num_fields:
            raise WireError(
                f"unexpected field {number} of wire type {wire_type} after field {last}"
            )
        if length > len(view) - offset:
            raise WireError(f"field {number} claims {length} bytes, {len(view) - offset} are left")
        fields[number - 1] = view[offset : offset + length]
        offset += length
        last = number
    if not last:
        raise WireError("the message is empty")
    return fields


def _varint(number: int) -> bytes:
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)


def _read_varint(view: memoryview, offset: int) -> tuple[int, int]:
    number = 0
    for shift in range(0, 64, 7):
        if offset >= len(view):
            raise WireError("the message ends within a number")
        byte = view[offset]
        offset += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, offset
    raise WireError("a number is longer than 64 bits")

"""Messages that no honest peer sends, and what a server must do with them: answer the next one.

Mutations are of bytes (flipped, cut, doubled, random) and of fields (numbers, strings and lists set
to what breaks programs). All draws come from the generator that is given.
"""

import queue
import random
import socket
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import grpc
import torch
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message

from cluster import PROTOCOL_VERSION, rpc, wire
from cluster.wire import Call
from model.config import MixtralConfig
from model.experts import Assignments
from model.units import Unit
from protos import expert_pb2, head_pb2, peer_pb2

DEADLINE_S = 60.0
"""For a batch of messages and the good one after it; only a hang comes near it."""

PORT_SHARE = 0.002
"""Of the messages that go to the bare TCP port, not through gRPC."""
HELLO_SHARE = 0.05

_INTS = (0, 1, 2, 15, 16, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1)
_FLOATS = (0.0, -0.0, 1.0, -1.0, 1e-320, 1e38, -1e308, float("inf"), float("-inf"), float("nan"))
_STRINGS = ("", "a", "\0", "ü\u2028😀", "regex", "(a|", '{"type": "object"}', "x" * 70_000)
_BOUNDS = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
    FieldDescriptor.CPPTYPE_ENUM: (-(2**31), 2**31 - 1),
}


# --- mutations ---


def fuzzed(rng: random.Random, valid: Message) -> bytes:
    """A message that began as this valid one; left as it is now and then."""
    kind = rng.random()
    if kind < 0.1:
        return rng.randbytes(rng.choice([0, 1, 5, 50, 5_000]))
    if kind < 0.55:
        for _ in range(rng.choice([1, 1, 1, 2, 4])):
            _mutate_field(rng, valid)
        return valid.SerializeToString()
    data = valid.SerializeToString()
    for _ in range(rng.choice([0, 1, 1, 1, 3])):
        data = _mutated_bytes(rng, data)
    return data


def _mutated_bytes(rng: random.Random, data: bytes) -> bytes:
    begin, end = sorted(rng.randint(0, len(data)) for _ in range(2))
    # mostly near the front, where lengths, ids and counts are
    at = rng.randrange(max(1, min(len(data), rng.choice([8, 64, 1 << 30]))))
    match rng.randrange(5):
        case 0:
            flipped = bytes([data[at] ^ 1 << rng.randrange(8)]) if data else b""
            return data[:at] + flipped + data[at + 1 :]
        case 1:
            return data[:at] + rng.randbytes(rng.randint(1, 9)) + data[at:]
        case 2:
            return data[:begin] + data[end:]
        case 3:
            return data[:end] + data[begin:end] + data[end:]
        case _:
            return data[: rng.randint(0, len(data))]


def _mutate_field(rng: random.Random, message: Message) -> None:
    field = rng.choice(message.DESCRIPTOR.fields)
    if field.is_repeated:
        _mutate_list(rng, field, getattr(message, field.name))
    elif rng.random() < 0.1:
        message.ClearField(field.name)
    elif field.message_type is not None:
        nested = getattr(message, field.name)
        nested.SetInParent()
        if field.message_type.fields:
            _mutate_field(rng, nested)
    else:
        setattr(message, field.name, _value(rng, field))


def _mutate_list(rng: random.Random, field: FieldDescriptor, values: Any) -> None:
    if values and rng.random() < 0.3:
        del values[rng.randrange(len(values))]
    elif field.message_type is not None:
        _mutate_field(rng, values.add())
    elif values and rng.random() < 0.4:
        values[rng.randrange(len(values))] = _value(rng, field)
    else:
        values.extend([_value(rng, field)] * rng.choice([1, 1, 2, 2_000]))


def _value(rng: random.Random, field: FieldDescriptor) -> Any:
    match field.cpp_type:
        case FieldDescriptor.CPPTYPE_BOOL:
            return rng.random() < 0.5
        case FieldDescriptor.CPPTYPE_DOUBLE | FieldDescriptor.CPPTYPE_FLOAT:
            return rng.choice([*_FLOATS, rng.uniform(-3, 3)])
        case FieldDescriptor.CPPTYPE_STRING:
            text = rng.choice(_STRINGS)
            return text.encode() if field.type == FieldDescriptor.TYPE_BYTES else text
    low, high = _BOUNDS[field.cpp_type]
    number = rng.choice([*_INTS, rng.randint(0, 2_100)]) * rng.choice([1, 1, -1])
    return min(max(number, low), high)


# --- valid messages ---


def valid_call(rng: random.Random, config: MixtralConfig, call_id: int) -> expert_pb2.ComputeCall:
    """A few rows for some experts of a layer."""
    num_rows = rng.randint(1, 5)
    expert_ids = sorted(rng.sample(range(config.num_local_experts), rng.randint(1, 3)))
    layer = rng.randrange(config.num_hidden_layers)
    counts = [(Unit(layer, expert_id), rng.randint(1, num_rows)) for expert_id in expert_ids]
    num_assignments = sum(count for _, count in counts)
    call = Call(
        call_id=call_id,
        epoch=1,
        layer=layer,
        x_RD=torch.full((num_rows, config.hidden_size), rng.uniform(-1, 1)),
        assignments=Assignments(
            tuple(counts),
            torch.tensor([rng.randrange(num_rows) for _ in range(num_assignments)]),
            torch.full((num_assignments,), 0.5),
        ),
    )
    return expert_pb2.ComputeCall.FromString(wire.joined(wire.encode_call(call)))


def valid_request(rng: random.Random, request_id: int) -> head_pb2.HeadRequest:
    """Something to continue, with all that can be asked for, or to give up."""
    if rng.random() < 0.1:
        return head_pb2.HeadRequest(abort=head_pb2.Abort(request_id=rng.randint(1, request_id)))
    submit = good_submit(request_id, [rng.randint(3, 2_000) for _ in range(rng.randint(1, 30))])
    submit.client = rng.choice("abc")
    submit.params.temperature = rng.choice([0.0, 0.8])
    submit.params.max_tokens = rng.randint(1, 8)
    if rng.random() < 0.3:
        submit.params.logprobs = 3
        submit.params.prompt_logprobs = 3
        submit.params.logit_bias.add(token_id=5, bias=1.0)
        submit.params.bad_words.add(token_ids=[7, 8])
        submit.params.num_drafts = 2
    if rng.random() < 0.1:
        grammar = rng.choice([("regex", "[0-9]{1,4}"), ("json_object", ""), ("choice", '["a"]')])
        submit.params.grammar.kind, submit.params.grammar.text = grammar
    return head_pb2.HeadRequest(submit=submit)


def good_submit(request_id: int, token_ids: list[int], max_tokens: int = 4) -> head_pb2.Submit:
    """A plain greedy request."""
    return head_pb2.Submit(
        request_id=request_id,
        token_ids=token_ids,
        client="good",
        params=head_pb2.SamplingParams(
            max_tokens=max_tokens, top_p=1, typical_p=1, repetition_penalty=1
        ),
    )


# --- campaigns ---


def fuzz_worker(
    rng: random.Random, channel: grpc.Channel, address: str, config: MixtralConfig, number: int
) -> None:
    """Send so many messages to a worker that holds every expert; every call must be answered.

    Then a good call must be computed as ever. Raises AssertionError or grpc.RpcError.
    """
    num_others = fuzz_door(rng, channel, address, rpc.EXPERT_SERVICE, number)
    messages = [
        fuzzed(rng, valid_call(rng, config, call_id)) for call_id in range(number - num_others)
    ]
    good = valid_call(random.Random(0), config, 2**64 - 1)
    compute = channel.stream_stream(f"/{rpc.EXPERT_SERVICE}/Compute")
    replies = compute(iter([*messages, good.SerializeToString()]), timeout=DEADLINE_S)
    decoded = [wire.decode_reply(reply) for reply in replies]
    assert len(decoded) == len(messages) + 1, "a call was not answered"
    last = decoded[-1]
    assert (last.call_id, last.error) == (2**64 - 1, expert_pb2.ERROR_NONE), last.message
    assert last.sums_RD.isfinite().all()
    failed = {reply.message for reply in decoded if reply.error == expert_pb2.ERROR_INTERNAL}
    assert not failed, f"calls that should have been refused were tried: {failed}"


def fuzz_head(
    rng: random.Random, channel: grpc.Channel, address: str, number: int
) -> tuple[int, ...]:
    """Send so many messages to a head, then a good request; returns the ids that it drew.

    Raises AssertionError or grpc.RpcError.
    """
    generate = channel.stream_stream(f"/{rpc.HEAD_SERVICE}/Generate")
    num_others = fuzz_door(rng, channel, address, rpc.HEAD_SERVICE, number)
    messages = [fuzzed(rng, valid_request(rng, 1 + at)) for at in range(number - num_others)]
    readable = [message for message in messages if _parses(message)]
    for message in messages:
        if not _parses(message):
            code = _code_of(generate(iter([message]), timeout=DEADLINE_S))
            assert code is grpc.StatusCode.INTERNAL, f"{message!r} was answered with {code}"
    good_id = 2**60 + 1
    good = head_pb2.HeadRequest(submit=good_submit(good_id, [1, 5, 9])).SerializeToString()
    outgoing: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    for message in (*readable, good):
        outgoing.put(message)
    try:
        return _ids_of(good_id, generate(iter(outgoing.get, None), timeout=DEADLINE_S))
    finally:
        outgoing.put(None)  # only now: the head ends a stream whose caller has said all


def fuzz_door(
    rng: random.Random, channel: grpc.Channel, address: str, service: str, number: int
) -> int:
    """Some fuzz for the handshake and for the bare port; returns how many messages that were."""
    hello = channel.unary_unary(f"/{service}/Hello")
    num_hellos = round(number * HELLO_SHARE)
    for _ in range(num_hellos):
        request = peer_pb2.HelloRequest(
            protocol=PROTOCOL_VERSION, build="1", peer="p", fingerprint="f"
        )
        try:
            hello(fuzzed(rng, request), timeout=DEADLINE_S)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                raise AssertionError("a handshake hangs") from error
    num_raw = max(1, round(number * PORT_SHARE))
    host, port = address.rsplit(":", 1)
    for _ in range(num_raw):
        with socket.create_connection((host, int(port)), timeout=DEADLINE_S) as connection:
            preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" if rng.random() < 0.5 else b""
            with suppress(ConnectionError):
                connection.sendall(preface + rng.randbytes(rng.randint(1, 2_000)))
    return num_hellos + num_raw


def _ids_of(request_id: int, steps: Iterator[bytes]) -> tuple[int, ...]:
    """What a head drew for a request."""
    token_ids: list[int] = []
    for step in steps:
        for event in head_pb2.StepEvents.FromString(step).events:
            if event.request_id == request_id:
                token_ids += event.token_ids
                assert not event.error, event.error
                if event.finish:
                    return tuple(token_ids)
    raise AssertionError("the stream ended without the request's answer")


def _parses(message: bytes) -> bool:
    try:
        head_pb2.HeadRequest.FromString(message)
    except DecodeError:
        return False
    return True


def _code_of(replies: Iterator[bytes]) -> grpc.StatusCode:
    """How a stream ends, whatever comes before."""
    try:
        for _ in replies:
            pass
    except grpc.RpcError as error:
        return error.code()
    return grpc.StatusCode.OK

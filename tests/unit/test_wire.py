"""What a head and a worker send each other arrives as it was, or is refused by name."""

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cluster import rpc, wire
from cluster.errors import WireError
from model.config import MixtralConfig
from model.experts import Assignments, assign
from model.router import Routing
from model.units import Unit
from protos import expert_pb2

CONFIG = MixtralConfig(
    hidden_size=6, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1, head_dim=4
)
DTYPES = {
    torch.float32: expert_pb2.DTYPE_FLOAT32,
    torch.bfloat16: expert_pb2.DTYPE_BFLOAT16,
    torch.float16: expert_pb2.DTYPE_FLOAT16,
}


def call_of(
    *,
    num_rows: int = 3,
    per_expert: dict[int, int] | dict[tuple[int, ...], int] | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **fields: int,
) -> wire.Call:
    """A valid call. per_expert: how many assignments each expert (id, or id and slice) gets."""
    generator = torch.Generator().manual_seed(seed)
    per_expert = {1: 2, 4: 1} if per_expert is None else per_expert
    num_assignments = sum(per_expert.values())
    layer = fields.get("layer", 1)
    units = [Unit(layer, *((e,) if isinstance(e, int) else e)) for e in per_expert]
    return wire.Call(
        call_id=fields.get("call_id", 7),
        epoch=fields.get("epoch", 2),
        layer=layer,
        x_RD=torch.randn(num_rows, CONFIG.hidden_size, generator=generator).to(dtype),
        assignments=Assignments(
            counts=tuple(zip(units, per_expert.values(), strict=True)),
            rows_A=torch.randint(0, max(num_rows, 1), (num_assignments,), generator=generator),
            weights_A=torch.rand(num_assignments, generator=generator),
        ),
    )


@st.composite
def calls(draw: st.DrawFn) -> wire.Call:
    num_rows = draw(st.integers(0, 9))
    of = st.integers(1, 3)
    slices = of.flatmap(lambda n: st.tuples(st.integers(0, n - 1), st.just(n)))
    expert_ids = st.integers(0, CONFIG.num_local_experts - 1)
    units = st.tuples(expert_ids, slices).map(lambda each: (each[0], *each[1]))
    experts = draw(st.sets(units)) if num_rows else set()
    return call_of(
        num_rows=num_rows,
        per_expert={each: draw(st.integers(1, num_rows)) for each in sorted(experts)},
        dtype=draw(st.sampled_from(list(DTYPES))),
        seed=draw(st.integers(0, 2**32)),
        call_id=draw(st.integers(1, 2**64 - 1)),
        epoch=draw(st.integers(1, 2**64 - 1)),
        layer=draw(st.integers(0, CONFIG.num_hidden_layers - 1)),
    )


def assert_same_call(actual: wire.Call, expected: wire.Call) -> None:
    assert (actual.call_id, actual.epoch, actual.layer) == (
        expected.call_id,
        expected.epoch,
        expected.layer,
    )
    assert actual.assignments.counts == expected.assignments.counts
    assert_same_tensor(actual.x_RD, expected.x_RD)
    assert_same_tensor(actual.assignments.rows_A, expected.assignments.rows_A)
    assert_same_tensor(actual.assignments.weights_A, expected.assignments.weights_A)


def assert_same_tensor(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    assert torch.equal(actual, expected)


def bytes_of(tensor: Tensor) -> bytes:
    return bytes(tensor.contiguous().view(-1).view(torch.uint8).tolist())


def proto_of(call: wire.Call) -> expert_pb2.ComputeCall:
    """The same call, built as any protobuf implementation would."""
    units = [unit for unit, _ in call.assignments.counts]
    are_whole = all(unit.num_slices == 1 for unit in units)
    return expert_pb2.ComputeCall(
        header=expert_pb2.CallHeader(
            call_id=call.call_id,
            epoch=call.epoch,
            layer=call.layer,
            num_rows=call.x_RD.shape[0],
            hidden_size=call.x_RD.shape[1],
            dtype=DTYPES[call.x_RD.dtype],
            expert_ids=[unit.expert_id for unit in units],
            expert_counts=[count for _, count in call.assignments.counts],
            slice_numbers=[] if are_whole else [unit.slice_number for unit in units],
            num_slices=[] if are_whole else [unit.num_slices for unit in units],
        ),
        rows=bytes_of(call.x_RD),
        row_numbers=bytes_of(call.assignments.rows_A.to(torch.int32)),
        weights=bytes_of(call.assignments.weights_A),
    )


def decode(message: bytes, dtype: torch.dtype = torch.float32) -> wire.Call:
    return wire.decode_call(message, CONFIG, dtype)


# --- round trips ---


@given(call=calls())
def test_a_call_arrives_as_it_was_sent(call: wire.Call) -> None:
    assert_same_call(decode(wire.joined(wire.encode_call(call)), call.x_RD.dtype), call)


@given(call=calls())
def test_a_call_is_the_protobuf_message_of_the_contract(call: wire.Call) -> None:
    assert expert_pb2.ComputeCall.FromString(wire.joined(wire.encode_call(call))) == proto_of(call)
    by_protobuf = proto_of(call).SerializeToString()
    assert_same_call(decode(by_protobuf, call.x_RD.dtype), call)


@given(
    num_rows=st.integers(0, 9),
    hidden_size=st.integers(1, 9),
    call_id=st.integers(0, 2**64 - 1),
    incarnation=st.integers(1, 2**64 - 1),
    seed=st.integers(0, 2**32),
)
def test_a_reply_arrives_as_it_was_sent_and_is_the_contracts_message(
    num_rows: int, hidden_size: int, call_id: int, incarnation: int, seed: int
) -> None:
    sums_RD = torch.randn(num_rows, hidden_size, generator=torch.Generator().manual_seed(seed))
    message = wire.joined(wire.encode_reply(call_id, incarnation, sums_RD, 0.25))
    reply = wire.decode_reply(message)
    assert (reply.call_id, reply.incarnation, reply.error) == (call_id, incarnation, 0)
    assert (reply.message, reply.compute_s) == ("", 0.25)
    assert_same_tensor(reply.sums_RD, sums_RD)

    proto = expert_pb2.ComputeReply(
        header=expert_pb2.ReplyHeader(
            call_id=call_id,
            incarnation=incarnation,
            num_rows=num_rows,
            hidden_size=hidden_size,
            compute_ns=250_000_000,
        ),
        sums=bytes_of(sums_RD),
    )
    assert expert_pb2.ComputeReply.FromString(message) == proto
    assert_same_tensor(wire.decode_reply(proto.SerializeToString()).sums_RD, sums_RD)


def test_sums_of_a_smaller_type_travel_in_float32() -> None:
    sums_RD = torch.tensor([[1.5, -2.25]], dtype=torch.bfloat16)
    assert_same_tensor(
        wire.decode_reply(wire.joined(wire.encode_reply(1, 1, sums_RD, 0.0))).sums_RD,
        sums_RD.float(),
    )


@given(text=st.text(max_size=2_000), error=st.sampled_from([1, 2, 3, 4]))
def test_an_error_reply_carries_its_reason_and_no_rows(text: str, error: int) -> None:
    message = wire.joined(wire.encode_error(5, 9, expert_pb2.ErrorCode.Name(error), text))  # type: ignore[arg-type]
    reply = wire.decode_reply(message)
    assert (reply.call_id, reply.incarnation, reply.error) == (5, 9, error)
    assert reply.message == text[:1_000]
    assert reply.sums_RD.numel() == 0


def test_rows_that_are_a_view_of_others_travel_as_what_they_show() -> None:
    whole_TD = torch.arange(48.0).view(8, 6)
    call = call_of(num_rows=4)
    strided = wire.Call(7, 2, 1, whole_TD[::2], call.assignments)
    assert_same_tensor(decode(wire.joined(wire.encode_call(strided))).x_RD, whole_TD[::2])


# --- no copies ---


def test_decoded_tensors_lie_in_the_message() -> None:
    message = wire.joined(wire.encode_call(call_of()))
    call = decode(message)
    assert_lies_in(message, call.x_RD)
    assert_lies_in(message, call.assignments.weights_A)
    message = wire.joined(wire.encode_reply(1, 1, torch.ones(2, 3), 0.0))
    assert_lies_in(message, wire.decode_reply(message).sums_RD)


def assert_lies_in(message: bytes, tensor: Tensor) -> None:
    begin = torch.frombuffer(message, dtype=torch.uint8).data_ptr()
    assert begin <= tensor.data_ptr() <= begin + len(message) - tensor.nbytes


def test_decoded_tensors_keep_their_message_alive() -> None:
    expected = call_of(num_rows=9, seed=3)
    call = decode(wire.joined(wire.encode_call(expected)))  # nobody else holds the bytes
    assert_same_call(call, expected)


# --- size ---


def test_the_largest_step_there_may_be_fits_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rpc, "MAX_MESSAGE_BYTES", 2**20)
    largest = 2**64 - 1
    num_rows = rpc.max_step_tokens(CONFIG)
    expert_ids_TK = torch.tensor([[0, 1], [6, 7]]).repeat(num_rows, 1)[:num_rows]
    call = wire.Call(
        call_id=largest,
        epoch=largest,
        layer=2,
        x_RD=torch.zeros(num_rows, CONFIG.hidden_size),
        assignments=assign(2, Routing(expert_ids_TK, torch.ones(num_rows, 2))),
    )
    reply = wire.joined(wire.encode_reply(largest, largest, call.x_RD, compute_s=1.0))
    assert len(reply) <= len(wire.joined(wire.encode_call(call))) <= 2**20


def test_mixtrals_largest_steps_are_those_that_the_settings_name() -> None:
    config = MixtralConfig()
    assert rpc.max_step_tokens(config) == 16_364
    assert rpc.max_step_tokens(replace(config, hidden_size=6_144)) == 10_912


# --- lies ---


def header(**changes: Any) -> dict[str, Any]:
    return {"header": changes}


LIES: list[tuple[str, dict[str, Any], str]] = [
    ("epoch 0", header(epoch=0), "epoch 0"),
    ("layer beyond the last", header(layer=3), "layer 3 of 3"),
    ("layer far beyond", header(layer=2**32 - 1), "layer 4294967295 of 3"),
    ("other dtype", header(dtype=2), "rows are DTYPE_BFLOAT16"),
    ("no dtype", header(dtype=0), "rows are DTYPE_UNSPECIFIED"),
    ("unknown dtype", header(dtype=77), "dtype number 77 is unknown"),
    ("negative dtype", header(dtype=-1), "dtype number -1 is unknown"),
    ("hidden size too small", header(hidden_size=5), "hidden size 5, here 6"),
    ("hidden size 0", header(hidden_size=0), "hidden size 0, here 6"),
    ("too many rows", header(num_rows=4), "rows has 72 bytes, 24 values"),
    ("too few rows", header(num_rows=1), r"more rows for an expert than the 1 there are: \[2, 1\]"),
    ("absurdly many rows", header(num_rows=2**32 - 1), "rows has 72 bytes"),
    ("no rows", header(num_rows=0), "more rows for an expert than the 0 there are"),
    ("unsorted experts", header(expert_ids=[4, 1]), r"ids \[4, 1\], slices .*: must ascend"),
    ("an expert twice", header(expert_ids=[4, 4]), r"ids \[4, 4\], slices .*: must ascend"),
    (
        "a slice twice",
        header(expert_ids=[4, 4], slice_numbers=[1, 1], num_slices=[2, 2]),
        r"slices \[1, 1\] of \[2, 2\]: must ascend",
    ),
    (
        "a slice beyond the last",
        header(slice_numbers=[0, 2], num_slices=[1, 2]),
        "slice 2 of 2 of expert 4: there are up to 14336",
    ),
    (
        "a slice of none",
        header(slice_numbers=[0, 0], num_slices=[1, 0]),
        "slice 0 of 0 of expert",
    ),
    (
        "slices without columns",
        header(slice_numbers=[0, 0], num_slices=[1, 2**32 - 1]),
        "slice 0 of 4294967295 of expert 4",
    ),
    ("slices of nothing", header(slice_numbers=[0, 0]), r"slices \[0, 0\] of \[\]: must match"),
    ("too few slices", header(slice_numbers=[0], num_slices=[1]), r"\[0\] of \[1\]: must match"),
    ("expert out of range", header(expert_ids=[1, 8]), "expert 8 of 8"),
    ("absurd expert", header(expert_ids=[1, 2**32 - 1]), "expert 4294967295 of 8"),
    ("too few experts", header(expert_ids=[1]), r"\[1\], counts \[2, 1\]"),
    ("too few counts", header(expert_counts=[3]), r"\[1, 4\], counts \[3\]"),
    ("an empty expert", header(expert_counts=[3, 0]), "without rows"),
    ("counts too large", header(expert_counts=[2, 2]), "row_numbers has 12 bytes, 4 values"),
    ("counts too small", header(expert_counts=[1, 1]), "row_numbers has 12 bytes, 2 values"),
    ("absurd counts", header(expert_counts=[2**32 - 1] * 2), "more rows for an expert than"),
    (
        "one row again and again",
        header(expert_ids=[1], expert_counts=[4])
        | {"row_numbers": b"\0" * 16, "weights": b"\0" * 16},
        r"more rows for an expert than the 3 there are: \[4\]",
    ),
    ("rows cut", {"rows": b"\0" * 71}, "rows has 71 bytes"),
    ("rows too long", {"rows": b"\0" * 73}, "rows has 73 bytes"),
    ("rows left out", {"rows": b""}, "rows has 0 bytes"),
    ("row numbers cut", {"row_numbers": b"\0" * 11}, "row_numbers has 11 bytes"),
    ("row numbers left out", {"row_numbers": b""}, "row_numbers has 0 bytes"),
    ("weights cut", {"weights": b"\0" * 8}, "weights has 8 bytes"),
    ("weights too long", {"weights": b"\0" * 16}, "weights has 16 bytes"),
    ("weights left out", {"weights": b""}, "weights has 0 bytes"),
    (
        "a row number too large",
        {"row_numbers": bytes_of(torch.tensor([0, 3, 1], dtype=torch.int32))},
        "a row number is outside the 3 rows",
    ),
    (
        "a negative row number",
        {"row_numbers": bytes_of(torch.tensor([0, -1, 1], dtype=torch.int32))},
        "a row number is outside the 3 rows",
    ),
]


@pytest.mark.parametrize(("changes", "reason"), [lie[1:] for lie in LIES], ids=[x[0] for x in LIES])
def test_a_lie_is_refused_by_name(changes: dict[str, Any], reason: str) -> None:
    proto = proto_of(call_of())
    for field, value in changes.items():
        if field != "header":
            setattr(proto, field, value)
    for field, value in changes.get("header", {}).items():
        if isinstance(value, list):
            getattr(proto.header, field)[:] = value
        else:
            setattr(proto.header, field, value)
    message = proto.SerializeToString()
    with pytest.raises(WireError, match=reason):
        decode(message)
    assert wire.call_id_of(message) == 7  # so that the refusal reaches its call


def test_a_call_without_header_is_refused() -> None:
    with pytest.raises(WireError, match="epoch 0"):
        decode(expert_pb2.ComputeCall(rows=b"abcd").SerializeToString())
    with pytest.raises(WireError, match="empty"):
        decode(b"")
    with pytest.raises(WireError, match="empty"):
        wire.decode_reply(b"")


@pytest.mark.parametrize("sums", [b"", b"\0" * 23, b"\0" * 25])
def test_a_reply_whose_sums_do_not_match_its_shape_is_refused(sums: bytes) -> None:
    proto = expert_pb2.ComputeReply(
        header=expert_pb2.ReplyHeader(call_id=1, num_rows=2, hidden_size=3), sums=sums
    )
    with pytest.raises(WireError, match=f"sums has {len(sums)} bytes, 6 values"):
        wire.decode_reply(proto.SerializeToString())


def test_a_message_cut_anywhere_is_refused() -> None:
    call = wire.joined(wire.encode_call(call_of()))
    reply = wire.joined(wire.encode_reply(3, 4, torch.ones(2, 3), 0.0))
    for length in range(len(call)):
        with pytest.raises(WireError):
            decode(call[:length])
    for length in range(len(reply)):
        with pytest.raises(WireError):
            wire.decode_reply(reply[:length])


@pytest.mark.parametrize(
    ("tail", "reason"),
    [
        (b"\x2a\x00", "unexpected field 5 of wire type 2 after field 4"),
        (b"\x22\x00", "unexpected field 4 of wire type 2 after field 4"),  # weights twice
        (b"\x0a\x00", "unexpected field 1 of wire type 2 after field 4"),  # out of order
        (b"\x28\x00", "unexpected field 5 of wire type 0"),
        (b"\x00", "a number|unexpected field 0"),
        (b"\xff" * 11, "longer than 64 bits"),
        (b"\xff" * 9, "ends within a number"),
        (b"\x2a", "ends within a number"),
    ],
)
def test_what_the_contract_does_not_know_is_refused(tail: bytes, reason: str) -> None:
    with pytest.raises(WireError, match=reason):
        decode(wire.joined(wire.encode_call(call_of())) + tail)


def test_a_field_longer_than_the_message_is_refused() -> None:
    with pytest.raises(WireError, match="field 1 claims 5 bytes, 2 are left"):
        decode(b"\x0a\x05ab")
    with pytest.raises(WireError, match=f"field 1 claims {2**63} bytes, 0 are left"):
        decode(b"\x0a" + b"\x80" * 9 + b"\x01")
    with pytest.raises(WireError, match="longer than 64 bits"):
        decode(b"\x0a" + b"\x80" * 10 + b"\x01")


def test_an_unreadable_header_is_refused() -> None:
    with pytest.raises(WireError, match="header does not parse"):
        decode(b"\x0a\x02\x08\xff")
    with pytest.raises(WireError, match="header does not parse"):
        wire.decode_reply(b"\x0a\x02\x08\xff")
    # text that is not UTF-8
    with pytest.raises(WireError, match="header does not parse"):
        wire.decode_reply(b"\x0a\x03\x32\x01\xff")
    assert wire.call_id_of(b"\x0a\x02\x08\xff") == 0
    assert wire.call_id_of(b"") == 0


# --- anything ---


def decode_everything(message: bytes) -> None:
    """Whatever it is, it decodes to something consistent or raises WireError."""
    wire.call_id_of(message)
    try:
        call = decode(message)
    except WireError:
        pass
    else:
        assert call.x_RD.shape[1] == CONFIG.hidden_size
        assert 0 <= call.layer < CONFIG.num_hidden_layers
        rows_A = call.assignments.rows_A
        assert len(rows_A) == len(call.assignments.weights_A)
        assert len(rows_A) == sum(count for _, count in call.assignments.counts)
        assert ((rows_A >= 0) & (rows_A < len(call.x_RD))).all()
        assert all(count <= len(call.x_RD) for _, count in call.assignments.counts)
    try:
        reply = wire.decode_reply(message)
    except WireError:
        pass
    else:
        assert reply.sums_RD.dim() == 2


@given(message=st.binary(max_size=200))
def test_random_bytes_raise_nothing_but_wire_errors(message: bytes) -> None:
    decode_everything(message)


@given(seed=st.integers(0, 2**32))
def test_random_damage_raises_nothing_but_wire_errors(seed: int) -> None:
    rng = random.Random(seed)
    for message in (
        wire.joined(wire.encode_call(call_of(seed=seed))),
        wire.joined(wire.encode_reply(2**63, 2**63, torch.ones(1, 2), 0.1)),
        wire.joined(wire.encode_error(1, 1, expert_pb2.ERROR_INTERNAL, "söme reason")),
    ):
        for _ in range(40):
            damaged = bytearray(message)
            for _ in range(rng.randint(1, 3)):
                # most of it near the start, where the header is
                at = min(rng.randrange(len(damaged)), rng.randrange(len(damaged)))
                match rng.randrange(4):
                    case 0:
                        damaged[at] = rng.randrange(256)
                    case 1:
                        damaged[at] ^= 1 << rng.randrange(8)
                    case 2:
                        del damaged[at : at + rng.randint(1, 4)]
                    case 3:
                        damaged[at:at] = rng.randbytes(rng.randint(1, 4))
                if not damaged:
                    damaged = bytearray(b"\0")
            decode_everything(bytes(damaged))

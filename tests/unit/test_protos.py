"""The committed code is what the contracts generate, and the contracts keep their word."""

import subprocess
import sys
from pathlib import Path

import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.descriptor_pb2 import DescriptorProto

import protos
from protos import expert_pb2, head_pb2, lender_pb2, maestrale_pb2, peer_pb2

FOLDER = Path(protos.__file__).parent
CONTRACTS = sorted(path.name for path in FOLDER.glob("*.proto"))


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of freshly generated code."""
    out = tmp_path_factory.mktemp("generated")
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I", "."]
    command += [f"--{kind}={out}" for kind in ("python_out", "pyi_out", "grpc_python_out")]
    command += [f"protos/{name}" for name in CONTRACTS]
    ran = subprocess.run(
        command, cwd=FOLDER.parent, capture_output=True, text=True, timeout=60, check=False
    )
    assert ran.returncode == 0, ran.stderr
    return out / "protos"


def test_generating_the_code_again_gives_the_committed_files(generated: Path) -> None:
    fresh = {path.name: path.read_bytes() for path in generated.iterdir()}
    committed = {path.name: path.read_bytes() for path in FOLDER.glob("*_pb2*.py*")}
    assert sorted(fresh) == sorted(committed)
    stale = [name for name in fresh if fresh[name] != committed[name]]
    assert stale == [], "run `make protos`"


def messages() -> list[Descriptor]:
    files = (expert_pb2, head_pb2, lender_pb2, maestrale_pb2, peer_pb2)
    return [m for file in files for m in file.DESCRIPTOR.message_types_by_name.values()]


@pytest.mark.parametrize("message", messages(), ids=lambda message: message.full_name)
def test_field_numbers_start_at_one_and_leave_no_gap(message: Descriptor) -> None:
    """A number that is dropped later must be marked reserved."""
    definition = DescriptorProto()
    message.CopyToProto(definition)
    numbers = [field.number for field in definition.field]
    for kept_free in definition.reserved_range:
        numbers += range(kept_free.start, kept_free.end)
    assert sorted(numbers) == list(range(1, len(numbers) + 1))


@pytest.mark.parametrize("name", ["ComputeCall", "ComputeReply"])
def test_large_fields_come_last(name: str) -> None:
    """`cluster.wire` appends them by hand."""
    first, *others = expert_pb2.DESCRIPTOR.message_types_by_name[name].fields
    assert first.type == FieldDescriptor.TYPE_MESSAGE
    assert others
    assert all(field.type == FieldDescriptor.TYPE_BYTES for field in others)


@pytest.mark.parametrize(
    "enum",
    [
        enum
        for file in (expert_pb2, head_pb2, lender_pb2, maestrale_pb2, peer_pb2)
        for enum in file.DESCRIPTOR.enum_types_by_name.values()
    ],
    ids=lambda enum: enum.full_name,
)
def test_the_zero_of_an_enum_asks_for_nothing(enum: object) -> None:
    """A field that a sender leaves out reads as zero."""
    (zero,) = [value.name for value in enum.values if value.number == 0]  # type: ignore[attr-defined]
    assert zero.endswith(("_NONE", "_UNSPECIFIED"))

from protos import peer_pb2 as _peer_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DTYPE_UNSPECIFIED: _ClassVar[DType]
    DTYPE_FLOAT32: _ClassVar[DType]
    DTYPE_BFLOAT16: _ClassVar[DType]
    DTYPE_FLOAT16: _ClassVar[DType]

class ErrorCode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ERROR_NONE: _ClassVar[ErrorCode]
    ERROR_INVALID: _ClassVar[ErrorCode]
    ERROR_NOT_HELD: _ClassVar[ErrorCode]
    ERROR_INTERNAL: _ClassVar[ErrorCode]
    ERROR_BUSY: _ClassVar[ErrorCode]
DTYPE_UNSPECIFIED: DType
DTYPE_FLOAT32: DType
DTYPE_BFLOAT16: DType
DTYPE_FLOAT16: DType
ERROR_NONE: ErrorCode
ERROR_INVALID: ErrorCode
ERROR_NOT_HELD: ErrorCode
ERROR_INTERNAL: ErrorCode
ERROR_BUSY: ErrorCode

class ComputeCall(_message.Message):
    __slots__ = ("header", "rows", "row_numbers", "weights")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    ROW_NUMBERS_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    header: CallHeader
    rows: bytes
    row_numbers: bytes
    weights: bytes
    def __init__(self, header: _Optional[_Union[CallHeader, _Mapping]] = ..., rows: _Optional[bytes] = ..., row_numbers: _Optional[bytes] = ..., weights: _Optional[bytes] = ...) -> None: ...

class CallHeader(_message.Message):
    __slots__ = ("call_id", "epoch", "layer", "num_rows", "hidden_size", "dtype", "expert_ids", "expert_counts", "slice_numbers", "num_slices")
    CALL_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    NUM_ROWS_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_SIZE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    EXPERT_IDS_FIELD_NUMBER: _ClassVar[int]
    EXPERT_COUNTS_FIELD_NUMBER: _ClassVar[int]
    SLICE_NUMBERS_FIELD_NUMBER: _ClassVar[int]
    NUM_SLICES_FIELD_NUMBER: _ClassVar[int]
    call_id: int
    epoch: int
    layer: int
    num_rows: int
    hidden_size: int
    dtype: DType
    expert_ids: _containers.RepeatedScalarFieldContainer[int]
    expert_counts: _containers.RepeatedScalarFieldContainer[int]
    slice_numbers: _containers.RepeatedScalarFieldContainer[int]
    num_slices: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, call_id: _Optional[int] = ..., epoch: _Optional[int] = ..., layer: _Optional[int] = ..., num_rows: _Optional[int] = ..., hidden_size: _Optional[int] = ..., dtype: _Optional[_Union[DType, str]] = ..., expert_ids: _Optional[_Iterable[int]] = ..., expert_counts: _Optional[_Iterable[int]] = ..., slice_numbers: _Optional[_Iterable[int]] = ..., num_slices: _Optional[_Iterable[int]] = ...) -> None: ...

class ComputeReply(_message.Message):
    __slots__ = ("header", "sums")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    SUMS_FIELD_NUMBER: _ClassVar[int]
    header: ReplyHeader
    sums: bytes
    def __init__(self, header: _Optional[_Union[ReplyHeader, _Mapping]] = ..., sums: _Optional[bytes] = ...) -> None: ...

class VerifyRequest(_message.Message):
    __slots__ = ("layer", "expert_id", "slice_number", "num_slices")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    EXPERT_ID_FIELD_NUMBER: _ClassVar[int]
    SLICE_NUMBER_FIELD_NUMBER: _ClassVar[int]
    NUM_SLICES_FIELD_NUMBER: _ClassVar[int]
    layer: int
    expert_id: int
    slice_number: int
    num_slices: int
    def __init__(self, layer: _Optional[int] = ..., expert_id: _Optional[int] = ..., slice_number: _Optional[int] = ..., num_slices: _Optional[int] = ...) -> None: ...

class VerifyReply(_message.Message):
    __slots__ = ("is_damaged",)
    IS_DAMAGED_FIELD_NUMBER: _ClassVar[int]
    is_damaged: bool
    def __init__(self, is_damaged: _Optional[bool] = ...) -> None: ...

class ReplyHeader(_message.Message):
    __slots__ = ("call_id", "incarnation", "num_rows", "hidden_size", "error", "message", "compute_ns")
    CALL_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    NUM_ROWS_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_SIZE_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_NS_FIELD_NUMBER: _ClassVar[int]
    call_id: int
    incarnation: int
    num_rows: int
    hidden_size: int
    error: ErrorCode
    message: str
    compute_ns: int
    def __init__(self, call_id: _Optional[int] = ..., incarnation: _Optional[int] = ..., num_rows: _Optional[int] = ..., hidden_size: _Optional[int] = ..., error: _Optional[_Union[ErrorCode, str]] = ..., message: _Optional[str] = ..., compute_ns: _Optional[int] = ...) -> None: ...

"""The client's groups of methods: `client.completions`, `client.chat.completions` and so on.

A group is named for what its methods give; what they take and do is said in calls.py.
"""

from cluster.client import calls
from cluster.client.connection import AsyncConnection, Connection


class Completions:
    def __init__(self, connection: Connection) -> None:
        self.create = connection.method(calls.complete)
        self.with_raw_response = RawCompletions(connection)
        self.with_streaming_response = StreamedCompletions(connection)


class RawCompletions:
    def __init__(self, connection: Connection) -> None:
        self.create = connection.raw_method(calls.complete)


class StreamedCompletions:
    def __init__(self, connection: Connection) -> None:
        self.create = connection.streamed_method(calls.complete)


class AsyncCompletions:
    def __init__(self, connection: AsyncConnection) -> None:
        self.create = connection.method(calls.complete)
        self.with_raw_response = AsyncRawCompletions(connection)
        self.with_streaming_response = AsyncStreamedCompletions(connection)


class AsyncRawCompletions:
    def __init__(self, connection: AsyncConnection) -> None:
        self.create = connection.raw_method(calls.complete)


class AsyncStreamedCompletions:
    def __init__(self, connection: AsyncConnection) -> None:
        self.create = connection.streamed_method(calls.complete)


class Chat:
    def __init__(self, connection: Connection) -> None:
        self.completions = ChatCompletions(connection)


class ChatCompletions:
    def __init__(self, connection: Connection) -> None:
        self.create = connection.method(calls.answer)
        self.with_raw_response = RawChatCompletions(connection)
        self.with_streaming_response = StreamedChatCompletions(connection)


class RawChatCompletions:
    def __init__(self, connection: Connection) -> None:
        self.create = connection.raw_method(calls.answer)


class StreamedChatCompletions:
    def __init__(self, connection: Connection) -> None:
        self.create = connection.streamed_method(calls.answer)


class AsyncChat:
    def __init__(self, connection: AsyncConnection) -> None:
        self.completions = AsyncChatCompletions(connection)


class AsyncChatCompletions:
    def __init__(self, connection: AsyncConnection) -> None:
        self.create = connection.method(calls.answer)
        self.with_raw_response = AsyncRawChatCompletions(connection)
        self.with_streaming_response = AsyncStreamedChatCompletions(connection)


class AsyncRawChatCompletions:
    def __init__(self, connection: AsyncConnection) -> None:
        self.create = connection.raw_method(calls.answer)


class AsyncStreamedChatCompletions:
    def __init__(self, connection: AsyncConnection) -> None:
        self.create = connection.streamed_method(calls.answer)


class Models:
    def __init__(self, connection: Connection) -> None:
        self.list = connection.method(calls.models)
        self.retrieve = connection.method(calls.model)


class AsyncModels:
    def __init__(self, connection: AsyncConnection) -> None:
        self.list = connection.method(calls.models)
        self.retrieve = connection.method(calls.model)


class Cluster:
    def __init__(self, connection: Connection) -> None:
        self.status = connection.method(calls.status)
        self.metrics = connection.method(calls.metrics)
        self.rebalance = connection.method(calls.rebalance)


class AsyncCluster:
    def __init__(self, connection: AsyncConnection) -> None:
        self.status = connection.method(calls.status)
        self.metrics = connection.method(calls.metrics)
        self.rebalance = connection.method(calls.rebalance)

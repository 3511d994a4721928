"""A streamed reply, chunk by chunk. Knows the API's end mark; how events are cut is sse.py's."""

from collections.abc import Generator
from types import TracebackType
from typing import Generic, Self

import httpx

from cluster.client import failures
from cluster.client.reply import ReplyT, read_chunk
from cluster.client.sse import EventDecoder

END_MARK = "[DONE]"


class Stream(Generic[ReplyT]):
    """Iterator over the chunks of one reply; owns its connection until it ends or is closed.

    Closing early closes the connection, which makes the server cancel the request: leave a
    stream by `with`, or by `close()`. For one thread at a time.

    Iterating raises APIStreamError if the server reports an error or the stream ends, breaks or
    falls silent before its end mark, and APIResponseError for a chunk of another shape. The
    stream is closed then.
    """

    def __init__(self, response: httpx.Response, reply: type[ReplyT]) -> None:
        self._response = response
        self._chunks = _read_chunks(response, reply)

    @property
    def request_id(self) -> str | None:
        """The server's X-Request-Id, by which its log knows this request."""
        return failures.request_id(self._response)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> ReplyT:
        return next(self._chunks)

    def close(self) -> None:
        """End the stream here. Closing again does nothing."""
        self._chunks.close()
        self._response.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._response.is_closed else "open"
        return f"<Stream of {self._response.request.url}, request {self.request_id}, {state}>"


# Not a method: a generator that held its Stream would keep both alive in a cycle, and a loop left
# by `break` would keep the server generating until the collector came by.
def _read_chunks(response: httpx.Response, reply: type[ReplyT]) -> Generator[ReplyT, None, None]:
    decoder = EventDecoder()
    num_chunks = 0
    try:
        for packet in response.iter_bytes():
            for data in decoder.feed(packet):
                if data == END_MARK:
                    return
                yield read_chunk(response, data, reply)
                num_chunks += 1
    except httpx.RequestError as error:
        raise failures.stream_broke_off(response, num_chunks, error) from error
    finally:
        response.close()
    raise failures.stream_broke_off(response, num_chunks, None)

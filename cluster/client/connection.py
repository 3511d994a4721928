"""The blocking way to the server: requests out, replies or errors back. All I/O of `Client`."""

import httpx

from cluster.client import failures
from cluster.client.reply import ReplyT, check_status, is_event_stream, read_reply
from cluster.client.request import LIMITS, Settings
from cluster.client.stream import Stream


class Connection:
    """One server, over a pool of connections. Safe to share between threads."""

    def __init__(self, settings: Settings, transport: httpx.BaseTransport | None) -> None:
        self.root = settings.root
        self._http = httpx.Client(
            headers=settings.headers,
            timeout=settings.timeout,
            limits=LIMITS,
            transport=transport,
        )

    @property
    def is_closed(self) -> bool:
        return self._http.is_closed

    def get(self, path: str) -> httpx.Response:
        """The answer, read, whatever its status."""
        return self._send(self._http.build_request("GET", self.root + path))

    def post(self, path: str, body: bytes, reply: type[ReplyT]) -> ReplyT:
        return read_reply(self._send(self._post_request(path, body)), reply)

    def stream(self, path: str, body: bytes, reply: type[ReplyT]) -> Stream[ReplyT]:
        """Return once the headers are in; an error before the first chunk is raised here."""
        response = self._send(self._post_request(path, body), stream=True)
        if is_event_stream(response):
            return Stream(response, reply)
        check_status(response)
        raise failures.not_a_stream(response)

    def close(self) -> None:
        self._http.close()

    def _post_request(self, path: str, body: bytes) -> httpx.Request:
        headers = {"Content-Type": "application/json"}
        return self._http.build_request("POST", self.root + path, content=body, headers=headers)

    def _send(self, request: httpx.Request, *, stream: bool = False) -> httpx.Response:
        """Send and map failures. The answer comes read, except an event stream asked for."""
        try:
            response = self._http.send(request, stream=stream)
            if stream and not is_event_stream(response):
                try:
                    response.read()
                finally:
                    response.close()
        except httpx.RequestError as error:
            raise failures.transport_error(error, request) from error
        return response

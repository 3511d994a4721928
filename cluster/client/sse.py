"""Server-sent events: bytes in, the data of complete events out. No I/O, no JSON.

Follows https://html.spec.whatwg.org/multipage/server-sent-events.html, of which the API uses
only `data`: the fields event, id and retry are read over. httpx's `iter_lines` will not do, for
it also ends a line at U+2028 and its like, which may stand unescaped in JSON.
"""

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class EventDecoder:
    """Cuts one stream of bytes, in whatever packets it comes, into events.

    Works on bytes until a line is whole, so a character split over packets survives. An event
    that the stream's end cuts off is never returned, as the standard asks.
    """

    def __init__(self) -> None:
        self._rest = b""  # a line whose end has not come yet
        self._data: list[str] = []  # data lines of an event whose end has not come yet
        self._after_cr = False  # the last byte was CR, so an LF now belongs to the same line end
        self._is_first_line = True

    def feed(self, packet: bytes) -> list[str]:
        """Data of the events that end in this packet, in order."""
        if not packet:
            return []
        if self._after_cr:
            packet = packet.removeprefix(b"\n")
        # A CR ends its line at once: to wait for a possible LF would hold back the event.
        self._after_cr = packet.endswith(b"\r")

        # bytes.splitlines, unlike str's, knows LF, CR and CRLF only.
        lines = (self._rest + packet).splitlines(keepends=True)
        is_cut = bool(lines) and not lines[-1].endswith((b"\n", b"\r"))
        self._rest = lines.pop() if is_cut else b""

        events = []
        for line in lines:
            event = self._take(line.rstrip(b"\r\n"))
            if event is not None:
                events.append(event)
        return events

    def _take(self, line: bytes) -> str | None:
        """Read one whole line; the data of the event that it ends, if it ends one."""
        if self._is_first_line:
            self._is_first_line = False
            line = line.removeprefix(_BYTE_ORDER_MARK)
        if not line:
            data, self._data = self._data, []
            return "\n".join(data) if data else None
        # A comment is a line with an empty field name, so it needs no case of its own.
        field, _, value = line.partition(b":")
        if field == b"data":
            self._data.append(value.removeprefix(b" ").decode("utf-8", errors="replace"))
        return None

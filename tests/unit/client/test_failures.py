"""What the SDK raises."""

import httpx
import pytest

from cluster import errors
from tests.client_fakes import Packets, Server, Way


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, errors.BadRequestError),
        (401, errors.AuthenticationError),
        (403, errors.PermissionDeniedError),
        (404, errors.NotFoundError),
        (409, errors.ConflictError),
        (413, errors.RequestTooLargeError),
        (418, errors.APIStatusError),
        (422, errors.UnprocessableEntityError),
        (429, errors.RateLimitError),
        (500, errors.InternalServerError),
        (502, errors.InternalServerError),
        (529, errors.InternalServerError),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_every_error_status_has_its_class(way: Way, status: int, kind: type, stream: bool) -> None:
    error = {"message": "No.", "type": "some_error", "param": "prompt", "code": "some_code"}
    answer = httpx.Response(status, json={"error": error}, headers={"x-request-id": "req-9"})
    with pytest.raises(errors.APIStatusError) as caught:
        way.client(Server(answer)).completions.create(prompt="a", stream=stream)
    raised = caught.value
    assert type(raised) is kind
    assert str(raised) == raised.message == "No."
    assert (raised.type, raised.param, raised.code) == ("some_error", "prompt", "some_code")
    assert (raised.status_code, raised.request_id) == (status, "req-9")
    assert raised.body == error
    assert raised.response.headers["x-request-id"] == "req-9"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "an empty body"),
        (b"<html>\n <h1>Bad Gateway</h1></html>", "<html> <h1>Bad Gateway</h1></html>"),
        (b"x" * 10_000, "x{200}\\.\\.\\."),
        (b"\xff\xfe", "\ufffd"),
        (b'{"detail": "Not Found"}', "Not Found"),
        (b'{"error": null}', "null"),
        (b'{"error": {"type": "t"}}', "without an error object"),
        (b'["error"]', "error"),
        (b"[" * 5_000, "without an error object"),
    ],
)
def test_an_error_without_openais_body_says_what_came(way: Way, body: bytes, message: str) -> None:
    with pytest.raises(errors.InternalServerError, match=message) as caught:
        way.client(Server(httpx.Response(502, content=body))).completions.create(prompt="a")
    assert "POST http://server/v1/completions answered 502" in str(caught.value)
    assert len(str(caught.value)) < 500
    assert caught.value.request_id is None


@pytest.mark.parametrize(
    ("error", "code"),
    [({"message": "No.", "code": 400}, "400"), ("No.", None), ({"message": "No."}, None)],
)
def test_other_servers_error_objects_are_understood(
    way: Way, error: object, code: str | None
) -> None:
    answer = httpx.Response(400, json={"error": error})
    with pytest.raises(errors.BadRequestError, match=r"^No\.$") as caught:
        way.client(Server(answer)).completions.create(prompt="a")
    assert caught.value.code == code


@pytest.mark.parametrize("body", [b"", b"<html>", b"{}", b"[]", b'{"id": 3}', b"[" * 5_000])
def test_a_success_of_another_shape_is_named(way: Way, body: bytes) -> None:
    with pytest.raises(errors.APIResponseValidationError, match="not a Completion") as caught:
        way.client(Server(httpx.Response(200, content=body))).completions.create(prompt="a")
    assert "maestrale serve" in str(caught.value)
    assert caught.value.__cause__ is not None


def test_a_redirect_is_named_and_not_followed(way: Way) -> None:
    server = Server(httpx.Response(307, headers={"location": "https://other/v1/completions"}))
    with pytest.raises(errors.APIResponseValidationError, match=r"307.*https://other"):
        way.client(server).completions.create(prompt="a")
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("cause", "kind", "message"),
    [
        (httpx.ConnectError("refused"), "APIConnectionError", "refused.*`maestrale serve` running"),
        (httpx.ProxyError("407"), "APIConnectionError", "no connection.*ProxyError: 407"),
        (httpx.ReadError("reset"), "APIConnectionError", "broke before the whole answer.*reset"),
        (httpx.RemoteProtocolError("gone"), "APIConnectionError", "broke before .*gone"),
        (httpx.ConnectTimeout("slow"), "APITimeoutError", "within 5 s.*`maestrale serve` running"),
        (httpx.ReadTimeout("slow"), "APITimeoutError", "no answer within 600 s.*timeout"),
        (httpx.WriteTimeout("slow"), "APITimeoutError", "could not be sent within 600 s"),
        (httpx.PoolTimeout("slow"), "APITimeoutError", "no connection of the pool within 600 s"),
        (
            httpx.DecodingError("not gzip"),
            "APIResponseValidationError",
            "cannot be decoded.*not gzip",
        ),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_every_failure_of_the_connection_has_its_class(
    way: Way, cause: Exception, kind: str, message: str, stream: bool
) -> None:
    with pytest.raises(errors.APIError, match=message) as caught:
        way.client(Server(cause)).completions.create(prompt="a", stream=stream)
    assert type(caught.value) is getattr(errors, kind)
    assert "http://server" in str(caught.value)
    assert caught.value.__cause__ is cause


def test_an_error_body_that_breaks_off_is_a_broken_connection(way: Way) -> None:
    body = Packets([b'{"error"'], httpx.ReadError("reset"))
    server = Server(httpx.Response(500, stream=body))
    with pytest.raises(errors.APIConnectionError, match="reset"):
        way.client(server).completions.create(prompt="a", stream=True)
    assert body.is_closed


@pytest.mark.parametrize(
    "error", [httpx.ConnectTimeout, httpx.ReadTimeout, httpx.WriteTimeout, httpx.PoolTimeout]
)
def test_a_timeout_that_is_the_systems_names_no_bound_of_ours(
    way: Way, error: type[httpx.TimeoutException]
) -> None:
    client = way.client(Server(error("timed out")), timeout=httpx.Timeout(None))
    with pytest.raises(errors.APITimeoutError) as caught:
        client.completions.create(prompt="a")
    assert " within " not in str(caught.value)

"""A client's settings: given, from the environment, and changed in a copy."""

from typing import Any

import httpx
import pytest

from cluster import errors
from cluster.client import AsyncClient, Client
from cluster.client.settings import settings
from tests.client_fakes import COMPLETION, MODEL, Server, Way

EITHER = pytest.mark.parametrize("new", [Client, AsyncClient])


def test_without_settings_the_server_is_the_local_one(way: Way) -> None:
    server = Server(httpx.Response(200, json=COMPLETION))
    way.client(server, None).completions.create(prompt="a")
    assert str(server.requests[0].url) == "http://127.0.0.1:8000/v1/completions"
    assert "authorization" not in server.requests[0].headers


def test_the_environment_fills_the_gaps(way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAESTRALE_BASE_URL", "http://elsewhere/v1/")
    monkeypatch.setenv("MAESTRALE_API_KEY", "key-of-env")
    server = Server(httpx.Response(200, json=COMPLETION))
    way.client(server, None).completions.create(prompt="a")
    assert str(server.requests[0].url) == "http://elsewhere/v1/completions"
    assert server.requests[0].headers["authorization"] == "Bearer key-of-env"


def test_arguments_win_over_the_environment(way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAESTRALE_BASE_URL", "not a URL at all")
    monkeypatch.setenv("MAESTRALE_API_KEY", "key-of-env")
    server = Server(httpx.Response(200, json=COMPLETION))
    way.client(server, "http://here", api_key="key-given").completions.create(prompt="a")
    way.client(server, "http://here", api_key="").completions.create(prompt="a")
    first, second = server.requests
    assert first.url.host == "here"
    assert first.headers["authorization"] == "Bearer key-given"
    assert "authorization" not in second.headers


def test_empty_variables_count_as_unset(way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAESTRALE_BASE_URL", "")
    monkeypatch.setenv("MAESTRALE_API_KEY", "")
    server = Server(httpx.Response(200, json=COMPLETION))
    way.client(server, None).completions.create(prompt="a")
    assert server.requests[0].url.host == "127.0.0.1"
    assert "authorization" not in server.requests[0].headers


@EITHER
@pytest.mark.parametrize(
    "base_url",
    ["", "localhost:8000", "127.0.0.1:8000", "ftp://h", "http://", "http://h?a=b", "http://h:x"],
)
def test_a_base_url_that_is_none_is_named(
    new: Any, base_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(errors.ConfigurationError, match=r"base_url .*http://127.0.0.1:8000"):
        new(base_url)
    if base_url:
        monkeypatch.setenv("MAESTRALE_BASE_URL", base_url)
        with pytest.raises(errors.ConfigurationError, match="MAESTRALE_BASE_URL"):
            new()


@EITHER
def test_a_password_in_the_base_url_is_refused_unquoted(new: Any) -> None:
    with pytest.raises(errors.ConfigurationError, match="api_key") as caught:
        new("http://user:secret@h")
    assert "secret" not in str(caught.value)


@EITHER
@pytest.mark.parametrize("api_key", ["secret\n", "sec ret", "secrét"])
def test_a_key_that_no_header_can_carry_is_refused_unquoted(new: Any, api_key: str) -> None:
    with pytest.raises(errors.ConfigurationError, match="api_key") as caught:
        new(api_key=api_key)
    assert api_key.strip() not in str(caught.value)
    assert caught.value.__cause__ is None


@EITHER
@pytest.mark.parametrize("timeout", [0, -1, float("nan"), float("inf")])
def test_a_timeout_that_is_none_is_refused(new: Any, timeout: float) -> None:
    with pytest.raises(errors.ConfigurationError, match="timeout"):
        new(timeout=timeout)


def test_the_timeout_bounds_every_wait(way: Way) -> None:
    server = Server(httpx.Response(200, json=COMPLETION))
    way.client(server, timeout=90).completions.create(prompt="a")
    way.client(server, timeout=2).completions.create(prompt="a")
    slow, quick = (request.extensions["timeout"] for request in server.requests)
    assert slow == {"connect": 5, "read": 90, "write": 90, "pool": 90}
    assert set(quick.values()) == {2}


@EITHER
def test_the_repr_shows_address_and_state_but_no_key(new: Any) -> None:
    client = new("http://h:1/v1", api_key="secret")
    assert repr(client) == f"<{new.__name__} of http://h:1, open>"


def test_a_client_left_is_closed(way: Way) -> None:
    with way.client(Server(httpx.Response(200))) as client:
        assert "open" in repr(client)
    assert "closed" in repr(client)
    client.close()


def test_the_repr_of_settings_shows_no_key() -> None:
    checked = settings(base_url="http://h", api_key="secret", timeout=1, environ={})
    assert checked.headers == {"Authorization": "Bearer secret"}
    assert "secret" not in repr(checked)


# --- copies ---


def test_a_copy_has_the_changes_and_else_the_same_settings(way: Way) -> None:
    server = Server(httpx.Response(200, json=COMPLETION))
    client = way.client(server, "http://here", api_key="first", timeout=9, max_retries=3)
    copied = client.with_options(timeout=2, api_key="second")
    assert (copied.timeout.read, copied.max_retries, copied.base_url) == (2, 3, "http://here")
    assert (client.timeout.read, client.max_retries) == (9, 3)
    copied.completions.create(prompt="a")
    client.completions.create(prompt="a")
    keys = [request.headers["authorization"] for request in server.requests]
    assert keys == ["Bearer second", "Bearer first"]
    assert [r.extensions["timeout"]["read"] for r in server.requests] == [2, 9]
    assert client.copy(base_url="http://there/v1").base_url == "http://there"
    assert client.with_options(timeout=None).timeout.read is None
    assert client.with_options(max_retries=0).max_retries == 0


@EITHER
def test_a_copy_does_not_read_the_environment(new: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    client = new("http://here", api_key="given")
    monkeypatch.setenv("MAESTRALE_BASE_URL", "http://elsewhere")
    monkeypatch.setenv("MAESTRALE_API_KEY", "of-env")
    assert repr(client.copy()) == repr(client)
    assert client.copy()._settings == client._settings


@EITHER
@pytest.mark.parametrize("change", [{"timeout": 0}, {"max_retries": -1}, {"base_url": "h"}])
def test_a_copy_is_checked_like_a_client(new: Any, change: dict[str, Any]) -> None:
    client = new()
    with pytest.raises(errors.ConfigurationError, match=next(iter(change))):
        client.with_options(**change)
    with pytest.raises(errors.ConfigurationError, match=next(iter(change))):
        new(**change)


def test_a_copy_shares_the_connections(way: Way) -> None:
    client = way.client(Server(httpx.Response(200)))
    copied = client.with_options(timeout=1)
    copied.close()
    assert "closed" in repr(client)


def test_one_call_may_have_a_timeout_of_its_own(way: Way) -> None:
    server = Server(httpx.Response(200, json=MODEL))
    client = way.client(server, timeout=9)
    client.models.retrieve("tiny", timeout=2)
    client.models.retrieve("tiny", timeout=None)
    client.models.retrieve("tiny", timeout=httpx.Timeout(1, read=3))
    client.models.retrieve("tiny")
    assert [r.extensions["timeout"]["read"] for r in server.requests] == [2, None, 3, 9]
    assert server.requests[1].extensions["timeout"]["connect"] == 5
    with pytest.raises(errors.ConfigurationError, match="timeout"):
        client.models.retrieve("tiny", timeout=-1)

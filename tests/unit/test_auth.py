"""Who may use the HTTP API: those with a key, or anybody by choice; and from which sites' pages."""

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from cluster.app import check_access
from cluster.config import ServeConfig
from cluster.errors import ConfigurationError
from cluster.ingress import auth
from cluster.ingress.auth import KEYS_VARIABLE, Access, ApiKey, read_api_keys
from tests.api_fakes import (
    BOTH,
    CLASSIFY,
    COMPLETIONS,
    EITHER_WAY,
    Api,
    assert_error,
    body_for,
    fails_after,
)

KEY = "sk-first-key"
KEYS = [KEY, "sk-second/key+="]
ORIGIN = "https://chat.example.org"
PREFLIGHT = {"Origin": ORIGIN, "Access-Control-Request-Method": "POST"}


def access(*keys: str, allow_open: bool = False, origins: tuple[str, ...] = ()) -> Access:
    return Access.with_keys(
        [ApiKey(key) for key in keys], allow_open=allow_open, allowed_origins=origins
    )


@pytest.fixture
def api(tiny_folder: Path) -> Api:
    """Behind two keys."""
    api = Api(tiny_folder)
    api.admit(access(*KEYS))
    return api


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


# --- keys ---


@BOTH
@pytest.mark.parametrize("key", KEYS)
def test_every_key_opens_the_api_either_way(api: Api, path: str, key: str) -> None:
    for headers in (bearer(key), {"authorization": f"bearer  {key} "}, {"X-API-Key": key}):
        assert api.post(path, body_for(path), headers=headers).status_code == 200


@BOTH
@pytest.mark.parametrize(
    "headers",
    [
        bearer("sk-first-ke"),
        bearer("sk-first-key2"),
        bearer("SK-FIRST-KEY"),
        bearer("sk-first-key sk-first-key"),
        {"Authorization": f"Basic {KEY}"},
        {"Authorization": KEY},
        {"X-API-Key": "wrong"},
        {"X-API-Key": ""},
        {**bearer("wrong"), "X-API-Key": KEY},
        {"Authorization": "Bearer \xff"},
        {},
    ],
    ids=str,
)
def test_anything_else_is_refused_before_the_request_is_read(
    api: Api, path: str, headers: dict[str, str]
) -> None:
    raw = {name: value.encode("latin-1") for name, value in headers.items()}
    response = api.request("POST", path, content=b"no json", headers=raw)
    message = assert_error(response, 401, kind="authentication_error", code="invalid_api_key")
    assert response.headers["www-authenticate"] == "Bearer"
    assert "key" in message
    assert not any(key in response.text for key in (*KEYS, "wrong"))
    assert not api.engine.journals


@pytest.mark.parametrize(
    "path",
    [
        "/metrics",
        "/v1/models",
        "/docs",
        "/openapi.json",
        "/nothing",
        "/healthy",
        "/v1/health",
        "/health/../v1/models",
        "//health",
    ],
)
def test_all_but_the_probes_needs_a_key(api: Api, path: str) -> None:
    assert api.get(path).status_code == 401
    assert api.get(path, headers=bearer(KEY)).status_code != 401


@pytest.mark.parametrize("path", ["/health", "/health/", "/ready", "/ready/"])
def test_probes_need_no_key(api: Api, path: str) -> None:
    assert api.request("GET", path, follow_redirects=True).status_code == 200


def test_refusals_are_counted_and_no_key_is_ever_logged(
    api: Api, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    api.post(COMPLETIONS, body_for(COMPLETIONS), headers=bearer(KEY))
    api.post(COMPLETIONS, body_for(COMPLETIONS), headers=bearer("sk-guess"))
    assert api.num_requests("other", 401) == 1
    logged = caplog.text + repr(api.access)
    assert KEY not in logged
    assert "sk-guess" not in logged


def test_callers_are_told_apart_by_their_keys_whichever_header_has_them(
    api: Api, tiny_folder: Path
) -> None:
    """So that clients of the same key share a head evenly with the others."""
    api.configure(labels=("a", "b", "c"))
    for headers in (bearer(KEY), {"x-api-key": KEY}, bearer(KEYS[1])):
        assert api.post(CLASSIFY, {"input": "the wind"}, headers=headers).status_code == 200
    by_bearer, by_header, other = api.engine.clients
    assert by_bearer == by_header != other


# --- without keys ---


def test_without_keys_loopback_is_served_and_a_network_only_by_choice(tiny_folder: Path) -> None:
    api = Api(tiny_folder)

    def status_at(host: str, path: str = "/v1/models") -> int:
        return api.get(f"http://{host}{path}").status_code

    api.admit(access())
    assert [status_at(host) for host in ("127.0.0.1", "[::1]", "[::ffff:127.0.0.1]")] == 3 * [200]
    assert [status_at(host) for host in ("10.1.2.3", "[2001:db8::1]", "unknown")] == 3 * [403]
    assert status_at("10.1.2.3", "/health") == 200
    refusal = api.get("http://10.1.2.3/v1/models")
    assert "allow_open_http" in assert_error(refusal, 403, kind="permission_error")
    api.admit(access(allow_open=True))
    assert status_at("10.1.2.3") == 200
    api.admit(access(KEY))
    assert api.get("http://10.1.2.3/v1/models", headers=bearer(KEY)).status_code == 200


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.1.2.3", "", "example.org"])
def test_a_network_host_is_refused_at_the_start_without_keys(
    host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(KEYS_VARIABLE, raising=False)
    with pytest.raises(ConfigurationError, match="--api-keys-file"):
        check_access(ServeConfig(), host)
    assert check_access(ServeConfig(allow_open_http=True), host) == [""]
    monkeypatch.setenv(KEYS_VARIABLE, KEY)
    assert check_access(ServeConfig(), host) == [KEY]


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_loopback_needs_no_keys(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEYS_VARIABLE, raising=False)
    assert check_access(ServeConfig(), host) == [""]


# --- where keys come from ---


def test_keys_come_from_a_file_and_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# ours\n{KEY}  # the chat page\n\n  {KEYS[1]}\n")
    in_file = [ApiKey(key) for key in KEYS]
    assert read_api_keys(file, {}) == in_file
    assert read_api_keys(None, {KEYS_VARIABLE: " a, b,"}) == [ApiKey("a"), ApiKey("b")]
    assert read_api_keys(file, {KEYS_VARIABLE: "a"}) == [ApiKey("a"), *in_file]
    assert read_api_keys(None, {}) == []


def test_a_key_may_be_marked_as_an_operators(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"{KEY}\n{KEYS[1]}  admin # mine\n")
    assert read_api_keys(file, {}) == [ApiKey(KEY), ApiKey(KEYS[1], is_admin=True)]
    marked = read_api_keys(None, {KEYS_VARIABLE: "a admin, b"})
    assert marked == [ApiKey("a", is_admin=True), ApiKey("b")]
    assert KEYS[1] not in repr(read_api_keys(file, {}))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no API key"),
        (b"# none\n", "holds no API key"),
        (b"good\nsecret word\n", "line 2 of .* is no key"),
        (b"secret admin admin\n", "line 1 of .* is no key"),
        (b"\xff", "cannot read the API keys"),
        (None, "cannot read the API keys"),
    ],
)
def test_a_file_without_usable_keys_opens_nothing(
    content: bytes | None, message: str, tmp_path: Path
) -> None:
    file = tmp_path / "keys"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigurationError, match=message) as error:
        read_api_keys(file, {})
    assert "secret" not in str(error.value)


def test_a_variable_with_something_that_is_no_key_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=KEYS_VARIABLE) as error:
        read_api_keys(None, {KEYS_VARIABLE: "good,secret word"})
    assert "secret" not in str(error.value)


def test_a_changed_file_of_keys_holds_soon_and_a_broken_one_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(auth, "READ_EVERY_S", 0.001)
    caplog.set_level(logging.INFO)
    file = tmp_path / "keys"
    live = access(KEY)

    def opens(key: str) -> bool:
        return live.refusal(key, is_local=False) is None

    async def until(is_true: Callable[[], bool]) -> None:
        for _ in range(10_000):
            if is_true():
                return
            await asyncio.sleep(0.001)
        raise AssertionError("the file was not read")

    async def change() -> None:
        following = asyncio.create_task(live.follow(file, {}))
        for broken in ("", "no key at all\n"):
            caplog.clear()
            file.write_text(broken, encoding="utf-8")
            await until(lambda: "stay as they were" in caplog.text)
            assert opens(KEY)
            assert not opens(KEYS[1])
        file.write_text(f"{KEYS[1]} admin\n", encoding="utf-8")
        await until(lambda: opens(KEYS[1]))
        assert not opens(KEY)
        assert live.admin_refusal(KEYS[1], is_local=False) is None
        following.cancel()

    asyncio.run(change())
    assert KEY not in caplog.text
    assert KEYS[1] not in caplog.text


# --- browsers ---


def allowed_origin(response: httpx.Response) -> Any:
    return response.headers.get("access-control-allow-origin")


def test_a_preflight_of_an_allowed_site_needs_no_key(api: Api) -> None:
    api.admit(access(KEY, origins=(ORIGIN,)))
    wanted = {"Access-Control-Request-Headers": "authorization,x-stainless-lang"}
    response = api.request("OPTIONS", COMPLETIONS, headers={**PREFLIGHT, **wanted})
    assert response.status_code == 200
    assert allowed_origin(response) == ORIGIN
    assert "x-stainless-lang" in response.headers["access-control-allow-headers"]
    assert api.request("OPTIONS", COMPLETIONS).status_code == 401  # no preflight


def test_a_page_of_an_allowed_site_can_read_answers_and_refusals(api: Api) -> None:
    api.admit(access(KEY, origins=(ORIGIN,)))
    headers = {"Origin": ORIGIN}
    body = body_for(COMPLETIONS)
    for key, status in ((KEY, 200), ("wrong", 401)):
        response = api.post(COMPLETIONS, body, headers={**headers, **bearer(key)})
        assert response.status_code == status
        assert allowed_origin(response) == ORIGIN
        for name in ("X-Request-Id", "Retry-After", "X-Resumed-Tokens"):
            assert name in response.headers["access-control-expose-headers"]


@BOTH
@EITHER_WAY
def test_a_page_of_an_allowed_site_can_read_a_failure_of_ours(
    api: Api, path: str, stream: bool
) -> None:
    api.admit(access(KEY, origins=(ORIGIN,)))
    api.engine.script = fails_after(0, ValueError("unexpected"))
    headers = {"Origin": ORIGIN, **bearer(KEY)}
    response = api.post(path, body_for(path, stream=stream), headers=headers)
    assert response.status_code == 500
    assert allowed_origin(response) == ORIGIN
    assert api.num_requests(path, 500) == 1


def test_other_sites_and_by_default_all_are_kept_out(api: Api) -> None:
    api.admit(access(KEY, origins=(ORIGIN,)))
    stranger = {**PREFLIGHT, "Origin": "https://evil.example"}
    response = api.request("OPTIONS", COMPLETIONS, headers=stranger)
    assert response.status_code == 400
    assert allowed_origin(response) is None
    api.admit(access(KEY))
    response = api.request("OPTIONS", COMPLETIONS, headers=PREFLIGHT)
    assert response.status_code == 401
    assert allowed_origin(response) is None

"""Keys, hosts, limits, headers and random requests, against the real process."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
import uvicorn
from prometheus_client.parser import text_string_to_metric_families

import cemg.serve.server
from cemg.errors import UserError
from cemg.serve.security import Guard, Keys

from .process import KEYS, ServerProcess, eventually, problem

# ---- who may call what


def test_keys_have_roles(server: ServerProcess) -> None:
    calls = {
        "/v1/catalog": "GET",
        "/metrics": "GET",
        "/v1/items/item-0003": "PATCH",
        "/v1/users/none": "DELETE",
    }
    with httpx.Client(base_url=server.url) as http:
        for path, method in calls.items():
            body = {"title": "x"} if method == "PATCH" else None
            writes = method != "GET"
            assert "Bearer" in http.request(method, path, json=body).headers["www-authenticate"]
            for headers in ({}, {"X-API-Key": "wrong" * 4}, {"Authorization": "Bearer nope"},
                            {"Authorization": "Basic abc"}, {"X-API-Key": "\xe9" * 16}):  # fmt: skip
                sent = {name: value.encode("latin-1") for name, value in headers.items()}
                problem(http.request(method, path, json=body, headers=sent), 401)
            for role, key in KEYS.items():
                for headers in ({"X-API-Key": key}, {"Authorization": f"Bearer {key}"}):
                    answer = http.request(method, path, json=body, headers=headers)
                    if writes and role == "read":
                        problem(answer, 403, "write")
                    else:
                        assert answer.status_code in (200, 404)
        for method, path in (("GET", ""), ("POST", ""), ("POST", "/rollback"), ("DELETE", "/shadow")):
            answer = http.request(
                method, f"/v1/models{path}", json={"run": "x"}, headers={"X-API-Key": KEYS["write"]}
            )
            problem(answer, 403, "admin")
        assert http.get("/health/live").json() == {"status": "live"}
        assert http.get("/health/ready").json() == {"status": "ready"}
    log = server.log.read_text()
    assert not any(key in log for key in (*KEYS.values(), "wrong" * 4))


@pytest.mark.parametrize(
    "text, reason",
    [
        ("read: []\nadmin:\n", "must map"), ("read: 5", "must map"), ("read: true", "must map"),
        ("[" * 5000, "cannot be read"), ("read: 2024-13-45", "cannot be read"),
        ("read: [first-key-of-many]\nread: [second-key-of-many]", "twice"),
        ("read: {first-key-of-many: a name}", "must map"),
        ("read: ['a-key-with-a-space ']", "without spaces"),
    ],
)  # fmt: skip
def test_a_file_without_usable_keys_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "keys.yaml").write_text(text)
    with pytest.raises(UserError) as refused:
        Keys.read(tmp_path / "keys.yaml")
    assert reason in f"{refused.value.message} {refused.value.cause}"


def test_the_spelling_of_a_key_does_not_raise_its_rate() -> None:
    async def nothing(*_: Any) -> None: ...

    guard = Guard(nothing, hosts=["*"], max_bytes=1, keys=Keys({"a" * 16: "read"}), rate=1)
    key = {"authorization": f"Bearer {'a' * 16}"}
    scope = {"path": "/v1/recommend", "client": ("1.2.3.4", 5)}
    spellings = [key, {"authorization": f"bearer  {'a' * 16}"}, key | {"x-api-key": "junk"}]
    assert [guard._too_many(headers, scope) is None for headers in spellings] == [True, False, False]


@pytest.mark.parametrize(
    "host", ["evil.example", "", "localhost.evil.example", "[::1", "127.0.0.1.evil.example:80"]
)
def test_an_unexpected_host_is_refused(server: ServerProcess, host: str) -> None:
    problem(server.http.get("/health/live", headers={"Host": host}), 421)


def test_expected_hosts_are_served(server: ServerProcess) -> None:
    for host in ("localhost", "127.0.0.1:9", "[::1]:8000", "shop.example", "SHOP.example:443"):
        assert server.http.get("/health/live", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://[", "http://localhost:1", "x", ""])
def test_requests_of_other_origins_are_refused(server: ServerProcess, origin: str) -> None:
    problem(server.http.get("/v1/catalog", headers={"Origin": origin}), 403, "origin")


def test_requests_of_the_own_origin_are_served(server: ServerProcess) -> None:
    assert server.http.get("/v1/catalog", headers={"Origin": server.url}).status_code == 200


# ---- HTTP


def raw(server: ServerProcess, head: str, body: bytes = b"") -> tuple[int, bytes]:
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        auth = f"Host: localhost\r\nAuthorization: Bearer {KEYS['admin']}\r\nConnection: close\r\n"
        connection.sendall(f"{head}\r\n{auth}".encode() + b"Content-Type: application/json\r\n")
        connection.sendall(body)
        answer = http.client.HTTPResponse(connection)
        answer.begin()
        return answer.status, answer.read()


def test_a_body_that_is_too_large_is_refused_before_it_is_read(server: ServerProcess) -> None:
    status, text = raw(server, "POST /v1/events HTTP/1.1", b"Content-Length: 99999999\r\n\r\n{")
    assert status == 413 and b"99999999" in text
    problem(server.http.post("/v1/events", content=b"x" * (4 << 20) + b"xx"), 413, "bytes")


def test_a_length_with_many_digits_is_refused(server: ServerProcess) -> None:
    assert raw(server, "POST /v1/events HTTP/1.1", b"Content-Length: %s2\r\n\r\n{}" % (b"0" * 5001))[0] == 422
    assert raw(server, "POST /v1/events HTTP/1.1", b"Content-Length: 1%s\r\n\r\n{}" % (b"0" * 18))[0] == 413


def test_headers_that_do_not_end_are_refused(server: ServerProcess) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nX: ")
        answer = b""
        for _ in range(100):
            try:
                connection.sendall(b"a" * 4096)
                time.sleep(0.01)
            except OSError:  # closed
                break
        else:
            pytest.fail("it read 400 kB of headers")
        with suppress(OSError):
            answer = connection.recv(100)
        assert not answer or b" 431 " in answer  # a reset may overtake the answer
    assert server.http.get("/health/live").status_code == 200


def test_a_request_that_does_not_arrive_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    class Connection:
        closed, written = False, b""

        def close(self) -> None:
            self.closed = True

        def get_extra_info(self, name: str) -> None: ...

        def is_closing(self) -> bool:
            return self.closed

        def write(self, data: bytes) -> None:
            self.written += data

    async def app(scope: Any, receive: Any, send: Any) -> None:
        while (await receive()).get("more_body"):
            pass
        await asyncio.sleep(0.3)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"done"})

    async def sent(*parts: bytes) -> Connection:
        config = uvicorn.Config(app, log_level="critical", timeout_keep_alive=60)
        config.load()
        connection: Any = Connection()
        protocol = cemg.serve.server.Protocol(config, uvicorn.server.ServerState(), {})
        protocol.connection_made(connection)
        for part in parts:
            await asyncio.sleep(0.06)
            protocol.data_received(part)
        await asyncio.sleep(0.6)
        protocol.connection_lost(None)
        return connection

    monkeypatch.setattr(cemg.serve.server, "ARRIVAL", 0.2)
    head = b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4\r\n\r\n"
    for parts in ((), (head[:20],), (head, b"{")):
        connection = asyncio.run(sent(*parts))
        assert connection.closed and b"200" not in connection.written
    slow = asyncio.run(sent(head[:20], head[20:], b"{  }"))  # the answer may take longer than the request
    assert b" 200 " in slow.written and b"done" in slow.written


def test_a_body_without_a_length_is_refused_once_it_is_too_large(server: ServerProcess) -> None:
    def parts() -> Iterator[bytes]:
        for _ in range(5):
            yield b" " * (1 << 20)

    answer = server.http.post("/v1/events", content=parts(), headers={"content-type": "application/json"})
    problem(answer, 413)
    assert server.http.get("/health/live").status_code == 200


def test_unknown_paths_and_methods(server: ServerProcess) -> None:
    problem(server.http.get("/v2/none"), 404)
    answer = server.http.delete("/v1/recommend")
    problem(answer, 405)
    assert answer.headers["allow"] == "POST"
    problem(server.http.request("PURGE", "/v1/catalog"), 405)


def test_every_answer_has_the_id_of_its_request(server: ServerProcess) -> None:
    calls = [("/v1/catalog", {}), ("/v2/none", {}), ("/v1/catalog", {"Host": "evil"}), ("/v1/items/none", {})]
    for path, headers in calls:
        answer = server.http.get(path, headers=headers | {"X-Request-ID": f"mine-{path}"})
        assert answer.headers["x-request-id"] == f"mine-{path}"
    made = {server.http.get("/health/live").headers["x-request-id"] for _ in range(3)}
    assert len(made) == 3
    long = server.http.get("/health/live", headers={"X-Request-ID": "x" * 65}).headers["x-request-id"]
    assert long != "x" * 65
    lines = [json.loads(line) for line in server.log.read_text().splitlines() if line.startswith("{")]
    assert {"mine-/v1/catalog", "mine-/v2/none"} <= {line["request_id"] for line in lines}


def test_metrics_can_be_parsed(server: ServerProcess) -> None:
    server.json("POST", "/v1/recommend", {"history": ["item-0002"]})
    server.json("GET", "/v1/items/item-0003")
    families = {one.name: one for one in text_string_to_metric_families(server.http.get("/metrics").text)}
    samples = {sample.labels["path"] for sample in families["cemg_requests"].samples}
    assert "/v1/recommend" in samples and not any("item-0003" in path for path in samples)
    assert families["cemg_items"].samples[0].value >= 50 and families["cemg_searches"].samples[0].value > 0
    assert {sample.labels["method"] for sample in families["cemg_requests"].samples} <= {
        "GET", "POST", "PUT", "PATCH", "DELETE", "other"}  # fmt: skip


def test_the_documentation_is_served(server: ServerProcess) -> None:
    answer = server.http.get("/docs")
    assert answer.status_code == 307 and answer.headers["location"] == "./#/api"
    schema = server.json("GET", "/openapi.json")
    assert schema["info"]["title"] == "CEMG" and "/v1/items/{item_id}" in schema["paths"]
    responses = schema["paths"]["/v1/recommend"]["post"]["responses"]
    assert "application/problem+json" in responses["422"]["content"]


@pytest.mark.parametrize("item", ["x/similar", "x/image", "a/b", "a%2Fb", "100% %/é", "/", "?q=#1"])
def test_an_id_may_have_any_printable_characters(server: ServerProcess, item: str) -> None:
    path = f"/v1/items/{quote(item, safe='')}"
    server.json("PUT", path, {"title": "Sturdy rudder", "attributes": {"odd": True}})
    found = eventually(lambda: (one := server.json("GET", path))["codes"] and one)
    assert found["item_id"] == item
    server.json("GET", f"{path}/similar")
    problem(server.http.get(f"{path}/image"), 404, "no picture")
    server.json("PATCH", path, {"title": "Plain rudder"})
    event = {"event_id": f"odd-{item}", "user_id": item, "item_id": item}
    server.json("POST", "/v1/events", {"events": [event]})
    user = f"/v1/users/{quote(item, safe='')}"
    assert server.json("GET", user) == {"user_id": item, "history": [item]}
    server.json("DELETE", user)
    server.json("DELETE", path)
    assert server.json("GET", path)["state"] == "removed"
    problem(server.http.get("/v1/items/x"), 404, "there is no item x")


# ---- the whole schema


def test_no_request_of_the_schema_fails(server: ServerProcess) -> None:
    """Random requests of the OpenAPI schema. CEMG_SCHEMA_EXAMPLES: requests per endpoint, 20 by default."""
    schemathesis = pytest.importorskip("schemathesis")
    hypothesis = pytest.importorskip("hypothesis")
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    examples = int(os.environ.get("CEMG_SCHEMA_EXAMPLES", "20"))
    count = 0
    for result in schema.get_all_operations():
        operation = result.ok()

        @hypothesis.given(case=operation.as_strategy())
        @hypothesis.settings(
            max_examples=examples, deadline=None, derandomize=True, database=None,
            suppress_health_check=list(hypothesis.HealthCheck),
        )  # fmt: skip
        def check(case: Any) -> None:
            nonlocal count
            count += 1
            answer = case.call(headers={"Authorization": f"Bearer {KEYS['admin']}"})
            assert answer.status_code < 500, (case.as_curl_command(), answer.text)
            case.validate_response(
                answer,
                checks=[
                    schemathesis.checks.not_a_server_error,
                    schemathesis.specs.openapi.checks.status_code_conformance,
                    schemathesis.specs.openapi.checks.content_type_conformance,
                    schemathesis.specs.openapi.checks.response_schema_conformance,
                ],
            )

        check()
    assert count > 15 * 5
    log = server.log.read_text()
    assert "Traceback" not in log, log[log.index("Traceback") :][:3000]

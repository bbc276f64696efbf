"""Every endpoint against the real process, socket and SQLite file; one process for the module."""

from __future__ import annotations

import base64
import http.client
import io
import itertools
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from .process import ServerProcess, copy_of, eventually

KEYS = {
    "read": "r" * 8 + "ead-key-1234",
    "write": "w" * 8 + "rite-key-1234",
    "admin": "a" * 8 + "dmin-key-1234",
}
FILTERS = """
below:
  parameters: {price: number}
  filter: {must: [{key: price, range: {lt: $price}}]}
"""
names = itertools.count()


@pytest.fixture(scope="module")
def server(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("endpoints")
    (folder / "keys.yaml").write_text(json.dumps({role: [key] for role, key in KEYS.items()}))
    (folder / "filters.yaml").write_text(FILTERS)
    options = ("--keys", folder / "keys.yaml", "--filters", folder / "filters.yaml")
    with ServerProcess(
        copy_of(tiny_run, folder), *options, "--allow-host", "shop.example", wait=False
    ) as process:
        process.http.headers["Authorization"] = f"Bearer {KEYS['admin']}"
        process.wait_until_ready()
        items = [one["item_id"] for one in process.json("GET", "/v1/items")["items"]]
        body = [
            {"item_id": item, "attributes": {"price": n, "kind": "old"}} for n, item in enumerate(items[:20])
        ]
        process.json("POST", "/v1/items", {"items": body})
        yield process


@pytest.fixture
def items(server: ServerProcess) -> list[str]:
    """Ids of active items."""
    found = server.json("GET", "/v1/items?limit=1000")["items"]
    return [one["item_id"] for one in found if one["state"] == "active"]


def problem(answer: httpx.Response, status: int, *words: str) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    found = answer.json()
    assert found["status"] == status and found["type"] == "about:blank" and found["title"]
    for word in words:
        assert word in json.dumps(found), found
    return dict(found)


def recommended(server: ServerProcess, **body: Any) -> list[str]:
    return [one["item_id"] for one in server.json("POST", "/v1/recommend", body)["items"]]


# ---- recommendations


def test_recommendations_for_a_history_a_user_and_a_batch(server: ServerProcess, items: list[str]) -> None:
    answer = server.json("POST", "/v1/recommend", {"history": items[:2], "limit": 5, "exclude_history": True})
    assert len(answer["items"]) == 5 and answer["complete"] and answer["skipped"] == []
    assert not {one["item_id"] for one in answer["items"]} & set(items[:2])
    scores = [one["score"] for one in answer["items"]]
    assert scores == sorted(scores, reverse=True) and answer["strategy"] in ("mixture", "generator")
    assert answer["catalog_version"] == server.json("GET", "/v1/catalog")["catalog_version"]
    batch = {"requests": [{"history": items[:2], "limit": 5, "exclude_history": True}, {"user_id": "u1"}]}
    first, second = server.json("POST", "/v1/recommend", batch)["recommendations"]
    assert [one["item_id"] for one in first["items"]] == [one["item_id"] for one in answer["items"]]
    assert len(second["items"]) == 10 and first["recommendation_id"] != answer["recommendation_id"]


def test_an_exact_list_is_certified_and_one_of_the_whole_catalog_says_so(
    server: ServerProcess, items: list[str]
) -> None:
    answer = server.json("POST", "/v1/recommend", {"history": items[:1], "limit": 3, "exact": True})
    assert answer["certified"] == 3
    answer = server.json(
        "POST", "/v1/recommend", {"history": items[:2], "limit": 1000, "exclude_history": False}
    )
    assert not answer["complete"] and {one["item_id"] for one in answer["items"]} == set(items)


def test_unknown_ids_are_skipped_or_refused(server: ServerProcess, items: list[str]) -> None:
    history = [items[0], "no such item"]
    assert server.json("POST", "/v1/recommend", {"history": history})["skipped"] == ["no such item"]
    assert server.json("POST", "/v1/recommend", {"user_id": "nobody"})["strategy"] == "popularity"
    post = server.http.post
    problem(post("/v1/recommend", json={"history": history, "strict": True}), 404, "no such item")
    problem(post("/v1/recommend", json={"user_id": "nobody", "strict": True}), 404, "nobody")


def test_a_user_without_history_gets_all_admitted_items_the_popular_ones_first(
    server: ServerProcess, items: list[str]
) -> None:
    fresh = [f"fresh-{next(names)}" for _ in range(2)]
    body = [{"item_id": item, "title": "Sturdy rudder", "attributes": {"shelf": "new"}} for item in fresh]
    server.json("POST", "/v1/items", {"items": body})
    server.json("PATCH", f"/v1/items/{items[30]}", {"attributes": {"shelf": "new"}})
    eventually(lambda: all(server.json("GET", f"/v1/items/{item}")["codes"] for item in fresh))
    asked = {"user_id": "nobody", "filter": {"must": [{"key": "shelf", "match": {"value": "new"}}]}}
    for limit, complete in ((3, True), (4, False)):
        answer = server.json("POST", "/v1/recommend", {**asked, "limit": limit})
        found = [one["item_id"] for one in answer["items"]]
        assert found[0] == items[30] and {*found[1:]} == {*fresh} and answer["complete"] == complete
        assert answer["strategy"] == "popularity"
    server.json("PATCH", f"/v1/items/{items[30]}", {"attributes": {"shelf": None}})
    for item in fresh:
        server.json("DELETE", f"/v1/items/{item}")


@pytest.mark.parametrize(
    "body, field",
    [
        ({}, "user_id or history"), ({"user_id": "u", "history": []}, "user_id or history"),
        ({"history": [], "limit": 0}, "limit"), ({"history": [], "limit": 1001}, "limit"),
        ({"history": [], "limit": "3"}, "limit"), ({"history": [], "beams": 0}, "beams"),
        ({"history": [], "beams": 10**9}, "beams"), ({"history": ["a"] * 10_001}, "history"),
        ({"history": [3]}, "history.0"), ({"history": [""]}, "history.0"),
        ({"history": ["a\x00"]}, "history.0"),
        ({"history": [], "colour": 1}, "colour"), ({"requests": []}, "requests"),
        ({"requests": [{"history": []}] * 257}, "requests"), ({"requests": [{"limit": 1}]}, "requests.0"),
        ({"history": [], "filter": {"must": [{"key": "prize", "range": {"lt": 3}}]}}, "price"),
        ({"history": [], "filter": {"must": [{"key": "kind", "range": {"lt": 3}}]}}, "kind"),
        ({"history": [], "filter": {"must": [{"key": "price", "match": {"value": "x"}}]}}, "price"),
        ({"history": [], "filter": {"most": []}}, "most"),
        ({"history": [], "filter": {"name": "above"}}, "above"),
        ({"history": [], "filter": {"name": "below", "parameters": {}}}, "price"),
        ({"history": [], "filter": {"name": "below", "parameters": {"price": "x"}}}, "price"),
        (None, "body"), ([], "body"), ("text", "body"),
    ],
)  # fmt: skip
def test_an_invalid_request_names_the_field(server: ServerProcess, body: Any, field: str) -> None:
    problem(server.http.post("/v1/recommend", json=body), 422, field)


@pytest.mark.parametrize("body", [b"", b"{", b"\xff\xfe", b'{"history": [NaN', b"[" * 100_000])
def test_malformed_json_is_refused(server: ServerProcess, body: bytes) -> None:
    answer = server.http.post("/v1/recommend", content=body, headers={"content-type": "application/json"})
    problem(answer, answer.status_code)
    assert answer.status_code in (400, 422)


def test_names_that_unicode_cannot_encode_are_refused(server: ServerProcess) -> None:
    bodies = (
        b'{"history": [], "\\ud800": 1}',
        b'{"history": ["\\ud800"]}',
        b'{"events": [{"event_id": "\\udfff"}]}',
    )
    for body in bodies:
        for path in ("/v1/recommend", "/v1/events", "/v1/items"):
            answer = server.http.post(path, content=body, headers={"content-type": "application/json"})
            problem(answer, 422)


def test_a_filter_holds_inside_the_search(server: ServerProcess, items: list[str]) -> None:
    below = {"must": [{"key": "price", "range": {"lt": 5}}]}
    assert sorted(recommended(server, history=items[30:32], limit=50, filter=below)) == items[:5]
    named = {"name": "below", "parameters": {"price": 5}}
    assert sorted(recommended(server, history=items[30:32], limit=50, filter=named)) == items[:5]
    nothing = server.json("POST", "/v1/recommend", {
        "history": items[:1], "filter": {"must": [{"key": "price", "range": {"gt": 1e6}}]}})  # fmt: skip
    assert nothing["items"] == [] and not nothing["complete"]


# ---- events and users


def event(user: str, item: str, **more: Any) -> dict[str, Any]:
    return {"event_id": f"e{next(names)}", "user_id": user, "item_id": item, **more}


def test_the_next_answer_reflects_an_event(server: ServerProcess, items: list[str]) -> None:
    user = "reader"
    for n, item in enumerate(items[:5]):
        sent = event(user, item)
        assert server.json("POST", "/v1/events", {"events": [sent]}) == {"stored": 1, "known": []}
        assert server.json("GET", f"/v1/users/{user}")["history"] == items[: n + 1]
        seen = recommended(server, user_id=user, limit=40, exclude_history=True)
        assert not {*seen} & {*items[: n + 1]}
        again = server.json("POST", "/v1/events", {"events": [sent, sent]})
        assert again == {"stored": 0, "known": [sent["event_id"]] * 2}
    early = event(user, items[9], timestamp=1.0)
    server.json("POST", "/v1/events", {"events": [early]})
    assert server.json("GET", f"/v1/users/{user}")["history"][0] == items[9]


@pytest.mark.parametrize(
    "change, field",
    [
        ({"event_id": ""}, "event_id"), ({"user_id": "x" * 257}, "user_id"), ({"item_id": "a\nb"}, "item_id"),
        ({"timestamp": "now"}, "timestamp"), ({"type": "x" * 65}, "type"), ({"more": 1}, "more"),
    ],
)  # fmt: skip
def test_an_invalid_event_refuses_all_of_the_call(server: ServerProcess, change: Any, field: str) -> None:
    good, before = event("keen", "item-0001"), server.json("GET", "/v1/catalog")["events"]
    answer = server.http.post("/v1/events", json={"events": [good, event("keen", "item-0002") | change]})
    assert f"events.1.{field}" in problem(answer, 422)["errors"][0]["field"]
    assert server.json("GET", "/v1/catalog")["events"] == before
    problem(server.http.post("/v1/events", content=b'{"events": [{"event_id": "nan", "user_id": "u", '
                             b'"item_id": "i", "timestamp": NaN}]}',
                             headers={"content-type": "application/json"}), 422, "nan")  # fmt: skip
    problem(server.http.post("/v1/events", json={"events": []}), 422, "events")
    problem(server.http.post("/v1/events", json={"events": [good] * 1001}), 422, "events")


def test_a_deleted_user_is_forgotten(server: ServerProcess, items: list[str]) -> None:
    server.json("POST", "/v1/events", {"events": [event("leaver", items[0]), event("leaver", "not there")]})
    assert server.json("DELETE", "/v1/users/leaver")["deleted"] == 2
    problem(server.http.get("/v1/users/leaver"), 404, "leaver")
    problem(server.http.delete("/v1/users/leaver"), 404, "leaver")
    server.json("POST", "/v1/events", {"events": [event("ghost", "not there")]})
    assert server.json("GET", "/v1/users/ghost")["history"] == []  # has an event, so it can be deleted
    assert server.json("DELETE", "/v1/users/ghost")["deleted"] == 1
    run_user = next(user for user in ("u1", "user-0001") if server.http.get(f"/v1/users/{user}").is_success)
    assert server.json("DELETE", f"/v1/users/{run_user}")["deleted"] > 0
    assert server.json("POST", "/v1/recommend", {"user_id": run_user})["strategy"] == "popularity"


# ---- the catalog


def test_an_added_item_becomes_active_and_can_be_removed_and_added_again(
    server: ServerProcess, items: list[str]
) -> None:
    old = {item: server.json("GET", f"/v1/items/{item}")["codes"] for item in items}
    server.json("POST", "/v1/events", {"events": [event("early", "new/1")]})
    version = server.json(
        "PUT",
        "/v1/items/new/1",
        {"title": "Sturdy rudder", "text": "for the garden", "attributes": {"price": 3.5}},
    )["catalog_version"]
    found = eventually(lambda: (one := server.json("GET", "/v1/items/new/1"))["state"] == "active" and one)
    assert len(found["codes"]) == 3 and found["version"] > version and found["title"] == "Sturdy rudder"
    assert {item: server.json("GET", f"/v1/items/{item}")["codes"] for item in items} == old
    assert "new/1" in recommended(server, history=items[:2], limit=1000, exclude_history=False)
    assert server.json("GET", "/v1/users/early")["history"] == ["new/1"]  # the event came before the item
    below = {"must": [{"key": "price", "range": {"gt": 3, "lt": 4}}]}
    assert recommended(server, history=items[:2], filter=below) == ["new/1"]
    server.json("DELETE", "/v1/items/new/1")
    assert "new/1" not in recommended(server, history=items[:2], limit=1000, exclude_history=False)
    assert recommended(server, history=items[:2], filter=below) == []
    assert server.json("GET", "/v1/items/new/1")["state"] == "removed"
    server.json("PUT", "/v1/items/new/1", {"title": "Rudder", "attributes": {"price": 3.5}})
    back = server.json("GET", "/v1/items/new/1")
    assert back["codes"] == found["codes"] and back["state"] == "active"
    answer = server.json("POST", "/v1/recommend", {"history": items[:2], "filter": below})["items"]
    assert [(one["item_id"], one["title"]) for one in answer] == [("new/1", "Rudder")]
    server.json("DELETE", "/v1/items/new/1")


def test_an_item_without_text_says_why_it_is_pending_until_it_has_one(server: ServerProcess) -> None:
    server.json("PUT", "/v1/items/bare", {"attributes": {"price": 1}})
    problem_of = lambda: server.json("GET", "/v1/items/bare")["problem"]  # noqa: E731
    assert "neither a title nor a text" in eventually(problem_of)
    assert server.json("GET", "/v1/catalog")["pending"] >= 1
    server.json("PATCH", "/v1/items/bare", {"title": "plain music"})
    eventually(lambda: server.json("GET", "/v1/items/bare")["state"] == "active")
    assert problem_of() is None
    server.json("DELETE", "/v1/items/bare")


def test_a_patch_and_a_removal_hold_from_the_next_request(server: ServerProcess, items: list[str]) -> None:
    item, odd = items[25], {"must": [{"key": "odd", "match": {"value": True}}]}
    first = server.json(
        "PATCH", f"/v1/items/{item}", {"title": "Odd one", "attributes": {"odd": True, "price": 7}}
    )
    answer = server.json("POST", "/v1/recommend", {"history": items[:2], "filter": odd})
    assert [(one["item_id"], one["title"]) for one in answer["items"]] == [(item, "Odd one")]
    assert answer["catalog_version"] == first["catalog_version"]
    server.json("PATCH", f"/v1/items/{item}", {"attributes": {"price": None}})
    assert server.json("GET", f"/v1/items/{item}")["attributes"] == {"odd": True}
    version = server.json("DELETE", f"/v1/items/{item}")["catalog_version"]
    assert item not in recommended(server, history=items[:2], limit=1000, exclude_history=False)
    assert (
        server.json("DELETE", f"/v1/items/{item}")["catalog_version"] == version
    )  # a second one does nothing
    problem(server.http.patch(f"/v1/items/{item}", json={"title": "x"}), 404, item)
    server.json("PUT", f"/v1/items/{item}", {"title": "Back"})
    assert item in recommended(server, history=items[:2], limit=1000, exclude_history=False)


def test_an_attribute_of_another_type_is_refused_and_nothing_is_stored(
    server: ServerProcess, items: list[str]
) -> None:
    version = server.json("GET", "/v1/catalog")["catalog_version"]
    wrong = {"price": "cheap"}
    http = server.http
    problem(http.patch(f"/v1/items/{items[30]}", json={"attributes": wrong}), 422, "price")
    problem(http.put(f"/v1/items/{items[30]}", json={"attributes": wrong}), 422, "price")
    problem(http.put("/v1/items/mixed", json={"title": "x", "attributes": wrong}), 422, "price")
    two = [
        {"item_id": items[31], "attributes": {"fresh": 1}},
        {"item_id": items[32], "attributes": {"fresh": "1"}},
    ]
    problem(http.post("/v1/items", json={"items": two}), 422, "fresh")
    assert server.json("GET", "/v1/catalog")["catalog_version"] == version
    problem(http.get("/v1/items/mixed"), 404, "mixed")


@pytest.mark.parametrize(
    "body", [{"title": 1}, {"title": "x" * 1001}, {"text": "x" * 100_001}, {"size": 1}, {"title": "a\x00"},
             {"attributes": {"a": {}}}, {"attributes": {"a": 2**64}}, {"attributes": {"a": [1]}},
             {"attributes": {"": 1}}, {"attributes": {f"a{n}": n for n in range(300)}}],
)  # fmt: skip
def test_an_invalid_item_is_refused(server: ServerProcess, body: Any) -> None:
    version = server.json("GET", "/v1/catalog")["catalog_version"]
    problem(server.http.put("/v1/items/wrong", json=body), 422)
    problem(
        server.http.post("/v1/items", json={"items": [{"item_id": "fine"}, {"item_id": "wrong"} | body]}), 422
    )
    assert server.json("GET", "/v1/catalog")["catalog_version"] == version


def test_unknown_and_impossible_item_ids(server: ServerProcess) -> None:
    for method in ("GET", "PATCH", "DELETE"):
        body = {"title": "x"} if method == "PATCH" else None
        problem(server.http.request(method, "/v1/items/nothing", json=body), 404, "nothing")
        for item in ("x" * 257, "a%00b", "a%09b"):
            problem(server.http.request(method, f"/v1/items/{item}", json=body), 422, "item_id")
    problem(server.http.put("/v1/items/" + "x" * 257, json={}), 422, "item_id")
    problem(server.http.get("/v1/users/" + "x" * 257), 422, "user_id")


def test_pages_of_items_are_complete(server: ServerProcess) -> None:
    whole = [one["item_id"] for one in server.json("GET", "/v1/items?limit=1000")["items"]]
    pages, cursor = [], ""
    while cursor is not None:
        page = server.json("GET", f"/v1/items?limit=7&cursor={cursor}")
        pages += [one["item_id"] for one in page["items"]]
        cursor = page["next"]
    assert pages == whole == sorted(whole)
    for query in ("limit=0", "limit=1001", "limit=x", "cursor=" + "x" * 257):
        problem(server.http.get(f"/v1/items?{query}"), 422, query.split("=")[0])


def test_the_log_of_changes_is_complete_and_numbered(server: ServerProcess) -> None:
    version = server.json("PATCH", "/v1/items/item-0002", {"title": "Changed"})["catalog_version"]
    seen, after = [], 0
    while page := server.json("GET", f"/v1/catalog/changes?after={after}&limit=9")["changes"]:
        seen += [one["version"] for one in page]
        after = seen[-1]
    assert seen == list(range(1, version + 1))
    (last,) = server.json("GET", f"/v1/catalog/changes?after={version - 1}")["changes"]
    assert last["kind"] == "patch" and last["payload"] == {"title": "Changed"}
    for query in ("after=-1", "after=x", "limit=0", f"after={10**30}"):
        problem(server.http.get(f"/v1/catalog/changes?{query}"), 422, query.split("=")[0])


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


# ---- images


def picture(kind: str, size: tuple[int, int] = (40, 30)) -> str:
    content = io.BytesIO()
    Image.new("RGB", size, "teal").save(content, kind)
    return base64.b64encode(content.getvalue()).decode()


def test_an_item_with_an_image_alone_is_encoded_and_its_picture_returned(server: ServerProcess) -> None:
    sent = picture("PNG")
    server.json("PUT", "/v1/items/seen", {"image": sent})
    found = eventually(lambda: [one for one in [server.json("GET", "/v1/items/seen")] if one["codes"]])
    assert found[0]["image"] and found[0]["state"] == "active"
    answer = server.http.get("/v1/items/seen/image")
    assert answer.content == base64.b64decode(sent) and answer.headers["content-type"] == "image/png"
    server.json("PATCH", "/v1/items/seen", {"image": picture("WEBP"), "title": "teal"})
    assert server.http.get("/v1/items/seen/image").headers["content-type"] == "image/webp"
    assert server.json("GET", "/v1/items/seen")["codes"] == found[0]["codes"]
    server.json("PATCH", "/v1/items/seen", {"image": None})
    assert server.http.get("/v1/items/seen/image").status_code == 404


@pytest.mark.parametrize(
    "image, words",
    [
        ("/etc/passwd", "paths and URLs"), ("https://example.org/a.png", "paths and URLs"),
        ("file:///etc/passwd", "paths and URLs"), ("", "readable"), ("AAAA", "readable"),
        (picture("PNG")[:80], "readable"), (picture("BMP"), "readable"), (picture("TIFF"), "readable"),
        (picture("PNG", (5000, 4000)), "pixels"), (7, "string"),
        (base64.b64encode(b"<svg xmlns='http://www.w3.org/2000/svg'/>").decode(), "readable"),
    ],
)  # fmt: skip
def test_a_bad_image_names_its_field_and_stores_nothing(
    server: ServerProcess, image: object, words: str
) -> None:
    problem(server.http.put("/v1/items/bad", json={"title": "a", "image": image}), 422, '"image"', words)
    body = {"items": [{"item_id": "good", "title": "a"}, {"item_id": "bad", "image": image}]}
    problem(server.http.post("/v1/items", json=body), 422, "items.1.image", words)
    problem(server.http.patch("/v1/items/new%2F1", json={"image": image}), 422, '"image"', words)
    assert (
        server.http.get("/v1/items/bad").status_code == server.http.get("/v1/items/good").status_code == 404
    )


def test_an_image_beyond_the_limit_of_bodies_is_refused(server: ServerProcess) -> None:
    problem(server.http.put("/v1/items/bad", json={"image": "A" * (4 << 20)}), 413, "bytes")

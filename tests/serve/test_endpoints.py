"""Every endpoint against the real process, socket and store, in SQLite and in PostgreSQL."""

from __future__ import annotations

import base64
import io
import itertools
from typing import Any

import pytest
from PIL import Image

from .process import ServerProcess, eventually, problem

names = itertools.count()
pytestmark = pytest.mark.parametrize("server", ["sqlite", "postgres"], indirect=True, scope="module")


@pytest.fixture
def items(server: ServerProcess) -> list[str]:
    """Ids of active items."""
    found = server.json("GET", "/v1/items?limit=1000")["items"]
    return [one["item_id"] for one in found if one["state"] == "active"]


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


@pytest.mark.parametrize(
    "body, headers, errors",
    [
        (b'{"history": [],', {}, {"body": "it is not JSON"}),
        (b'{"history": []}', {"content-type": "text/plain"}, {"body": "content-type: application/json"}),
        (b'{"history": [], "filter": {"must": [{"key": "price", "rnge": {}}]}}', {},
         {"filter.must.0": "a condition is"}),
        (b'{"requests": [{"history": [1]}]}', {}, {"requests.0.history.0": "string"}),
        (b'{"user_id": 3, "limit": 0}', {}, {"user_id": "string", "limit": "greater"}),
    ],
)  # fmt: skip
def test_an_error_names_each_field_once_as_the_body_spells_it(
    server: ServerProcess, body: bytes, headers: dict[str, str], errors: dict[str, str]
) -> None:
    headers = {"content-type": "application/json"} | headers
    found = problem(server.http.post("/v1/recommend", content=body, headers=headers), 422)["errors"]
    assert [one["field"] for one in found] == [*errors]
    assert all(text in one["message"] for one, text in zip(found, errors.values(), strict=True))


def test_wrong_attributes_are_one_error(server: ServerProcess, items: list[str]) -> None:
    many = {name: [1] for name in ("bad", *map(str, range(9999)))}
    for bad in ({"bad": {"x": 1}}, {"bad": [1]}, many):
        answer = server.http.patch(f"/v1/items/{items[0]}", json={"attributes": bad})
        (error,) = problem(answer, 422)["errors"]
        assert error["field"] == "attributes" and "'bad'" in error["message"]


@pytest.mark.parametrize(
    "path, body",
    [
        ("/v1/recommend", {"history": []} | dict.fromkeys(map(str, range(50_000)), 0)),
        ("/v1/recommend", {"history": [0] * 10_000}),
        ("/v1/recommend", {"requests": [{}] * 256}),
        ("/v1/events", {"events": [{}] * 1000}),
        ("/v1/items", {"items": [{"item_id": "a", "attributes": {str(n): [n] for n in range(500)}}] * 50}),
    ],
)  # fmt: skip
def test_many_errors_have_a_short_answer(server: ServerProcess, path: str, body: Any) -> None:
    answer = server.http.post(path, json=body)
    assert 0 < len(problem(answer, 422)["errors"]) <= 20 and len(answer.content) < 10_000


def test_ids_that_no_store_can_have_are_refused(server: ServerProcess) -> None:
    for path in ("/v1/items?cursor=%00", "/v1/users?cursor=%00", "/v1/items/%FF", "/v1/users/%FE"):
        problem(server.http.get(path), 422)


def test_the_words_of_a_filter_are_bounded(server: ServerProcess) -> None:
    for count, status in ((64, 200), (65, 422)):
        text = {"key": "kind", "match": {"text": " ".join(f"w{n}" for n in range(count))}}
        answer = server.http.post("/v1/recommend", json={"history": [], "filter": {"should": [text]}})
        assert answer.status_code == status, answer.text


def test_large_changes_come_in_several_answers(server: ServerProcess) -> None:
    before = after = server.json("GET", "/v1/catalog")["catalog_version"]
    for number in range(0, 300, 50):
        body = [
            {"item_id": f"large-{n}", "title": "x", "text": "y" * 20_000} for n in range(number, number + 50)
        ]
        server.json("POST", "/v1/items", {"items": body})
    counts = []
    while found := server.json("GET", f"/v1/catalog/changes?after={after}&limit=1000")["changes"]:
        counts.append(len(found))
        after = found[-1]["version"]
    assert sum(counts) >= 300 and len(counts) > 1 and after - before == sum(counts)
    for n in range(300):
        server.json("DELETE", f"/v1/items/large-{n}")


def test_changes_that_the_store_never_had_are_refused(server: ServerProcess) -> None:
    last = server.json("GET", "/v1/catalog")["catalog_version"]
    assert server.json("GET", f"/v1/catalog/changes?after={last}")["changes"] == []
    problem(server.http.get(f"/v1/catalog/changes?after={last + 1}"), 410, "restored")


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
        assert server.json("POST", "/v1/events", {"events": [sent]}) == {
            "stored": 1, "known": [], "unknown_items": [],
        }  # fmt: skip
        assert server.json("GET", f"/v1/users/{user}")["history"] == items[: n + 1]
        seen = recommended(server, user_id=user, limit=40, exclude_history=True)
        assert not {*seen} & {*items[: n + 1]}
        again = server.json("POST", "/v1/events", {"events": [sent, sent]})
        assert again == {"stored": 0, "known": [sent["event_id"]] * 2, "unknown_items": []}
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
    asked = {"events": [event("ghost", "not there"), event("ghost", "not there", event_id="again")]}
    assert server.json("POST", "/v1/events", asked)["unknown_items"] == ["not there"]
    assert server.json("GET", "/v1/users/ghost")["history"] == []  # has an event, so it can be deleted
    assert server.json("DELETE", "/v1/users/ghost")["deleted"] == 2
    run_user = next(user for user in ("u1", "user-0001") if server.http.get(f"/v1/users/{user}").is_success)
    assert server.json("DELETE", f"/v1/users/{run_user}")["deleted"] > 0
    assert server.json("POST", "/v1/recommend", {"user_id": run_user})["strategy"] == "popularity"


# ---- the catalog


def test_a_removed_item_of_the_run_keeps_its_texts(server: ServerProcess, items: list[str]) -> None:
    before = server.json("GET", f"/v1/items/{items[-1]}")
    server.json("DELETE", f"/v1/items/{items[-1]}")
    after = server.json("GET", f"/v1/items/{items[-1]}")
    assert before["title"] and before["text"] and after["state"] == "removed"
    assert [after[name] for name in ("title", "text")] == [before[name] for name in ("title", "text")]
    again = {name: after[name] for name in ("title", "text", "attributes")}
    server.json("PUT", f"/v1/items/{items[-1]}", again)  # as docs/http-service.md undoes a removal
    assert server.json("GET", f"/v1/items/{items[-1]}")["state"] == "active"


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

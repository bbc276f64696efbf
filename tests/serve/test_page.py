"""The page at / against a real process: its files, its policy and its endpoints."""

from __future__ import annotations

import re
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cemg.serve.browse import POLICY, page_files
from cemg.serve.metrics import SLOT, SLOTS, Metrics, Recent
from cemg.storage.files import StorageError

from .pages import web

# ---- files


@pytest.mark.parametrize(
    ("path", "media_type", "cache"),
    [
        ("/", "text/html; charset=utf-8", "no-cache"),
        ("/page/app.js", "text/javascript; charset=utf-8", "no-cache"),
        ("/page/style.css", "text/css; charset=utf-8", "no-cache"),
        ("/page/icon.svg", "image/svg+xml", "no-cache"),
        ("/page/vendor/preact-11.2.0/hooks.mjs", "text/javascript; charset=utf-8", "immutable"),
        ("/page/vendor/uplot-1.6.32/uPlot.min.css", "text/css; charset=utf-8", "immutable"),
        ("/page/vendor/htm-3.1.1/LICENSE.txt", "text/plain; charset=utf-8", "immutable"),
    ],
)
def test_files_have_their_media_types_and_the_policy(
    service: str, path: str, media_type: str, cache: str
) -> None:
    answer = web.get(service + path)
    assert answer.status_code == 200 and answer.headers["content-type"] == media_type
    assert answer.headers["content-security-policy"] == POLICY and "unsafe" not in POLICY
    assert answer.headers["x-content-type-options"] == "nosniff" and cache in answer.headers["cache-control"]
    again = web.get(service + path, headers={"If-None-Match": answer.headers["etag"]})
    assert again.status_code == 304 and not again.content
    assert web.head(service + path).headers["etag"] == answer.headers["etag"]


@pytest.mark.parametrize(
    "path", ["/page/", "/page/none.js", "/page/../app.py", "/page/%2e%2e/app.py", "/page//etc/passwd"]
)
def test_only_files_of_the_page_are_served(service: str, path: str) -> None:
    with socket.create_connection(("127.0.0.1", int(service.rpartition(":")[2]))) as connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        assert b" 404 " in connection.makefile("rb").readline()


def test_the_page_has_no_inline_script_or_style_and_writes_no_markup() -> None:
    index = page_files()["index.html"].content.decode()
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\son\w+=|\sstyle=", index)
    for name, file in page_files().items():
        if name.endswith(".js") and not name.startswith("vendor/"):
            assert not re.search(rb"innerHTML|insertAdjacentHTML|document\.write|\beval\b", file.content), (
                name
            )


def test_other_hosts_and_origins_are_refused_also_for_the_page(service: str) -> None:
    assert web.get(service, headers={"Host": "evil.example"}).status_code == 421
    assert web.get(f"{service}/v1/status", headers={"Origin": "http://evil.example"}).status_code == 403


# ---- endpoints


def test_items_are_found_by_the_beginning_of_an_id_or_a_part_of_a_title_in_any_case(service: str) -> None:
    def find(query: str, **options: object) -> list[str]:
        answer = web.get(f"{service}/v1/items", params={"query": query, **options})
        assert answer.status_code == 200
        return [item["item_id"] for item in answer.json()["items"]]

    every = {item["item_id"]: item["title"] for item in web.get(f"{service}/v1/items").json()["items"]}
    word = every["item-0002"].split()[-1]
    wanted = sorted(item for item, title in every.items() if word.lower() in title.lower())
    assert find(word.upper()) == find(word.lower()) == wanted
    assert find(word, limit=1) == wanted[:1] and find(word, limit=1, cursor=wanted[0]) == wanted[1:2]
    assert find("ITEM-0012") == find("item-0012") == ["item-0012"] and len(find("item-", limit=7)) == 7
    assert find("<B>BOLD") == ["added"] and find(".*") == [] and find("added")[0] == "added"
    web.patch(f"{service}/v1/items/item-0040", json={"title": "Straße nach Łódź"}).raise_for_status()
    assert find("STRASSE") == find("łódź") == ["item-0040"]
    web.patch(f"{service}/v1/items/item-0041", json={"title": "Box of item-0042"}).raise_for_status()
    params, pages = {"query": "item-0042", "limit": 1}, []
    while params.get("cursor", "") is not None:  # the exact id is on the first page and hides no other item
        page = web.get(f"{service}/v1/items", params=params).json()
        pages.append([item["item_id"] for item in page["items"]])
        params["cursor"] = page["next"]
    assert [item for page in pages for item in page] == ["item-0042", "item-0041"]


def test_pictures_are_only_those_that_the_run_names(service: str, page_run: Path) -> None:
    about = web.get(f"{service}/v1/items/item-0002").json()
    picture = web.get(f"{service}/v1/items/item-0002/image")
    assert about["image"] and picture.headers["content-type"] == "image/png"
    assert picture.content.startswith(b"\x89PNG") and picture.headers["x-content-type-options"] == "nosniff"
    assert "sandbox" in picture.headers["content-security-policy"]
    for item in ("added", "none", "..", "..%2f..%2fetc%2fpasswd"):
        answer = web.get(f"{service}/v1/items/{item}/image")
        assert answer.status_code == 404 and "problem" in answer.headers["content-type"]


def test_the_nearest_items_are_those_of_the_memory(service: str, page_run: Path) -> None:
    found = web.get(f"{service}/v1/items/item-0002/similar", params={"limit": 5}).json()["items"]
    shares = [one["share"] for one in found]
    assert 0 < len(found) <= 5 and shares == sorted(shares, reverse=True) and 0 < sum(shares) <= 1
    assert "item-0002" not in {one["item_id"] for one in found}
    assert web.get(f"{service}/v1/items/none/similar").status_code == 404


def test_users_are_listed_by_the_beginning_of_their_ids(service: str) -> None:
    every = web.get(f"{service}/v1/users", params={"limit": 100}).json()
    assert every["users"] == sorted(every["users"]) and len(every["users"]) == 40 and every["next"] is None
    prefix = every["users"][0][:-1]
    some = web.get(f"{service}/v1/users", params={"query": prefix, "limit": 2}).json()
    assert some["users"] == [user for user in every["users"] if user.startswith(prefix)][:2]
    after = web.get(f"{service}/v1/users", params={"cursor": some["next"], "limit": 1}).json()
    assert after["users"] == [every["users"][every["users"].index(some["next"]) + 1]]


def test_recommendations_have_codes_and_explain_what_they_rest_on(service: str) -> None:
    body = {"history": ["item-0012", "nothing", "item-0007"], "limit": 5}
    plain = web.post(f"{service}/v1/recommend", json=body).json()["items"]
    told = web.post(f"{service}/v1/recommend", json=body | {"explain": True}).json()["items"]
    assert [(one["shares"], one["events"]) for one in plain] == [(None, None)] * 5
    assert any(one["events"] for one in told)
    for one in told:
        assert sum(one["shares"].values()) == pytest.approx(1) and min(one["shares"].values()) >= 0
        from_events = [event["share"] for event in one["events"]]
        assert sum(from_events) == pytest.approx(one["shares"]["memory"])
        assert from_events == sorted(from_events, reverse=True)
        for event in one["events"]:
            assert event["position"] in (0, 2) and event["item_id"] == body["history"][event["position"]]
        assert one["codes"] == web.get(f"{service}/v1/items/{one['item_id']}").json()["codes"]
    popular = {"history": [], "limit": 1, "explain": True}
    (one,) = web.post(f"{service}/v1/recommend", json=popular).json()["items"]
    assert one["shares"]["popularity"] == pytest.approx(1, abs=1e-5) and one["events"] == []


def test_shares_are_the_addends_of_the_mixture(tiny_run: Path) -> None:
    """The generator's share of P(mixture) is (1 - weight) * P(generator) for every item, with one weight."""
    from cemg.recommender import Recommender

    recommender = Recommender.from_run(tiny_run)
    options = {"top": 50, "beams": 50, "exact": True}
    mixed = recommender.recommend(["item-0012", "item-0007"], shares=True, **options)  # type: ignore[arg-type]
    alone = recommender.recommend(["item-0012", "item-0007"], memory="off", shares=True, **options)  # type: ignore[arg-type]
    assert mixed.shares is not None and {*mixed.shares} == {"generator", "memory"}
    assert alone.shares is not None and {*alone.shares} == {"generator"} and alone.shares["generator"].all()
    own = dict(zip(alone.items[0].tolist(), alone.scores[0].double().exp().tolist(), strict=True))
    rest = mixed.shares["generator"][0] * mixed.scores[0].double().exp()
    weights = [part / own[item] for item, part in zip(mixed.items[0].tolist(), rest.tolist(), strict=True)]
    assert min(weights) > 0 and weights == pytest.approx(
        [weights[0]] * 50, rel=1e-2
    )  # differences of float32


def test_the_status_counts_recent_requests(service: str) -> None:
    before = web.get(f"{service}/v1/status").json()
    for _ in range(3):
        web.post(f"{service}/v1/recommend", json={"history": [], "limit": 1}).raise_for_status()
    after = web.get(f"{service}/v1/status").json()
    assert after["state"] == "ready" and len(after["points"]) == SLOTS
    assert after["recent"]["requests"] == before["recent"]["requests"] + 3
    assert 0 < after["recent"]["p50_ms"] <= after["recent"]["p95_ms"] <= after["recent"]["p99_ms"]
    assert after["items"] == 51 and after["searched_requests"] >= 3


def test_recent_requests_are_kept_for_some_minutes_with_quantiles_to_nine_percent() -> None:
    recent = Recent()
    for number in range(1000):
        recent.observe("/v1/recommend", 200, (number + 1) / 1000, now=100.0)
    recent.observe("/v1/items", 503, 1.0, now=100.0 + SLOT)
    recent.observe("/v1/status", 200, 1.0, now=100.0)
    recent.observe("/page/app.js", 200, 1.0, now=100.0)
    points = recent.series(now=100.0 + 2 * SLOT)
    total = Recent.total(points)
    assert len(points) == SLOTS and (total.requests, total.errors) == (1001, 1)
    for name, value in {"p50_ms": 500, "p95_ms": 950, "p99_ms": 990}.items():
        assert total.quantiles()[name] == pytest.approx(value, rel=0.09)
    assert points[-2].quantiles()["p50_ms"] is None and points[-2].errors == 1
    assert Recent.total(recent.series(now=100.0 + SLOT * (SLOTS + 1))).requests == 0
    recent.observe("/v1/recommend", 200, 1e9, now=50.0)  # a clock that was set back, and a long time
    assert Recent.total(recent.series(now=100.0 + SLOT)).requests == 1002
    recent.observe("/v1/recommend", 200, 1.0, now=1e9)  # a clock that was far ahead for a moment
    recent.observe("/v1/recommend", 200, 1.0, now=200.0)
    assert Recent.total(recent.series(now=200.0)).requests == 1003


def test_metrics_are_there_while_the_store_is_not() -> None:
    def sizes() -> None:
        raise StorageError("the store cannot be reached")

    figures = SimpleNamespace(searches=3, queries=4, late=0, cancelled=0)
    model = SimpleNamespace(waiting=2, figures=figures)
    service: Any = SimpleNamespace(sizes=sizes, model=model, shadows=SimpleNamespace(current=None))
    text = Metrics(service).page()[0].decode()
    assert "cemg_waiting_requests 2.0" in text and "cemg_searches_total 3.0" in text
    assert "cemg_items" not in text

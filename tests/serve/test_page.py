"""The page at / against a real process: its files and policy, and each of its functions in Chromium."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from cemg.serve.browse import POLICY, page_files
from cemg.serve.metrics import SLOT, SLOTS, Recent

ROOT = Path(__file__).parents[2]
MARKUP = "<img src=x onerror=document.title='run'><b>bold</b>"
KEY = "a-read-key-of-the-tests"
WAIT = 60.0  # seconds until something must have happened, also on a busy machine
web = httpx.Client(timeout=WAIT)


@contextmanager
def serving(run: Path, *options: object) -> Iterator[str]:
    """The address of a process that serves a run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = "from cemg.commands.serve import main; main()"
    words = [sys.executable, "-c", code, "--run", str(run), "--port", str(port), *map(str, options)]
    with (run / "serve.log").open("wb") as log:
        process = subprocess.Popen(words, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"
    try:
        wait_for(lambda: answers(address) or process.poll() is not None, seconds=120)
        assert process.poll() is None, (run / "serve.log").read_text()
        yield address
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


def answers(address: str) -> bool:
    try:
        return web.get(f"{address}/health/ready").status_code == 200
    except httpx.TransportError:
        return False


def wait_for(check: Callable[[], Any], *, seconds: float = WAIT) -> Any:
    end = time.monotonic() + seconds
    while not (found := tried(check)):
        assert time.monotonic() < end, "it has not happened in time"
        time.sleep(0.1)
    return found


def tried(check: Callable[[], Any]) -> Any:
    """The result of a check; None if the page replaced an element meanwhile."""
    try:
        return check()
    except Exception as error:
        if type(error).__name__ != "StaleElementReferenceException":
            raise
        return None


@pytest.fixture(scope="module")
def run(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shutil.copytree(tiny_run, tmp_path_factory.mktemp("page") / "run")


@pytest.fixture(scope="module")
def service(run: Path) -> Iterator[str]:
    """A service with an added item whose title is markup, and a run's item with attributes."""
    with serving(run) as address:
        body = {"title": MARKUP, "text": "A sturdy <script>rudder</script>", "attributes": {"price": 5}}
        assert web.put(f"{address}/v1/items/added", json=body).status_code == 200
        for number in range(1, 6):
            patch = {"attributes": {"price": number, "tags": ["toy", "<i>sale</i>"]}}
            assert web.patch(f"{address}/v1/items/item-000{number}", json=patch).status_code == 200
        wait_for(lambda: web.get(f"{address}/v1/items/added").json()["codes"], seconds=120)
        yield address


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


def test_pictures_are_only_those_that_the_run_names(service: str, run: Path) -> None:
    about = web.get(f"{service}/v1/items/item-0002").json()
    picture = web.get(f"{service}/v1/items/item-0002/image")
    assert about["image"] and picture.headers["content-type"] == "image/png"
    assert picture.content.startswith(b"\x89PNG") and picture.headers["x-content-type-options"] == "nosniff"
    assert "sandbox" in picture.headers["content-security-policy"]
    for item in ("added", "none", "..", "..%2f..%2fetc%2fpasswd"):
        answer = web.get(f"{service}/v1/items/{item}/image")
        assert answer.status_code == 404 and "problem" in answer.headers["content-type"]


def test_the_nearest_items_are_those_of_the_memory(service: str, run: Path) -> None:
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


# ---- in a browser


class Page:
    """The page in a browser."""

    def __init__(self, driver: Any, address: str) -> None:
        self.driver, self.address = driver, address

    def open(self, place: str, *, width: int = 1000, height: int = 900, dark: bool = False) -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
        self.driver.get("about:blank")
        self.driver.get(f"{self.address}/#/{place}")

    def all(self, selector: str) -> list[Any]:
        return [one for one in self.driver.find_elements("css selector", selector) if one.is_displayed()]

    def one(self, selector: str, text: str = "") -> Any:
        """The first visible element with a text, once there is one."""
        return wait_for(
            lambda: next(
                (one for one in self.all(selector) if text in (one.text or one.accessible_name)), None
            )
        )

    def click(self, selector: str, text: str = "") -> None:
        wait_for(lambda: self.one(selector, text).click() or True)

    def type(self, selector: str, *keys: str) -> None:
        self.one(selector).send_keys(*keys)

    def text(self) -> str:
        return str(self.one("main").text)

    def problems(self) -> list[str]:
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def fits(self) -> bool:
        """Whether nothing is wider than the window."""
        script = "return [document.documentElement.scrollWidth, innerWidth]"
        content, window = self.driver.execute_script(script)
        return bool(content <= window)

    def pictures(self) -> bool:
        """Whether all pictures are drawn."""
        script = (
            "return [...document.querySelectorAll('main img.picture')].every((one) => one.naturalWidth > 0)"
        )
        return bool(self.driver.execute_script(script))


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver")
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    program = shutil.which("chromedriver")
    if browser is None or program is None:
        pytest.skip("needs Chromium and its driver: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(program))
    driver.set_page_load_timeout(60)
    yield driver
    driver.quit()


@pytest.fixture
def page(driver: Any, service: str) -> Iterator[Page]:
    page = Page(driver, service)
    page.open("status")
    driver.execute_script("sessionStorage.clear()")
    page.problems()
    yield page
    assert page.problems() == []  # of the console


WIDTHS = pytest.mark.parametrize("width", [1000, 360])


@WIDTHS
def test_a_history_is_typed_with_suggestions_and_gets_recommendations(page: Page, width: int) -> None:
    page.open("recommend", width=width)
    for item in ("item-0012", "item-0007"):
        page.type("#add", item[:-1])
        page.click("#add-list [role=option]", item)
    page.type("#add", "item-00")
    wait_for(lambda: len(page.all("#add-list [role=option]")) == 8)
    page.type("#add", "\ue015\ue015\ue007")  # down, down, enter
    wait_for(lambda: len(page.all(".chips li")) == 3)
    page.click(".chips li:last-child button")
    page.driver.execute_script("document.querySelector('#limit').value = ''")
    page.type("#limit", "7")
    page.click("#exact")
    page.click("button[type=submit]")
    wait_for(lambda: len(page.all("ol.list li")) == 7)
    body = {"history": ["item-0012", "item-0007"], "limit": 7, "exact": True, "explain": True}
    answer = web.post(f"{page.address}/v1/recommend", json=body).json()
    for row, item in zip(page.all("ol.list li"), answer["items"], strict=True):
        assert (item["title"] or item["item_id"]) in row.text and f"{item['score']:.3f}" in row.text
        assert " · ".join(map(str, item["codes"])) in row.text and "memory" in row.text
    summary = page.one("#summary").text
    assert f"{answer['certified']} of 7 certified" in summary and "ranked by mixture" in summary
    assert f"catalog version {answer['catalog_version']}" in summary
    assert len(page.all(".tree .leaf")) == 7
    before = len(page.all(".tree .leaf"))
    page.click(".tree summary")
    wait_for(lambda: len(page.all(".tree .leaf")) < before)
    wait_for(page.pictures)
    assert page.fits()


@WIDTHS
def test_a_user_is_picked_and_options_hold(page: Page, width: int) -> None:
    user = web.get(f"{page.address}/v1/users").json()["users"][3]
    page.open("recommend", width=width)
    page.click(".ways label", "a user")
    page.type("#user", user)
    page.click("#user-list [role=option]", user)
    history = web.get(f"{page.address}/v1/users/{user}").json()["history"]
    wait_for(lambda: f"User {user}: {len(history)} item" in page.text())
    page.type("#filter", '{"must": [{"key": "price", "range": {"lte": 3}}]}')
    page.one("#exclude").send_keys("may")
    page.click("button[type=submit]")
    wait_for(lambda: "3 of 10: the catalog has no more" in page.text())
    found = {row.text.split(" · ")[0].split("\n")[-1] for row in page.all("ol.list li")}
    assert found == {"item-0001", "item-0002", "item-0003"} and page.fits()
    page.click("#explain")
    page.click("button[type=submit]")
    wait_for(lambda: page.all("ol.list li") and not page.all(".shares"))


@WIDTHS
def test_endpoints_are_described_and_called(page: Page, width: int) -> None:
    page.open("api", width=width)
    schema = web.get(f"{page.address}/openapi.json").json()
    names = {f"{method.upper()} {path}" for path, methods in schema["paths"].items() for method in methods}
    names |= {*schema["components"]["schemas"]}
    listed = "return [...document.querySelectorAll('summary > code')].map((one) => one.textContent)"
    wait_for(lambda: {*page.driver.execute_script(listed)} == names)
    page.click("summary > code", "POST /v1/recommend")
    assert json.loads(page.one("textarea").get_property("value")) == {"user_id": "u17", "limit": 3}
    assert f"curl -s '{page.address}/v1/recommend'" in page.one("pre").text
    page.click("button", "Send")
    assert '"strategy": "popularity"' in page.one("[role=status] pre").text
    page.click("summary > code", "POST /v1/recommend")
    page.click("summary > code", "PUT /v1/items/{item_id}")
    page.type("details[open] input", "item-0002")
    assert "/v1/items/item-0002'" in page.one("pre").text
    page.click("details[open] a", "VersionAnswer")
    assert "catalog_version" in page.one("#schema-VersionAnswer[open]").text and page.fits()


def test_a_wrong_filter_is_explained(page: Page) -> None:
    page.open("recommend")
    page.type("#filter", "{nonsense")
    page.click("button[type=submit]")
    assert "the filter is not JSON" in page.one("[role=alert]").text
    assert page.problems() == []
    page.one("#filter").clear()
    page.type("#filter", '{"must": [{"key": "colour", "match": {"value": "red"}}]}')
    page.click("button[type=submit]")
    assert "colour" in page.one("[role=alert]", "colour").text
    assert [line for line in page.problems() if "422" not in line] == []  # Chromium logs the status


@WIDTHS
def test_items_are_found_and_shown_with_their_nearest(page: Page, width: int) -> None:
    about = web.get(f"{page.address}/v1/items/item-0002").json()
    page.open("items", width=width)
    wait_for(lambda: len(page.all(".card")) == 20)
    page.click("button", "Next")
    wait_for(lambda: "Page 2" in page.text())
    assert page.fits()
    page.type("#query", about["title"].upper())
    page.click(".card", "item-0002")
    page.one("article h2", about["title"])
    nearest = web.get(f"{page.address}/v1/items/item-0002/similar", params={"limit": 8}).json()["items"]
    wait_for(lambda: len(page.all("article .card")) == len(nearest))
    text = page.text()
    assert about["text"] in text and " · ".join(map(str, about["codes"])) in text and "active" in text
    assert "price" in text and "toy, <i>sale</i>" in text
    wait_for(lambda: page.all("article img.large"))
    wait_for(page.pictures)
    assert page.fits()
    first = nearest[0]["item_id"]
    page.click("article .card")
    wait_for(lambda: page.driver.current_url.endswith(f"#/items/{first}"))
    page.driver.back()
    page.one("article h2", about["title"])


@WIDTHS
def test_titles_and_texts_are_text_and_never_markup(page: Page, width: int) -> None:
    page.open("items/added", width=width)
    assert page.one("article h2").text == MARKUP and "A sturdy <script>rudder</script>" in page.text()
    page.open("items", width=width)
    page.type("#query", "<b>")
    assert MARKUP in page.one(".card", "added").text
    page.open("recommend", width=width)
    page.type("#add", "added")
    assert MARKUP in page.one("#add-list [role=option]", "bold").text
    page.type("#add", "\ue015\ue007")
    assert MARKUP in page.one(".chips li", "bold").text
    page.type("#filter", '{"must": [{"has_id": ["added"]}]}')
    page.one("#exclude").send_keys("may")
    page.click("button[type=submit]")
    assert MARKUP in page.one("ol.list li").text and MARKUP in page.one(".tree .leaf").text
    selector = "main b, main script, main img:not(.picture)"
    script = f"return [document.title, document.querySelectorAll('{selector}').length]"
    assert page.driver.execute_script(script) == ["CEMG: recommendations", 0] and page.fits()


@WIDTHS
def test_the_status_is_read_again_every_few_seconds(page: Page, width: int) -> None:
    page.open("status", width=width)
    wait_for(lambda: len(page.all(".chart canvas")) == 2)
    assert "Ready\nyes" in page.text() and "Catalog version" in page.text()

    def searches() -> str:
        return next(one.text for one in page.all(".figures div") if one.text.startswith("Searches"))

    before = searches()
    web.post(f"{page.address}/v1/recommend", json={"history": []}).raise_for_status()
    wait_for(lambda: searches() != before)
    wait_for(lambda: "none" not in page.one(".chart").get_attribute("aria-label"), seconds=WAIT + SLOT)
    assert page.fits() and all(0 < one.size["width"] < width for one in page.all(".chart canvas"))


def test_everything_is_reached_with_the_keyboard(page: Page) -> None:
    page.open("recommend")
    page.one("#add")
    names, outlined = [], []
    script = """
        const one = document.activeElement, style = getComputedStyle(one);
        return [one.id || one.innerText || one.name || one.tagName, style.outlineStyle !== 'none'];
    """
    for _ in range(14):
        page.driver.switch_to.active_element.send_keys("\ue004")  # tab
        name, visible = page.driver.execute_script(script)
        names.append(name.strip())
        outlined.append(visible)
    wanted = ["Skip to the content", "Recommend", "Items", "Status", "API", "way", "add", "limit", "exclude",
              "exact", "explain", "filter", "Recommend"]  # fmt: skip
    assert names[: len(wanted)] == wanted and all(outlined[: len(wanted)])
    page.driver.execute_script("document.querySelector('#add').focus()")
    page.driver.switch_to.active_element.send_keys("item-0012\ue007")
    page.one(".chips li")
    page.driver.execute_script("document.querySelector('#limit').focus()")
    page.driver.switch_to.active_element.send_keys("\ue007")  # enter submits
    wait_for(lambda: page.all("ol.list li"))
    page.driver.execute_script("document.querySelector('.tree summary').focus()")
    before = len(page.all(".tree .leaf"))
    page.driver.switch_to.active_element.send_keys(" ")
    wait_for(lambda: len(page.all(".tree .leaf")) < before)
    unlabelled = """return [...document.querySelectorAll('input, select, textarea')]
        .filter((one) => !one.labels.length).map((one) => one.id)"""
    assert page.driver.execute_script(unlabelled) == []


def test_a_key_is_asked_for_and_kept_for_the_tab_only(driver: Any, tiny_run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(tiny_run, tmp_path / "run")
    (tmp_path / "keys.yaml").write_text(f"read: [{KEY}]\n")
    with serving(run, "--keys", tmp_path / "keys.yaml") as address:
        assert web.get(f"{address}/v1/items/item-0002/image").status_code == 401
        page = Page(driver, address)
        page.open("items")
        page.type("#key", "a-key-that-is-wrong\ue007")
        wait_for(lambda: "not known" in page.one("dialog [role=alert]").text)
        page.type("#key", f"{KEY}\ue007")
        wait_for(lambda: len(page.all(".card")) == 20 and page.pictures())
        assert (
            page.driver.execute_script("return [Object.values(sessionStorage), localStorage.length]")
            == [
                [KEY, ""],
                0,
            ]
            and page.driver.get_cookies() == []
        )
        page.click("nav a", "Status")
        wait_for(lambda: "Ready\nyes" in page.text())
        page.driver.execute_script("sessionStorage.clear()")
        page.click("nav a", "Items")
        page.click("dialog button", "Cancel")
        assert "an API key is needed" in page.one("main [role=alert]").text
        assert [line for line in page.problems() if "401" not in line] == []


@pytest.mark.skipif(not os.environ.get("CEMG_SCREENSHOTS"), reason="CEMG_SCREENSHOTS is not set")
def test_the_screenshot_of_the_docs(page: Page) -> None:
    page.open("recommend", width=900, height=1400)
    for item in ("item-0012", "item-0007", "item-0033"):
        page.type("#add", f"{item}\ue007")
    page.one("#limit").clear()
    page.type("#limit", "6")
    page.click("#exact")
    page.click("button[type=submit]")
    wait_for(lambda: page.all(".tree .leaf") and page.pictures())
    page.driver.execute_script("document.activeElement.blur()")
    height = page.driver.execute_script("return document.documentElement.scrollHeight")
    metrics = {"width": 900, "height": height, "deviceScaleFactor": 1, "mobile": False}
    page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    assert page.driver.save_screenshot(str(ROOT / "docs" / "figures" / "serve.png"))

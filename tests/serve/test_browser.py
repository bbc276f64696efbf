"""Each function of the page at /, in Chromium against a real process."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cemg.serve.metrics import SLOT

from .pages import MARKUP, WAIT, Page, serving, wait_for, web

ROOT = Path(__file__).parents[2]
KEY = "a-read-key-of-the-tests"


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

"""examples/serve and the curl lines of pages run against a service; the manifests fit the command line."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from prometheus_client.parser import text_string_to_metric_families

from cemg.commands import serve

from ..serve.process import ServerProcess, copy_of, eventually

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples" / "serve"
needs_curl = pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")


@pytest.fixture(scope="module")
def server(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with ServerProcess(copy_of(tiny_run, tmp_path_factory.mktemp("examples"))) as process:
        yield process


def run(*words: object, **options: Any) -> str:
    done = subprocess.run([*map(str, words)], capture_output=True, text=True, timeout=120, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@needs_curl
@pytest.mark.parametrize("page", ["README.md", "docs/http-service.md"])
def test_the_curl_lines_of_a_page_work_as_printed(
    server: ServerProcess, tiny_run: Path, tmp_path: Path, page: str
) -> None:
    text = (ROOT / page).read_text().replace("\\\n", " ")
    lines = re.findall(r"^curl .*$", text, flags=re.MULTILINE)[:4]
    assert all(" localhost:8000/" in line for line in lines)
    with ServerProcess(copy_of(tiny_run, tmp_path)) as fresh:
        there = [line.replace("localhost:8000", f"localhost:{fresh.port}") for line in lines]
        listed, stored, put, removed = (json.loads(run("sh", "-c", line)) for line in there)
        assert len(listed["items"]) == 3 and listed["strategy"] == "mixture" and listed["complete"]
        assert stored == {"stored": 1, "known": [], "unknown_items": []}
        assert put["catalog_version"] == 1 and removed["catalog_version"] >= 2
        user = fresh.json("GET", "/v1/users/user-0001")["history"]
        assert user[-1] == "item-0012"
        answer = fresh.json("POST", "/v1/recommend", {"user_id": "user-0001", "limit": 50, "beams": 50})
        assert "item-0012" not in {one["item_id"] for one in answer["items"]}


@needs_curl
def test_the_script_of_calls_runs(server: ServerProcess) -> None:
    answers = [json.loads(line) for line in run("sh", EXAMPLES / "requests.sh", server.url).splitlines()]
    assert len(answers) == 10 and all("status" not in answer for answer in answers)
    assert answers[1] == {"stored": 1, "known": [], "unknown_items": []} and answers[6]["item_id"] == "new/1"
    assert answers[6]["attributes"] == {"price": 8.5}


def test_the_client_sends_an_event_and_recommends(server: ServerProcess) -> None:
    printed = run(sys.executable, EXAMPLES / "client.py", server.url, "bob", "item-0012").splitlines()
    assert printed[0] == "stored 1" and len(printed) == 4
    assert server.json("GET", "/v1/users/bob")["history"] == ["item-0012"]


def test_the_client_repeats_a_call_with_the_same_event_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from client import Client  # type: ignore[import-not-found]

    bodies: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            if len(bodies) == 1:  # stored, but the answer is lost
                self.connection.close()
                return
            self.send_response(503 if len(bodies) == 2 else 200)
            self.send_header("retry-after", "0")
            self.end_headers()
            self.wfile.write(json.dumps({"stored": 1, "detail": "busy"}).encode())

        def log_message(self, *words: object) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Handler) as service:
        threading.Thread(target=service.serve_forever, daemon=True).start()
        client = Client(f"http://127.0.0.1:{service.server_port}")
        assert client.send_events([{"user_id": "ann", "item_id": "x"}]) == 1
        service.shutdown()
    assert len(bodies) == 3 and bodies[0] == bodies[1] == bodies[2]


GORSE_ITEMS = """\
item_id,is_hidden,categories,time_stamp,labels,description
shop/1,false,toy|garden,2020-01-01 01:01:01.1 +0000 UTC,"{""price"": 9.5, ""tags"": [""a"", ""b""]}","Sturdy
rudder, plain"
shop/2,true,,2022-01-01 01:01:01 +0000 UTC,null,Plain telescope
item-0040,true,,,null,
"""
GORSE_FEEDBACK = """\
feedback_type,user_id,item_id,time_stamp
click,carl,item-0003,2021-01-02 00:00:00 +0000 UTC
read,carl,item-0004,2021-01-01 00:00:00 +0000 UTC
"""


def test_files_of_gorse_are_imported_once(server: ServerProcess, tmp_path: Path) -> None:
    (tmp_path / "items.csv").write_text(GORSE_ITEMS)
    (tmp_path / "feedback.csv").write_text(GORSE_FEEDBACK)
    words = [sys.executable, EXAMPLES / "import_csv.py", server.url]
    words += ["--items", tmp_path / "items.csv", "--feedback", tmp_path / "feedback.csv"]
    assert run(*words) == "items: 3\nnew events: 2\n"
    assert run(*words) == "items: 3\nnew events: 0\n"
    found = eventually(lambda: (one := server.json("GET", "/v1/items/shop%2F1"))["codes"] and one)
    assert found["text"] == "Sturdy\nrudder, plain" and found["state"] == "active"
    assert found["attributes"] == {
        "categories": ["toy", "garden"], "time_stamp": "2020-01-01T01:01:01Z", "price": 9.5,
        "tags": ["a", "b"],
    }  # fmt: skip
    before = {"must": [{"key": "time_stamp", "range": {"lt": "2021-01-01"}}]}
    answer = server.json("POST", "/v1/recommend", {"history": ["item-0001"], "filter": before})
    assert [one["item_id"] for one in answer["items"]] == ["shop/1"]
    assert server.http.get("/v1/items/shop%2F2").status_code == 404, "hidden, so never sent"
    assert server.json("GET", "/v1/items/item-0040")["state"] == "removed"
    assert server.json("GET", "/v1/users/carl")["history"] == ["item-0004", "item-0003"]


def test_other_tables_are_imported_by_the_names_of_their_columns(
    server: ServerProcess, tmp_path: Path
) -> None:
    lines = ("sku,name,price,fit", "0012,Sturdy rudder,3,38", "0013,Plain telescope,4.5,M")
    (tmp_path / "products.csv").write_text("\n".join(lines))
    words = [sys.executable, EXAMPLES / "import_csv.py", server.url, "--items", tmp_path / "products.csv"]
    refused = subprocess.run([*map(str, words)], capture_output=True, text=True)
    assert (
        refused.returncode == 1
        and "has no column 'item_id'; its columns are sku, name, price" in refused.stderr
    )
    run(*words, "--id", "sku", "--title", "name")
    found = server.json("GET", "/v1/items/0012")
    assert found["title"] == "Sturdy rudder" and found["attributes"] == {"price": 3, "fit": "38"}
    for broken, reason in (("nowhere.csv", "No such file"), ("products.csv", "is a string")):
        (tmp_path / "products.csv").write_text("sku,name,price\n0014,Brown orbit,cheap\n")
        words = [*words[:3], "--items", tmp_path / broken, "--id", "sku", "--title", "name"]
        refused = subprocess.run([*map(str, words)], capture_output=True, text=True)
        assert refused.returncode == 1 and reason in refused.stderr and "Traceback" not in refused.stderr


def test_the_dashboard_reads_metrics_that_exist(server: ServerProcess) -> None:
    server.json("POST", "/v1/recommend", {"user_id": "ann"})
    families = text_string_to_metric_families(server.http.get("/metrics").text)
    known = {sample.name for family in families for sample in family.samples}
    panels = json.loads((EXAMPLES / "grafana.json").read_text())["panels"]
    used = [set(re.findall(r"cemg_\w+", target["expr"])) for one in panels for target in one["targets"]]
    assert all(used) and set().union(*used) <= known
    paths = set(re.findall(r'path=\\?"([^"\\]+)', (EXAMPLES / "grafana.json").read_text()))
    assert paths == {"/v1/recommend"}


def test_the_commands_of_the_image_and_the_manifest_exist() -> None:
    image = json.loads(re.findall(r"^CMD (.*)$", (EXAMPLES / "Dockerfile").read_text(), re.MULTILINE)[0])
    manifest = [*yaml.safe_load_all((EXAMPLES / "kubernetes.yaml").read_text())]
    container = manifest[0]["spec"]["template"]["spec"]["containers"][0]
    command: Any = typer.main.get_command(serve.app)
    for program, *arguments in (image, container["args"]):
        assert program == "cemg-serve"
        context = command.commands["serve"].make_context("serve", arguments)
        assert context.params["host"] == "0.0.0.0" and context.params["keys"]
    timeout = context.params["shutdown_timeout"]
    assert manifest[0]["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] > timeout
    names = {mount["name"] for mount in container["volumeMounts"]}
    assert names == {volume["name"] for volume in manifest[0]["spec"]["template"]["spec"]["volumes"]}
    assert os.access(EXAMPLES / "requests.sh", os.R_OK)

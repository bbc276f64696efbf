"""Databases for the tests of the store: SQLite files, and PostgreSQL if a server can be started."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from cemg.serve.store import Store

from .pages import MARKUP, serving, wait_for, web
from .process import KEYS, ServerProcess, copy_of

schemas = itertools.count()
FILTERS = """
below:
  parameters: {price: number}
  filter: {must: [{key: price, range: {lt: $price}}]}
"""


def _binaries() -> Path | None:
    """The folder of initdb and pg_ctl. Debian does not put them on the PATH."""
    found = shutil.which("initdb")
    if found is not None:
        return Path(found).resolve().parent
    return max(Path("/usr/lib/postgresql").glob("*/bin"), default=None)


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """The URL of a server: CEMG_TEST_POSTGRES, or one that is started for this session."""
    pytest.importorskip("psycopg")
    if os.environ.get("CEMG_TEST_POSTGRES"):
        yield os.environ["CEMG_TEST_POSTGRES"]
        return
    binaries = _binaries()
    if binaries is None:
        pytest.skip("no PostgreSQL server is installed, and CEMG_TEST_POSTGRES is not set")
    folder = Path(tempfile.mkdtemp(prefix="cemg-pg-"))
    user = None
    if os.geteuid() == 0:  # the server refuses to run as root
        user = "postgres"
        try:
            shutil.chown(folder, user)
        except LookupError:
            pytest.skip("PostgreSQL does not run as root, and there is no user 'postgres'")

    def run(*command: str) -> None:
        with (folder / "output").open("ab") as output:
            subprocess.run(
                command, user=user, cwd=folder, stdout=output, stderr=output, check=True, timeout=60
            )

    data, control = str(folder / "data"), str(binaries / "pg_ctl")
    options = f"-F -k {folder} -c listen_addresses='' -c max_connections=200"
    try:
        run(
            str(binaries / "initdb"),
            "-D",
            data,
            "-A",
            "trust",
            "-U",
            "cemg",
            "-E",
            "UTF8",
            "--locale=C.UTF-8",
            "-N",
        )
        run(control, "-D", data, "-w", "-o", options, "-l", str(folder / "log"), "start")
    except (OSError, subprocess.SubprocessError) as error:
        text = (folder / "output").read_text()
        shutil.rmtree(folder, ignore_errors=True)
        pytest.skip(f"PostgreSQL does not start: {error} {text[-300:]}")
    try:
        yield f"postgresql://cemg@/postgres?host={folder}"
    finally:
        run(control, "-D", data, "-m", "immediate", "stop")
        shutil.rmtree(folder, ignore_errors=True)


def new_schema(postgres: str) -> str:
    """The URL of a new empty schema of a server."""
    import psycopg

    name = f"cemg_{os.getpid()}_{next(schemas)}"
    with psycopg.connect(postgres, autocommit=True) as connection:
        connection.execute(f"CREATE SCHEMA {name}")
    return f"{postgres}{'&' if '?' in postgres else '?'}options={quote(f'-csearch_path={name}')}"


@pytest.fixture
def new_postgres(postgres: str) -> Callable[[], str]:
    """Returns the URL of a new empty schema at each call."""
    return lambda: new_schema(postgres)


@pytest.fixture(params=["sqlite", "postgres"])
def new_location(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], str]:
    """Returns the location of a store that does not exist yet at each call."""
    if request.param == "postgres":
        return request.getfixturevalue("new_postgres")
    numbers = itertools.count()
    return lambda: str(tmp_path / f"store-{next(numbers)}.sqlite")


@pytest.fixture
def location(new_location: Callable[[], str]) -> str:
    """The location of a store that does not exist yet."""
    return new_location()


@pytest.fixture
def open_store() -> Iterator[Callable[..., Store]]:
    """`Store.open`, closed at the end of the test."""
    with ExitStack() as stack:
        yield lambda *arguments, **options: stack.enter_context(Store.open(*arguments, **options))


@pytest.fixture
def store(location: str, open_store: Callable[..., Store]) -> Store:
    """An empty store."""
    return open_store(location)


@pytest.fixture(scope="session")
def other_run(tiny_run: Path, make_once: Any, command: Any) -> Path:
    """A run of the same data with another tokenizer and another generator."""
    from cemg.commands.train import main

    def train(folder: Path) -> None:
        shutil.copytree(tiny_run, folder / "run")
        shutil.rmtree(folder / "run" / "serve", ignore_errors=True)
        settings = ("--set", "tokenizer.epochs=10", "--set", "generator.epochs=2")
        assert command(main, "--run", folder / "run", "--force", *settings) == 0

    return make_once("other", train) / "run"


@pytest.fixture(scope="module")
def server(
    request: pytest.FixtureRequest, tiny_run: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    """A process with keys and a named filter. Its store is in SQLite, or for the parameter in PostgreSQL."""
    folder = tmp_path_factory.mktemp("endpoints")
    (folder / "keys.yaml").write_text(json.dumps({role: [key] for role, key in KEYS.items()}))
    (folder / "filters.yaml").write_text(FILTERS)
    options = ["--keys", folder / "keys.yaml", "--filters", folder / "filters.yaml"]
    if getattr(request, "param", "sqlite") == "postgres":
        options += ["--store", new_schema(request.getfixturevalue("postgres"))]
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


@pytest.fixture(scope="module")
def page_run(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shutil.copytree(tiny_run, tmp_path_factory.mktemp("page") / "run")


@pytest.fixture(scope="module")
def service(page_run: Path) -> Iterator[str]:
    """A service with an added item whose title is markup, and a run's item with attributes."""
    with serving(page_run) as address:
        body = {"title": MARKUP, "text": "A sturdy <script>rudder</script>", "attributes": {"price": 5}}
        assert web.put(f"{address}/v1/items/added", json=body).status_code == 200
        for number in range(1, 6):
            patch = {"attributes": {"price": number, "tags": ["toy", "<i>sale</i>"]}}
            assert web.patch(f"{address}/v1/items/item-000{number}", json=patch).status_code == 200
        wait_for(lambda: web.get(f"{address}/v1/items/added").json()["codes"], seconds=120)
        yield address

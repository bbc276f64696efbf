"""``cemg-serve``: recommendations over HTTP."""

from __future__ import annotations

import gc
import logging
from pathlib import Path
from types import ModuleType
from typing import Annotated

import typer

from cemg.commands import console as command
from cemg.errors import UserError
from cemg.progress import console

app = command.command_line(cls=command.DefaultGroup, add_help_option=False)
RunOfStoreOption = Annotated[
    Path | None, typer.Option("--run", metavar="FOLDER", help="Run that the store belongs to.")
]
StoreOption = Annotated[
    str, typer.Option(metavar="PATH", help="Store of the service. Default: serve/store.sqlite in the run.")
]
LOOPBACK = ("127.0.0.1", "localhost", "::1")


@app.command(
    cls=command.Command,
    epilog=command.examples(
        "cemg-serve --run runs/demo",
        "cemg-serve --run runs/beauty --host 0.0.0.0 --keys keys.yaml --allow-host shop.example",
        "cemg-serve backup --help",
    ),
)
def serve(
    run: command.RunOption,
    host: Annotated[str, typer.Option(metavar="ADDRESS", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8000,
    store: Annotated[
        str,
        typer.Option(
            metavar="PATH", help="SQLite file, or postgresql:// URL. Default: serve/store.sqlite in the run."
        ),
    ] = "",
    keys: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="YAML file that maps the roles read, write and admin to lists of keys."
        ),
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Listen on an address beyond this machine without keys.")
    ] = False,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="Name that clients may use for this service. Repeatable; * admits any."
        ),
    ] = None,
    filters: Annotated[
        Path | None, typer.Option(metavar="FILE", help="YAML file of named filters with parameters.")
    ] = None,
    timeout: Annotated[
        float,
        typer.Option(metavar="SECONDS", min=0.001, help="Time that a request may wait for its search."),
    ] = 10.0,
    shutdown_timeout: Annotated[
        float,
        typer.Option(metavar="SECONDS", min=0.0, help="Time for requests to finish after SIGTERM."),
    ] = 30.0,
    max_queue: Annotated[
        int, typer.Option(min=1, help="Number of waiting requests beyond which others get 503.")
    ] = 1024,
    max_batch: Annotated[int, typer.Option(min=1, max=1024, help="Requests in one search.")] = 64,
    models: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="Folder whose runs POST /v1/models may load. Default: that of the run."
        ),
    ] = None,
    move_store: Annotated[
        bool,
        typer.Option(
            "--move-store",
            help="Serve --run even if the store belongs to another run: added items get new semantic IDs.",
        ),
    ] = False,
    replica: Annotated[
        bool,
        typer.Option("--replica", help="Share the store with other replicas: see docs/scale.md."),
    ] = False,
    rate: Annotated[
        float, typer.Option(min=0.0, help="Requests per second that are answered per client; 0 for no limit.")
    ] = 0.0,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads of a search. Default: one per core.")
    ] = None,
    device: command.DeviceOption = "cpu",
    version: command.VersionOption = False,
) -> None:
    """Serve recommendations over HTTP, from a catalog and a memory that change while it runs.

    GET /docs lists the endpoints. The service needs no other one; SIGTERM and Ctrl-C end it after the waiting
    requests are answered. The name serve may be left out. `cemg-serve backup` and `cemg-serve restore` copy
    the store.
    """
    try:
        from cemg.serve.app import Settings, create_app
        from cemg.serve.named_filters import NamedFilters
        from cemg.serve.security import Keys
        from cemg.serve.server import Server, bind
        from cemg.serve.service import Service
        from cemg.storage.run import Run
    except ModuleNotFoundError as error:
        raise _missing(error) from error
    import torch
    from transformers.utils.logging import disable_progress_bar

    if threads is not None:
        torch.set_num_threads(threads)
    disable_progress_bar()  # the log has JSON lines
    command.check_device(device)
    known = Keys.read(keys) if keys is not None else Keys({})
    if host not in LOOPBACK and not known.roles and not insecure:
        raise UserError(
            f"--host {host}: anyone who reaches this address could change the catalog",
            fix="add --keys keys.yaml, or --insecure if the network is closed",
        )
    if replica and move_store:
        raise UserError(
            "--move-store changes the store under the other replicas",
            fix="load the run into the replicas: POST /v1/models; or move it before, without --replica",
        )
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    hosts = [*LOOPBACK, *([] if host in ("0.0.0.0", "::") else [host]), *(allow_host or [])]
    named = None if filters is None else NamedFilters.read(filters)
    bound = bind(host, port)
    Run(run).check_unlocked()
    service = Service(
        run, store=store or None, filters=named, device=device, max_batch=max_batch, max_queue=max_queue,
        models=models, move_store=move_store, replica=replica,
    )  # fmt: skip
    gc.freeze()  # the objects of the start stay, so later collections skip them
    gc.enable()
    app = create_app(service, Settings(keys=known, hosts=hosts, timeout=timeout, rate=rate))
    console.print(
        f"serving {service.loaded.run} on http://{host}:{port}, catalog version {service.store.version}",
        soft_wrap=True,
    )
    Server(app, service, shutdown_timeout=shutdown_timeout).run([bound])


@app.command(
    cls=command.Command,
    epilog=command.examples("cemg-serve backup --run runs/demo --out monday.sqlite"),
)
def backup(
    out: Annotated[Path, typer.Option(metavar="FILE", help="File to write.")],
    run: RunOfStoreOption = None,
    store: StoreOption = "",
) -> None:
    """Copy the store of a service to a file, while it runs or not.

    The copy is complete and checked, or there is none. For PostgreSQL, use pg_dump.
    """
    backups = _backups()
    backups.backup(_store(run, store), out)
    print(out)


@app.command(
    cls=command.Command,
    epilog=command.examples("cemg-serve restore --run runs/demo --from monday.sqlite"),
)
def restore(
    file: Annotated[Path, typer.Option("--from", metavar="FILE", help="File of cemg-serve backup.")],
    run: RunOfStoreOption = None,
    store: StoreOption = "",
) -> None:
    """Copy a backup to the place of a store, of which there must be none.

    The backup is checked first. No service may run on the store. With --run, the backup must belong to the
    catalog of the run.
    """
    backups = _backups()
    target, catalog = _store(run, store), ""
    if run is not None:
        from cemg.artifacts import RunArtifacts

        catalog = RunArtifacts.open(run).load_catalog().digest()
    backups.restore(file, target, catalog=catalog)
    print(target)


def _store(run: Path | None, store: str) -> str | Path:
    """The store that --store or --run names."""
    if store:
        return store
    if run is None:
        raise UserError("no store is named", fix="add --run RUN, or --store PATH")
    from cemg.serve.database import STORE_FILE

    return run / STORE_FILE


def _backups() -> ModuleType:
    try:
        from cemg.serve import backup as backups
    except ModuleNotFoundError as error:
        raise _missing(error) from error
    return backups


def _missing(error: ModuleNotFoundError) -> UserError:
    return UserError(f"cemg-serve needs the package {error.name}", fix="pip install -e '.[serve]'")


def main() -> None:
    """Run ``cemg-serve`` on the command line's arguments."""
    gc.disable()  # a start makes millions of objects that stay; every collection would traverse them
    try:
        command.run(app)
    finally:
        gc.enable()

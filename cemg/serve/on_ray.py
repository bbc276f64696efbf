"""Replicas of ``cemg-serve`` behind one address, by Ray Serve.

    serve run cemg.serve.on_ray:application run=/data/runs/beauty store=postgresql://cemg@db/cemg replicas=3

Ray Serve starts the replicas on the machines of a cluster, and replaces those that die. They follow one
store, as those of ``cemg-serve --replica`` do. Only this module imports Ray Serve.
"""

from __future__ import annotations

from pathlib import Path

import torch
from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.serve import Application

from cemg.serve.app import Settings, create_app
from cemg.serve.named_filters import NamedFilters
from cemg.serve.security import LOOPBACK, Keys
from cemg.serve.service import Service

WAITING = 1_000  # requests that a replica takes at once; it searches them in batches


class Arguments(BaseModel):
    """Arguments of ``serve run cemg.serve.on_ray:application``, which are options of ``cemg-serve``.

    Attributes:
        run: Folder of the run, on every machine.
        store: URL of PostgreSQL, or an SQLite file if all replicas are on one machine.
        replicas: How many.
        cpus: CPU cores of each, and threads of its searches.
        keys: YAML file of API keys, on every machine; "" for none.
        hosts: Names that clients may use, separated by commas; "*" admits any.
        filters: YAML file of named filters; "" for none.
        timeout: Seconds that a request may wait for its search.
        models: Folder whose runs may be loaded; "" for that of the run.
        device: "cpu", "cuda", …
    """

    model_config = ConfigDict(extra="forbid")

    run: Path
    store: str
    replicas: int = Field(2, ge=1)
    cpus: int = Field(1, ge=1)
    keys: str = ""
    hosts: str = ""
    filters: str = ""
    timeout: float = Field(10.0, gt=0)
    models: str = ""
    device: str = "cpu"


def application(arguments: Arguments) -> Application:
    """Return the application with these arguments, for ``serve run`` and `ray.serve.run`."""

    def build() -> FastAPI:  # called in each replica
        torch.set_num_threads(arguments.cpus)
        service = Service(
            arguments.run, store=arguments.store, replica=True, device=arguments.device,
            filters=NamedFilters.read(Path(arguments.filters)) if arguments.filters else None,
            models=Path(arguments.models) if arguments.models else None,
        )  # fmt: skip
        settings = Settings(
            keys=Keys.read(Path(arguments.keys)) if arguments.keys else Keys({}),
            hosts=[*LOOPBACK, *filter(None, arguments.hosts.split(","))],
            timeout=arguments.timeout,
        )
        return create_app(service, settings)

    options = {"num_cpus": arguments.cpus, "num_gpus": float(arguments.device.startswith("cuda"))}
    deployment = serve.deployment(
        serve.ingress(build)(),
        name="cemg",
        num_replicas=arguments.replicas,
        max_ongoing_requests=WAITING,
        ray_actor_options=options,
    )
    return deployment.bind()

"""``--ray``: the parts of a table computed on a Ray cluster, by Ray Data.

Workers send finished parts to this process, which keeps them. Ray computes the parts of a worker or a node
that died again elsewhere. `cemg.commands.tasks_on_ray` runs the tasks of an experiment.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import pickle
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pyarrow as pa

from cemg.errors import UserError
from cemg.storage.parts import Compute, Encode, Work
from cemg.version import __version__

LOCAL = "local"
SECONDS = 10  # until an address counts as unreachable
SETTINGS = {  # of Ray, which reads them when it is imported
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_BACKEND_LOG_LEVEL": "fatal",  # failures reach this process as errors
    "RAY_worker_niceness": "0",  # of a cluster that the command starts; else its work has a low priority
    "RAY_NUM_REDIS_GET_RETRIES": "2",  # else a server that is not Ray is tried for ten minutes
}
PROBE_SECONDS = 300  # until a node counts as hanging; it imports CEMG


def check_ray(address: str) -> None:
    """Raise UserError if Ray is not installed, or if nothing answers at the address."""
    host, _, port = address.rpartition(":")
    if address != LOCAL and not (host and port.isdecimal() and 0 < int(port) < 65536):
        raise UserError(f"--ray must be local or HOST:PORT, got {address!r}", fix="--ray 10.0.0.1:6379")
    if not _installed():
        raise UserError("--ray needs Ray, which is not installed", fix="pip install 'cemg[distributed]'")
    if address == LOCAL:
        return
    try:
        socket.create_connection((host, int(port)), timeout=SECONDS).close()
    except OSError as error:
        raise _unreachable(address, str(error)) from error


def _installed() -> bool:
    return all(importlib.util.find_spec(name) for name in ("ray", "pandas"))  # pandas: of ray[data]


def on_ray(address: str, work: Work) -> Compute:
    """A function that computes parts of ``work`` on a Ray cluster and yields them as they are finished.

    Args:
        address: "local" for a cluster on this machine that ends with the command; or HOST:PORT of the head of
            a cluster that this machine belongs to.
        work: The table.

    Raises:
        UserError: Ray is not installed, the cluster cannot be reached, a node has another version of CEMG, or
            a worker reports one.
    """
    check_ray(address)

    def compute(numbers: Sequence[int]) -> Iterator[tuple[int, pa.Table]]:
        if not numbers:
            return
        with connected(address, kept="finished parts"):
            check_nodes()
            yield from _parts(work, numbers)

    return compute


class Worker:
    """Computes parts in a process of the cluster. Errors of the user are sent back as data."""

    def __init__(self, make: bytes, version: str) -> None:
        self.error: UserError | None = None
        try:
            if version != __version__:
                raise other_version(__version__, version)
            self.encode: Encode = pickle.loads(make)()
        except UserError as error:
            self.error = error

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        try:
            if self.error is not None:
                raise self.error
            table = self.encode(pickle.loads(row["payload"]))
        except UserError as error:
            fields = (error.message, error.cause, error.fix)
            return {"number": row["number"], "table": b"", "error": pickle.dumps(fields)}
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        return {"number": row["number"], "table": sink.getvalue().to_pybytes(), "error": b""}


def _parts(work: Work, numbers: Sequence[int]) -> Iterator[tuple[int, pa.Table]]:
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)  # after the import, which sets it
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    rows = [{"number": number, "payload": pickle.dumps(work.payload(number))} for number in numbers]
    workers = ray.data.ActorPoolStrategy(min_size=1, max_size=len(rows))
    data = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
        Worker, fn_constructor_args=(ray.cloudpickle.dumps(work.worker()), __version__), compute=workers
    )
    for row in data.iter_rows():
        if row["error"]:
            message, cause, fix = pickle.loads(row["error"])
            raise UserError(f"a worker of the Ray cluster failed: {message}", cause=cause, fix=fix)
        yield int(row["number"]), pa.ipc.open_stream(row["table"]).read_all()


@contextmanager
def connected(address: str, *, kept: str) -> Iterator[None]:
    """Connect to a cluster, or start one on this machine, until the end of the block.

    Args:
        address: "local", or HOST:PORT of its head.
        kept: What an error keeps, for its message.

    Raises:
        UserError: The cluster cannot be reached, or fails in the block.
    """
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    import ray

    options: dict[str, Any] = {"address": address, "log_to_driver": False, "logging_level": "ERROR"}
    if address == LOCAL:
        options |= {"include_dashboard": False}
    ends = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(**options)
    except Exception as error:  # of any class, even of this one: a cluster that does not start in time
        raise _unreachable(address, str(error).split("\n")[0]) from error
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, ends)  # which Ray has replaced
    try:
        yield
    except ray.exceptions.RayError as error:
        raise UserError(
            "the Ray cluster failed", cause=str(error).strip().split("\n")[-1][:300],
            fix=f"{kept} are kept; check the cluster with `ray status`, and repeat the command",
        ) from error  # fmt: skip
    finally:
        ray.shutdown()


def check_nodes() -> None:
    """Raise UserError if a node has no CEMG, or another version than this process."""

    def version() -> str | None:  # a nested function is sent by value, so it needs no CEMG there
        try:
            from cemg.version import __version__ as found
        except ImportError:
            return None
        return str(found)

    for node, found in on_nodes(version):
        if found != __version__:
            raise other_version(found, __version__, node=node["NodeManagerAddress"])


def on_nodes(function: Callable[..., Any], *arguments: Any) -> list[tuple[dict[str, Any], Any]]:
    """Call a function on each node. Returns what Ray knows of each node, and the result of the call there.

    Raises UserError if a node does not run it.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    probe = ray.remote(num_cpus=0, max_retries=0)(function)
    nodes = [node for node in ray.nodes() if node["Alive"]]
    strategies = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in nodes]
    answers = [probe.options(scheduling_strategy=strategy).remote(*arguments) for strategy in strategies]
    results = []
    for node, answer in zip(nodes, answers, strict=True):
        try:
            results.append((node, ray.get(answer, timeout=PROBE_SECONDS)))
        except ray.exceptions.RayError as error:
            cause = str(error).strip().split("\n")[-1][:300]
            raise UserError(f"node {node['NodeManagerAddress']} does not run tasks", cause=cause) from error
    return results


def other_version(found: str | None, version: str, node: str | None = None) -> UserError:
    """The error for a node with another version of CEMG than the command; None: it has no CEMG."""
    where = "a node of the Ray cluster" if node is None else f"node {node} of the Ray cluster"
    has = f"has version {found} of CEMG" if found else "has no CEMG"
    return UserError(
        f"{where} {has}, and this command is version {version}",
        fix=f"install the same version on every node: pip install cemg=={version}",
    )


def _unreachable(address: str, cause: str) -> UserError:
    return UserError(
        f"no Ray cluster can be reached at {address}", cause=cause,
        fix="start one: ray start --head on one machine, what it prints on the others; or use --ray local",
    )  # fmt: skip

"""Parts computed on a Ray cluster: a node that dies, other versions, and addresses that do not answer.

The tests that start a cluster need Ray: ``pip install 'cemg[distributed]'``.
"""

from __future__ import annotations

import pickle
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from cemg.commands import on_ray, recommend
from cemg.commands.all_users import AllUsers
from cemg.commands.shards import write_parts
from cemg.errors import UserError
from cemg.features import ImageConfig, TextConfig
from cemg.features import shards as feature_shards
from cemg.features.shards import FeatureWork
from cemg.recommender import Recommender
from cemg.storage.parts import Parts
from cemg.version import __version__

SECONDS = 0.5  # of a part, so that parts are left when a node dies


class Slow:
    """Work whose workers take longer. The results are those of the work."""

    def __init__(self, work: Any) -> None:
        self.work = work

    def __getattr__(self, name: str) -> Any:
        return getattr(self.work, name)

    def worker(self) -> Any:
        make = self.work.worker()

        def slow() -> Any:
            encode = make()

            def later(payload: Any) -> pa.Table:
                time.sleep(SECONDS)
                return encode(payload)

            return later

        return slow


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A cluster whose head computes nothing. Tests add nodes."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_worker_niceness", "0")  # Ray's 15 makes tests beside others very slow
        ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
        made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        yield made
        made.shutdown()


@pytest.fixture
def nodes(cluster) -> Iterator[list[Any]]:
    """Two nodes with one CPU each."""
    added = [cluster.add_node(num_cpus=1) for _ in range(2)]
    yield added
    for node in set(added) & set(cluster.list_all_nodes()):
        cluster.remove_node(node)


def work_of(kind: str, tiny_run: Path, tiny_text_model: Path) -> Any:
    if kind == "recommendations":
        options = {"top": 5, "beams": 20, "exclude_history": True, "memory": "gate"}
        return AllUsers(Recommender.from_run(tiny_run), part="all", options=options, part_users=4)
    texts = [" ".join(["plain", "garden", "music"] * (n % 7)) + f" a{n}" for n in range(40)]
    text = TextConfig(str(tiny_text_model), batch_size=2)
    return FeatureWork(texts, [None] * 40, text=text, image=ImageConfig())


@pytest.mark.parametrize("kind", ["recommendations", "features"])
def test_a_node_that_dies_loses_and_repeats_no_row(
    kind, cluster, nodes, tiny_run, tiny_text_model, tmp_path, monkeypatch
):
    monkeypatch.setattr(feature_shards, "PART_ITEMS", 4)
    work = work_of(kind, tiny_run, tiny_text_model)
    expected = write_parts(work, tmp_path / "expected.parquet", shard=None, label="")
    assert work.total == 10
    write, written = Parts.write, list[int]()

    def killing(self: Parts, number: int, table: pa.Table) -> None:
        write(self, number, table)
        written.append(number)
        if len(written) == 3:
            cluster.remove_node(nodes.pop(), allow_graceful=False)

    monkeypatch.setattr(Parts, "write", killing)
    out = write_parts(Slow(work), tmp_path / "out.parquet", shard=None, label="", ray=cluster.address)
    assert sorted(written) == list(range(10)) and len(nodes) == 1
    assert out.read_bytes() == expected.read_bytes()


def test_a_node_with_another_version_is_refused(
    cluster, nodes, tiny_run, tiny_text_model, tmp_path, monkeypatch
):
    work = work_of("features", tiny_run, tiny_text_model)
    monkeypatch.setattr(on_ray, "__version__", "9.9")
    with pytest.raises(
        UserError, match=rf"node .* has version {__version__} of CEMG, and this command is version 9\.9"
    ):
        write_parts(work, tmp_path / "out.parquet", shard=None, label="", ray=cluster.address)
    assert not list(tmp_path.iterdir())


def test_a_worker_with_another_version_run_or_file_sends_an_error(tiny_run, tiny_text_model, tmp_path):
    def message(work: Any, version: str = __version__) -> str:
        worker = on_ray.Worker(pickle.dumps(work.worker()), version)
        row = worker({"number": 0, "payload": pickle.dumps(work.payload(0))})
        assert row["table"] == b""
        return str(pickle.loads(row["error"]))

    work = work_of("recommendations", tiny_run, tiny_text_model)
    assert f"has version {__version__} of CEMG, and this command is version 9.9" in message(work, "9.9")
    work.about["generator of the run"] = "0" * 64
    assert "is another run than that of the command" in message(work)
    features = work_of("features", tiny_run, tiny_text_model)
    features.contents["text"] = [f"{text}!" for text in features.contents["text"]]
    assert "is missing, or another one than that of the command" in message(features)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--ray", "local", "--join"), "--ray and --join exclude each other"),
        (("--ray", "head"), "--ray must be local or HOST:PORT, got 'head'"),
        (("--ray", "127.0.0.1:1"), "no Ray cluster can be reached at 127.0.0.1:1"),
        (("--ray", "local"), "--ray needs Ray, which is not installed"),
    ],
)
def test_invalid_options_are_refused(command, capsys, tiny_run, tmp_path, monkeypatch, options, said):
    monkeypatch.setattr(on_ray, "_installed", lambda: not said.endswith("not installed"))
    assert command(recommend.main, "--run", tiny_run, "--all-users", tmp_path / "a.parquet", *options) == 2
    assert f"error: {said}" in capsys.readouterr().err and not list(tmp_path.iterdir())

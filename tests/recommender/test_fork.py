"""A process forked after a recommendation, as by ``gunicorn --preload``, can recommend."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cemg import forks
from cemg.errors import UserError

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
LIMIT_S = 60
IN_A_CHILD = """
import json, os, sys, threading, time, torch

def in_a_child(work):
    '''What work() returns in a forked process; "it hangs" where it does not end.'''
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            answer = work()
        except Exception as error:
            answer = f"{type(error).__name__}: {error}"
        os.write(send, json.dumps(answer).encode())
        os._exit(0)
    for _ in range(1200):
        if os.waitpid(child, os.WNOHANG)[0]:
            return json.loads(os.read(receive, 2**16))
        time.sleep(0.05)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return "it hangs"

torch.set_num_threads(2)
"""
SERVING = """
from cemg import Recommender
from cemg.data import Dataset

recommender = Recommender.from_run(sys.argv[1])
histories = [recommender.catalog.item_ids[:3], recommender.catalog.item_ids[5:9]]
def lists():
    found = recommender.recommend(histories, top=5, exclude_history=True)
    return [found.ids, found.titles]
expected = lists()
large = torch.rand(1500, 1500)
(large @ large).exp().sum()  # torch's own threads have worked, too

def on_a_thread():
    found = []
    thread = threading.Thread(target=lambda: found.extend(lists()))
    thread.start()
    thread.join()
    return found

print(json.dumps({
    "expected": expected, "found": in_a_child(lists), "on a thread": in_a_child(on_a_thread),
    "torch": in_a_child(lambda: bool((large @ large).exp().sum() > 0)),
    "threads": in_a_child(torch.get_num_threads),
    "of a grandchild": in_a_child(lambda: in_a_child(lists)),
    "Polars": in_a_child(lambda: Dataset.load(recommender.artifacts.run.path("data")).name),
    "afterwards": lists(), "own threads": torch.get_num_threads(),
}))
"""
KERNELS = """
from cemg_kernels import BipartiteGraph, Trie, lightgcn_propagate, residual_quantize

x, codebooks = torch.randn(4000, 32), torch.randn(2, 64, 32)
graph = BipartiteGraph.from_edges(torch.arange(2000), torch.arange(2000), 2000, 2000)
def answers():
    codes = residual_quantize(x, codebooks)[0]
    trie = Trie.from_codes(torch.unique(codes, dim=0), 64)
    nodes = trie.lookup(codes)
    return [int(codes.sum()), int(trie.interval(nodes).sum()),
            int(lightgcn_propagate(graph, x, 2).view(torch.int32).long().sum())]
print(json.dumps([answers(), in_a_child(answers)]))
"""


def run(script: str, *arguments: object) -> Any:
    """Runs a script in a new process that may use two threads, and returns its output."""
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-W", "ignore", "-c", IN_A_CHILD + script, *map(str, arguments)]
    ran = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=4 * LIMIT_S, env=environment
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    return json.loads(ran.stdout.splitlines()[-1])


def test_a_child_of_a_process_that_recommended_returns_the_same_lists(tiny_run: Path):
    told = run(SERVING, tiny_run)
    for where in ("found", "on a thread", "of a grandchild", "afterwards"):
        assert told[where] == told["expected"], where
    assert told["torch"] is True
    assert (told["threads"], told["own threads"]) == (1, 2)
    assert told["Polars"].startswith("UserError: reading ")
    assert "recommend keeps the titles" in told["Polars"]


def test_a_child_of_a_process_that_used_the_kernels_gets_the_same_answers():
    expected, found = run(KERNELS)
    assert found == expected


def test_polars_is_refused_only_in_a_child_whose_parent_started_its_threads(monkeypatch):
    monkeypatch.setattr(forks, "_lost", False)
    monkeypatch.setattr(forks, "_ran", False)
    forks._in_child()
    forks.check_polars("reading a table")
    monkeypatch.setattr(forks, "_ran", True)
    forks._in_child()
    with pytest.raises(UserError, match="reading a table needs Polars"):
        forks.check_polars("reading a table")

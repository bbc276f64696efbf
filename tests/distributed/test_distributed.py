"""Two processes have the losses of one, continue after one was killed, and end together with one error."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed import TCPStore

from cemg.distributed import ALONE, World, first_to_fail
from cemg.errors import UserError
from cemg.generator import GeneratorConfig
from cemg.generator.training import check_parts
from cemg.graph import GraphConfig, lightgcn

SCRIPT = Path(__file__).with_name("compare.py")
SPEC = importlib.util.spec_from_file_location("compare", SCRIPT)
compare = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(compare)
TOLERANCE = 1e-5  # sums in another order, over 100 steps in float32


def launched(*arguments: object, module: str = "", restarts: int = 0) -> subprocess.CompletedProcess[str]:
    """Run the script, or a module, in two processes of torchrun."""
    target = ["-m", "--", module] if module else [str(SCRIPT)]
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
         f"--max-restarts={restarts}", *target, *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip


@pytest.mark.medium
@pytest.mark.parametrize(
    "cases",
    [
        pytest.param(
            ("graph", "tokenizer, letter", "gpt2", "llama with dropout", "gpt2, divided"), id="some"
        ),
        pytest.param(compare.CASES, marks=pytest.mark.slow, id="all"),
    ],
)
def test_two_processes_have_the_losses_of_one(tmp_path, cases):
    """Divided weights (FSDP2) too, in fewer steps."""
    ended = launched(tmp_path / "out.json", *cases)
    assert ended.returncode == 0, ended.stderr
    differences = json.loads((tmp_path / "out.json").read_text())
    assert differences.keys() == {*cases} and max(differences.values()) <= TOLERANCE, differences


@pytest.mark.medium
def test_after_a_process_was_killed_the_command_continues_with_the_same_losses(tmp_path):
    """The end of a process ends the others. Step 9 is in the second epoch of five steps.

    One process that computes the same parts has equal losses: a sum of two numbers has one order.
    """
    out = tmp_path / "out.json"
    ended = launched(out, "killed", tmp_path / "checkpoints", 9, restarts=1)
    assert ended.returncode == 0 and "exitcode: -9" in ended.stderr, ended.stderr
    resumed = json.loads(out.read_text())
    first = resumed[0]["step"]
    assert first in (8, 9)  # the main process may have been killed before its last checkpoint
    whole = compare.resumable(ALONE, tmp_path / "whole", accumulation_steps=2)
    assert resumed == [row for row in whole if row["step"] >= first]


@pytest.mark.medium
@pytest.mark.parametrize("name, step, steps_per_epoch", [("graph", 41, 3), ("tokenizer", 50, 4)])
def test_after_a_process_was_killed_a_stage_ends_with_the_result_of_an_uninterrupted_one(
    tmp_path, name, step, steps_per_epoch
):
    """The graph has a checkpoint after each step, the tokenizer after each epoch."""
    ended = launched(tmp_path / "out.json", "killed", name, tmp_path / "checkpoints", step, restarts=1)
    assert ended.returncode == 0 and "exitcode: -9" in ended.stderr, ended.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    epochs = len(found["whole"]) - len(found["resumed"])
    last = step // steps_per_epoch  # the main process may have been killed before its last checkpoint
    assert last - 1 <= epochs <= last
    assert found["equal"] and found["resumed"] == found["whole"][epochs:]


@pytest.mark.medium
def test_processes_that_do_not_divide_a_batch_end_with_one_error_before_anything_is_written(tmp_path):
    run = tmp_path / "run"
    ended = launched(
        "--run", run, "--set", "data.path=", "--set", "generator.batch_size=9", module="cemg.commands.train"
    )
    assert ended.returncode != 0 and not run.exists()
    assert ended.stderr.count("error: ") == 1
    assert "error: generator.batch_size=9 cannot be divided into 2 equal parts" in ended.stderr


@pytest.mark.parametrize(
    "config, size, fix",
    [
        (GeneratorConfig(batch_size=10), 4, "generator.batch_size=12"),
        (GeneratorConfig(batch_size=8, accumulation_steps=3), 2, "generator.batch_size=12"),
    ],
)
def test_parts_that_do_not_divide_a_batch_are_refused_with_a_size_that_fits(config, size, fix):
    check_parts(GeneratorConfig(batch_size=12, accumulation_steps=3), World(0, size))
    with pytest.raises(UserError, match="cannot be divided into") as error:
        check_parts(config, World(0, size))
    assert fix in str(error.value.fix)


def test_more_processes_than_columns_are_refused():
    lightgcn.check_columns(GraphConfig(dim=3), World(0, 3))
    with pytest.raises(UserError, match=r"graph\.dim=3 columns"):
        lightgcn.check_columns(GraphConfig(dim=3), World(0, 4))


@pytest.mark.parametrize("rows", [1, 3, 16, 33, 50])
def test_the_columns_of_all_processes_are_the_table_that_one_draws_at_once(monkeypatch, rows):
    monkeypatch.setattr(lightgcn, "BLOCK", 16)
    config = GraphConfig(dim=5, seed=3)
    wanted = torch.empty(rows, 5).normal_(0, 0.1, generator=torch.Generator().manual_seed(3))
    assert torch.equal(lightgcn._initial(rows, config, ALONE), wanted)
    parts = [lightgcn._initial(rows, config, World(rank, 3)) for rank in range(3)]
    assert torch.equal(torch.cat(parts, 1), wanted)


@pytest.mark.parametrize(
    "variables, said",
    [
        ({"MASTER_PORT": "29500", "ACCELERATE_USE_CPU": "True"}, "has started a single process"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2, but no launcher started this process"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "ACCELERATE_MIXED_PRECISION=bf16 is not supported"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "ACCELERATE_USE_DEEPSPEED=true"),
        ({"ACCELERATE_USE_FSDP": "true"}, "FSDP_VERSION=1"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"}, "OFFLOAD"),
    ],
)
def test_a_launch_that_would_not_do_as_it_says_is_refused(monkeypatch, variables, said):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=said):
        World.join("cpu")


def test_a_launcher_that_started_one_process_trains_alone(monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "ACCELERATE_MIXED_PRECISION": "no"}.items():
        monkeypatch.setenv(name, value)
    with World.join("cpu") as world:
        assert (world.main, world.size, world.sharded) == (True, 1, False)


def test_only_the_first_process_that_fails_prints_its_error(monkeypatch):
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    for name, value in {
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(store.port),
        "WORLD_SIZE": "2",
    }.items():
        monkeypatch.setenv(name, value)
    assert [first_to_fail(), first_to_fail()] == [True, False]
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert first_to_fail()
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert first_to_fail()


def test_a_connection_that_another_process_closed_is_an_error_that_says_how_to_continue():
    lost = pytest.raises(UserError, match="another process of this training has ended")
    with lost as error, World(0, 2):
        raise RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:4")
    assert "continues from the last checkpoint" in str(error.value.fix)
    with pytest.raises(ValueError, match="of the command itself"), World(0, 2):
        raise ValueError("of the command itself")

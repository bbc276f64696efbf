"""Settings of the test session, and the tiny run of the whole pipeline that many tests share."""

from __future__ import annotations

import errno
import os
import shutil
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

if "PYTEST_XDIST_WORKER" in os.environ:  # one thread per process; OpenMP reads this once, when torch loads it
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from filelock import FileLock

from .helpers import save_wordpiece_tokenizer

MAX_WORKERS = 8  # each worker imports torch and transformers: 1 GB

if not torch.cuda.is_available():  # Triton reads this when it decorates a kernel, so set it before any import
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _one_thread(request: pytest.FixtureRequest) -> Iterator[None]:
    """The models of the tests are so small that more threads only wait for each other."""
    threads = torch.get_num_threads()
    if not request.node.get_closest_marker("gpu"):  # whose references on the CPU are large
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """``-n auto`` starts one worker per core that this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MAX_WORKERS)


@pytest.hookimpl(tryfirst=True)  # before pytest selects by markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks each test that needs a trained run as ``medium``, which ``make test-fast`` leaves out."""
    for item in items:
        if "tiny_run" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.medium)


def _fail_skipped_kernel_test(report: Any) -> None:
    """With CEMG_NO_SKIPS set (CI, bench/gpu.sh), a skipped kernel test fails, because it checks nothing."""
    is_kernel_test = report.nodeid.startswith(("tests/kernels/", "tests/csrc/", "tests/test_gpu.py"))
    if os.environ.get("CEMG_NO_SKIPS") and report.skipped and is_kernel_test:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome, report.longrepr = "failed", f"CEMG_NO_SKIPS is set, but this test skipped: {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, Any, Any]:
    report = yield
    _fail_skipped_kernel_test(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, Any, Any]:
    report = yield
    _fail_skipped_kernel_test(report)
    return report


WORDS = ["plain", "sturdy", "garden", "kitchen", "music", "office", "telescope", "rudder", "a", "for", "to"]


@pytest.fixture(scope="session")
def make_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], object]], Path]:
    """``make_once(name, make)`` returns a folder that ``make(folder)`` filled, once for all xdist workers."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def once(name: str, make: Callable[[Path], object]) -> Path:
        folder, done = shared / name, shared / f"{name}.done"
        with FileLock(shared / f"{name}.lock"):
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)  # another worker failed here
                folder.mkdir()
                make(folder)
                done.touch()
        return folder

    return once


@pytest.fixture(scope="session")
def tiny_text_model(make_once) -> Path:
    """A BERT checkpoint of one random layer, width 16, with a WordPiece vocabulary of a few words."""
    return make_once("tiny-bert", _save_tiny_bert)


def _save_tiny_bert(folder: Path) -> None:
    from transformers import BertConfig, BertModel

    letters = [chr(letter) for letter in range(97, 123)]
    words = list(dict.fromkeys([*WORDS, *letters, *(f"##{letter}" for letter in letters)]))
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=5 + len(words), initializer_range=0.5, **shape)).save_pretrained(folder)
    save_wordpiece_tokenizer(folder, words)


@pytest.fixture(scope="session")
def tiny_settings(tiny_text_model: Path) -> list[str]:
    """Overrides that make a run of seconds: 40 users, 50 items, no encoder that has to be installed."""
    return [
        "data.synthetic_users=40", "data.synthetic_items=50", f"text.model={tiny_text_model}",
        "image.backbone=shufflenet_v2_x0_5", "image.weights=random", "pca.dim=8", "graph.dim=8",
        "graph.epochs=3", "tokenizer.levels=3", "tokenizer.codebook_size=8", "tokenizer.dim=16",
        "tokenizer.latent=8", "tokenizer.hidden=[32]", "tokenizer.epochs=20", "backbone.layers=1",
        "backbone.dim=16", "backbone.heads=2", "generator.epochs=6", "generator.batch_size=8",
        "generator.history_items=6", "generator.validate_every=2", "generator.checkpoint_seconds=0",
        "decoding.beams=10", "decoding.validation_beams=5", "decoding.validation_users=20",
    ]  # fmt: skip


@pytest.fixture(scope="session")
def feature_cache(make_once) -> Path:
    """One folder of cached features for every run of the session."""
    return make_once("features", lambda folder: None)


@pytest.fixture(scope="session")
def command() -> Callable[..., int]:
    """``command(main, "--run", run)`` calls a command's ``main`` as the shell would; its exit code."""

    def call(main: Callable[[], None], *arguments: object) -> int:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["cemg", *map(str, arguments)])
            try:
                main()
            except SystemExit as end:
                return int(end.code or 0)
        return 0

    return call


@pytest.fixture(scope="session")
def fail_disk() -> Callable[..., list[int]]:
    """``fail_disk(patch, call)``: step ``call`` (from 0) of `cemg.storage.files` fails with ``code``.

    Returns the count of steps so far.
    """
    from cemg.storage import files

    def fail(patch: pytest.MonkeyPatch, call: int, code: int = errno.ENOSPC) -> list[int]:
        count = [0]

        def failing(step: Callable[..., Any]) -> Callable[..., Any]:
            def wrapped(*arguments: Any, **options: Any) -> Any:
                count[0] += 1
                if count[0] == call + 1:
                    raise OSError(code, os.strerror(code), str(arguments[0]))
                return step(*arguments, **options)

            return wrapped

        for name in ("_open", "_fsync", "_replace", "_mkdir"):
            patch.setattr(files, name, failing(getattr(files, name)))
        return count

    return fail


@pytest.fixture(scope="session")
def tiny_run(make_once, tiny_settings: list[str], feature_cache: Path, command) -> Path:
    """A finished run. Tests that write to it copy it first."""
    from cemg.commands.train import main

    settings = [part for setting in tiny_settings for part in ("--set", setting)]

    def train(folder: Path) -> None:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # a fixture of the session runs before those of the test
        assert command(main, "--run", folder / "run", "--cache", feature_cache, *settings) == 0
        torch.set_num_threads(threads)

    return make_once("tiny", train) / "run"

"""What is built and installed: configurations and types travel along, and a missing compiler is named."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMPILER = """#!/bin/sh
# Writes an empty output file in place of a compiler: these tests check packaging, not compilation.
while [ $# -gt 0 ]; do
  case "$1" in
    -o) shift; : > "$1" ;;
    -o?*) : > "${1#-o}" ;;
  esac
  shift
done
"""
USER = """
from cemg import Recommender
from cemg.decoding import Recommendations
from cemg_kernels import ItemFilter

recommender = Recommender.from_run("runs/demo")
found: Recommendations = recommender.recommend(["12", "7"], top=10, filter=recommender.only(["3"]))
reveal_type(found.ids)
reveal_type(recommender.only)
wrong: int = recommender.item_ids(found)
"""


def environment(**more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "CXX", "CC")}
    return kept | {"CEMG_CUDA": "0"} | more


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what git tracks, links kept."""
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True)
    tree = tmp_path_factory.mktemp("tree")
    for name in filter(None, names.stdout.split("\0")):
        if (ROOT / name).exists() and not name.startswith(("results/", "tests/", "bench/", "docs/")):
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tree / name, follow_symlinks=False)
    return tree


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a build that takes seconds."""
    compiler = tmp_path_factory.mktemp("compiler") / "g++"
    compiler.write_text(COMPILER)
    compiler.chmod(0o755)
    return environment(CXX=str(compiler), CC=str(compiler))


def run(*command: object, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*map(str, command)], capture_output=True, text=True, **options)  # type: ignore[call-overload]


@pytest.mark.parametrize("variables", [{"CXX": "/absent/g++", "CC": "/absent/gcc"}, {"PATH": "/absent"}])
def test_without_a_compiler_the_build_says_which_package_to_install(tree, tmp_path, variables):
    build = ("setup.py", "-q", "build_ext", "-b", tmp_path / "b", "-t", tmp_path / "t")
    done = run(sys.executable, *build, cwd=tree, env=environment(**variables))
    assert done.returncode == 1
    assert "cemg: no C++ compiler: " in done.stderr and "apt-get install g++" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_packages_lie_under_the_names_that_they_import_as():
    """So that an editable install is a path, which type checkers follow, and not an import hook."""
    for name, folder in (("cemg", "cemg"), ("cemg_kernels", "kernels/cemg_kernels")):
        assert (ROOT / "src" / name).resolve() == ROOT / folder


@pytest.mark.slow
def test_wheel_and_sdist_carry_configurations_presets_and_types(tree, tmp_path, quick):
    wheel = ("-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", tmp_path, tree)
    done = run(sys.executable, *wheel, env=quick)
    assert done.returncode == 0, done.stderr
    names = set(zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist())
    wanted = {"cemg/configs/beauty.yaml", "cemg/presets/small.yaml", "cemg/py.typed", "cemg_kernels/py.typed"}
    wanted |= {"cemg/report/page.html", "cemg/serve/page/index.html", "cemg/serve/page/vendor/README.txt"}
    wanted |= {"cemg/serve/page/app.js", "cemg/serve/page/vendor/preact-11.2.0/preact.mjs"}
    wanted |= {"cemg_kernels/_native.pyi", "cemg/commands/train.py", "cemg_kernels/trie/trie.py"}
    assert wanted <= names
    done = run(sys.executable, "setup.py", "-q", "sdist", "-d", tmp_path, cwd=tree, env=quick)
    assert done.returncode == 0, done.stderr
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as sdist:
        packed = {name.partition("/")[2] for name in sdist.getnames()}
        sdist.extractall(tmp_path, filter="data")
    assert {"configs/beauty.yaml", "csrc/bindings/module.cpp", "src/cemg/presets/small.yaml"} <= packed
    unpacked = next(path for path in tmp_path.iterdir() if path.is_dir())
    again = (*wheel[:-2], tmp_path / "again", unpacked)
    done = run(sys.executable, *again, env=quick)
    assert done.returncode == 0, done.stderr
    assert set(zipfile.ZipFile(next((tmp_path / "again").glob("*.whl"))).namelist()) == names


@pytest.mark.slow
def test_types_are_visible_to_mypy_after_an_editable_install(tree, tmp_path, quick):
    pytest.importorskip("mypy")
    assert run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv").returncode == 0
    python = tmp_path / "venv" / "bin" / "python"
    words = ("--python", python, "install", "-q", "--no-build-isolation", "--no-deps", "-e", tree)
    done = run(sys.executable, "-m", "pip", *words, env=quick | {"PYTHONPATH": os.pathsep.join(sys.path)})
    assert done.returncode == 0, done.stderr
    (tmp_path / "user.py").write_text(USER)
    checked = run(sys.executable, "-m", "mypy", "--python-executable", python, "user.py", cwd=tmp_path)
    assert "import-untyped" not in checked.stdout and "import-not-found" not in checked.stdout
    assert 'Revealed type is "list[list[int | str | None]]"' in checked.stdout
    assert "cemg_kernels.trie.filters.ItemFilter" in checked.stdout
    assert 'error: Incompatible types in assignment (expression has type "list[' in checked.stdout

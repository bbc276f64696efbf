"""The C++ core, without Python, under AddressSanitizer and UndefinedBehaviorSanitizer."""

from __future__ import annotations

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytestmark = pytest.mark.medium

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
COMPILER = shutil.which("g++")
# -O0, because an optimizer may remove undefined behaviour before the sanitizer can see it.
FLAGS = ["-std=c++20", "-O0", "-g1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas",
         "-fsanitize=address,undefined", "-fno-sanitize-recover=all", f"-I{CSRC / 'include'}"]  # fmt: skip
BUILDS = {  # compiler options and the programs built with them
    "openmp": (["-fopenmp"], ["trie_main", "prior_main", "ops_main", "search_main"]),
    "one thread, no AVX-512": (["-DCEMG_NARROW"], ["ops_main", "search_main"]),
}
PRINTED = {
    "trie_main": "240 tries\n",
    "prior_main": "108 steps\n",
    "ops_main": "61 comparisons\n",
    "search_main": "24 searches\n",
}


def run(*command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)


def compile_all(build: str, folder: Path) -> None:
    """Compiles the files of csrc/src and the programs of a build to objects in ``folder``."""
    options, programs = BUILDS[build]
    sources = [*(CSRC / "src").glob("*.cpp"), *(HERE / f"{program}.cpp" for program in programs)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        commands = [
            (COMPILER, *FLAGS, *options, "-c", path, "-o", folder / f"{path.stem}.o") for path in sources
        ]
        for done in pool.map(lambda command: run(*command), commands):
            assert done.returncode == 0, done.stderr


@pytest.mark.skipif(COMPILER is None, reason="there is no g++ on this machine")
@pytest.mark.parametrize(
    ("build", "program"),
    [(build, program) for build, (_, programs) in BUILDS.items() for program in programs],
)
def test_the_cpp_is_clean_under_asan_and_ubsan(build, program, tmp_path: Path, make_once):
    objects = make_once(f"sanitized, {build}", lambda folder: compile_all(build, folder))
    linked = [path for path in objects.glob("*.o") if path.stem == program or path.stem not in PRINTED]
    built = run(COMPILER, *FLAGS, *BUILDS[build][0], *linked, "-o", tmp_path / program)
    if "cannot find" in built.stderr and "san" in built.stderr:
        pytest.skip("the libraries of this g++'s sanitizers are not installed")
    assert built.returncode == 0, built.stderr
    ran = run(tmp_path / program)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == PRINTED[program]

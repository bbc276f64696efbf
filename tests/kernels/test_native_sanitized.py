"""The C++ core, without Python, under AddressSanitizer and UndefinedBehaviorSanitizer."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
COMPILER = shutil.which("g++")
FLAGS = ["-std=c++20", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


PROGRAMS = {  # each with the sources it is compiled with, and what it prints
    "trie_main": (["trie_*.cpp", "row_math.cpp"], "240 tries\n"),
    "decoder_main": (["attention_cpu.cpp", "gemm_cpu.cpp", "transformer_cpu.cpp"], "24 searches\n"),
}


@pytest.mark.skipif(COMPILER is None, reason="no g++ on this machine")
@pytest.mark.parametrize("name", PROGRAMS)
def test_the_cpp_core_is_clean_under_asan_and_ubsan(name, tmp_path: Path):
    patterns, printed = PROGRAMS[name]
    program = tmp_path / name
    sources = [str(path) for pattern in patterns for path in sorted((CSRC / "src").glob(pattern))]
    command = [str(COMPILER), *FLAGS, *SANITIZERS, f"-I{CSRC / 'include'}", str(HERE / f"{name}.cpp"),
               *sources, "-o", str(program)]  # fmt: skip
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    if "cannot find" in built.stderr and "san" in built.stderr:
        pytest.skip("this g++ comes without the sanitizers' libraries")
    assert built.returncode == 0, built.stderr
    ran = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == printed

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


@pytest.mark.skipif(COMPILER is None, reason="no g++ on this machine")
def test_the_trie_and_attention_in_cpp_are_clean_under_asan_and_ubsan(tmp_path: Path):
    program = tmp_path / "trie_main"
    sources = [
        str(HERE / "trie_main.cpp"),
        *map(str, sorted((CSRC / "src").glob("trie_*.cpp"))),
        *(str(CSRC / "src" / name) for name in ("attention_cpu.cpp", "row_math.cpp")),
    ]
    command = [str(COMPILER), *FLAGS, *SANITIZERS, f"-I{CSRC / 'include'}", *sources, "-o", str(program)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    if "cannot find" in built.stderr and "san" in built.stderr:
        pytest.skip("this g++ comes without the sanitizers' libraries")
    assert built.returncode == 0, built.stderr
    ran = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == "240 tries\n"

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


CPU = ["attention_cpu.cpp", "gemm_cpu.cpp", "packed_ascending.cpp", "propagate_cpu.cpp", "quantize_cpu.cpp",
       "row_math.cpp", "search_cpu.cpp", "transformer_cpu.cpp", "trie_build.cpp", "trie_row.cpp",
       "trie_step.cpp"]  # fmt: skip
PROGRAMS = {  # the program, its sources, and what it prints
    "the trie, by threads": (
        "trie_main",
        ["trie_*.cpp", "packed_ascending.cpp", "row_math.cpp"],
        ["-fopenmp"],
        "240 tries\n",
    ),
    "the rest, by threads": ("cpu_main", CPU, ["-fopenmp"], "24 searches\n"),
    "the rest, as without AVX-512": ("cpu_main", CPU, ["-DCEMG_NARROW"], "24 searches\n"),
}


@pytest.mark.skipif(COMPILER is None, reason="no g++ on this machine")
@pytest.mark.parametrize("name", PROGRAMS)
def test_the_cpp_is_clean_under_asan_and_ubsan(name, tmp_path: Path):
    main, patterns, defined, printed = PROGRAMS[name]
    program = tmp_path / main
    sources = [str(path) for pattern in patterns for path in sorted((CSRC / "src").glob(pattern))]
    command = [str(COMPILER), *FLAGS, *SANITIZERS, *defined, f"-I{CSRC / 'include'}",
               str(HERE / f"{main}.cpp"), *sources, "-o", str(program)]  # fmt: skip
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    if "cannot find" in built.stderr and "san" in built.stderr:
        pytest.skip("this g++ comes without the sanitizers' libraries")
    assert built.returncode == 0, built.stderr
    ran = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == printed

"""Ahead-of-time compile of every kernel for sm_80 and sm_90: registers, shared memory, spills. No GPU needed.

    python -m cemg_kernels.runtime.aot [--all] [--json PATH] [NAME ...]

Every Triton kernel, and ``trie_cuda.cu`` where ``nvcc`` is on PATH. Exits with 1 where one does not compile,
spills a register, wants more shared memory than there is or has a sum that Triton 3.6 gets wrong.
``TRITON_INTERPRET`` must be unset: it is read when a kernel is decorated.

The configurations come from the functions that plan a launch (``plan_of``, ``tiles_of``, ``layer_blocks``),
over all they take. By default any two choices (of dtype, normalisation, filter) meet in one case, of the
widest sizes, where a thread holds most. ``--all``: every configuration. One process a core. Interrupted, a
further call finds in Triton's cache what was compiled.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cache
from itertools import combinations, product
from pathlib import Path
from typing import Any

ARCHITECTURES = (80, 90)
SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024}  # bytes that one block may have
MODULES = (  # each: aot_cases()
    "attention.beam_tree_triton",
    "graph.propagate_triton",
    "attention.shared_prefix_triton",
    "quantize.residual_triton",
    "attention.logsumexp_triton",
    "trie.build_triton",
    "constrained.step_triton",
)
CUDA_SOURCE = Path(__file__).resolve().parents[3] / "csrc" / "src" / "trie_cuda.cu"
WARP = 32
REGISTERS = 255  # of a thread, as many as it wants: left to itself, ptxas keeps to fewer and spills some


@dataclass(frozen=True, slots=True)
class AotCase:
    """One configuration of a Triton kernel.

    ``signature`` gives every argument's type in order ("*fp32", "i32", "constexpr"), ``constants`` the
    constexprs' values, ``options`` what the launch passes (num_warps, num_stages, maxnreg). Arguments in
    ``aligned`` are multiples of 16, as torch's pointers are. Other sizes are compiled as any number, though
    Triton makes a variant, no wider, for a 1 and for multiples of 16.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, int | None] = field(default_factory=dict)
    aligned: Sequence[str] = ()
    architectures: tuple[int, ...] = ARCHITECTURES  # those that launch it so


@dataclass(frozen=True, slots=True)
class Compiled:
    """What one kernel takes on one architecture: bytes of shared memory, spills as bytes stored + loaded, and
    how many sums it has that ``sums_over_copies`` finds."""

    kernel: str
    arch: str
    registers: int
    shared: int
    spills: int
    stack: int
    wrong_sums: int = 0


def triton_cases(names: Sequence[str] = (), *, every: bool = False) -> Iterator[AotCase]:
    """The cases of all kernels, or of those whose name holds one of ``names``."""
    for module in MODULES:
        for case in importlib.import_module(f"cemg_kernels.{module}").aot_cases(every):
            if not names or any(name in case.name for name in names):
                yield case


def powers_of_two(largest: int) -> list[int]:
    """1, 2, 4 ... ``largest``: the classes of sizes that a kernel tells apart."""
    return [1 << power for power in range(largest.bit_length())]


def pairwise(*axes: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Rows of one value an axis, such that any two values of two axes meet in one of them."""
    open_pairs = {
        (i, a, j, b) for i, j in combinations(range(len(axes)), 2) for a, b in product(axes[i], axes[j])
    }
    rows = []
    for i, a, j, b in sorted(open_pairs, key=repr):
        if (i, a, j, b) not in open_pairs:
            continue
        row = {i: a, j: b}
        for k in set(range(len(axes))) - {i, j}:  # the value that meets most for the first time
            row[k] = max(axes[k], key=lambda value: len(_pairs(row | {k: value}) & open_pairs))
        open_pairs -= _pairs(row)
        rows.append(tuple(row[k] for k in range(len(axes))))
    return rows


def _pairs(row: dict[int, Any]) -> set[tuple[int, Any, int, Any]]:
    return {(i, row[i], j, row[j]) for i, j in combinations(sorted(row), 2)}


def sums_over_copies(ttgir: str) -> list[str]:
    """The operands of sums whose layout gives several lanes of a warp the same element. Triton 3.6 counts
    such an element more than once (seen on an H200, behind a reshape): nothing of ours may add up one.
    Of layouts it knows those that have a name, and of reductions sums: maxima bear copies.
    """
    layouts = dict(re.findall(r"^(#\w+) = #ttg\.linear<\{.*?lane = (\[.*?\]), warp", ttgir, re.M))
    reductions = re.findall(r'"tt.reduce".*?\n(.*?)\}\) : \((tensor<[^)]*?)\)', ttgir, re.S)
    added = {operand for body, operand in reductions if re.search(r"arith\.add[if]", body)}
    return sorted(
        operand
        for operand in added
        for name, lanes in layouts.items()
        if operand.endswith(f", {name}>") and re.search(r"\[0(, 0)*\]", lanes)
    )


def compile_triton(case: AotCase, capability: int) -> Compiled:
    """Compile one case to PTX and assemble it. Raises what Triton or ptxas say."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    place = {name: index for index, name in enumerate(case.kernel.arg_names)}
    divisible = {(place[name],): [["tt.divisibility", 16]] for name in case.aligned}
    source = ASTSource(case.kernel, case.signature, constexprs=case.constants, attrs=divisible)
    target = GPUTarget("cuda", capability, WARP)
    compiled = triton.compile(source, target=target, options=dict(case.options))
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder, "kernel.ptx")
        ptx.write_text(compiled.asm["ptx"])
        arch = re.search(r"\.target\s+(sm_\w+)", compiled.asm["ptx"])
        target_name = arch[1] if arch else f"sm_{capability}"
        fusion = [] if case.options.get("enable_fp_fusion", True) else ["--fmad=false"]  # as Triton does
        said = _run([_ptxas(capability), "-v", *fusion, f"-arch={target_name}", str(ptx), "-o",
                     str(Path(folder, "kernel.cubin"))])  # fmt: skip
    registers, _, spills, stack = next(_usages(said))
    shared, wrong = int(compiled.metadata.shared), len(sums_over_copies(compiled.asm["ttgir"]))
    return Compiled(case.name, f"sm_{capability}", registers, shared, spills, stack, wrong)


def sweep(names: Sequence[str], *, every: bool) -> list[Compiled]:
    """All cases on both architectures, a process a core."""
    cases = triton_cases(names, every=every)
    tasks = [(case.name, every, arch) for case in cases for arch in case.architectures]
    if not tasks:
        return []
    processes, rows = min(len(os.sched_getaffinity(0)), len(tasks)), []
    with ProcessPoolExecutor(processes) as pool:
        for row in pool.map(_compile_named, *zip(*tasks, strict=True), chunksize=2):
            rows.append(row)
            if len(rows) % 100 == 0:
                print(f"{len(rows)} of {len(tasks)} compiled", file=sys.stderr, flush=True)
    return rows


def _compile_named(name: str, every: bool, capability: int) -> Compiled:
    return compile_triton(_cases_by_name(every)[name], capability)


@cache
def _cases_by_name(every: bool) -> dict[str, AotCase]:
    """Found anew in each process, since a kernel cannot be sent to one."""
    return {case.name: case for case in triton_cases(every=every)}


def compile_cuda(source: Path, capability: int) -> list[Compiled]:
    """Compile a .cu by nvcc; one entry a kernel in it."""
    include = source.parent.parent / "include"
    with tempfile.TemporaryDirectory() as folder:
        said = _run(["nvcc", "-std=c++20", "-O3", "-cubin", f"-arch=sm_{capability}", "-Xptxas=-v",
                     f"-I{include}", str(source), "-o", str(Path(folder, "trie.cubin"))])  # fmt: skip
    names = re.findall(r"Compiling entry function '(\w+)'", said)
    demangler = shutil.which("c++filt")
    if demangler:
        names = _run([demangler, *names]).splitlines()
    short = [re.sub(r"^void |\(.*\)$|cemg::|\(anonymous namespace\)::", "", name) for name in names]
    return [
        Compiled(name, f"sm_{capability}", *usage) for name, usage in zip(short, _usages(said), strict=True)
    ]


def table(rows: Sequence[Compiled]) -> str:
    """The rows as text, a line each."""
    width = max(len(row.kernel) for row in rows)
    head = f"{'kernel':<{width}}  arch   registers  shared  spills  stack"
    lines = [
        f"{r.kernel:<{width}}  {r.arch}  {r.registers:>9}  {r.shared:>6}  {r.spills:>6}  {r.stack:>5}"
        for r in rows
    ]
    return "\n".join([head, *lines])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="only kernels whose name holds one of these")
    parser.add_argument("--all", action="store_true", help="every configuration; over an hour of two cores")
    parser.add_argument("--json", type=Path, help="write the table there as well")
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        sys.exit("TRITON_INTERPRET is set, so kernels are interpreted and cannot be compiled; unset it")
    rows = sweep(arguments.names, every=arguments.all)
    if not arguments.names or "trie_cuda" in arguments.names:
        if shutil.which("nvcc"):
            rows += [row for arch in ARCHITECTURES for row in compile_cuda(CUDA_SOURCE, arch)]
        else:
            print("nvcc is not on PATH: trie_cuda.cu was not compiled")
    if not rows:
        sys.exit(f"no kernel's name holds {' or '.join(arguments.names)}")
    print(table(rows))
    if arguments.json:
        arguments.json.write_text(_as_json(rows))
    wrong = [f"{row.kernel} ({row.arch})" for row in rows if row.wrong_sums]
    if wrong:
        sys.exit(f"a sum over copies, which Triton 3.6 counts twice, in {', '.join(wrong)}; use a maximum")
    spilled = [f"{row.kernel} ({row.arch})" for row in rows if row.spills]
    if spilled:
        sys.exit(f"registers spill in {', '.join(spilled)}; use smaller tiles or more warps")
    large = [f"{row.kernel} ({row.arch})" for row in rows if row.shared > SHARED[row.arch]]
    if large:
        sys.exit(f"more shared memory than the GPU has in {', '.join(large)}; use smaller tiles")


def _as_json(rows: Sequence[Compiled]) -> str:
    """The versions that compiled, then a row a line."""
    import torch
    import triton

    ptxas = re.search(r"V(\d\S*)", _run([_ptxas(ARCHITECTURES[0]), "--version"]))
    versions = {"torch": torch.__version__, "triton": triton.__version__, "ptxas": ptxas[1] if ptxas else ""}
    head = json.dumps(versions).removesuffix("}")
    return f'{head}, "rows": [\n' + ",\n".join(json.dumps(asdict(row)) for row in rows) + "\n]}\n"


def _usages(said: str) -> Iterator[tuple[int, int, int, int]]:
    """Registers, static shared bytes, spilled bytes and stack of each kernel that ``ptxas -v`` reports."""
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", said)
    used = re.findall(r"Used (\d+) registers(.*)", said)
    for (stack, stores, loads), (registers, rest) in zip(frames, used, strict=True):
        shared = re.search(r"(\d+) bytes smem", rest)
        yield int(registers), int(shared[1]) if shared else 0, int(stores) + int(loads), int(stack)


def _ptxas(capability: int) -> str:
    """The assembler that Triton itself runs for this architecture."""
    from triton.backends.nvidia.compiler import get_ptxas

    return str(get_ptxas(capability).path)


def _run(command: Sequence[str]) -> str:
    """Standard output and error of a command that must succeed."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


if __name__ == "__main__":
    main()

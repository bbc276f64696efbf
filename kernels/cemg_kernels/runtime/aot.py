"""Compiles every kernel for sm_80 and sm_90 and reports registers, shared memory and spills. Needs no GPU.

    python -m cemg_kernels.runtime.aot [--all] [--arch 80 90] [--json PATH] [NAME ...]

The command compiles every Triton kernel, and ``trie_cuda.cu`` if ``nvcc`` is on PATH. It exits with 1 if a
kernel does not compile, spills a register, needs more shared memory than the GPU has, or contains a sum that
Triton 3.6 compiles incorrectly. ``TRITON_INTERPRET`` must be unset, because Triton reads it when a kernel is
decorated.

The configurations come from the functions that plan a launch (``plan_of``, ``tiles_of``, ``layer_blocks``).
By default any two choices (dtype, normalisation, filter) occur together in one case, at the largest sizes,
which use the most registers per thread. ``--all`` compiles every configuration. The cases run in one process
per core. After an interruption, a second call takes the finished kernels from Triton's cache.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from .aot_case import ARCHITECTURES, AotCase
from .registry import OPERATIONS

MAX_SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024}  # bytes per block
CUDA_SOURCE = Path(__file__).resolve().parents[3] / "csrc" / "src" / "trie_cuda.cu"
WARP_SIZE = 32


@dataclass(frozen=True, slots=True)
class Compiled:
    """The resources of one kernel on one architecture.

    ``registers`` is per thread; ``shared`` and ``stack`` are bytes; ``spills`` is bytes stored plus bytes
    loaded; ``wrong_sums`` is the number of sums that ``sums_over_copies`` finds.
    """

    kernel: str
    arch: str
    registers: int
    shared: int
    spills: int
    stack: int
    wrong_sums: int = 0


def triton_cases(names: Sequence[str] = (), *, every: bool = False) -> Iterator[AotCase]:
    """Yields the cases of all kernels, or those whose name contains one of ``names``."""
    for operation in OPERATIONS.values():
        for case in operation.aot_cases(every) if operation.aot_cases else ():
            if not names or any(name in case.name for name in names):
                yield case


def sums_over_copies(ttgir: str) -> list[str]:
    """Returns the operands of sums whose layout assigns one element to several lanes of a warp.

    Triton 3.6 adds such an element more than once (seen on an H200 after a reshape), so no kernel may contain
    one. The check covers named layouts and sums only; a maximum over copies is correct.
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
    """Compiles one case to PTX and assembles it; errors of Triton and ptxas propagate."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    position = {name: index for index, name in enumerate(case.kernel.arg_names)}
    divisible = {(position[name],): [["tt.divisibility", 16]] for name in case.aligned}
    source = ASTSource(case.kernel, case.signature, constexprs=case.constants, attrs=divisible)
    target = GPUTarget("cuda", capability, WARP_SIZE)
    compiled = triton.compile(source, target=target, options=dict(case.options))
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder, "kernel.ptx")
        ptx.write_text(compiled.asm["ptx"])
        arch = re.search(r"\.target\s+(sm_\w+)", compiled.asm["ptx"])
        target_name = arch[1] if arch else f"sm_{capability}"
        fusion = [] if case.options.get("enable_fp_fusion", True) else ["--fmad=false"]  # as Triton does
        report = _run([_ptxas(capability), "-v", *fusion, f"-arch={target_name}", str(ptx), "-o",
                       str(Path(folder, "kernel.cubin"))])  # fmt: skip
    registers, _, spills, stack = next(_usages(report))
    shared, wrong = int(compiled.metadata.shared), len(sums_over_copies(compiled.asm["ttgir"]))
    return Compiled(case.name, f"sm_{capability}", registers, shared, spills, stack, wrong)


def sweep(names: Sequence[str], architectures: Sequence[int], *, every: bool) -> list[Compiled]:
    """Compiles the cases for the architectures that run them, in one process per core."""
    tasks = [
        (case.name, every, arch)
        for case in triton_cases(names, every=every)
        for arch in case.architectures
        if arch in architectures
    ]
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
    """Each process builds this table itself, because a kernel cannot be pickled."""
    return {case.name: case for case in triton_cases(every=every)}


def compile_cuda(source: Path, capability: int) -> list[Compiled]:
    """Compiles a .cu file with nvcc; returns one entry per kernel."""
    include = source.parent.parent / "include"
    with tempfile.TemporaryDirectory() as folder:
        report = _run(["nvcc", "-std=c++20", "-O3", "-cubin", f"-arch=sm_{capability}", "-Xptxas=-v",
                       f"-I{include}", str(source), "-o", str(Path(folder, "trie.cubin"))])  # fmt: skip
    names = re.findall(r"Compiling entry function '(\w+)'", report)
    demangler = shutil.which("c++filt")
    if demangler:
        names = _run([demangler, *names]).splitlines()
    short = [re.sub(r"^void |\(.*\)$|cemg::|\(anonymous namespace\)::", "", name) for name in names]
    return [
        Compiled(name, f"sm_{capability}", *usage) for name, usage in zip(short, _usages(report), strict=True)
    ]


def table(rows: Sequence[Compiled]) -> str:
    """Formats the rows as text, one line per row."""
    width = max(len(row.kernel) for row in rows)
    head = f"{'kernel':<{width}}  arch   registers  shared  spills  stack"
    lines = [
        f"{r.kernel:<{width}}  {r.arch}  {r.registers:>9}  {r.shared:>6}  {r.spills:>6}  {r.stack:>5}"
        for r in rows
    ]
    return "\n".join([head, *lines])


def main() -> None:
    """Runs the command ``python -m cemg_kernels.runtime.aot``."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", help="only kernels whose name contains one of these")
    parser.add_argument(
        "--all", action="store_true", help="every configuration; takes over an hour on two cores"
    )
    parser.add_argument(
        "--arch", type=int, nargs="+", choices=ARCHITECTURES, default=ARCHITECTURES, help="default: all"
    )
    parser.add_argument("--json", type=Path, help="also write the table to this file")
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        sys.exit("TRITON_INTERPRET is set, so kernels are interpreted, not compiled; unset it")
    rows = sweep(arguments.names, arguments.arch, every=arguments.all)
    if not arguments.names or "trie_cuda" in arguments.names:
        if shutil.which("nvcc"):
            rows += [row for arch in arguments.arch for row in compile_cuda(CUDA_SOURCE, arch)]
        else:
            print("nvcc is not on PATH: trie_cuda.cu was not compiled")
    if not rows:
        sys.exit(f"no kernel's name contains {' or '.join(arguments.names)}")
    print(table(rows))
    if arguments.json:
        arguments.json.write_text(_as_json(rows))
    wrong = [f"{row.kernel} ({row.arch})" for row in rows if row.wrong_sums]
    if wrong:
        sys.exit(f"Triton 3.6 counts some elements twice in a sum in {', '.join(wrong)}; use a maximum")
    spilled = [f"{row.kernel} ({row.arch})" for row in rows if row.spills]
    if spilled:
        sys.exit(f"registers spill in {', '.join(spilled)}; use smaller tiles or more warps")
    too_large = [f"{row.kernel} ({row.arch})" for row in rows if row.shared > MAX_SHARED[row.arch]]
    if too_large:
        sys.exit(f"more shared memory than the GPU has in {', '.join(too_large)}; use smaller tiles")


def _as_json(rows: Sequence[Compiled]) -> str:
    """Formats the versions of the compilers, then one line per row."""
    import torch
    import triton

    ptxas = re.search(r"V(\d\S*)", _run([_ptxas(ARCHITECTURES[0]), "--version"]))
    versions = {"torch": torch.__version__, "triton": triton.__version__, "ptxas": ptxas[1] if ptxas else ""}
    head = json.dumps(versions).removesuffix("}")
    return f'{head}, "rows": [\n' + ",\n".join(json.dumps(asdict(row)) for row in rows) + "\n]}\n"


def _usages(report: str) -> Iterator[tuple[int, int, int, int]]:
    """Yields registers, static shared bytes, spilled bytes and stack bytes per kernel from ``ptxas -v``."""
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    used = re.findall(r"Used (\d+) registers(.*)", report)
    for (stack, stores, loads), (registers, rest) in zip(frames, used, strict=True):
        shared = re.search(r"(\d+) bytes smem", rest)
        yield int(registers), int(shared[1]) if shared else 0, int(stores) + int(loads), int(stack)


def _ptxas(capability: int) -> str:
    """Returns the path of the assembler that Triton runs for this architecture."""
    from triton.backends.nvidia.compiler import get_ptxas

    return str(get_ptxas(capability).path)


def _run(command: Sequence[str]) -> str:
    """Runs a command and returns its standard output and error; raises RuntimeError if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


if __name__ == "__main__":
    main()

"""Every Triton kernel compiles for sm_80 and sm_90 without spilling, in a process that is not interpreted."""

from __future__ import annotations

import ctypes
import importlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from cemg_kernels.runtime import aot, aot_case, dispatch
from cemg_kernels.runtime.registry import OPERATIONS
from cemg_kernels.trie import cuda_launch as trie_cuda

pytestmark = pytest.mark.medium

CUDA_OPERATIONS = ("lookup", "advance", "children", "mask", "interval", "keep", "open_level", "close")


@pytest.mark.parametrize(
    ("every", "architectures"),
    [
        pytest.param(False, [90], id="widest"),
        pytest.param(False, [80, 90], id="widest, both", marks=pytest.mark.slow),
        pytest.param(True, [80, 90], id="all", marks=pytest.mark.slow),
    ],
)
def test_every_configuration_compiles_without_spills(tmp_path: Path, every: bool, architectures: list[int]):
    table = tmp_path / "aot.json"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "cemg_kernels.runtime.aot", "--json", str(table), *["--all"] * every,
               "--arch", *map(str, architectures)]  # fmt: skip
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    results = json.loads(table.read_text())
    assert results["torch"] and results["triton"] and results["ptxas"]
    rows = results["rows"]
    cases = aot.triton_cases(every=every)
    names = {case.name for case in cases if set(architectures) & set(case.architectures)}
    compiled = {row["kernel"] for row in rows}
    assert names <= compiled
    if shutil.which("nvcc"):
        assert all(any(operation in name for name in compiled - names) for operation in CUDA_OPERATIONS)
    assert {row["arch"] for row in rows} == {f"sm_{architecture}" for architecture in architectures}
    assert all(row["spills"] == 0 and 0 < row["registers"] <= 255 for row in rows)


@pytest.mark.parametrize("architecture", aot_case.ARCHITECTURES)
def test_the_compiler_of_cupy_accepts_the_cuda_source(architecture: int):
    """Compiles with torch's NVRTC and the options passed to CuPy: no standard headers, no launcher."""
    options = f"--gpu-architecture=sm_{architecture}", "--ptxas-options=-v"
    image, log = nvrtc_cubin(trie_cuda.SOURCE, (*trie_cuda.NVRTC_OPTIONS, *options))
    kernels = list(itertools.product(CUDA_OPERATIONS, ("u8", "i16")))
    for operation, code in kernels:
        assert f"{operation}_{code}".encode() in image
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    assert len(spills) >= len(kernels) and set(spills) == {("0", "0")}


def nvrtc_cubin(source: Path, options: tuple[str, ...]) -> tuple[bytes, str]:
    """Compiles a file with libnvrtc; returns the image and the log, or fails with the log."""
    nvrtc = ctypes.CDLL(nvrtc_path())
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    assert not nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.read_bytes(), None, 0, None, None)
    arguments = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    failed = nvrtc.nvrtcCompileProgram(program, len(options), arguments)
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    assert not failed, log.value.decode()
    nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size))
    image = ctypes.create_string_buffer(size.value)
    assert not nvrtc.nvrtcGetCUBIN(program, image)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return image.raw, log.value.decode()


def nvrtc_path() -> str:
    """Returns the path of libnvrtc in the packages that torch installs."""
    nvidia = find_spec("nvidia")
    folders = [] if nvidia is None else list(nvidia.submodule_search_locations or [])
    paths = [path for folder in folders for path in Path(folder).glob("*/lib/libnvrtc.so.*")]
    if not paths:
        pytest.skip("no libnvrtc: this torch was built for the CPU only")
    return str(paths[0])


@pytest.mark.parametrize(
    ("cupy", "source", "message"),
    [(None, "csrc", "no CuPy"), ("cupy", "nowhere", "from a checkout"), ("cupy", "csrc", "")],
)
def test_the_reason_why_the_trie_cannot_run_on_a_gpu_is_reported(
    monkeypatch, tmp_path, cupy, source, message
):
    (tmp_path / "csrc").touch()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(trie_cuda, "built_by_nvcc", lambda: "")
    monkeypatch.setattr(trie_cuda, "find_spec", lambda name: cupy)
    monkeypatch.setattr(trie_cuda, "SOURCE", tmp_path / source)
    problem = trie_cuda.problem()
    assert message in problem and bool(problem) == bool(message)


def test_every_op_with_a_triton_backend_has_aot_cases():
    with_triton = {name for name, op in OPERATIONS.items() if "triton" in op.backends}
    covered = {case.name.split()[0] for case in aot.triton_cases()}
    assert with_triton == covered


def test_the_cases_include_every_configuration_that_a_launch_can_choose():
    """For any shape of a beam step, its kernels are among the compiled ones."""
    from cemg_kernels.constrained import beam_step_triton as step

    cases = list(aot.triton_cases(every=True))
    assert len({case.name for case in cases}) == len(cases)
    kernels = {
        (case.kernel, case.options["num_warps"], *case.constants.items())
        for case in cases
        if case.kernel in (step.beam_step_kernel, step.merge_kernel)
    }
    merges = [dict(constants) for kernel, _, *constants in kernels if kernel is step.merge_kernel]
    for beams in (1, 2, 3, 7, 16, 33, 64, 100, 255, 256):
        for size in (1, 2, 31, 256, 257, 300, 1000, 2048, 4095, 4096):
            for width in (1, 2, 50, 127, 128, 255, 256):
                plan = step.plan_of(beams, size, width)
                kind = {"NORMALIZE": 2, "BITMAPS": 1, "CLOSED": True}
                first_kernel = step.beam_step_kernel, plan.warps, *(kind | plan.constants).items()
                assert first_kernel in kernels
                assert any(m | {"BLOCK_K": plan.block_k} == plan.merge for m in merges)
    filtered = {
        (case.constants["NORMALIZE"], case.constants["BITMAPS"]) for case in aot.triton_cases(["step W"])
    }
    assert len(filtered) == 9
    tiles = {case.constants["BLOCK_D"] for case in aot.triton_cases(["lightgcn"], every=True)}
    assert tiles == set(aot_case.powers_of_two(1024))


def test_a_sum_over_copies_is_detected():
    """As in a beam step that was wrong on a GPU: lane 3 holds the elements of lane 0."""
    ttgir = """#linear = #ttg.linear<{register = [], lane = [[32], [64], [128], [0], [1]], warp = [[2]]}>
#linear1 = #ttg.linear<{register = [[0]], lane = [[32], [64], [10], [8], [1]], warp = [[0]]}>
    %a = "tt.reduce"(%x) <{axis = 0 : i32}> ({
    ^bb0(%p: i32, %q: i32):
      %s = arith.BODY %p, %q : i32
    }) : (tensor<256xi32, LAYOUT>) -> i32
"""
    detected = {
        (body, layout): aot.sums_over_copies(ttgir.replace("BODY", body).replace("LAYOUT", layout))
        for body in ("addi", "addf", "maxsi")
        for layout in ("#linear", "#linear1", "#blocked")
    }
    assert {key for key, sums in detected.items() if sums} == {("addi", "#linear"), ("addf", "#linear")}
    assert detected["addi", "#linear"] == ["tensor<256xi32, #linear>"]


def test_any_two_values_of_two_axes_occur_together():
    axes = (1, 2, 3), "ab", (True, False), range(4)
    rows = aot_case.pairwise(*axes)
    assert len(rows) < 24  # of 48 combinations
    for i, j in itertools.combinations(range(4), 2):
        assert {(row[i], row[j]) for row in rows} == set(itertools.product(axes[i], axes[j]))


@pytest.mark.parametrize(
    ("shared", "spills", "message"),
    [(0, 12, "registers spill in"), (163 * 1024 + 1, 0, "more shared memory than the GPU has in")],
)
def test_a_spill_or_too_much_shared_memory_ends_the_command(monkeypatch, capsys, shared, spills, message):
    spilling = aot.Compiled("some_kernel", "sm_80", 255, shared, spills, 16)
    monkeypatch.setattr(aot, "sweep", lambda names, architectures, every: [spilling])
    monkeypatch.setattr(sys, "argv", ["aot", "some"])
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(SystemExit, match=message + r" some_kernel \(sm_80\)"):
        aot.main()
    assert "some_kernel" in capsys.readouterr().out


def test_the_earlier_name_of_the_module_works_and_warns(monkeypatch):
    monkeypatch.delitem(sys.modules, "cemg_kernels.aot", raising=False)
    with pytest.warns(DeprecationWarning, match=r"use cemg_kernels\.runtime\.aot"):
        alias = importlib.import_module("cemg_kernels.aot")
    assert alias.main is aot.main


def test_triton_kernels_are_interpreted_here_and_none_is_skipped():
    """Fails if Triton is missing or not interpreted, because the kernel tests would then prove nothing."""
    assert find_spec("triton") is not None
    assert torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"
    assert dispatch.pick("lightgcn_propagate", torch.device("cpu"), "triton") == "triton"


@pytest.mark.parametrize(
    ("variable", "code"), [({"CEMG_NO_SKIPS": "1"}, 1), pytest.param({}, 0, marks=pytest.mark.slow)]
)
def test_a_skipped_kernel_test_fails_under_cemg_no_skips(variable, code):
    """CI and bench/gpu.sh rely on this; shown with a test that a machine without a GPU skips."""
    root = Path(__file__).parents[3]
    inherited = {name: value for name, value in os.environ.items() if name != "CEMG_NO_SKIPS"}
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "tests/test_gpu.py::test_the_native_trie_runs_here"], cwd=root, capture_output=True,
        text=True, check=False, env=inherited | variable | {"CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    assert ("CEMG_NO_SKIPS is set, but this test skipped: " in done.stdout) == bool(code)

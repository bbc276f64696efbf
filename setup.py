"""Builds ``cemg_kernels._native`` from csrc. All other settings are in pyproject.toml.

The CUDA source is compiled if ``nvcc`` is found (``CUDA_HOME`` or ``PATH``). ``CEMG_CUDA=0`` skips it, and
``CEMG_CUDA=1`` makes a missing or failing ``nvcc`` an error.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from glob import glob
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import find_packages, setup
from setuptools.errors import CompileError, LinkError

SOURCES = [*sorted(glob("csrc/bindings/*.cpp")), *sorted(glob("csrc/src/*.cpp"))]
HEADERS = sorted(glob("csrc/include/cemg/*.h")) + sorted(glob("csrc/bindings/*.h"))
STUB = Path("kernels/cemg_kernels/_native.pyi")
# The module reports this hash of its interface; cemg_kernels.runtime.dispatch compares it with the stub file.
INTERFACE = hashlib.sha256("\n".join(STUB.read_text().splitlines()).encode()).hexdigest()[:16]
CUDA_SOURCE = "csrc/src/trie_cuda.cu"
ARCHITECTURES = ("80", "90")  # machine code for these, and PTX of the last for newer GPUs
NVCC_FAILED = """
******************************************************************************
cemg: nvcc failed, so the module is built for the CPU only. The command was

  {command}

and its output was

{output}
To fix this, set CUDA_HOME to a toolkit that supports this machine's compiler
(or NVCC_APPEND_FLAGS=-ccbin=... to a compiler that it supports), and install
again. CEMG_CUDA=1 makes this an error, and CEMG_CUDA=0 skips nvcc. Without
nvcc, CuPy compiles the kernels at first use: pip install cupy-cuda13x
******************************************************************************
"""
NO_COMPILER = """
cemg: {problem}. Install the missing package, then install cemg again:
  Debian, Ubuntu:  apt-get install g++ python3-dev
  Fedora, RHEL:    dnf install gcc-c++ python3-devel
  conda:           conda install -c conda-forge gxx
"""
OPENMP_PROBE = "#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n"


class build_native(build_ext):
    """Adds OpenMP if the compiler supports it and CUDA if nvcc is found, and prints a line if not."""

    def build_extensions(self) -> None:
        self._check_compiler()
        problem = self._add_cuda()
        if problem:
            print(f"cemg: built for the CPU only: {problem}")
            if os.environ.get("CEMG_CUDA") == "1":
                raise CompileError(f"CEMG_CUDA=1, but {problem}")
        if self._has_openmp():
            for extension in self.extensions:
                extension.extra_compile_args.append("-fopenmp")
                extension.extra_link_args.append("-fopenmp")
        else:
            print("cemg: this compiler has no OpenMP, so the native module will use one core")
        super().build_extensions()

    def _check_compiler(self) -> None:
        """Exits with the names of the packages to install if the compiler or Python.h is missing."""
        command = (getattr(self.compiler, "compiler_so_cxx", None) or self.compiler.compiler_so)[0]
        headers = Path(sysconfig.get_paths()["include"], "Python.h")
        problem = f"no C++ compiler: {command} was not found" if shutil.which(command) is None else ""
        if not problem and not headers.is_file():
            problem = f"no Python headers: {headers} does not exist"
        if problem:
            sys.exit(NO_COMPILER.format(problem=problem))

    def _add_cuda(self) -> str:
        """Compiles the CUDA source and adds it to the extension. Returns the reason if it cannot."""
        if os.environ.get("CEMG_CUDA") == "0":
            return "CEMG_CUDA=0"
        home = os.environ.get("CUDA_HOME")
        nvcc = shutil.which("nvcc", path=str(Path(home, "bin"))) if home else shutil.which("nvcc")
        if nvcc is None:
            return f"no nvcc in {home}/bin (CUDA_HOME)" if home else "no nvcc on PATH, and CUDA_HOME is unset"
        command = [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull]  # prints the folder of the toolkit
        dry_run = subprocess.run(command, capture_output=True, text=True)
        tops = [line.split("=", 1)[1] for line in dry_run.stderr.splitlines() if line.startswith("#$ TOP=")]
        root = Path(tops[0] if tops else home or Path(nvcc).resolve().parents[1])
        folders = [str(root / name) for name in ("lib64", "lib", "targets/x86_64-linux/lib")]
        runtime = [folder for folder in folders if Path(folder, "libcudart_static.a").exists()]
        if not runtime:
            return f"no libcudart_static.a beside {nvcc}"
        target = Path(self.build_temp, "trie_cuda.o")
        target.parent.mkdir(parents=True, exist_ok=True)
        codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
        codes.append(f"-gencode=arch=compute_{ARCHITECTURES[-1]},code=compute_{ARCHITECTURES[-1]}")
        command = [nvcc, "-std=c++20", "-O3", *codes, "-Xcompiler", "-fPIC", "-Icsrc/include", "-c",
                   CUDA_SOURCE, "-o", str(target)]  # fmt: skip
        built = subprocess.run(command, capture_output=True, text=True)
        if built.returncode:
            output = built.stdout + built.stderr
            print(NVCC_FAILED.format(command=" ".join(command), output=output), file=sys.stderr)
            return "nvcc failed; its output is above"
        for extension in self.extensions:
            extension.extra_objects.append(str(target))
            extension.define_macros.append(("CEMG_CUDA", f'"sm_{", sm_".join(ARCHITECTURES)}, PTX"'))
            extension.library_dirs.append(runtime[0])
            # the static runtime, because the module must import on a machine without a driver
            extension.libraries += ["cudart_static", "rt", "pthread", "dl"]
        return ""

    def _has_openmp(self) -> bool:
        with tempfile.TemporaryDirectory() as folder:
            probe = Path(folder, "probe.cpp")
            probe.write_text(OPENMP_PROBE)
            try:
                objects = self.compiler.compile([str(probe)], output_dir=folder, extra_postargs=["-fopenmp"])
                self.compiler.link_executable(
                    objects, str(Path(folder, "probe")), extra_postargs=["-fopenmp"], target_lang="c++"
                )
            except (CompileError, LinkError, subprocess.CalledProcessError, OSError):
                return False
        return True


native = Pybind11Extension(
    "cemg_kernels._native",
    SOURCES,
    include_dirs=["csrc/include"],
    depends=[*HEADERS, CUDA_SOURCE, str(STUB)],
    define_macros=[("CEMG_INTERFACE", f'"{INTERFACE}"')],
    cxx_std=20,
    extra_compile_args=["-O3", "-ffp-contract=fast", "-Wall", "-Wextra"],
)

ParallelCompile().install()  # compiles as many files at a time as there are cores
setup(
    packages=find_packages("src", include=["cemg", "cemg.*", "cemg_kernels", "cemg_kernels.*"]),
    ext_modules=[native],
    cmdclass={"build_ext": build_native},
)

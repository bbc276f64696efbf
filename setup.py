"""Builds ``cemg_kernels._native`` from csrc; everything else is in pyproject.toml.

The CUDA half is built where ``nvcc`` is found (``CUDA_HOME`` or ``PATH``). ``CEMG_CUDA=0`` leaves it out,
``CEMG_CUDA=1`` makes its absence an error.
"""

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

SOURCES = ["csrc/bindings.cpp", *sorted(glob("csrc/src/*.cpp"))]
HEADERS = sorted(glob("csrc/include/cemg/*.h"))
CUDA_SOURCE = "csrc/src/trie_cuda.cu"
ARCHITECTURES = ("80", "90")  # machine code for these, and PTX of the last for what comes later
NVCC_FAILED = """
******************************************************************************
cemg: nvcc failed, so the module is built for the CPU alone. It was asked

  {command}

and said

{said}
To mend it, set CUDA_HOME to a toolkit that takes this machine's compiler (or
NVCC_APPEND_FLAGS=-ccbin=... to one that it takes) and install again.
CEMG_CUDA=1 makes this an error, CEMG_CUDA=0 leaves nvcc alone. Without it,
CuPy compiles the kernels at first use: pip install cupy-cuda13x
******************************************************************************
"""
NO_COMPILER = """
cemg: {what}. Install what is missing and install cemg again:
  Debian, Ubuntu:  apt-get install g++ python3-dev
  Fedora, RHEL:    dnf install gcc-c++ python3-devel
  conda:           conda install -c conda-forge gxx
"""
OPENMP_PROBE = "#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n"


class build_native(build_ext):
    """Adds OpenMP where the compiler has it, and CUDA where nvcc is; where not, a line says so."""

    def build_extensions(self) -> None:
        self._check_compiler()
        problem = self._add_cuda()
        if problem:
            print(f"cemg: built for the CPU alone: {problem}")
            if os.environ.get("CEMG_CUDA") == "1":
                raise CompileError(f"CEMG_CUDA=1, but {problem}")
        if self._has_openmp():
            for extension in self.extensions:
                extension.extra_compile_args.append("-fopenmp")
                extension.extra_link_args.append("-fopenmp")
        else:
            print("cemg: this compiler has no OpenMP; the native trie will use one core")
        super().build_extensions()

    def _check_compiler(self) -> None:
        """SystemExit that names the packages to install, where the compiler or Python.h is missing."""
        command = (getattr(self.compiler, "compiler_so_cxx", None) or self.compiler.compiler_so)[0]
        headers = Path(sysconfig.get_paths()["include"], "Python.h")
        what = f"no C++ compiler: {command} was not found" if shutil.which(command) is None else ""
        if not what and not headers.is_file():
            what = f"no headers of Python: {headers} does not exist"
        if what:
            sys.exit(NO_COMPILER.format(what=what))

    def _add_cuda(self) -> str:
        """Compile the CUDA half and add it to the extension; why not, where that is not possible."""
        if os.environ.get("CEMG_CUDA") == "0":
            return "CEMG_CUDA=0"
        home = os.environ.get("CUDA_HOME")
        nvcc = shutil.which("nvcc", path=str(Path(home, "bin"))) if home else shutil.which("nvcc")
        if nvcc is None:
            return f"no nvcc in {home}/bin (CUDA_HOME)" if home else "no nvcc on PATH, and CUDA_HOME is unset"
        command = [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull]  # says where the toolkit lies
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
            said = built.stdout + built.stderr
            print(NVCC_FAILED.format(command=" ".join(command), said=said), file=sys.stderr)
            return "nvcc failed, as said above"
        for extension in self.extensions:
            extension.extra_objects.append(str(target))
            extension.define_macros.append(("CEMG_CUDA", f'"sm_{", sm_".join(ARCHITECTURES)}, PTX"'))
            extension.library_dirs.append(runtime[0])
            # static, so that the module imports on a machine without a driver
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
    depends=[*HEADERS, CUDA_SOURCE],
    cxx_std=20,
    extra_compile_args=["-O3", "-ffp-contract=fast", "-Wall", "-Wextra"],
)

ParallelCompile().install()  # a file a core
setup(
    packages=find_packages("src", include=["cemg", "cemg.*", "cemg_kernels", "cemg_kernels.*"]),
    ext_modules=[native],
    cmdclass={"build_ext": build_native},
)

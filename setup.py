"""Builds ``cemg_kernels._native`` from csrc; everything else is in pyproject.toml."""

import subprocess
import tempfile
from glob import glob
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import find_packages, setup
from setuptools.errors import CompileError, LinkError

SOURCES = ["csrc/bindings.cpp", *sorted(glob("csrc/src/*.cpp"))]
HEADERS = sorted(glob("csrc/include/cemg/*.h"))
OPENMP_PROBE = "#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n"


class build_native(build_ext):
    """Adds OpenMP where the compiler has it; without it the loops run on one core, and a line says so."""

    def build_extensions(self) -> None:
        if self._has_openmp():
            for extension in self.extensions:
                extension.extra_compile_args.append("-fopenmp")
                extension.extra_link_args.append("-fopenmp")
        else:
            print("cemg: this compiler has no OpenMP; the native trie will use one core")
        super().build_extensions()

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
    depends=HEADERS,
    cxx_std=20,
    extra_compile_args=["-O3", "-Wall", "-Wextra"],
)

setup(
    packages=[*find_packages(include=["cemg", "cemg.*"]), "cemg_kernels"],
    ext_modules=[native],
    cmdclass={"build_ext": build_native},
)

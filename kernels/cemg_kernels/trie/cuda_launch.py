"""Launches the trie's CUDA kernels (``csrc/src/trie_cuda.cu``) on torch's current stream.

``pip install -e .`` compiles them if it finds nvcc. Otherwise CuPy (extra ``gpu``) compiles the same file at
first use. Launches are asynchronous.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..runtime.dispatch import native, native_available
from .arrays import TrieArrays

CSRC = Path(__file__).resolve().parents[3] / "csrc"
SOURCE = CSRC / "src" / "trie_cuda.cu"
NVRTC_OPTIONS = ("--std=c++20", f"-I{CSRC / 'include'}")
THREADS, MAX_BLOCKS = 256, 132 * 16
NO_FILTER = (0, 0, 0, 0, 0, 1)  # the fields of a filter that allows all items


def problem() -> str:
    """Returns why the kernels cannot run on this machine, or "" if they can."""
    if not torch.cuda.is_available():
        return "torch finds no GPU"
    if built_by_nvcc():
        return ""
    if find_spec("cupy") is None:
        return "built without nvcc (pip install -v -e . says why), and no CuPy (pip install cupy-cuda13x)"
    if not SOURCE.exists():
        return f"built without nvcc, and CuPy finds no {SOURCE}; install from a checkout: pip install -e ."
    return ""


def built_by_nvcc() -> str:
    """Returns the GPU architectures in the native module, or "" if it was built for the CPU only."""
    return str(native().build_info()["cuda"]) if native_available() else ""


def launch(
    name: str, trie: TrieArrays, filter: tuple[int, ...], arguments: tuple[Tensor | int, ...], count: int
) -> None:
    """Launches one kernel.

    Args:
        name: The operation, as in ``csrc/src/trie_cuda.cu``.
        trie: The trie, on a GPU.
        filter: ``FilterTensors.fields`` of the call, or ``NO_FILTER``.
        arguments: Contiguous tensors on the same GPU, and sizes.
        count: The number of rows or cells.
    """
    if count == 0:
        return  # CUDA rejects an empty grid
    kernel = f"{name}_{'u8' if trie.code.element_size() == 1 else 'i16'}"
    view: tuple[Tensor | int, ...] = (
        trie.code, trie.first_child, trie.num_inner, trie.num_nodes, trie.codebook_size, *filter,
    )  # fmt: skip
    values = [v.data_ptr() if isinstance(v, Tensor) else v for v in (*view, *arguments)]
    device = trie.code.device
    stream = torch.cuda.current_stream(device).cuda_stream
    if built_by_nvcc():
        native().launch_trie_kernel(kernel, values, count, device.index or 0, stream)
        return
    import cupy

    with cupy.cuda.Device(device.index or 0), cupy.cuda.ExternalStream(stream):
        blocks = min(-(-count // THREADS), MAX_BLOCKS)
        _compiled().get_function(kernel)((blocks,), (THREADS,), (*values, count))


@cache
def _compiled() -> Any:
    """Compiles trie_cuda.cu with CuPy's NVRTC, once per process; CuPy also caches the result on disk."""
    import cupy

    return cupy.RawModule(code=SOURCE.read_text(), options=NVRTC_OPTIONS)

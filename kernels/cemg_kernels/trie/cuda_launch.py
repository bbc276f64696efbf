"""The trie's operations on a GPU: the kernels of ``csrc/src/trie_cuda.cu``, built by nvcc or at first use.

``pip install -e .`` builds them where it finds nvcc. Where it did not, CuPy compiles the same file (extra
``gpu``). Launches are asynchronous, on torch's current stream.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .arrays import TrieArrays

CSRC = Path(__file__).resolve().parents[3] / "csrc"
SOURCE = CSRC / "src" / "trie_cuda.cu"
NVRTC_OPTIONS = ("--std=c++20", f"-I{CSRC / 'include'}")
THREADS, MOST_BLOCKS = 256, 132 * 16
NO_FILTER = (0, 0, 0, 0, 0, 1)  # the fields of a filter that allows everything


def problem() -> str:
    """Why the kernels cannot run on this machine; empty where they can."""
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
    """The architectures in the module; empty where it was built for the CPU alone."""
    from ..runtime.dispatch import native, native_available

    return str(native().build_info()["cuda"]) if native_available() else ""


def launch(
    name: str, trie: TrieArrays, filter: tuple[int, ...], arguments: tuple[Tensor | int, ...], count: int
) -> None:
    """Run kernel ``name`` over ``count`` rows or cells; tensors of the trie's device, contiguous.

    ``filter``: ``FilterTensors.fields`` of the call.
    """
    if count == 0:
        return  # a grid has at least one block
    kernel = f"{name}_{'u8' if trie.code.element_size() == 1 else 'i16'}"
    view: tuple[Tensor | int, ...] = (
        trie.code, trie.first_child, trie.num_inner, trie.num_nodes, trie.codebook_size, *filter,
    )  # fmt: skip
    values = [v.data_ptr() if isinstance(v, Tensor) else v for v in (*view, *arguments)]
    device = trie.code.device
    stream = torch.cuda.current_stream(device).cuda_stream
    if built_by_nvcc():
        from ..runtime.dispatch import native

        native().launch_trie_kernel(kernel, values, count, device.index or 0, stream)
        return
    import cupy

    with cupy.cuda.Device(device.index or 0), cupy.cuda.ExternalStream(stream):
        blocks = min(-(-count // THREADS), MOST_BLOCKS)
        _compiled().get_function(kernel)((blocks,), (THREADS,), (*values, count))


@cache
def _compiled() -> Any:
    """The module that CuPy's NVRTC makes of trie_cuda.cu; kept for the process, on disk by CuPy."""
    import cupy

    return cupy.RawModule(code=SOURCE.read_text(), options=NVRTC_OPTIONS)

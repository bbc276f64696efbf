"""The precision of matrix products: bfloat16 only where the hardware supports it natively."""

from __future__ import annotations

from functools import cache

import torch

from cemg.progress import console

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16")  # of x86 and Arm


@cache
def has_native_bfloat16(kind: str) -> bool:
    """Whether the hardware has bfloat16 matrix products. Emulated ones are 15 to 50 times as slow.

    Args:
        kind: The type of the device, "cpu" or "cuda".
    """
    if kind == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    features = torch.cpu.get_capabilities()
    return any(features.get(name) for name in INSTRUCTIONS)


def product_dtype(name: str, device: torch.device | str) -> torch.dtype:
    """Return the type of the matrix products of a training.

    Args:
        name: "float32" or "bfloat16". Without native support, where bfloat16 would be slower, it means
            float32, and a note says so.
        device: The device of the training.
    """
    wanted = DTYPES[name]
    if wanted is torch.bfloat16 and not has_native_bfloat16(torch.device(device).type):
        _print_note(torch.device(device).type)
        return torch.float32
    return wanted


@cache
def _print_note(kind: str) -> None:
    hardware = "CPU" if kind == "cpu" else "GPU"
    console.print(
        f"note: this {hardware} has no native bfloat16 support; using float32, which is faster here"
    )

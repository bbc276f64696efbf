"""Residual quantization: each of M levels selects the codebook vector that is nearest to the residual.

N rows, M levels, K codes per level, D dimensions.

    for m in range(M):
        codes[:, m] = argmin_k ||residual - codebooks[m, k]||^2
        residual   -= codebooks[m, codes[:, m]]

Source: RQ-VAE, Lee et al. 2022, section 3.1 (https://arxiv.org/abs/2203.01941).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..runtime.aot_case import AotCase
from ..runtime.dispatch import native, pick
from ..runtime.operands import tensor_of
from ..runtime.ranges import ranged
from ..runtime.registry import register

TILE_CELLS = 2**18  # scores per tile: 1 MB, which stays in cache
EXACT_CELLS = 2**22  # float64 differences per tile: 32 MB
CODE_DTYPES = (torch.int64, torch.int32, torch.int16, torch.uint8)
MAY_OVERFLOW = 1e38  # a partial sum this large may not fit float32


@ranged
def residual_quantize(
    x: Tensor, codebooks: Tensor, *, code_dtype: torch.dtype = torch.int64, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Quantizes each row to one code per level. All backends return the same codes and bits.

    The residual is float32: the chosen vectors are subtracted from ``x`` one level after the other. A code is
    the argmin of the squared distance to the residual, computed in float64; ties go to the lowest index. A
    NaN distance counts as infinite, and the code is 0 if no distance is finite. There is no gradient; add a
    straight-through estimator outside.

    Args:
        x: Floating point [N, D].
        codebooks: Floating point [M, K, D].
        code_dtype: int64, int32, int16 or uint8.
        backend: "triton", "native" (C++ on the CPU), "torch", "reference", or None for the dispatcher's
            choice. On a GPU that is "torch" for more than 128 dimensions (256 if both arguments are bfloat16
            or both float16).

    Returns:
        The codes [N, M], and the float32 sum [N, D] of the chosen vectors, added in the order of the levels.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit, or ``code_dtype`` cannot hold K - 1.

    Example:
        >>> codebooks = torch.tensor([[[0.0], [4.0]], [[-1.0], [1.0]]])
        >>> codes, quantized = residual_quantize(torch.tensor([[4.8], [0.7]]), codebooks)
        >>> codes.tolist(), quantized.tolist()
        ([[1, 1], [0, 1]], [[5.0], [1.0]])
    """
    x, codebooks = tensor_of("x", x), tensor_of("codebooks", codebooks)
    _check(x, codebooks, code_dtype)
    if torch.compiler.is_compiling():
        codes, quantized = torch.ops.cemg.residual_quantize(
            x.detach(), codebooks.detach(), code_dtype, backend
        )
        return codes, quantized
    return _quantize(x, codebooks, code_dtype, backend)


@torch.no_grad()
def _quantize(
    x: Tensor, codebooks: Tensor, code_dtype: torch.dtype, backend: str | None
) -> tuple[Tensor, Tensor]:
    """Runs checked arguments on ``backend`` or the dispatcher's choice."""
    chosen = pick("residual_quantize", x.device, backend)
    if backend is None and chosen == "triton" and not _fits_triton(x, codebooks):
        chosen = "torch"
    if chosen == "triton":
        from .residual_triton import quantize

        return quantize(x, codebooks, code_dtype)
    run = {"native": _quantize_native, "torch": _quantize_tiled, "reference": residual_quantize_reference}
    codes, quantized = run[chosen](x.float().contiguous(), codebooks.float().contiguous())
    return codes.to(code_dtype), quantized


_op = torch.library.custom_op(
    "cemg::residual_quantize", _quantize, mutates_args=(),
    schema="(Tensor x, Tensor codebooks, ScalarType code_dtype, str? backend) -> (Tensor, Tensor)",
)  # fmt: skip


@_op.register_fake
def _fake(x: Tensor, codebooks: Tensor, code_dtype: torch.dtype, _: str | None) -> tuple[Tensor, Tensor]:
    codes = x.new_empty(x.shape[0], codebooks.shape[0], dtype=code_dtype)
    return codes, x.new_empty(x.shape, dtype=torch.float32)


def residual_quantize_reference(x: Tensor, codebooks: Tensor) -> tuple[Tensor, Tensor]:
    """The definition, for float32 inputs: computes every distance in float64."""
    residual, quantized = x, torch.zeros_like(x)
    codes = torch.empty(x.shape[0], codebooks.shape[0], dtype=torch.int64, device=x.device)
    for m, codebook in enumerate(codebooks):
        codes[:, m] = _nearest_reference(residual, codebook)
        vectors = codebook[codes[:, m]]  # [N, D]
        residual, quantized = residual - vectors, quantized + vectors
    return codes, quantized


def _fits_triton(x: Tensor, codebooks: Tensor) -> bool:
    """Returns whether the Triton kernel supports this number of dimensions without spilling registers."""
    from .residual_triton import MAX_DIM

    dtype = x.dtype if x.dtype == codebooks.dtype and x.dtype in MAX_DIM else torch.float32
    return x.shape[1] <= MAX_DIM[dtype]


def _check(x: Tensor, codebooks: Tensor, code_dtype: torch.dtype) -> None:
    if x.dim() != 2 or codebooks.dim() != 3 or x.shape[1] != codebooks.shape[2]:
        raise ValueError(
            f"x must be [N, D] and codebooks [M, K, D], got {list(x.shape)} and {list(codebooks.shape)}"
        )
    if min(codebooks.shape) < 1:
        raise ValueError(f"codebooks must not be empty, got {list(codebooks.shape)}")
    if code_dtype not in CODE_DTYPES or torch.iinfo(code_dtype).max < codebooks.shape[1] - 1:
        raise ValueError(
            f"code_dtype must be int64, int32, int16 or uint8 and hold codes 0 to {codebooks.shape[1] - 1}, "
            f"got {code_dtype}; take a wider one"
        )
    if not (x.is_floating_point() and codebooks.is_floating_point()):
        raise ValueError(f"x and codebooks must be floating point, got {x.dtype} and {codebooks.dtype}")
    if x.device != codebooks.device:
        raise ValueError(f"x is on {x.device}, codebooks on {codebooks.device}; move one with .to()")


def _nearest_reference(residual: Tensor, codebook: Tensor) -> Tensor:
    """The definition of one level: [N, D], [K, D] -> [N], in float64, in tiles to bound the memory."""
    vectors = codebook.double()
    rows = max(1, EXACT_CELLS // codebook.numel())
    tiles = [_argmin_distance(tile.double(), vectors) for tile in residual.split(rows)]
    return torch.cat(tiles) if tiles else residual.new_empty(0, dtype=torch.int64)


def _argmin_distance(residual: Tensor, vectors: Tensor) -> Tensor:
    distance = (residual[:, None] - vectors).square_().sum(2)  # [N, K]
    return torch.nan_to_num_(distance, nan=float("inf"), posinf=float("inf")).argmin(1)


@dataclass(frozen=True, slots=True)
class _Codebook:
    """The vectors [K, D] of one level, ||c||^2 / 2 [K] in float32, and the largest norm in float64."""

    vectors: Tensor
    half_norm: Tensor
    max_norm: Tensor

    @classmethod
    def of(cls, vectors: Tensor) -> _Codebook:
        half_norm = vectors.double().square().sum(1) / 2
        return cls(vectors, half_norm.float(), half_norm.max().mul(2).sqrt())


def _quantize_native(x: Tensor, codebooks: Tensor) -> tuple[Tensor, Tensor]:
    codes = torch.empty(x.shape[0], codebooks.shape[0], dtype=torch.int64)
    quantized = torch.empty_like(x)
    levels, codebook_size, dim = codebooks.shape
    native().residual_quantize(
        x=x.data_ptr(), rows=x.shape[0], codebooks=codebooks.data_ptr(), levels=levels,
        codebook_size=codebook_size, dim=dim, codes=codes.data_ptr(), quantized=quantized.data_ptr(),
    )  # fmt: skip
    return codes, quantized


def _quantize_tiled(x: Tensor, codebooks: Tensor) -> tuple[Tensor, Tensor]:
    """Processes all levels of a tile of rows before the next tile, so residuals and scores stay in cache."""
    levels = [_Codebook.of(vectors) for vectors in codebooks]
    unit = _input_roundoff(x.device)
    codes = torch.empty(x.shape[0], len(levels), dtype=torch.int64, device=x.device)
    quantized = torch.zeros_like(x)
    rows = max(1, TILE_CELLS // codebooks.shape[1])
    for begin in range(0, x.shape[0], rows):
        tile = slice(begin, begin + rows)
        residual = x[tile]
        for m, book in enumerate(levels):
            codes[tile, m] = code = _nearest(residual, book, unit)
            vectors = book.vectors[code]
            residual = residual - vectors
            quantized[tile] += vectors
    return codes, quantized


def _nearest(residual: Tensor, book: _Codebook, input_roundoff: float) -> Tensor:
    """Finds the exact codes of one level by a matrix product; recomputes rows whose winner is not certain.

    The score s_k = ||c_k||^2 / 2 - r . c_k has the order of the distance, d_k = 2 s_k + ||r||^2. With unit
    roundoff u, R = ||r|| and C = max ||c_k||, the error of a computed score is at most
        E = (D + 8) u (R C + C^2 / 2)            a dot product of D terms in any order, then one addition
          + (D + 8) 2^-52 (R + C)^2              the rounding of the reference
          + D 2^-125                             products lost to underflow
    Inputs rounded to TF32 or bfloat16 add their unit roundoff; see ``_input_roundoff``. A code that wins by
    more than 2 E also wins in float64. The reference recomputes all other rows, including rows with NaN,
    which fail the comparison, and rows that may overflow, whose E is infinite.
    """
    score = torch.addmm(book.half_norm, residual, book.vectors.t(), alpha=-1)  # [rows, K]
    code = score.argmin(1, keepdim=True)
    best = score.gather(1, code)
    second = score.scatter_(1, code, float("inf")).amin(1)
    certain = second > best[:, 0] + 2 * _error_bound(residual, book.max_norm, input_roundoff)
    code = code[:, 0]
    if score.shape[1] > 1:
        doubtful = (~certain).nonzero()[:, 0]
        code[doubtful] = _nearest_reference(residual[doubtful], book.vectors)
    return code


def _error_bound(residual: Tensor, max_norm: Tensor, input_roundoff: float) -> Tensor:
    """Returns E of ``_nearest`` for each row of ``residual`` [N, D]: float32 [N], rounded up."""
    norm = residual.double().square().sum(1).sqrt()
    terms = residual.shape[1] + 8
    size = norm * max_norm + max_norm.square() / 2
    bound = (terms * 2.0**-24 + input_roundoff) * size
    bound = bound + terms * 2.0**-52 * (norm + max_norm).square() + terms * 2.0**-125
    return (bound * 1.001).float().masked_fill(size > MAY_OVERFLOW, float("inf"))


def _input_roundoff(device: torch.device) -> float:
    """Returns the relative error from rounding both float32 inputs of a matrix product, or 0."""
    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:  # the per-backend settings are in use and differ
        precision = "medium"
    if device.type == "cpu" and precision == "high":
        precision = "medium"
    return {"highest": 0.0, "high": 2.0**-9}.get(precision, 2.0**-6)  # TF32 has 11 bits, bf16 8


def _aot_cases(every: bool) -> Sequence[AotCase]:
    from .residual_triton import aot_cases

    return aot_cases(every)


register("residual_quantize", ("triton", "native", "torch", "reference"), aot_cases=_aot_cases)

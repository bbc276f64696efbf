"""The Triton kernel of ``residual_quantize``: all levels in one launch, without writing the N x K scores.

N rows, M levels, K codes per level, D dimensions. Codebooks are padded with zeros to 2**HALVINGS dimensions,
which aligns their rows. A program keeps the residuals of its rows in registers through all levels. Codes are
exact: if two codes of a row differ by less than the rounding error, the kernel recomputes the row in float64,
without the host. The definition is ``residual_quantize_reference`` (``residual.py``).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ..runtime.aot_case import ARCHITECTURES, MAX_REGISTERS, AotCase, powers_of_two
from ..runtime.dispatch import on_its_gpu

DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
MAX_DIM = {torch.float32: 128, torch.bfloat16: 256, torch.float16: 256}  # more would spill or exceed 163 KB
CODES = ("i32", "i16", "u8")
HOPPER = 90  # from this architecture on, four warps share one tensor core instruction
EXACT_CELLS = 1024  # float64 differences per iteration


@triton.jit
def _sum_by_pairs(values, HALVINGS: tl.constexpr):
    """Sums each row by pairwise addition: [R, 2**HALVINGS] -> [R]."""
    for _ in tl.static_range(HALVINGS):
        left, right = tl.split(tl.reshape(values, [values.shape[0], values.shape[1] // 2, 2]))
        values = left + right
    return tl.reshape(values, [values.shape[0]])


@triton.jit
def _tf32_part(values):
    """Clears the 13 bits of a float32 that TF32 does not have."""
    return (values.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)


@triton.jit
def prepare_kernel(
    codebooks_ptr, high_ptr, low_ptr, half_norm_ptr, norm_ptr, rows,
    HALVINGS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes of each of the M * K vectors: its TF32 part, the rest, ||c||^2 / 2, and ||c|| rounded up."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    offset = row[:, None] * 2**HALVINGS + tl.arange(0, 2**HALVINGS)
    inside = (row < rows)[:, None]
    vectors = tl.load(codebooks_ptr + offset, mask=inside, other=0).to(tl.float32)
    high = _tf32_part(vectors)
    tl.store(high_ptr + offset, high, mask=inside)
    tl.store(low_ptr + offset, vectors - high, mask=inside)
    vectors_64 = vectors.to(tl.float64)
    squares = tl.sum(vectors_64 * vectors_64, 1)
    tl.store(half_norm_ptr + row, (squares / 2).to(tl.float32), mask=row < rows)
    norm = tl.where(squares == squares, tl.sqrt(squares) * 1.001, float("inf"))
    tl.store(norm_ptr + row, norm.to(tl.float32), mask=row < rows)


@triton.jit
def _largest(norm_ptr, K, BLOCK: tl.constexpr):
    """Returns the maximum of ``norm_ptr`` [K]."""
    largest = tl.zeros([BLOCK], tl.float32)
    for k0 in range(0, K, BLOCK):
        k = k0 + tl.arange(0, BLOCK)
        largest = tl.maximum(largest, tl.load(norm_ptr + k, mask=k < K, other=0.0))
    return tl.max(largest, 0)


@triton.jit
def _error_bound(residual, max_norm, D: tl.constexpr):
    """Returns E of ``residual._nearest`` for each row of ``residual`` [R, ...]: [R], rounded up."""
    norm = tl.sqrt(tl.sum(residual * residual, 1)) * 1.001 + D * 2.0**-62  # squares below 2^-126 are lost
    size = norm * max_norm + max_norm * max_norm / 2
    both = norm + max_norm
    bound = ((D + 8) * 2.0**-22 + 2.0**-18) * size + (D + 8) * (
        2.0**-52 * both * both + 2.0**-125 * (1 + both)
    )
    return tl.where(size < 1e38, bound * 1.001, float("inf"))


@triton.jit
def _nearest_exact(residual, codebook_ptr, K, HALVINGS: tl.constexpr, BLOCK: tl.constexpr):
    """Returns the code with the smallest float64 distance to one row, ``residual`` [2**HALVINGS]."""
    d = tl.arange(0, 2**HALVINGS)
    residual_64 = residual.to(tl.float64)
    best = tl.full([], float("inf"), tl.float64)
    code = tl.full([], 0, tl.int32)
    for k0 in range(0, K, BLOCK):
        k = k0 + tl.arange(0, BLOCK)
        offset = k[:, None] * 2**HALVINGS + d
        vectors = tl.load(codebook_ptr + offset, mask=(k < K)[:, None], other=0).to(tl.float64)
        difference = residual_64[None, :] - vectors
        distance = _sum_by_pairs(difference * difference, HALVINGS)
        distance = tl.where((k < K) & (distance == distance), distance, float("inf"))
        least = tl.min(distance, 0)
        first = tl.min(tl.where(distance == least, k, 2147483647), 0)
        code = tl.where(least < best, first, code)
        best = tl.minimum(best, least)
    return code


# N=100k D=64 K=256 M=4 fp32: reads 26 MB of x, writes 26 MB and the codes; 3 x 13 GFLOP on TF32 cores. It is
# compute-bound; writing the scores would move 820 MB more.
@triton.jit
def residual_quantize_kernel(
    x_ptr, codebooks_ptr, high_ptr, low_ptr, half_norm_ptr, norm_ptr, codes_ptr, quantized_ptr,
    N, K, M, stride_x, D: tl.constexpr, HALVINGS: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_EXACT: tl.constexpr,
):  # fmt: skip
    """All levels of BLOCK_N rows: codes_ptr [N, M] and quantized_ptr [N, D]."""
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, 2**HALVINGS)
    row_64 = row.to(tl.int64)
    inside = (row < N)[:, None] & (d < D)
    residual = tl.load(x_ptr + row_64[:, None] * stride_x + d, mask=inside, other=0).to(tl.float32)
    for m in range(M):
        high, best = _tf32_part(residual), tl.full([BLOCK_N], float("inf"), tl.float32)
        low, second = residual - high, tl.full([BLOCK_N], float("inf"), tl.float32)
        code = tl.zeros([BLOCK_N], tl.int32)
        for k0 in range(0, K, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)
            offset = (m * K + k)[:, None] * 2**HALVINGS + d
            valid = (k < K)[:, None]
            vectors = tl.load(high_ptr + offset, mask=valid, other=0.0)
            dot = tl.dot(low, tl.trans(vectors), input_precision="tf32")
            if SPLIT:
                rest = tl.load(low_ptr + offset, mask=valid, other=0.0)
                dot = tl.dot(high, tl.trans(rest), dot, input_precision="tf32")
            dot = tl.dot(high, tl.trans(vectors), dot, input_precision="tf32")
            half_norm = tl.load(half_norm_ptr + m * K + k, mask=k < K, other=float("inf"))
            score = half_norm[None, :] - dot  # [BLOCK_N, BLOCK_K]
            score = tl.where(score == score, score, float("inf"))  # NaN never wins
            least, argmin = tl.min(score, 1, True, False)  # either code of a tie: the row is uncertain anyway
            runner_up = tl.min(tl.where(k[None, :] - k0 == argmin[:, None], float("inf"), score), 1)
            second = tl.minimum(tl.minimum(second, runner_up), tl.maximum(best, least))
            code = tl.where(least < best, k0 + argmin, code)
            best = tl.minimum(best, least)
        bound = _error_bound(residual, _largest(norm_ptr + m * K, K, BLOCK_K), D)
        uncertain = (row < N) & ~(second > best + 2 * bound)
        for _ in range(tl.sum(uncertain.to(tl.int32), 0)):
            is_row = row == tl.max(tl.where(uncertain, row, -1), 0)
            row_residual = tl.sum(tl.where(is_row[:, None], residual, 0.0), 0)
            codebook_ptr = codebooks_ptr + m * K * 2**HALVINGS
            exact = _nearest_exact(row_residual, codebook_ptr, K, HALVINGS, BLOCK_EXACT)
            code = tl.where(is_row, exact, code)
            uncertain = uncertain & ~is_row
        tl.store(codes_ptr + row_64 * M + m, code.to(codes_ptr.dtype.element_ty), mask=row < N)
        chosen = codebooks_ptr + (m * K + code)[:, None] * 2**HALVINGS + d
        residual -= tl.load(chosen).to(tl.float32)
    tl.debug_barrier()  # the codes are read back, because a running sum would need more registers
    quantized = tl.zeros([BLOCK_N, 2**HALVINGS], tl.float32)
    for m in range(M):
        code = tl.load(codes_ptr + row_64 * M + m, mask=row < N, other=0).to(tl.int32)
        chosen = codebooks_ptr + (m * K + code)[:, None] * 2**HALVINGS + d
        quantized += tl.load(chosen).to(tl.float32)
    tl.store(quantized_ptr + row_64[:, None] * D + d, quantized, mask=inside)


@dataclass(frozen=True, slots=True)
class Tiles:
    """The tile sizes for one D; ``registers`` per thread, because ptxas would choose fewer and spill."""

    rows: int
    codes: int
    warps: int
    stages: int
    registers: int | None = None


@on_its_gpu
def quantize(x: Tensor, codebooks: Tensor, code_dtype: torch.dtype = torch.int64) -> tuple[Tensor, Tensor]:
    """Returns codes [N, M] and quantized float32 [N, D] of checked ``x`` [N, D] and ``codebooks`` [M, K, D].

    If both have the same dtype (float32, bfloat16 or float16), they are read without conversion, otherwise as
    float32. Each call prepares the codebooks in one launch, because neither their address nor their version
    proves that they are unchanged.
    """
    levels, size, dim = codebooks.shape
    if x.dtype != codebooks.dtype or x.dtype not in DTYPES:
        x, codebooks = x.float(), codebooks.float()
    if dim > MAX_DIM[x.dtype]:
        raise ValueError(
            f"the Triton backend takes up to {MAX_DIM[x.dtype]} dimensions of {x.dtype}, got {dim}; "
            "use backend='torch'"
        )
    halvings, vectors = halvings_of(dim), levels * size
    x, codebooks = x.contiguous(), F.pad(codebooks, (0, 2**halvings - dim)).contiguous()
    codes = torch.empty(x.shape[0], levels, dtype=code_dtype, device=x.device)
    quantized = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    if not x.shape[0]:
        return codes, quantized
    high, low = (torch.empty(codebooks.shape, dtype=torch.float32, device=x.device) for _ in range(2))
    half_norm, norm = torch.empty(2, levels, size, device=x.device)
    block = EXACT_CELLS >> halvings
    prepare_kernel[(triton.cdiv(vectors, block),)](
        codebooks, high, low, half_norm, norm, vectors, HALVINGS=halvings, BLOCK=block, num_warps=4
    )
    tiles = tiles_of(dim, x.dtype, architecture_of(x.device))
    residual_quantize_kernel[(triton.cdiv(x.shape[0], tiles.rows),)](
        x, codebooks, high, low, half_norm, norm, codes, quantized, x.shape[0], size, levels, x.stride(0),
        **constants_of(dim, tiles, x.dtype), num_warps=tiles.warps, num_stages=tiles.stages,
        maxnreg=tiles.registers, enable_fp_fusion=False,
    )  # fmt: skip
    return codes, quantized


def tiles_of(dim: int, dtype: torch.dtype, architecture: int) -> Tiles:
    """Returns tile sizes that keep the residual in registers, for D = ``dim``.

    On Hopper: 64 rows and four warps, the shape of one tensor core instruction. For float32 and D = 64 this
    was the fastest of fourteen choices on an H200, three times as fast as 64 rows and eight warps. The other
    sizes follow by analogy. Before Hopper, the sizes are those that do not spill; they were not timed.
    """
    if dim > 128:
        return Tiles(16, 32, 4, 1, MAX_REGISTERS)
    codes = 64 if dim <= 64 else 16 if dtype == torch.float32 else 32
    if architecture >= HOPPER:
        return Tiles(64, codes, 4, 2, MAX_REGISTERS)
    if dim > 64 and dtype != torch.float32:
        return Tiles(32, 64, 4, 2, MAX_REGISTERS)
    return Tiles(64, max(16, codes // 2), 8, 2, MAX_REGISTERS)


def architecture_of(device: torch.device) -> int:
    """Returns 80 for an A100, 90 for an H100, and 90 for a CPU, which interprets the kernel."""
    if device.type != "cuda":
        return HOPPER
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def halvings_of(dim: int) -> int:
    """Returns log2 of ``dim`` rounded up to a power of two and to 16, the minimum of a matrix product."""
    return max(4, (dim - 1).bit_length())


def constants_of(dim: int, tiles: Tiles, dtype: torch.dtype) -> dict[str, int]:
    """Returns the constexprs of the kernel."""
    halvings = halvings_of(dim)
    return {"D": dim, "HALVINGS": halvings, "SPLIT": dtype == torch.float32, "BLOCK_N": tiles.rows,
            "BLOCK_K": tiles.codes, "BLOCK_EXACT": EXACT_CELLS >> halvings}  # fmt: skip


def aot_cases(every: bool = False) -> list[AotCase]:
    """Returns cases for dtypes, code types and classes of dimensions, with full and partial tiles.

    K and M are run-time numbers, so they need no cases.
    """
    cases = []
    for dtype, max_dim in MAX_DIM.items():
        dims = sorted({d for block in powers_of_two(max_dim)[4:] for d in (block, block // 2 + 1)})
        dims = dims if every else [64, max_dim] if dtype != torch.float16 else [max_dim]
        for dim, codes in product(dims, ("i64", *CODES * every)):
            cases += _quantize_cases(dim, dtype, codes)
        cases += [_prepare_case(dim, DTYPES[dtype]) for dim in dims]
    return cases if every else [*cases, *_quantize_cases(100, torch.float32, CODES[-1])]


def _quantize_cases(dim: int, dtype: torch.dtype, codes: str) -> list[AotCase]:
    """Returns one case per distinct launch; architectures with the same tile sizes share a case."""
    by_tiles: dict[Tiles, tuple[int, ...]] = {}
    for architecture in ARCHITECTURES:
        tiles = tiles_of(dim, dtype, architecture)
        by_tiles[tiles] = (*by_tiles.get(tiles, ()), architecture)
    return [_quantize_case(dim, dtype, codes, *pair) for pair in by_tiles.items()]


def _quantize_case(
    dim: int, dtype: torch.dtype, codes: str, tiles: Tiles, architectures: tuple[int, ...]
) -> AotCase:
    name, constants = DTYPES[dtype], constants_of(dim, tiles, dtype)
    types = {
        "x_ptr": f"*{name}", "codebooks_ptr": f"*{name}", "high_ptr": "*fp32", "low_ptr": "*fp32",
        "half_norm_ptr": "*fp32", "norm_ptr": "*fp32", "codes_ptr": f"*{codes}", "quantized_ptr": "*fp32",
        "N": "i32", "K": "i32", "M": "i32", "stride_x": "i32",
    }  # fmt: skip
    options = {"num_warps": tiles.warps, "num_stages": tiles.stages, "maxnreg": tiles.registers,
               "enable_fp_fusion": False}  # fmt: skip
    aligned = [argument for argument in types if argument.endswith("_ptr")]
    aligned += ["stride_x"] * (dim % 16 == 0)
    types |= dict.fromkeys(constants, "constexpr")
    title = f"residual_quantize D={dim} {name} {tiles.rows}x{tiles.codes} {tiles.warps} warps"
    title += f" codes {codes}" if codes != "i64" else ""
    return AotCase(title, residual_quantize_kernel, types, constants, options, aligned, architectures)


def _prepare_case(dim: int, name: str) -> AotCase:
    types = {"codebooks_ptr": f"*{name}", "high_ptr": "*fp32", "low_ptr": "*fp32", "half_norm_ptr": "*fp32",
             "norm_ptr": "*fp32", "rows": "i32"}  # fmt: skip
    halvings = halvings_of(dim)
    constants = {"HALVINGS": halvings, "BLOCK": EXACT_CELLS >> halvings}
    aligned = [argument for argument in types if argument.endswith("_ptr")]
    types |= dict.fromkeys(constants, "constexpr")
    return AotCase(f"residual_quantize prepare D={dim} {name}", prepare_kernel, types, constants,
                   {"num_warps": 4}, aligned)  # fmt: skip

"""Residual quantization: codes of N rows by M codebooks of K vectors, against what people use for it.

python bench/quantize.py [--items 100000] [--device cuda] [--json PATH] [--plot PATH]
"""

from __future__ import annotations

import torch
from harness import Report, Work, arguments, gemm_rate, optional, start
from torch import Tensor

from cemg_kernels import residual_quantize
from cemg_kernels.runtime import dispatch

DIM, LEVELS, SAMPLE = 64, 4, 2000
ITEMS, SIZES = 100_000, (256, 2048)  # rows N, and codes a level K of the cases
TILE, TIE = 4096, 1e-9


def cdist_loop(x: Tensor, codebooks: Tensor) -> Tensor:
    """The loop of most repositories: torch.cdist, argmin, subtract."""
    codes, residual = [], x
    for codebook in codebooks:
        codes.append(torch.cdist(residual, codebook).argmin(1))
        residual = residual - codebook[codes[-1]]
    return torch.stack(codes, dim=1)


def tiled_addmm(x: Tensor, codebooks: Tensor, rows: int) -> Tensor:
    """||c||^2 / 2 - x.c by one product a tile of rows, its argmin: fast, and inexact at near ties."""
    half = codebooks.square().sum(2) / 2
    out = torch.empty(len(x), len(codebooks), dtype=torch.int64, device=x.device)
    for begin in range(0, len(x), rows):
        residual = x[begin : begin + rows]
        for m, codebook in enumerate(codebooks):
            code = torch.addmm(half[m], residual, codebook.t(), alpha=-1).argmin(1)
            out[begin : begin + rows, m] = code
            residual = residual - codebook[code]
    return out


def residual_vq(x: Tensor, codebooks: Tensor) -> Work | str:
    """``ResidualVQ`` of vector-quantize-pytorch with these codebooks, in evaluation."""
    missing = optional(["vector-quantize-pytorch", "einops", "einx"])
    if missing:
        return missing
    from vector_quantize_pytorch import ResidualVQ

    model = ResidualVQ(dim=DIM, num_quantizers=len(codebooks), codebook_size=codebooks.shape[1]).eval()
    model = model.to(x.device)
    for layer, codebook in zip(model.layers, codebooks, strict=True):
        layer._codebook.embed.data.copy_(codebook[None])
        layer._codebook.initted.data.fill_(1)
    return lambda: model(x[None])[1][0]


def faiss_index(x: Tensor, codebooks: Tensor) -> Work | str:
    """A flat L2 index a level."""
    missing = optional(["faiss-cpu"])
    if missing or x.device.type != "cpu":
        return missing or "faiss-cpu runs on the CPU only"
    import faiss

    indexes = [faiss.IndexFlatL2(DIM) for _ in codebooks]
    books = [codebook.numpy() for codebook in codebooks]
    for index, book in zip(indexes, books, strict=True):
        index.add(book)

    def run() -> Tensor:
        residual, codes = x.numpy(), []
        for index, book in zip(indexes, books, strict=True):
            found = index.search(residual, 1)[1][:, 0]
            codes.append(torch.from_numpy(found))
            residual = residual - book[found]
        return torch.stack(codes, dim=1)

    return run


def not_nearest(x: Tensor, codebooks: Tensor, codes: Tensor) -> int:
    """How many rows hold a code that, in float64, is not the nearest to its residual, ties of TIE aside."""
    wrong = 0
    for rows, chosen in zip(x.split(TILE), codes.split(TILE), strict=True):
        missed, residual = torch.zeros(len(rows), dtype=torch.bool, device=x.device), rows
        for m, codebook in enumerate(codebooks):
            vectors = codebook.double()
            distance = torch.addmm(
                vectors.square().sum(1), residual.double(), vectors.t(), alpha=-2
            )  # [T, K]
            missed |= distance.gather(1, chosen[:, m, None])[:, 0] > distance.amin(1) + TIE
            residual = residual - codebook[chosen[:, m]]
        wrong += int(missed.sum())
    return wrong


def main() -> None:
    parser = arguments(__doc__.splitlines()[0], rounds=9, seconds=15.0)
    parser.add_argument("--items", type=int, default=ITEMS)
    options = parser.parse_args()
    device = start(options)
    report = Report("residual_quantize", options, device)
    if device.type == "cuda":  # TF32, which our kernel takes as well
        torch.set_float32_matmul_precision("high")
    rate = gemm_rate(device)
    torch.set_float32_matmul_precision("highest")
    for size in SIZES:
        one_case(report, options.items, size, rate)
    report.finish()


def draw(items: int, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """x [N, D] and codebooks [M, K, D] of one case."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(items, DIM, generator=generator).to(device)
    return x, torch.randn(LEVELS, size, DIM, generator=generator).to(device)


def one_case(report: Report, items: int, size: int, rate: float) -> None:
    x, codebooks = draw(items, size, report.device)
    wanted = residual_quantize(x[:SAMPLE], codebooks, backend="reference")[0]
    fast = dispatch.choose("residual_quantize", report.device).backend
    ours: dict[str, Work] = {fast: lambda: residual_quantize(x, codebooks, backend=fast)}
    codes = residual_quantize(x, codebooks, backend=fast)[0]
    if not torch.equal(codes[:SAMPLE], wanted) or not_nearest(x, codebooks, codes):
        raise SystemExit(f"{fast} differs from the reference: run pytest tests/kernels")
    peers: dict[str, Work | str] = {
        "ResidualVQ": residual_vq(x, codebooks),
        "faiss": faiss_index(x, codebooks),
        "torch.cdist loop": lambda: cdist_loop(x, codebooks),
        "tiled addmm + argmin": lambda: tiled_addmm(x, codebooks, len(x) if x.is_cuda else 1024),
    }
    agree = {
        name: float((peer() == codes).all(1).float().mean())
        for name, peer in peers.items()
        if not isinstance(peer, str)
    }
    floor = 2e3 * items * LEVELS * size * DIM / rate
    moved = x.nbytes * 2 + items * LEVELS * 8
    rows = report.case(f"N {items:,} D {DIM} K {size} M {LEVELS}", ours, peers,
                       f"reference, {SAMPLE:,} rows exactly; float64 distances of all rows",
                       floor, nbytes=moved, peers_equal_rows=agree)  # fmt: skip
    for row in rows:
        row["gemm_share"] = floor / row["p50_ms"]
    print(f"  {rows[0]['gemm_share']:.0%} of the matrix rate, {rate / 1e9:.0f} GFLOP/s")
    report.write()


if __name__ == "__main__":
    main()

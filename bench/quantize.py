"""Residual quantization of N rows with M codebooks of K vectors, against the usual implementations.

python bench/quantize.py [--items 100000] [--device cuda] [--json PATH] [--plot PATH]
"""

from __future__ import annotations

import torch
from harness import Report, Work, apply_options, gemm_rate, make_parser, missing_packages
from torch import Tensor

from cemg_kernels import residual_quantize
from cemg_kernels.runtime import dispatch

DIM, LEVELS, SAMPLE = 64, 4, 2000
ITEMS, SIZES = 100_000, (256, 2048)  # rows N and codes per level K of the cases
TILE, TIE = 4096, 1e-9


def cdist_loop(x: Tensor, codebooks: Tensor) -> Tensor:
    """The loop of most implementations: torch.cdist, argmin, subtract."""
    codes, residual = [], x
    for codebook in codebooks:
        codes.append(torch.cdist(residual, codebook).argmin(1))
        residual = residual - codebook[codes[-1]]
    return torch.stack(codes, dim=1)


def tiled_addmm(x: Tensor, codebooks: Tensor, rows: int) -> Tensor:
    """The argmin of ||c||^2 / 2 - x.c, one product per tile of rows: fast, and wrong at near ties."""
    half = codebooks.square().sum(2) / 2
    codes = torch.empty(len(x), len(codebooks), dtype=torch.int64, device=x.device)
    for begin in range(0, len(x), rows):
        residual = x[begin : begin + rows]
        for m, codebook in enumerate(codebooks):
            code = torch.addmm(half[m], residual, codebook.t(), alpha=-1).argmin(1)
            codes[begin : begin + rows, m] = code
            residual = residual - codebook[code]
    return codes


def residual_vq(x: Tensor, codebooks: Tensor) -> Work | str:
    """``ResidualVQ`` of vector-quantize-pytorch with these codebooks, in evaluation mode."""
    missing = missing_packages(["vector-quantize-pytorch", "einops", "einx"])
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
    """One flat L2 index of faiss per level."""
    missing = missing_packages(["faiss-cpu"])
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
            code = index.search(residual, 1)[1][:, 0]
            codes.append(torch.from_numpy(code))
            residual = residual - book[code]
        return torch.stack(codes, dim=1)

    return run


def count_wrong(x: Tensor, codebooks: Tensor, codes: Tensor) -> int:
    """The number of rows with a code that is not the nearest one in float64, by more than TIE."""
    wrong = 0
    for begin in range(0, len(x), TILE):
        rows, chosen = x[begin : begin + TILE], codes[begin : begin + TILE]
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
    parser = make_parser(__doc__, rounds=9, seconds=15.0)
    parser.add_argument("--items", type=int, default=ITEMS, help="number of rows, N")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="codes per level, K")
    options = parser.parse_args()
    device = apply_options(options)
    report = Report("residual_quantize", options, device)
    if device.type == "cuda":  # the rate of TF32, which our kernel uses too
        torch.set_float32_matmul_precision("high")
    rate = gemm_rate(device)
    torch.set_float32_matmul_precision("highest")
    for size in options.sizes:
        one_case(report, options.items, size, rate)
    report.finish()


def draw(items: int, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Random x [N, D] and codebooks [M, K, D]."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(items, DIM, generator=generator).to(device)
    return x, torch.randn(LEVELS, size, DIM, generator=generator).to(device)


def one_case(report: Report, items: int, size: int, rate: float) -> None:
    """Times our backend and the peers after comparing the codes with the reference."""
    x, codebooks = draw(items, size, report.device)
    expected = residual_quantize(x[:SAMPLE], codebooks, backend="reference")[0]
    fast = dispatch.choose("residual_quantize", report.device).backend
    ours: dict[str, Work] = {fast: lambda: residual_quantize(x, codebooks, backend=fast)}
    codes = residual_quantize(x, codebooks, backend=fast)[0]
    if not torch.equal(codes[:SAMPLE], expected) or count_wrong(x, codebooks, codes):
        raise SystemExit(f"{fast} differs from the reference: run pytest tests/kernels")
    peers: dict[str, Work | str] = {
        "ResidualVQ": residual_vq(x, codebooks),
        "faiss": faiss_index(x, codebooks),
        "torch.cdist loop": lambda: cdist_loop(x, codebooks),
        "tiled addmm + argmin": lambda: tiled_addmm(x, codebooks, len(x) if x.is_cuda else 1024),
    }
    equal_rows = {
        name: float((torch.as_tensor(peer()) == codes).all(1).float().mean())
        for name, peer in peers.items()
        if not isinstance(peer, str)
    }
    floor = 2e3 * items * LEVELS * size * DIM / rate
    moved = x.nbytes * 2 + items * LEVELS * 8
    rows = report.case(f"N {items:,} D {DIM} K {size} M {LEVELS}", ours, peers,
                       f"reference, {SAMPLE:,} rows exactly; float64 distances of all rows",
                       floor, nbytes=moved, peers_equal_rows=equal_rows)  # fmt: skip
    for row in rows:
        row["gemm_share"] = floor / row["p50_ms"]
    print(f"  {rows[0]['gemm_share']:.0%} of the matrix rate, {rate / 1e9:.0f} GFLOP/s")
    report.write()


if __name__ == "__main__":
    main()

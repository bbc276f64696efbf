"""Every backend returns exactly the codes of the reference, also near ties and at the limits of float32."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cemg_kernels import residual_quantize

pytestmark = pytest.mark.medium


def draw(n: int, m: int, k: int, d: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator), torch.randn(m, k, d, generator=generator)


def assert_backends_agree(
    x: Tensor, codebooks: Tensor, backends: tuple[str, ...] = ("native", "torch", "triton")
) -> None:
    wanted_codes, expected = residual_quantize(x, codebooks, backend="reference")
    for backend in backends:
        codes, quantized = residual_quantize(x, codebooks, backend=backend)
        assert torch.equal(codes, wanted_codes), backend
        assert torch.equal(quantized.nan_to_num(), expected.nan_to_num())  # the same sums of the same rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("n", "m", "k", "d"), [(1, 1, 1, 1), (3, 2, 31, 5), (256, 4, 256, 64), (513, 3, 300, 33), (0, 2, 4, 3),
     (5, 8, 40, 19)],
)  # fmt: skip
def test_codes_of_every_backend_equal_the_reference(n, m, k, d, dtype):
    x, codebooks = draw(n, m, k, d)
    assert_backends_agree(x.to(dtype), codebooks.to(dtype))


@pytest.mark.parametrize(("levels", "backends"), [(8, ("native", "torch")), (1, ("triton",))])
def test_codes_of_the_largest_codebooks_equal_the_reference(levels, backends):
    """Uses one level where the kernel is interpreted, which takes a second."""
    x, codebooks = draw(9, levels, 4096, 19)
    assert_backends_agree(x, codebooks, backends)


def test_the_reference_is_a_loop_over_rows():
    x, codebooks = draw(40, 3, 9, 4)
    codes, quantized = residual_quantize(x, codebooks, backend="reference")
    for i in range(40):
        residual, total = x[i].clone(), torch.zeros(4)
        for m in range(3):
            distances = [((residual.double() - v.double()) ** 2).sum().item() for v in codebooks[m]]
            best = distances.index(min(distances))
            assert int(codes[i, m]) == best
            residual, total = residual - codebooks[m, best], total + codebooks[m, best]
        assert torch.equal(quantized[i], total)


def test_equal_codebook_rows_give_the_lowest_code():
    x, codebooks = draw(100, 2, 8, 4)
    codebooks = codebooks.repeat_interleave(3, dim=1)
    for backend in ("native", "torch", "triton", "reference"):
        codes, _ = residual_quantize(x, codebooks, backend=backend)
        assert (codes % 3 == 0).all()


def test_near_ties_are_resolved_in_float64():
    """The codes differ by one float32 step: float32 scores cannot separate them, float64 distances can."""
    x, codebooks = draw(300, 2, 16, 32, seed=1)
    near = torch.nextafter(codebooks, torch.full_like(codebooks, 100.0))
    assert_backends_agree(x * 100, torch.cat((codebooks, near), 1))


@pytest.mark.parametrize("scale", [1e-30, 1e-22, 1e-12, 1e12, 1e18, 1e30])
@pytest.mark.parametrize("book_scale", [1e-25, 1.0, 1e19])
def test_codes_are_exact_at_any_magnitude(scale, book_scale):
    x, codebooks = draw(64, 2, 16, 8)
    assert_backends_agree(x * scale, codebooks * book_scale)


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_codes_are_exact_with_any_matmul_precision(precision):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        assert_backends_agree(*draw(500, 3, 128, 64, seed=2))
    finally:
        torch.set_float32_matmul_precision(before)


def test_rows_with_nan_or_infinity_get_a_code_and_do_not_change_other_rows():
    x, codebooks = draw(50, 3, 16, 8)
    clean, _ = residual_quantize(x, codebooks)
    x[7, 2], x[9, 0], x[11, 1] = float("nan"), float("inf"), float("-inf")
    assert_backends_agree(x, codebooks)
    codes, _ = residual_quantize(x, codebooks)
    assert (codes[[7, 9, 11]] == 0).all()
    others = torch.tensor([i for i in range(50) if i not in (7, 9, 11)])
    assert torch.equal(codes[others], clean[others])


def test_a_codebook_row_of_nan_is_never_chosen():
    x, codebooks = draw(50, 1, 8, 4)
    codebooks[0, 3] = float("nan")
    assert_backends_agree(x, codebooks)
    assert not (residual_quantize(x, codebooks)[0] == 3).any()


def test_codes_do_not_depend_on_the_batch():
    x, codebooks = draw(300, 4, 64, 16, seed=3)
    whole, _ = residual_quantize(x, codebooks)
    parts = torch.cat([residual_quantize(part, codebooks)[0] for part in x.split(7)])
    assert torch.equal(whole, parts)


@settings(max_examples=80, deadline=None)
@given(
    n=st.integers(0, 20),
    m=st.integers(1, 4),
    k=st.integers(1, 9),
    d=st.integers(1, 6),
    grid=st.integers(1, 4),
    seed=st.integers(0, 2**31),
)
def test_points_on_a_grid_with_many_ties_equal_the_reference(n, m, k, d, grid, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-grid, grid + 1, (n, d), generator=generator).float() / 2
    codebooks = torch.randint(-grid, grid + 1, (m, k, d), generator=generator).float()
    assert_backends_agree(x, codebooks)


@pytest.mark.parametrize(
    ("x", "codebooks", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(1, 4, 5), r"\[N, D\]"),
        (torch.zeros(2), torch.zeros(1, 4, 5), r"\[N, D\]"),
        (torch.zeros(2, 3), torch.zeros(0, 4, 3), "empty"),
        (torch.zeros(2, 3).long(), torch.zeros(1, 4, 3), "floating"),
    ],
)
def test_inputs_that_do_not_fit_are_rejected(x, codebooks, message):
    with pytest.raises(ValueError, match=message):
        residual_quantize(x, codebooks)


def test_more_dimensions_than_the_kernel_supports_are_rejected_with_a_remedy():
    with pytest.raises(
        ValueError, match=r"up to 128 dimensions of torch.float32, got 129; use backend='torch'"
    ):
        residual_quantize(torch.zeros(1, 129), torch.zeros(1, 1, 129), backend="triton")


def test_an_unknown_backend_is_rejected_with_the_choices():
    with pytest.raises(ValueError, match="choose from triton, native, torch, reference"):
        residual_quantize(torch.zeros(1, 1), torch.zeros(1, 1, 1), backend="fpga")


@pytest.mark.parametrize("backend", ["reference", "torch", "native", "triton"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_codes_have_the_requested_dtype(backend, dtype):
    generator = torch.Generator().manual_seed(3)
    x, codebooks = torch.randn(9, 5, generator=generator), torch.randn(2, 200, 5, generator=generator)
    expected, sums = residual_quantize(x, codebooks, backend="reference")
    codes, quantized = residual_quantize(x, codebooks, code_dtype=dtype, backend=backend)
    assert codes.dtype == dtype and torch.equal(codes.long(), expected) and expected.max() > 127
    assert torch.equal(quantized, sums)


@pytest.mark.parametrize(
    ("dim", "dtype"),
    [(40, torch.float32), (100, torch.float32), (40, torch.bfloat16), (100, torch.float16)],
)
def test_the_tiles_of_an_a100_give_the_same_codes(monkeypatch, dim, dtype):
    from cemg_kernels.quantize import residual_triton as kernels

    monkeypatch.setattr(kernels, "architecture_of", lambda device: 80)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(70, dim, generator=generator).to(dtype)
    codebooks = torch.randn(2, 90, dim, generator=generator).to(dtype)
    codes, quantized = residual_quantize(x, codebooks, backend="triton")
    expected, total = residual_quantize(x, codebooks, backend="reference")
    assert torch.equal(codes, expected) and torch.equal(quantized, total)


def test_a_dtype_that_cannot_hold_the_codes_is_rejected():
    x, codebooks = torch.zeros(1, 2), torch.zeros(1, 257, 2)
    with pytest.raises(ValueError, match=r"hold codes 0 to 256, got torch\.uint8; take a wider one"):
        residual_quantize(x, codebooks, code_dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"got torch\.float32"):
        residual_quantize(x, codebooks, code_dtype=torch.float32)


@pytest.mark.parametrize("backend", ["native", "torch", "triton", "reference"])
def test_the_custom_op_passes_opcheck_and_compiles_without_a_graph_break(backend):
    x, codebooks = torch.randn(7, 5), torch.randn(2, 6, 5)
    for laid_out in (x, x.t().contiguous().t()):  # row-major, column-major
        operands = laid_out, codebooks, torch.int16, backend
        torch.library.opcheck(torch.ops.cemg.residual_quantize.default, operands)

    def doubled(rows: Tensor) -> tuple[Tensor, Tensor]:
        codes, quantized = residual_quantize(rows * 2, codebooks, code_dtype=torch.uint8, backend=backend)
        return codes + 1, quantized - rows

    torch._dynamo.reset()
    compiled = torch.compile(doubled, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(compiled(x), doubled(x), strict=True):
        assert torch.equal(actual, expected)

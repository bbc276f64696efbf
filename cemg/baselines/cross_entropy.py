"""Softmax cross-entropy over the whole catalog without the [P, N] matrix of logits.

P positions, D embedding, N items, R rows per chunk. The loss is the last operation of a SASRec step, so the
gradient of a chunk is known as soon as its logits are. The forward pass processes one chunk of rows at a
time, keeps only the gradients of its two inputs, and never stores P x N floats.

Time of forward and backward on two cores of an AVX512-BF16 processor, P = 1,766, D = 64, N = 12,101: 153 ms
in plain PyTorch, 132 ms in PyTorch with bfloat16 autocast, 71 ms chunked in float32, 40 ms chunked with
bfloat16 products.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_ROWS = 256


def linear_cross_entropy(
    states: Tensor,
    table: Tensor,
    *,
    targets: Tensor,
    dtype: torch.dtype = torch.float32,
    rows: int = CHUNK_ROWS,
) -> Tensor:
    """Compute the mean over P of ``-log softmax(states @ table.T)[target]``; differentiable once.

    The softmax and the sums over chunks are float32. With bfloat16 products, the relative error of the
    gradient is about 2 ** -8. They are faster on processors that multiply bfloat16 (AVX512-BF16, AMX, GPUs).

    Args:
        states: [P, D] float32, P >= 1.
        table: [N, D] float32, the item embeddings.
        targets: [P] int64, the target item of each position.
        dtype: The type of the inputs of the three matrix products.
        rows: Positions per chunk.

    Returns:
        The loss, a float32 scalar.
    """
    loss: Tensor = _LinearCrossEntropy.apply(states, table, targets, dtype, rows)
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, states: Tensor, table: Tensor, targets: Tensor, dtype: torch.dtype, rows: int
    ) -> Tensor:
        cast_table = table.to(dtype)
        grad_states, grad_table = torch.empty_like(states), torch.zeros_like(table)
        loss = states.new_zeros(())
        for start in range(0, len(states), rows):
            part = states[start : start + rows].to(dtype)  # [R, D]
            target = targets[start : start + rows, None]  # [R, 1]
            logits = (part @ cast_table.T).float()  # [R, N]
            normaliser = logits.logsumexp(1, keepdim=True)  # [R, 1]
            loss += (normaliser - logits.gather(1, target)).sum()
            error = logits.sub_(normaliser).exp_()  # softmax, then minus the one-hot target
            error.scatter_add_(1, target, error.new_full(target.shape, -1.0))
            cast_error = error.to(dtype)
            grad_states[start : start + rows] = cast_error @ cast_table
            grad_table += cast_error.T @ part
        ctx.save_for_backward(grad_states, grad_table)
        ctx.count = len(states)
        return loss / len(states)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        grad_states, grad_table = ctx.saved_tensors
        scale = grad / ctx.count
        return grad_states * scale, grad_table * scale, None, None, None

"""Differentiable operations of a decoder layer with hand-written gradients: few kernel calls on a CPU.

The residual stream, the norms and the softmax are float32. Matrix products have the dtype of the training,
float32 or bfloat16.

B sequences, S tokens, H heads, E = D / H width of a head, F width of the feed-forward layer, n = B · S rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

LANES = 16  # torch's softmax is several times slower if its rows are shorter than a vector of floats


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """x / rms(x) · weight over the last dimension: float32 to ``dtype``, same shape."""
    out: Tensor = _RMSNorm.apply(x, weight, eps, dtype)
    return out


def feed_forward(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """The SwiGLU layer (silu(x · gateᵀ) · (x · upᵀ)) · downᵀ: [n, D]; gate and up are [F, D], down [D, F]."""
    out: Tensor = _FeedForward.apply(x, gate, up, down)
    return out


def add_with_dropout(x: Tensor, y: Tensor, rate: float) -> Tensor:
    """x + dropout(y), float32 [n, D]. The mask is drawn from torch's generator."""
    out: Tensor = _AddWithDropout.apply(x, y, rate)
    return out


def attention(qkv: Tensor, rotations: Tensor, reads: Tensor | None = None) -> Tensor:
    """Self-attention with rotary positions.

    Args:
        qkv: [B, S, 3, H, E]; the two coordinates of each rotated pair of queries and keys are neighbours.
        rotations: [S, 2, H, E / 2] complex64, for queries (with the scale of the scores) and keys; or
            [B, S, 2, H, E / 2].
        reads: [B, S, S] bool: whether the first of two positions reads the second; None if each position
            reads itself and those before.

    Returns:
        [B, S, H · E].
    """
    out: Tensor = _Attention.apply(qkv, rotations, reads)
    return out


class _RMSNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
        scale = scale.div_(x.shape[-1]).add_(eps).rsqrt_()  # [n, 1]
        ctx.save_for_backward(x, weight, scale)
        out: Tensor = (x * scale).mul_(weight).to(dtype)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, scale = ctx.saved_tensors
        normed = x * scale
        grad = grad.float()
        by_column = grad * normed
        along = (by_column @ weight).div_(-x.shape[-1])
        x_grad = (grad * weight).addcmul_(normed, along.unsqueeze(-1)).mul_(scale)
        return x_grad, by_column.flatten(0, -2).sum(0), None, None


class _FeedForward(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        before, factor = x @ gate.t(), x @ up.t()  # [n, F]
        active = F.silu(before)
        hidden = active * factor
        ctx.save_for_backward(x, gate, up, down, before, factor, active, hidden)
        return hidden @ down.t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, gate, up, down, before, factor, active, hidden = ctx.saved_tensors
        down_grad = grad.t() @ hidden
        wide = grad @ down  # [n, F]
        factor_grad = wide * active
        before_grad = torch.ops.aten.silu_backward(wide.mul_(factor), before)
        x_grad = torch.addmm(before_grad @ gate, factor_grad, up)
        return x_grad, before_grad.t() @ x, factor_grad.t() @ x, down_grad


class _AddWithDropout(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, rate: float) -> Tensor:
        if rate == 0:
            ctx.save_for_backward(None)
            return x + y
        keep = _keep(y, rate)
        ctx.save_for_backward(keep)
        ctx.scale = 1 / (1 - rate)
        return torch.add(x, y * keep, alpha=ctx.scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (keep,) = ctx.saved_tensors
        if keep is None:
            return grad, grad, None
        return grad, grad.mul(ctx.scale).to(keep.dtype).mul_(keep), None


def _keep(like: Tensor, rate: float) -> Tensor:
    """1 with probability 1 - rate, in steps of 2 ** -16, else 0."""
    bits = torch.empty(-(-like.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    threshold = round(rate * 2**16) - 2**15
    keep = torch.empty_like(like)
    # written as 0 and 1 at once: a conversion from bool takes ten times as long
    return torch.ge(bits.view(torch.int16)[: like.numel()].view(like.shape), threshold, out=keep)


class _Attention(Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, rotations: Tensor, reads: Tensor | None) -> Tensor:
        B, S, _, H, E = qkv.shape
        padded = -(-S // LANES) * LANES
        heads = qkv.new_zeros(3, B, H, padded, E)
        rotated = torch.view_as_real(_pairs(qkv[:, :, :2]) * rotations).flatten(-2)  # [B, S, 2, H, E]
        heads[:2, :, :, :S] = rotated.permute(2, 0, 3, 1, 4)
        heads[2, :, :, :S] = qkv[:, :, 2].transpose(1, 2)
        q, k, v = heads.flatten(1, 2)
        q = q[:, :S]  # [B · H, S, E]
        mask = torch.full((S, padded), float("-inf"), dtype=qkv.dtype)
        if reads is None:
            mask = mask.triu_(1)
        else:
            mask = mask.repeat(B, 1, 1)
            mask[:, :, :S].masked_fill_(reads, 0)
            mask = mask.repeat_interleave(H, 0)
        shares = torch.softmax(torch.baddbmm(mask, q, k.transpose(1, 2)), -1, dtype=torch.float32)
        products = shares.to(qkv.dtype)
        ctx.save_for_backward(q, k, v, shares, products, rotations)
        return torch.bmm(products, v).view(B, H, S, E).transpose(1, 2).reshape(B, S, H * E)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        q, k, v, shares, products, rotations = ctx.saved_tensors
        B, S, H, E = len(grad), q.shape[1], grad.shape[2] // q.shape[2], q.shape[2]
        grad = grad.view(B, S, H, E).transpose(1, 2).reshape(B * H, S, E)
        wide = torch.bmm(grad, v.transpose(1, 2)).float()
        scores = torch._softmax_backward_data(wide, shares, -1, torch.float32).to(grad.dtype)  # [B · H, S, ·]
        out = grad.new_empty(B, S, 3, H, E)

        def by_head(x: Tensor) -> Tensor:
            return x.view(B, H, -1, E)[:, :, :S].transpose(1, 2)

        turned = torch.stack((by_head(scores @ k), by_head(scores.transpose(1, 2) @ q)), 2)  # [B, S, 2, H, E]
        out[:, :, :2] = torch.view_as_real(_pairs(turned) * rotations.conj()).flatten(-2)
        out[:, :, 2] = by_head(products.transpose(1, 2) @ grad)
        return out, None, None


def _pairs(x: Tensor) -> Tensor:
    return torch.view_as_complex(x.float().contiguous().unflatten(-1, (-1, 2)))

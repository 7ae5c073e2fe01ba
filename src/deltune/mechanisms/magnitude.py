"""Matrices as direction and magnitude: the norms of rows, and outputs rescaled by them."""

from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def row_norms(weight: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """||(W + s B A)_i|| of each row i, shape (..., out), without the matrix B A.

    ||W_i||^2 + 2 s (W A^T)_i . B_i + s^2 B_i (A A^T) B_i^T, in float32 or more.

    Args:
        weight: W (..., out, in).
        down: A (..., r, in).
        up: B (..., out, r).
        scale: s.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    own = torch.linalg.vector_norm(weight, dim=-1, dtype=wide).square()
    A, B = down.to(wide), up.to(wide)
    crossed = (weight @ down.mT.to(weight.dtype)).to(wide)
    squared = own + ((2 * scale * crossed + scale**2 * B @ (A @ A.mT)) * B).sum(-1)
    return squared.clamp(min=0).sqrt()


def per_norm(magnitude: Tensor, norms: Tensor) -> Tensor:
    """m / n, and 0 where n is 0: a row of zeros has no direction and stays what it is."""
    return torch.where(norms > 0, magnitude / norms.where(norms > 0, 1), 0)


class Rescaled(torch.autograd.Function):
    """r (.) (y - b + h B^T) + b, keeping for backward nothing of the size of y but the result.

    The gradient of r is the sum over tokens of g (.) (result - b) / r; where r is 0 it is 0.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(y: Tensor, hidden: Tensor, up: Tensor, r: Tensor, bias: Tensor | None) -> Tensor:
        raw = (y if bias is None else y - bias) + hidden @ up.mT
        return r * raw if bias is None else torch.addcmul(bias, r, raw)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, hidden, up, r, bias = inputs
        ctx.save_for_backward(hidden, up, r, bias, output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (hidden, up, r, bias, output) = grads, ctx.saved_tensors
        inner = grad * r
        flat = inner.reshape(-1, inner.shape[-1])
        d_hidden = inner @ up if ctx.needs_input_grad[1] else None
        d_up = flat.mT @ hidden.reshape(-1, hidden.shape[-1]) if ctx.needs_input_grad[2] else None
        d_r = None
        if ctx.needs_input_grad[3]:
            raw = output if bias is None else output - bias
            summed = (grad * raw).flatten(0, -2).sum(0)
            d_r = torch.where(r == 0, 0, summed / torch.where(r == 0, 1, r))
        d_bias = None
        if bias is not None and ctx.needs_input_grad[4]:
            d_bias = (grad - inner).flatten(0, -2).sum(0)
        return inner, d_hidden, d_up, d_r, d_bias

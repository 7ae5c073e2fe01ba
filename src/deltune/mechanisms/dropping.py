"""Dropout before a linear map, of which next to nothing is kept for the backward pass."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from deltune.mechanisms.streams import rowwise

KEPT = 2**17  # elements up to which a mask is kept, which saves drawing it again


class DroppedLinear(torch.autograd.Function):
    """F.linear(dropout(x, p), weight); keeps x and a seed for backward, no mask and no copy."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, p: float, seed: int) -> Tensor:
        return F.linear(x * mask_of(x, p, seed), weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, ctx.p, ctx.seed = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        (grad,), (x, weight) = grads, ctx.saved_tensors
        mask = mask_of(x, ctx.p, ctx.seed)
        dx = (grad @ weight) * mask if ctx.needs_input_grad[0] else None
        dw = None
        if ctx.needs_input_grad[1]:
            dw = grad.reshape(-1, grad.shape[-1]).mT @ (x * mask).reshape(-1, x.shape[-1])
        return dx, dw, None, None


class Drop(NamedTuple):
    """What is dropped in the rows of one lane."""

    p: float
    seed: int
    shape: tuple[int, ...]
    """Of the rows without what longer rows beside them add."""

    def mask(self, x: Tensor) -> Tensor:
        """For the rows x of the lane; 0 where it has more than the shape."""
        if self.p == 0.0:
            return torch.ones_like(x)
        own = mask_of(x.new_empty(self.shape), self.p, self.seed)
        gaps = [full - size for full, size in zip(x.shape, self.shape, strict=True)]
        return F.pad(own, [n for gap in gaps[::-1] for n in (0, gap)]) if any(gaps) else own


class DroppedEach(torch.autograd.Function):
    """dropout(x) A^T with another A (groups, r, in), and other dropout, for each of equal groups of
    the rows of x; keeps x and seeds for backward, and small masks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, down: Tensor, drops: tuple[Drop, ...]) -> Tensor:
        mask, ctx.drops = _masks(x, drops), drops
        ctx.save_for_backward(x, down, mask if x.numel() <= KEPT else None)
        return torch.bmm((x * mask).view(len(down), -1, x.shape[-1]), down.mT)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (grad,), (x, down, mask) = grads, ctx.saved_tensors
        mask = _masks(x, ctx.drops) if mask is None else mask
        dx = (grad @ down).view(x.shape) * mask if ctx.needs_input_grad[0] else None
        dw = None
        if ctx.needs_input_grad[1]:
            dw = grad.mT @ (x * mask).view(len(down), -1, x.shape[-1])
        return dx, dw, None


def _masks(x: Tensor, drops: tuple[Drop, ...]) -> Tensor:
    parts, p, count = x.chunk(len(drops)), drops[0].p, x.numel() // len(drops)
    if p and all(drop.p == p and drop.shape == parts[0].shape for drop in drops):
        bits = torch.stack([_bits(count, drop.seed, x.device) for drop in drops])
        return _kept(bits[:, :count].reshape(x.shape), p, x.dtype)
    return torch.cat([drop.mask(part) for part, drop in zip(parts, drops, strict=True)])


def mask_of(x: Tensor, p: float, seed: int) -> Tensor:
    """0 where x is dropped, else 1 / (1 - p), with p to the nearest 2^-16.

    16 random bits decide for each element, four of them from one draw: a third of the time of
    `bernoulli_`, which is most of what dropout costs.
    """
    return _kept(_bits(x.numel(), seed, x.device)[: x.numel()].view(x.shape), p, x.dtype)


def _bits(count: int, seed: int, device: torch.device) -> Tensor:
    """16 random bits for each of `count` elements, and of up to 3 more."""
    generator = torch.Generator(device).manual_seed(seed)
    draws = (-(-count // 4),)
    bits = torch.randint(-(2**63), 2**63 - 1, draws, generator=generator, device=device)
    return bits.view(torch.int16)


def _kept(bits: Tensor, p: float, dtype: torch.dtype) -> Tensor:
    dropped = min(round(p * 2**16), 2**16 - 1)
    return (bits >= dropped - 2**15).to(dtype).mul_(2**16 / (2**16 - dropped))


def dropped_linear(x: Tensor, weight: Tensor, p: float) -> Tensor:
    """F.linear(dropout(x, p), weight); nothing but `x` itself is kept for backward.

    The seed of the mask is drawn from torch's global generator, so that seeding and gradient
    checkpointing work as for `nn.Dropout`.
    """
    return F.linear(x, weight) if p == 0.0 else _dropped_linear(x, weight, p)


@rowwise
def _dropped_linear(x: Tensor, weight: Tensor, p: float) -> Tensor:
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    seed = int(torch.randint(2**62, (), dtype=torch.int64))
    return DroppedLinear.apply(x, weight, p, seed)

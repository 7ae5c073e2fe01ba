"""Changes of a matrix in factors, and what is dropped of their input."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from deltune.errors import MergeError
from deltune.mechanisms.modules import matched
from deltune.mechanisms.streams import new_seed, rowwise
from deltune.mechanisms.terms import Terms

KEPT = 2**17  # elements of rows together up to which what is dropped is kept, which saves time


class Update(Protocol):
    """dW in factors."""

    def dense(self) -> Tensor:
        """dW, shape (..., out, in)."""
        ...

    def apply(self, x: Tensor, scale: float, training: bool, onto: Tensor | None = None) -> Tensor:
        """scale * x dW^T, added to `onto` if that is given."""
        ...

    def rows(self, ids: Tensor, scale: float, padding: int | None) -> Tensor:
        """scale * dW^T[ids]: the change of embeddings, without a gradient from `padding`."""
        ...


class LowRank(NamedTuple):
    """dW = scale * up @ down, with dropout on the input of `down` in training."""

    down: Tensor
    up: Tensor
    scale: float
    dropout: float = 0.0

    def dense(self) -> Tensor:
        """dW, shape (..., out, in)."""
        return self.scale * (self.up @ self.down)

    def apply(self, x: Tensor, scale: float, training: bool, onto: Tensor | None = None) -> Tensor:
        """scale * x dW^T, added to `onto` if that is given."""
        down, up = matched(x, self.down, self.up)
        hidden = dropped_linear(x, down, self.dropout if training else 0.0)
        up = up * (self.scale * scale)
        return _raised(hidden, up) if onto is None else _raised_onto(onto, hidden, up)

    def rows(self, ids: Tensor, scale: float, padding: int | None) -> Tensor:
        """scale * dW^T[ids], without a gradient from `padding`."""
        hidden = F.embedding(ids, self.down.mT, padding)
        return _raised(hidden, self.up * (self.scale * scale))


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
    the rows of x; keeps x and seeds for backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, down: Tensor, drops: tuple[Drop, ...]) -> Tensor:
        ctx.drops = drops
        ctx.save_for_backward(x, down)
        return _lowered_each(x * _masks(x, drops), down)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (grad,), (x, down) = grads, ctx.saved_tensors
        mask = _masks(x, ctx.drops)
        dx = (grad @ down).view(x.shape) * mask if ctx.needs_input_grad[0] else None
        dw = None
        if ctx.needs_input_grad[1]:
            dw = grad.mT @ (x * mask).view(len(down), -1, x.shape[-1])
        return dx, dw, None


def _lowered_each(x: Tensor, down: Tensor) -> Tensor:
    return torch.bmm(x.reshape(len(down), -1, x.shape[-1]), down.mT)


def _masks(x: Tensor, drops: tuple[Drop, ...]) -> Tensor:
    p, each, count = drops[0].p, x.shape[0] // len(drops), x.numel() // len(drops)
    own = (each, *x.shape[1:])
    if p and all(drop.p == p and drop.shape == own for drop in drops):
        bits = _bits(count, [drop.seed for drop in drops], x.device)
        return _kept(bits[:, :count].reshape(x.shape), p, x.dtype)
    parts = x.chunk(len(drops))
    return torch.cat([drop.mask(part) for part, drop in zip(parts, drops, strict=True)])


def mask_of(x: Tensor, p: float, seed: int) -> Tensor:
    """0 where x is dropped, else 1 / (1 - p), with p to the nearest 2^-16.

    16 random bits decide for each element, four of them from one draw: a third of the time of
    `bernoulli_`, which is most of what dropout costs.
    """
    bits = _bits(x.numel(), [seed], x.device)
    return _kept(bits[0, : x.numel()].view(x.shape), p, x.dtype)


def _bits(count: int, seeds: Sequence[int], device: torch.device) -> Tensor:
    """(seeds, count or up to 3 more): 16 random bits for each element."""
    draws = torch.empty((len(seeds), -(-count // 4)), dtype=torch.int64, device=device)
    generator = torch.Generator(device)
    for row, seed in zip(draws.unbind(), seeds, strict=True):
        row.random_(-(2**63), 2**63 - 1, generator=generator.manual_seed(seed))
    return draws.view(torch.int16)


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
    return DroppedLinear.apply(x, weight, p, new_seed())


def _raised(hidden: Tensor, up: Tensor) -> Tensor:
    """F.linear(hidden, up), on a copy of `up` the other way round: with a rank of a few the matrix
    products of backward are several times faster in that layout."""
    return hidden @ up.mT.contiguous()


def _raised_onto(output: Tensor, hidden: Tensor, up: Tensor) -> Tensor:
    """output + F.linear(hidden, up) in one pass over the memory of the output."""
    flat = output.reshape(-1, output.shape[-1])
    added = torch.addmm(flat, hidden.reshape(-1, hidden.shape[-1]), up.mT.contiguous())
    return added.view(output.shape)


def raised_each(
    x: Tensor, output: Tensor, down: Tensor, up: Tensor, scale: float, drops: tuple[Drop, ...] = ()
) -> Tensor:
    """output + scale * dropout(x) A^T B^T with another A (groups, r, in) and B^T (groups, r, out)
    for each of equal groups of rows."""
    down, up = matched(x, down, up)
    if drops and torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, down = x.to(dtype), down.to(dtype)
    if drops and x.numel() > KEPT:
        hidden = DroppedEach.apply(x, down, drops)
    else:
        hidden = _lowered_each(x * _masks(x, drops) if drops else x, down)
    flat = output.reshape(len(down), -1, output.shape[-1])
    return torch.baddbmm(flat, hidden, up.to(hidden.dtype), alpha=scale).view(output.shape)


def dense(term: LowRank | Tensor) -> Tensor:
    """A change as one tensor."""
    return term.dense() if isinstance(term, LowRank) else term


def one_rank(terms: Terms) -> tuple[int, dict[str, LowRank]]:
    """The largest rank of the factors of some places, one at each, and all of them filled up to it
    with zeros.

    Raises:
        MergeError: a change without factors.
    """
    found: dict[str, LowRank] = {}
    for key, one in terms.items():
        for term in one.values():
            if not isinstance(term, LowRank):
                raise MergeError(
                    f"the change at `{key}` has no factors, which this method needs; give a `rank`"
                )
            found[key] = term
    most = max(term.down.shape[-2] for term in found.values())
    for key, term in found.items():
        more = most - term.down.shape[-2]
        down, up = F.pad(term.down, (0, 0, 0, more)), F.pad(term.up, (0, more))
        found[key] = term._replace(down=down, up=up)
    return most, found

"""Sums, angles and singular values of terms. Factors stay factors: of dW = B A (out, in) of rank r
nothing larger than (out + in, r) is made, and all is computed in float64."""

from collections.abc import Sequence

import torch
from torch import Tensor

from deltune.mechanisms.factors import LowRank

Term = LowRank | Tensor


def precise(tensor: Tensor) -> Tensor:
    """The values in float64, where all devices know it."""
    return tensor.detach().to("cpu", torch.float64)


def wide(term: Term) -> Term:
    """The term in float64, its scale in its factor `up`."""
    if isinstance(term, LowRank):
        return LowRank(precise(term.down), precise(term.up) * term.scale, 1.0)
    return precise(term)


def summed(terms: Sequence[Term], weights: Sequence[float]) -> Term:
    """sum_i w_i T_i: factors one behind another if all terms have some, of rank sum_i r_i."""
    factors = [term for term in terms if isinstance(term, LowRank)]
    if len(factors) == len(terms):
        down = torch.cat([term.down for term in factors], dim=-2)
        pairs = zip(factors, weights, strict=True)
        return LowRank(down, torch.cat([w * t.scale * t.up for t, w in pairs], dim=-1), 1.0)
    whole = [term.dense() if isinstance(term, LowRank) else term for term in terms]
    return sum((w * t for t, w in zip(whole[1:], weights[1:], strict=True)), weights[0] * whole[0])


def inner(one: Term, other: Term) -> float:
    """<T, T'> = tr(T^T T'); of factors sum((B^T B') (.) (A A'^T))."""
    if isinstance(one, LowRank) and isinstance(other, LowRank):
        pair = (one.up.mT @ other.up) * (one.down @ other.down.mT)
        return one.scale * other.scale * float(pair.sum())
    a, b = (term.dense() if isinstance(term, LowRank) else term for term in (one, other))
    return float((a * b).sum())


def norm(term: Term) -> float:
    """The Frobenius norm."""
    return max(0.0, inner(term, term)) ** 0.5


def cosine(one: Term, other: Term) -> float | None:
    """The cosine of the angle between two terms; None if one of them is zero."""
    return ratio(inner(one, other), norm(one) * norm(other))


def ratio(product: float, size: float) -> float | None:
    """The cosine <T, T'> / (||T|| ||T'||), which rounding must not bring beyond 1; None of a size
    of 0."""
    return max(-1.0, min(1.0, product / size)) if size else None


def svd(term: Term) -> tuple[Tensor, Tensor, Tensor]:
    """U (..., out, k), S (..., k) and V^T (..., k, in); of factors by QR of each and the SVD of the
    core, k = min(r, out, in)."""
    if not isinstance(term, LowRank):
        return torch.linalg.svd(term, full_matrices=False)
    left, upper = torch.linalg.qr(term.scale * term.up)
    right, lower = torch.linalg.qr(term.down.mT)
    u, s, vh = torch.linalg.svd(upper @ lower.mT, full_matrices=False)
    return left @ u, s, vh @ right.mT


def truncated(term: Term, rank: int) -> tuple[LowRank, float]:
    """The factors of rank at most `rank` that are nearest in the Frobenius norm (Eckart and Young
    1936), and the square of their distance."""
    u, s, vh = svd(term)
    root = s[..., :rank].sqrt()
    near = LowRank(root[..., :, None] * vh[..., :rank, :], u[..., :rank] * root[..., None, :], 1.0)
    return near, float(s[..., rank:].square().sum())

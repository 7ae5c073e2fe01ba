"""Parameterised hypercomplex multiplication: y = x H + b, with H = sum_i A_i (x) S_i in n terms.

A (n, n, n) holds the rules of multiplication and S (n, k / n, m / n) the weights, so that H (k, m)
has about 1 / n of its entries as parameters; each S_i may be a product u_i v_i of rank r.
"""

from torch import Tensor
from torch.nn import functional as F

from deltune.mechanisms.kronecker import KroneckerSum

Factors = tuple[Tensor, Tensor]
"""u (n, k / n, r) and v (n, r, m / n), for S_i = u_i v_i."""


def phm_matrix(A: Tensor, S: Tensor | Factors) -> Tensor:
    """H = sum_i A_i (x) S_i, shape (k, m)."""
    return KroneckerSum(A, S if isinstance(S, Tensor) else S[0] @ S[1]).dense()


def phm_linear(x: Tensor, A: Tensor, S: Tensor | Factors, bias: Tensor) -> Tensor:
    """x H + bias, with H made only where that takes fewer multiplications for each token.

    Of S in factors, A joins the one on the smaller side, which leaves two small products:
    x (A u) and v, or x u and (A v).
    """
    if isinstance(S, Tensor):
        return F.linear(x, phm_matrix(A, S).mT, bias)
    u, v = S
    n, p, r = u.shape
    q = v.shape[-1]
    if n * r * (n * min(p, q) + max(p, q)) >= n * p * q:
        return F.linear(x, phm_matrix(A, S).mT, bias)
    if p <= q:
        narrow = (A[:, :, None, :, None] * u[:, None, :, None, :]).flatten(1, 2)  # (i, a p, b, r)
        hidden = F.linear(x, narrow.permute(2, 0, 3, 1).flatten(0, 2))  # (..., b i r)
        return F.linear(hidden.unflatten(-1, (n, n * r)), v.flatten(0, 1).mT).flatten(-2) + bias
    hidden = F.linear(x.unflatten(-1, (n, p)), u.movedim(1, -1).flatten(0, 1))  # (..., a, i r)
    wide = A[:, :, None, :, None] * v[:, None, :, None, :]  # (i, a, r, b, q)
    return F.linear(hidden.flatten(-2), wide.transpose(0, 1).flatten(3).flatten(0, 2).mT, bias)

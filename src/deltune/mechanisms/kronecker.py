"""Sums of Kronecker products: dW = sum_i A_i (x) B_i, evaluated in factors where that is cheaper.

With dW[(a, b), (c, d)] = sum_i A_i[a, c] B_i[b, d] and x as a matrix X[c, d], x dW^T is
sum_i A_i X B_i^T: two products with the small factors.
"""

from math import isqrt
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from deltune.mechanisms.modules import matched

SMALL = 4  # a multiplication in the small products takes as long as about four in a large one


class KroneckerSum(NamedTuple):
    """dW = sum_i A_i (x) B_i, with A (..., r, m1, n1), B (..., r, m2, n2), dW (m1 m2, n1 n2)."""

    A: Tensor
    B: Tensor

    def dense(self) -> Tensor:
        """dW, shape (..., out, in)."""
        blocks = torch.einsum("...rac,...rbd->...abcd", self.A, self.B)
        return blocks.flatten(-2).flatten(-3, -2)

    def apply(self, x: Tensor, scale: float, training: bool, onto: Tensor | None = None) -> Tensor:
        """scale * x dW^T, added to `onto` if that is given."""
        A, B = matched(x, self.A * scale, self.B)
        factors = KroneckerSum(A, B)
        change = factors._multiplied(x) if self._sparing(x) else F.linear(x, factors.dense())
        return change if onto is None else onto + change

    def rows(self, ids: Tensor, scale: float, padding: int | None) -> Tensor:
        """scale * dW^T[ids]; `padding` shares its factors with other rows and is one of them."""
        width = self.B.shape[-1]
        upper = F.embedding(ids // width, self.A.flatten(0, 1).mT) * scale
        lower = F.embedding(ids % width, self.B.flatten(0, 1).mT)
        upper, lower = (half.unflatten(-1, (len(self.A), -1)) for half in (upper, lower))
        return (upper.mT @ lower).flatten(-2)

    def _multiplied(self, x: Tensor) -> Tensor:
        (r, m1, n1), (_, _, n2) = self.A.shape, self.B.shape
        hidden = F.linear(x.unflatten(-1, (n1, n2)).mT, self.A.flatten(0, 1))  # (..., n2, r m1)
        hidden = hidden.unflatten(-1, (r, m1)).movedim(-1, -3).flatten(-2)  # (..., m1, n2 r)
        return F.linear(hidden, self.B.movedim(0, -1).flatten(1)).flatten(-2)

    def _sparing(self, x: Tensor) -> bool:
        """Whether two small products take less time than making dW and one large product."""
        (r, m1, n1), (_, m2, n2) = self.A.shape, self.B.shape
        tokens = x.numel() // (n1 * n2)
        small = tokens * r * m1 * n2 * (n1 + m2)
        return SMALL * small < (tokens + r) * m1 * m2 * n1 * n2

    @classmethod
    def nearest(cls, matrix: Tensor, rank: int, out: tuple[int, int], into: tuple[int, int]) -> (
        "KroneckerSum"
    ):  # fmt: skip
        """The sum of `rank` terms that is nearest to a matrix in the Frobenius norm.

        Args:
            matrix: (m1 m2, n1 n2).
            rank: number of terms r.
            out: (m1, m2).
            into: (n1, n2).

        Source: Van Loan and Pitsianis, "Approximation with Kronecker Products", 1993: the truncated
        SVD of the rearranged matrix, whose row (a, c) is the block of dW that A[a, c] multiplies.
        """
        (m1, m2), (n1, n2) = out, into
        U, S, V = torch.linalg.svd(rearranged(matrix, out, into), full_matrices=False)
        root = S[:rank].sqrt()
        A = (U[:, :rank] * root).mT.reshape(rank, m1, n1)
        return cls(A, (root[:, None] * V[:rank]).reshape(rank, m2, n2))


def rearranged(matrix: Tensor, out: tuple[int, int], into: tuple[int, int]) -> Tensor:
    """R[(a, c), (b, d)] = matrix[(a, b), (c, d)]: a sum of r Kronecker products has rank r here."""
    (m1, m2), (n1, n2) = out, into
    return matrix.reshape(m1, m2, n1, n2).transpose(1, 2).reshape(m1 * n1, m2 * n2)


def near_root(number: int) -> tuple[int, int]:
    """Two factors of a number, as near to its square root as there are, the smaller first."""
    smaller = next(k for k in range(isqrt(number), 0, -1) if number % k == 0)
    return smaller, number // smaller

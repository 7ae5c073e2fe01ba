"""One shard for all groups of inputs: dW is D^T beside D^T beside D^T ..., evaluated in one.

x dW^T is the sum of the groups of r inputs, times D.
"""

from typing import NamedTuple

from torch import Tensor
from torch.nn import functional as F

from deltune.mechanisms.modules import matched


class Shards(NamedTuple):
    """dW (out, in) with dW[o, i] = D[i mod r, o], D (..., r, out); dropout on the input."""

    D: Tensor
    into: int
    dropout: float = 0.0

    def dense(self) -> Tensor:
        """dW, shape (..., out, in)."""
        return self.D.mT.tile(-(-self.into // self.D.shape[-2]))[..., : self.into]

    def apply(self, x: Tensor, scale: float, training: bool, onto: Tensor | None = None) -> Tensor:
        """scale * x dW^T, added to `onto` if that is given."""
        (D,) = matched(x, self.D * scale)
        r = D.shape[-2]
        x = F.dropout(x, self.dropout, training and self.dropout > 0)
        change = F.pad(x, (0, -x.shape[-1] % r)).unflatten(-1, (-1, r)).sum(-2) @ D
        return change if onto is None else onto + change

    def rows(self, ids: Tensor, scale: float, padding: int | None) -> Tensor:
        """scale * dW^T[ids]; `padding` shares its row of D with others and is one of them."""
        return F.embedding(ids % self.D.shape[-2], self.D) * scale

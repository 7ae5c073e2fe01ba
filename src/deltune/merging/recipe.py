"""Recipes: sparsify each change, let the signs agree, sum. Known methods are points of one grid."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from deltune.errors import MergeError

Sparsify = Literal["none", "magnitude", "random", "outliers"]
Consensus = Literal["none", "sum", "count"]
Rescale = Literal["none", "density", "norm"]


@dataclass(frozen=True, slots=True)
class Recipe:
    """How the changes T_i of n deltas at one place, with weights w_i, become one:

        M = factor * sum_i m_i (.) w_i S(T_i)  /  sum_i m_i |w_i|

    the division with `normalise` alone. S leaves some entries and sets the others to 0; m_i is 1
    where w_i S(T_i) has the sign that was elected at an entry, all ones without `consensus`.

    Source: TIES: Yadav et al. 2023, arXiv:2306.01708; DARE: Yu et al. 2023, arXiv:2311.03099;
    breadcrumbs: Davari and Belilovsky 2023, arXiv:2312.06795.
    Differs: every matrix or parameter is sparsified by itself; TIES trims the whole vector. TIES
    has no weights; here they are in force before the election, and the mean over the entries that
    agree is weighted. Breadcrumbs take from a tensor with fewer than 1 / gamma entries none away as
    an outlier.

    Example:
        >>> recipe = Recipe("magnitude", density=0.5, consensus="sum", normalise=True)
        >>> changes = [torch.tensor([4.0, -1.0, 2.0, 0.5]), torch.tensor([2.0, 3.0, -1.0, 0.5])]
        >>> recipe.blend(changes, [1.0, 1.0]).tolist()
        [3.0, 3.0, 2.0, 0.0]
    """

    sparsify: Sparsify = "none"
    """`magnitude` leaves the largest entries, `random` each with probability `density`, `outliers`
    the largest after the share `gamma` of the very largest."""
    density: float = 1.0
    """Share of the entries that stay."""
    gamma: float = 0.0
    """Share of the largest entries that `outliers` takes away."""
    consensus: Consensus = "none"
    """The sign of an entry: that of the `sum`, or that of most (`count`); 0 counts as positive."""
    normalise: bool = False
    """Divide by the weights of those that agree: a mean."""
    rescale: Rescale = "none"
    """After sparsifying: `density` divides by it, so that a random choice is right on average;
    `norm` brings back the sum of absolute values, which is not."""
    factor: float = 1.0
    """On the result."""

    def __post_init__(self) -> None:
        if not 0.0 < self.density <= 1.0:
            raise MergeError(f"`density` must be above 0 and at most 1, got {self.density}")
        if not 0.0 <= self.gamma < 1.0:
            raise MergeError(f"`gamma` must be from 0 to below 1, got {self.gamma}")
        if not math.isfinite(self.factor):
            raise MergeError(f"`factor` must be a finite number, got {self.factor}")

    @property
    def plain(self) -> bool:
        """Whether it is a weighted sum and nothing else."""
        return (self.sparsify, self.consensus, self.normalise) == ("none", "none", False)

    def blend(
        self, changes: Sequence[Tensor], weights: Sequence[float], seed: int = 0, place: str = ""
    ) -> Tensor:
        """One change of several.

        Args:
            changes: all of one shape.
            weights: one for each.
            seed: of `random`; another draw for each change and each place.
            place: the name of the place.
        """
        left = [
            w * self._sparse(change, seed, f"{i} {place}")
            for i, (change, w) in enumerate(zip(changes, weights, strict=True))
        ]
        stack = torch.stack(left)
        sizes = torch.tensor(weights, dtype=stack.dtype, device=stack.device).abs()
        agree = torch.ones_like(stack, dtype=torch.bool)
        if self.consensus != "none":
            votes = stack if self.consensus == "sum" else stack.sign()
            elected = torch.where(votes.sum(0) >= 0, 1.0, -1.0).to(stack.dtype)
            agree = stack.sign() == elected
        total = (stack * agree).sum(0)
        if self.normalise:
            share = (agree * sizes.view(-1, *[1] * (stack.ndim - 1))).sum(0)
            total = total / torch.where(share > 0, share, 1.0)
        return self.factor * total

    def _sparse(self, change: Tensor, seed: int, place: str) -> Tensor:
        flat = change.flatten()
        n = len(flat)
        most = max(1, math.floor(self.density * n + 1e-9))
        if self.sparsify == "none" or not n:
            return change
        keep = torch.zeros_like(flat, dtype=torch.bool)
        if self.sparsify == "random":
            draw = torch.Generator().manual_seed(_seed(seed, place))
            keep = (torch.rand(n, generator=draw, dtype=torch.float64) < self.density).to(
                keep.device
            )
        else:
            above = math.floor(self.gamma * n + 1e-9) if self.sparsify == "outliers" else 0
            keep[flat.abs().topk(min(n, above + most)).indices[above:]] = True
        left = flat * keep
        if self.rescale == "density":
            left = left / self.density
        elif self.rescale == "norm":
            size = left.abs().sum()
            left = left * (flat.abs().sum() / torch.where(size > 0, size, 1.0))
        return left.view(change.shape)


def _seed(seed: int, place: str) -> int:
    digest = hashlib.sha256(f"{seed} {place}".encode()).digest()
    return int.from_bytes(digest[:7])


RECIPES = {
    "linear": Recipe(),
    "magnitude": Recipe("magnitude", density=0.2),
    "ties": Recipe("magnitude", density=0.2, consensus="sum", normalise=True),
    "dare": Recipe("random", density=0.5, rescale="density"),
    "dare_ties": Recipe(
        "random", density=0.5, consensus="sum", normalise=True, rescale="density"
    ),
    "breadcrumbs": Recipe("outliers", density=0.9, gamma=0.01),
    "breadcrumbs_ties": Recipe("outliers", density=0.9, gamma=0.01, consensus="sum",
                               normalise=True),
}  # fmt: skip
"""The points of the grid that have a name."""

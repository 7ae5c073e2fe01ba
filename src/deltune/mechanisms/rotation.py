"""Rotations and reflections of features, applied to a matrix instead of the features.

A linear map of turned inputs x Q is one whose weight W (out, in) has its rows turned: W Q^T. An
embedding's rows are its vectors. So what turns features acts on the last dimension of the weight as
PyTorch stores it: (out, in), or (vocabulary, features) of an embedding. Rotations near the identity
are held as their difference to it, which is exact where they start.
"""

from typing import Any

import torch
from torch import Tensor

from deltune.errors import SpecError
from deltune.sites.site import Site
from deltune.spec import require


def features_last(site: Site, matrix: Tensor) -> Tensor:
    """A matrix (..., out, in) with the features that are turned last: the inputs of a map, the
    outputs of an embedding. Its own inverse."""
    return matrix.mT if site.kind == "embedding" else matrix


def turned_features(site: Site) -> int:
    """How many features there are to turn."""
    return site.shape[-2] if site.kind == "embedding" else site.shape[-1]


def skew(values: Tensor, size: int) -> Tensor:
    """Q = -Q^T (..., size, size) with these values (..., size (size - 1) / 2) above the diagonal,
    row by row."""
    row, column = torch.triu_indices(size, size, 1, device=values.device)
    flat = values.new_zeros(*values.shape[:-1], size * size)
    upper = flat.index_copy(-1, row * size + column, values).unflatten(-1, (size, size))
    return upper - upper.mT


def cayley(Q: Tensor) -> Tensor:
    """(I - Q) (I + Q)^-1 - I for Q = -Q^T: the difference of a rotation to the identity."""
    eye = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)
    return torch.linalg.solve(eye + Q, -2 * Q, left=False)


def neumann(Q: Tensor, terms: int) -> Tensor:
    """2 (Q + Q^2 + ... + Q^(terms - 2)) + Q^(terms - 1): `cayley(-Q)` as a series, whose last power
    is halved."""
    power, total = Q, 2 * Q
    for _ in range(terms - 3):
        power = power @ Q
        total = total + 2 * power
    return total + power @ Q


def blockwise(rows: Tensor, blocks: Tensor) -> Tensor:
    """Rows (..., n b) times the block-diagonal matrix of the blocks (..., n, b, b), or of one block
    (..., 1, b, b) n times."""
    split = rows.unflatten(-1, (-1, blocks.shape[-1])).transpose(-3, -2)
    return (split @ blocks).transpose(-3, -2).flatten(-2)


def check_blocks(spec: Any) -> None:
    """Refuses a method's fields `block` and `blocks` unless one of them is given, and can be."""
    one = (spec.block is None) != (spec.blocks is None)
    require(one, spec, "blocks", "given instead of `block`, which is None then")
    require(spec.block is None or spec.block >= 2, spec, "block", "2 or more")
    require(spec.blocks is None or spec.blocks >= 1, spec, "blocks", "1 or more")


def divided(spec: Any, site: Site) -> tuple[int, int]:
    """The number of blocks at a site and their size, of which a method's fields give one."""
    features = turned_features(site)
    name, given = ("block", spec.block) if spec.blocks is None else ("blocks", spec.blocks)
    if features % given or features == spec.blocks:
        what = f"leaves blocks of one of the {features}" if features == spec.blocks else (
            f"{given} does not divide the {features}"
        )  # fmt: skip
        raise SpecError(
            f"`{spec.kind}({name}={given})`: {what} features at `{site.path}`; use a divisor that "
            "leaves blocks of two or more, or leave the matrix out of `where`"
        )
    count = features // spec.block if spec.blocks is None else spec.blocks
    return count, features // count

"""Matrix product operators: a matrix as a train of small tensors.

W (I, J) with I = i_1 ... i_n and J = j_1 ... j_n is T_1[i_1, j_1] T_2[i_2, j_2] ... T_n[i_n, j_n],
a product of matrices T_k[i, j] (D_{k-1}, D_k) for every pair of indices, D_0 = D_n = 1.
"""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

Factors = tuple[int, ...]
NEGLIGIBLE = 1e-15  # of the largest squared singular value: no smaller one is divided by


def primes(number: int) -> list[int]:
    """The prime factors of a number, largest first."""
    found, divisor = [], 2
    while divisor * divisor <= number:
        while number % divisor == 0:
            found.append(divisor)
            number //= divisor
        divisor += 1
    return sorted([*found, number] if number > 1 else found, reverse=True)


def factors(number: int, count: int, rows: bool) -> Factors:
    """A number as a product of `count` factors near each other, the large ones in the middle.

    The prime factors, largest first, go each to the smallest product so far. Columns have the
    smallest product last and `rows` first, so that the outer tensors of a train stay small. These
    are the shapes that Liu et al. 2021 give: 768 is (3, 4, 4, 4, 4) as rows and (4, 4, 4, 4, 3) as
    columns, 3072 is (4, 4, 8, 6, 4) as columns.
    """
    products = [1] * count
    for prime in primes(number):
        products[products.index(min(products))] *= prime
    middle = count // 2
    outwards = sorted(
        range(count),
        key=lambda place: (abs(place - middle), (place > middle) == (abs(place - middle) % 2 == 0)),
    )
    placed = dict(zip(outwards, sorted(products, reverse=True), strict=True))
    spread = tuple(placed[place] for place in range(count))
    return spread[::-1] if rows else spread


def full_bonds(out: Factors, into: Factors, most: Sequence[int | None]) -> Factors:
    """D_1 ... D_{n-1}: the smaller of what is on the left and on the right, and at most `most`."""
    sizes = [i * j for i, j in zip(out, into, strict=True)]
    bonds = [1]
    for k, limit in enumerate(most, start=1):
        bond = min(bonds[-1] * sizes[k - 1], prod(sizes[k:]))
        bonds.append(bond if limit is None else min(bond, limit))
    return tuple(bonds[1:])


def decompose(matrix: Tensor, out: Factors, into: Factors, bonds: Factors) -> list[Tensor]:
    """The train T_1 ... T_n of a matrix (..., I, J), each (..., D_{k-1}, i_k, j_k, D_k), in double.

    Sequential SVDs, each cut at its bond: with `full_bonds` the train is the matrix, and otherwise
    its squared error is the sum of the squared singular values that were cut off. Each bond's
    spectrum L is shared by both sides: T_k = L_{k-1}^(-1/2) U_k L_k^(1/2).
    """
    batch = matrix.shape[:-2]
    rest = _paired(matrix.detach().double(), out, into)
    gauge = rest.new_ones(*batch, 1)
    train = []
    for i, j, bond in zip(out[:-1], into[:-1], bonds, strict=True):
        left = gauge.shape[-1]
        U, S, rest = _split(rest.reshape(*batch, left * i * j, -1), bond)
        core = (U * S.sqrt()[..., None, :]).reshape(*batch, left, i, j, bond)
        train.append(core / gauge[..., None, None, None])
        gauge = S.sqrt()
    last = rest.reshape(*batch, -1, out[-1], into[-1], 1)
    return [*train, last / gauge[..., None, None, None]]


def _split(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """U, S and S V^T for the largest singular values, from the eigenvectors of the smaller Gram
    matrix: a tenth of the time of an SVD. U times S V^T is exact, tiny values of S are not."""
    wide = matrix.shape[-2] <= matrix.shape[-1]
    squares, vectors = torch.linalg.eigh(matrix @ matrix.mT if wide else matrix.mT @ matrix)
    squares, vectors = squares[..., -rank:].flip(-1), vectors[..., -rank:].flip(-1)
    squares = squares.clamp(min=NEGLIGIBLE * squares[..., :1])
    S = torch.where(squares > 0, squares, 1.0).sqrt()
    if wide:
        return vectors, S, vectors.mT @ matrix
    return matrix @ vectors / S[..., None, :], S, S[..., None] * vectors.mT


def contract(train: Sequence[Tensor]) -> Tensor:
    """The matrix (..., I, J) of a train."""
    count, batch = len(train), train[0].ndim - 4
    whole = train[0].flatten(batch, -2)
    for core in train[1:]:
        whole = (whole @ core.flatten(-3)).unflatten(-1, (-1, core.shape[-1])).flatten(-3, -2)
    pairs = [size for core in train for size in core.shape[-3:-1]]
    full = whole.squeeze(-1).unflatten(-1, pairs)
    order = (*range(batch, full.ndim, 2), *range(batch + 1, full.ndim, 2))
    full = full.permute(*range(batch), *order)
    return full.flatten(batch, batch + count - 1).flatten(batch + 1)


def spectra(train: Sequence[Tensor]) -> list[Tensor]:
    """The singular values at each bond, largest first: those of the matrix of a train with the
    pairs of indices before the bond as rows and those behind it as columns.

    Cutting bonds errs by at most the root of the sum of the squares that are cut off at all of
    them, so the bond to cut first is the one whose smallest values are the smallest.
    """
    out, into = sides(train)
    whole = _paired(contract(train).detach().double(), out, into)
    start, bonds = train[0].ndim - 4, [core.shape[-1] for core in train[:-1]]
    return [
        torch.linalg.svdvals(whole.flatten(start + 2 * k).flatten(start, -2))[..., :bond]
        for k, bond in enumerate(bonds, start=1)
    ]


def squeezed(train: Sequence[Tensor], most: Sequence[int | None]) -> list[Tensor]:
    """A train with bonds of at most `most` and the product nearest to that of `train` but for the
    bound of `spectra`: how a decomposition is made smaller once it was tuned.

    Source: the dimension squeezing of Liu et al. 2021, arXiv:2106.02205.
    """
    out, into = sides(train)
    made = decompose(contract(train), out, into, full_bonds(out, into, most))
    return [core.to(train[0].dtype) for core in made]


def sides(train: Sequence[Tensor]) -> tuple[Factors, Factors]:
    """The factors i_1 ... i_n and j_1 ... j_n of a train."""
    return tuple(core.shape[-3] for core in train), tuple(core.shape[-2] for core in train)


def _paired(matrix: Tensor, out: Factors, into: Factors) -> Tensor:
    """A matrix (..., I, J) with a dimension for each index, in the order i_1 j_1 ... i_n j_n."""
    batch, count = matrix.ndim - 2, len(out)
    pairs = [batch + side * count + k for k in range(count) for side in (0, 1)]
    return matrix.reshape(*matrix.shape[:-2], *out, *into).permute(*range(batch), *pairs)

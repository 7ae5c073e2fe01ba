"""Random linear maps P from a few coordinates to many, each drawn from a seed and known by it.

    Fastfood   P = H G Pi H B / sqrt(D |G|^2)   O(D) memory, O(D log D) time
    Dense      P_ij ~ N(0, 0.01^2)              O(D d) memory and time
    Sparse     sqrt(D) entries in each column   O(d sqrt(D)) memory, O(D) time
    Selection  a 1 in each column               O(d) memory and time

from v (d, the dimension) to P v (D, the size). Draws are made on the CPU at first use, the same on
every device and in every precision, and kept beside the map; copies and pickles carry the seed.
"""

import math
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Map = Callable[[Tensor], Tensor]
RADIX = 32  # of one pass of the Hadamard transform: the fastest of 8 to 256 on a CPU


class Linear(torch.autograd.Function):
    """A linear map of the last dimension with its transpose as derivative; nothing is kept."""

    @staticmethod
    def forward(x: Tensor, there: Map, back: Map) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return there(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.there, ctx.back = inputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return Linear.apply(grads[0], ctx.back, ctx.there), None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        return Linear.apply(tangents[0], ctx.there, ctx.back)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Tensor, int]:
        x, *maps = args
        return Linear.apply(x.movedim(in_dims[0], 0), *maps), 0


class Projection:
    """A random linear map P, size x dimension, drawn from a seed.

    Args:
        size: D, the length of what it makes.
        dimension: d, the length of what it is given.
        seed: the same seed is the same map.

    Example:
        >>> import torch
        >>> v = torch.randn(10)
        >>> torch.equal(Fastfood(100, 10, seed=1).project(v), Fastfood(100, 10, seed=1).project(v))
        True
    """

    def __init__(self, size: int, dimension: int, seed: int) -> None:
        self.size, self.dimension, self.seed = size, dimension, seed
        self._kept: tuple[Tensor, ...] = ()

    def project(self, v: Tensor) -> Tensor:
        """P v, for v (..., dimension)."""
        return Linear.apply(v, self._project, self._adjoint)

    def adjoint(self, y: Tensor) -> Tensor:
        """P^T y, for y (..., size)."""
        return Linear.apply(y, self._adjoint, self._project)

    def drawn(self, device: torch.device) -> tuple[Tensor, ...]:
        """What the map is made of: the diagonal of B, Pi and the diagonal of G over the norm; the
        matrix; the rows and signs of the entries of each column."""
        if not self._kept or self._kept[0].device != device:
            drawn = self._draw(torch.Generator().manual_seed(self.seed))
            self._kept = tuple(tensor.to(device) for tensor in drawn)
        return self._kept

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": ()}

    def _draw(self, generator: torch.Generator) -> tuple[Tensor, ...]:
        raise NotImplementedError

    def _project(self, v: Tensor) -> Tensor:
        raise NotImplementedError

    def _adjoint(self, y: Tensor) -> Tensor:
        raise NotImplementedError


class Fastfood(Projection):
    """P = H G Pi H B / sqrt(D |G|^2), cut to D of the m rows and d of the m columns.

    m is the smallest power of two not below D and d, B holds random signs, Pi permutes, G is
    Gaussian and H the unnormalised Walsh-Hadamard matrix: E |P v|^2 = |v|^2, and every column has
    norm 1 exactly where D = m. With 2^k >= d the first d columns of H repeat every 2^k rows, so
    that the first transform is one of length 2^k, and Pi is known by its places modulo 2^k.

    Source: Le, Sarlos and Smola, "Fastfood: Approximate Kernel Expansions in Loglinear Time",
    2014, arXiv:1408.3060; the norm as in the code of Aghajanyan et al. 2021, arXiv:2012.13255.
    Differs: m is not below d either; padding to D alone would cut v where it is longer.
    """

    @property
    def padded(self) -> int:
        """m."""
        return _power(max(self.size, self.dimension))

    def _draw(self, generator: torch.Generator) -> tuple[Tensor, ...]:
        signs = 2 * torch.randint(2, (self.dimension,), generator=generator) - 1
        places = torch.randperm(self.padded, generator=generator) % _power(self.dimension)
        gauss = torch.randn(self.padded, generator=generator)
        norm = math.sqrt(self.size * float(gauss.double().square().sum()))
        return signs.to(torch.int8), places.int(), gauss / norm, sylvester(RADIX)

    def through(self, v: Tensor, diagonal: Tensor) -> Tensor:
        """P v with another diagonal in place of G / sqrt(D |G|^2); gradients reach both."""
        turn = partial(hadamard, block=self.drawn(v.device)[-1])
        return self._passed(v, diagonal, lambda x: Linear.apply(x, turn, turn))  # H = H^T

    def _project(self, v: Tensor) -> Tensor:
        _, _, gauss, block = self.drawn(v.device)
        return self._passed(v, gauss.to(v.dtype), partial(hadamard, block=block))

    def _passed(self, v: Tensor, diagonal: Tensor, turn: Map) -> Tensor:
        signs, places, _, _ = self.drawn(v.device)
        short = F.pad(v * signs, (0, _power(self.dimension) - self.dimension))
        mixed = turn(short).index_select(-1, places)
        return turn(mixed * diagonal)[..., : self.size]

    def _adjoint(self, y: Tensor) -> Tensor:
        signs, places, gauss, block = self.drawn(y.device)
        mixed = hadamard(F.pad(y, (0, self.padded - self.size)), block) * gauss.to(y.dtype)
        short = y.new_zeros(*y.shape[:-1], _power(self.dimension)).index_add_(-1, places, mixed)
        return hadamard(short, block)[..., : self.dimension] * signs


class Dense(Projection):
    """P_ij ~ N(0, 0.01^2), not normalised: E |P v|^2 = D 0.01^2 |v|^2.

    Source: the alternative in the code of Aghajanyan et al. 2021, arXiv:2012.13255.
    """

    def _draw(self, generator: torch.Generator) -> tuple[Tensor, ...]:
        return (torch.randn(self.size, self.dimension, generator=generator) * 0.01,)

    def _project(self, v: Tensor) -> Tensor:
        return F.linear(v, self.drawn(v.device)[0].to(v.dtype))

    def _adjoint(self, y: Tensor) -> Tensor:
        return y @ self.drawn(y.device)[0].to(y.dtype)


class Sparse(Projection):
    """k = sqrt(D), rounded up, entries +-1 / sqrt(k) in each column: E |P v|^2 = |v|^2.

    Source: Li, Hastie and Church, "Very Sparse Random Projections", 2006, as used by Li et al.,
    "Measuring the Intrinsic Dimension of Objective Landscapes", 2018, arXiv:1804.08838.
    Differs: k entries in every column, at rows drawn with replacement, instead of entries drawn
    one by one with probability 1 / sqrt(D), so that every coordinate acts.
    """

    def _draw(self, generator: torch.Generator) -> tuple[Tensor, ...]:
        each = math.isqrt(self.size - 1) + 1
        rows = torch.randint(self.size, (self.dimension, each), generator=generator).int()
        signs = 2 * torch.randint(2, rows.shape, generator=generator) - 1
        return rows, signs.to(torch.int8)

    def _project(self, v: Tensor) -> Tensor:
        rows, signs = self.drawn(v.device)
        values = v[..., None] * signs / math.sqrt(rows.shape[-1])
        whole = v.new_zeros(*v.shape[:-1], self.size)
        return whole.index_add_(-1, rows.flatten(), values.flatten(-2))

    def _adjoint(self, y: Tensor) -> Tensor:
        rows, signs = self.drawn(y.device)
        values = y.index_select(-1, rows.flatten()).unflatten(-1, rows.shape)
        return (values * signs).sum(-1) / math.sqrt(rows.shape[-1])


class Selection(Projection):
    """The coordinates at the first d of D places in a random order, and zero elsewhere."""

    def _draw(self, generator: torch.Generator) -> tuple[Tensor, ...]:
        return (_first(self.size, self.dimension, generator.initial_seed()),)

    def _project(self, v: Tensor) -> Tensor:
        (places,) = self.drawn(v.device)
        return v.new_zeros(*v.shape[:-1], self.size).index_copy_(-1, places, v)

    def _adjoint(self, y: Tensor) -> Tensor:
        (places,) = self.drawn(y.device)
        return y.index_select(-1, places)


@lru_cache(maxsize=8)
def _first(size: int, count: int, seed: int) -> Tensor:
    """The first numbers of a random order, once for all matrices of a size."""
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    return order[:count].clone()


PROJECTIONS = {"fastfood": Fastfood, "dense": Dense, "sparse": Sparse}


def _power(number: int) -> int:
    """The smallest power of two that is not below."""
    return 1 << (number - 1).bit_length()


def sylvester(order: int) -> Tensor:
    """The Hadamard matrix of an order that is a power of two: H_2n = [[H, H], [H, -H]]."""
    matrix = torch.ones(1, 1)
    while len(matrix) < order:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), matrix)
    return matrix


def hadamard(x: Tensor, block: Tensor) -> Tensor:
    """H x along the last dimension, a power of two: the unnormalised Walsh-Hadamard transform.

    H is the Kronecker product of small ones. Each pass multiplies the first factor that is left
    and moves it behind the others, so that in the end all are in their places again.

    Args:
        x: (..., 2^m).
        block: `sylvester` of the largest factor.
    """
    left = x.shape[-1]
    while left > 1:
        k = min(left, len(block))
        factor = block[:k, :k].to(x.dtype)
        x = (x.unflatten(-1, (k, -1)).mT @ factor).flatten(-2)
        left //= k
    return x

"""What a subspace is made of: decoders from codes to differences, and encoders back."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import linear

from deltune.mechanisms.projections import Dense, Fastfood, Projection

RANDOM: dict[str, type[Projection]] = {"dense": Dense, "fastfood": Fastfood}
"""Maps that are drawn and stay as they are."""


class Up(Protocol):
    """A decoder of one method, from codes (..., d) to differences (..., n_t)."""

    linear: ClassVar[bool]

    @property
    def size(self) -> int:
        """n_t."""
        ...

    @property
    def dimension(self) -> int:
        """d."""
        ...

    def project(self, v: Tensor) -> Tensor:
        """The difference of a code."""
        ...


@dataclass(frozen=True)
class Matrix:
    """U v, with the matrix U (n_t, d) kept.

    Args:
        weight: U.
    """

    linear: ClassVar[bool] = True
    weight: Tensor

    @property
    def size(self) -> int:
        """n_t."""
        return self.weight.shape[0]

    @property
    def dimension(self) -> int:
        """d."""
        return self.weight.shape[1]

    def project(self, v: Tensor) -> Tensor:
        """U v."""
        return linear(v, self.weight)


@dataclass(frozen=True)
class Random:
    """A random map times a number, known by its seed.

    Args:
        kind: `dense` or `fastfood`.
        size: n_t.
        dimension: d.
        seed: of the draw.
        factor: the number.
    """

    linear: ClassVar[bool] = True
    kind: str
    size: int
    dimension: int
    seed: int
    factor: float = 1.0

    @cached_property
    def inner(self) -> Projection:
        """The map as it was drawn."""
        return RANDOM[self.kind](self.size, self.dimension, self.seed)

    def project(self, v: Tensor) -> Tensor:
        """factor P v."""
        return self.factor * self.inner.project(v)


@dataclass(frozen=True)
class Diagonal:
    """Fastfood whose Gaussian diagonal is learned: as many numbers as a vector has, whatever d is.

        P v = H G Pi H B v / sqrt(D m)

    with the signs B and the permutation Pi of a draw, D = n_t, and m the power of two above it; or
    such a map P_i for each tensor i of the vector, of its own size D_i, one below the other.

    Source: the connection of fine-tuning with delta tuning in the released code of Yi et al.,
    "Different Tunes Played with Equal Skill", 2022, arXiv:2210.13311, which has a map for each
    weight.

    Args:
        size: n_t.
        dimension: d.
        seed: of the draw of B and Pi.
        gauss: the diagonal of G (m), drawn with a mean square of one; of all tensors in a row.
        sizes: of the tensors; none where one map makes the whole vector.
    """

    linear: ClassVar[bool] = True
    size: int
    dimension: int
    seed: int
    gauss: Tensor
    sizes: Sequence[int] = ()

    @classmethod
    def begin(cls, size: int, dimension: int, seed: int, sizes: Sequence[int] = ()) -> "Diagonal":
        """The map with G as Fastfood draws it: it is Fastfood then."""
        empty = cls(size, dimension, seed, torch.empty(0), sizes)
        drawn = [one.drawn(torch.device("cpu"))[2] / _unit(one) for one in empty.inner]
        return replace(empty, gauss=torch.cat(drawn))

    @cached_property
    def inner(self) -> tuple[Fastfood, ...]:
        """Fastfood as it was drawn, of each tensor."""
        return tuple(
            Fastfood(size, self.dimension, self.seed + 7919 * place)
            for place, size in enumerate(self.sizes or (self.size,))
        )

    def project(self, v: Tensor) -> Tensor:
        """P v; gradients reach v and G."""
        diagonals = self.gauss.split([one.padded for one in self.inner])
        pieces = zip(self.inner, diagonals, strict=True)
        return torch.cat([one.through(v, gauss * _unit(one)) for one, gauss in pieces], dim=-1)


def _unit(map_: Fastfood) -> float:
    """1 / sqrt(D m): what a diagonal with a mean square of one is multiplied with."""
    return 1 / math.sqrt(map_.size * map_.padded)


@dataclass(frozen=True)
class Curved:
    """W3 tanh(W2 v + b2) + b3, a decoder with one hidden layer of width h.

    Source: Qin et al., "Exploring Universal Intrinsic Task Subspace via Prompt Tuning", 2021,
    arXiv:2110.07867, with the released code.
    Differs: it is added to the prompt as it was before training, which b3 may take back.

    Args:
        w2: W2 (h, d).
        b2: b2 (h).
        w3: W3 (n_t, h).
        b3: b3 (n_t).
    """

    linear: ClassVar[bool] = False
    w2: Tensor
    b2: Tensor
    w3: Tensor
    b3: Tensor

    @property
    def size(self) -> int:
        """n_t."""
        return self.w3.shape[0]

    @property
    def dimension(self) -> int:
        """d."""
        return self.w2.shape[1]

    def project(self, v: Tensor) -> Tensor:
        """The difference of a code."""
        return linear(linear(v, self.w2, self.b2).tanh(), self.w3, self.b3)


@dataclass(frozen=True)
class Encoder:
    """A learned map from differences D (..., n_t) to codes (..., d):

        W2 tanh(W1 D + b1) + b2,    or W1 D + b1 where there is no second layer

    Args:
        w1: W1 (d, n_t).
        b1: b1 (d).
        w2: W2 (d, d), or None.
        b2: b2 (d), or None.
    """

    w1: Tensor
    b1: Tensor
    w2: Tensor | None = None
    b2: Tensor | None = None

    def __call__(self, difference: Tensor) -> Tensor:
        """The code of a difference."""
        hidden = linear(difference, self.w1, self.b1)
        return hidden if self.w2 is None else linear(hidden.tanh(), self.w2, self.b2)


MAPS: dict[str, type[Any]] = {
    kind.__name__.lower(): kind for kind in (Matrix, Random, Diagonal, Curved, Encoder)
}
Made = TypeVar("Made")


def taken_apart(made: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a map, and the rest of what it is, for a file."""
    every = {field.name: getattr(made, field.name) for field in fields(made)}
    tensors = {name: value for name, value in every.items() if isinstance(value, Tensor)}
    rest = {n: v for n, v in every.items() if n not in tensors and v is not None}
    return tensors, {"map": type(made).__name__.lower(), **rest}


def put_together(tensors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> Any:
    """The map that was taken apart; KeyError or TypeError if it was not one."""
    said = dict(rest)
    return MAPS[said.pop("map")](**tensors, **said)


def moved(made: Made, device: torch.device) -> Made:
    """The map with its tensors on a device."""
    return _each(made, lambda tensor: tensor.to(device))


def detached(made: Made) -> Made:
    """The map without the graph that its tensors stand in."""
    return _each(made, Tensor.detach)


def _each(made: Any, change: Callable[[Tensor], Tensor]) -> Any:
    tensors, _ = taken_apart(made)
    return replace(made, **{name: change(tensor) for name, tensor in tensors.items()})

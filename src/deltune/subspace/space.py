"""A subspace: one code, which every method decodes with its own map."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from deltune.errors import SubspaceError, closest, listing
from deltune.subspace.solutions import Solutions

if TYPE_CHECKING:
    from deltune.delta import Delta


class Up(Protocol):
    """A linear map U_t from codes (..., d) to differences (..., n_t)."""

    @property
    def size(self) -> int:
        """n_t."""
        ...

    @property
    def dimension(self) -> int:
        """d."""
        ...

    def project(self, v: Tensor) -> Tensor:
        """U_t v."""
        ...

    def adjoint(self, y: Tensor) -> Tensor:
        """U_t^T y."""
        ...


@dataclass(frozen=True)
class Matrix:
    """A map that is kept as its matrix (n_t, d)."""

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
        """U_t v, for v (..., d)."""
        return v @ self.weight.T

    def adjoint(self, y: Tensor) -> Tensor:
        """U_t^T y, for y (..., n_t)."""
        return y @ self.weight


@dataclass(frozen=True)
class Encoder:
    """A learned map W2 g(W1 D + b1) + b2 from differences (..., n_t) to codes (..., d).

    Args:
        w1: W1 (d, n_t).
        b1: b1 (d).
        w2: W2 (d, d).
        b2: b2 (d).
        activation: g: `tanh`, or `none`.
    """

    w1: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor
    activation: str

    def __call__(self, difference: Tensor) -> Tensor:
        """The code of a difference."""
        hidden = linear(difference, self.w1, self.b1)
        return linear(hidden.tanh() if self.activation == "tanh" else hidden, self.w2, self.b2)


@dataclass(frozen=True)
class Subspace:
    """Codes I (d) that every method t decodes:

        Proj_up_t(I) = theta_t^init + U_t I

    and encodes, by least squares where no encoder was learned:

        Proj_down_t(Delta theta) = (U_t^T U_t)^-1 U_t^T Delta theta

    Source: Yi et al., "Different Tunes Played with Equal Skill", 2022, arXiv:2210.13311; the linear
    decoder without bias is that of its released code.

    Args:
        ups: method -> U_t.
        starts: method -> theta_t^init (n_t).
        codes: method -> codes of the tasks that the space was found with (tasks, d).
        tasks: the names of these tasks.
        about: how it was found.
        downs: method -> Proj_down_t, where encoders were learned.
        deltas: method -> folder of the delta as it was before training: see `attach`.
    """

    ups: Mapping[str, Up]
    starts: Mapping[str, Tensor]
    codes: Mapping[str, Tensor]
    tasks: tuple[str, ...]
    about: Mapping[str, Any] = field(default_factory=dict)
    downs: Mapping[str, "Encoder"] = field(default_factory=dict)
    deltas: Mapping[str, Path] = field(default_factory=dict)

    @property
    def dimension(self) -> int:
        """d."""
        return next(iter(self.ups.values())).dimension

    @property
    def methods(self) -> tuple[str, ...]:
        """The names of the methods."""
        return tuple(self.ups)

    def to(self, device: torch.device) -> "Subspace":
        """The space with what decodes on a device."""
        ups: dict[str, Up] = {
            name: Matrix(up.weight.to(device)) if isinstance(up, Matrix) else up
            for name, up in self.ups.items()
        }
        starts = {name: start.to(device) for name, start in self.starts.items()}
        return replace(self, ups=ups, starts=starts)

    def decode(self, method: str, code: Tensor) -> Tensor:
        """The vector (..., n_t) of a method at a code (..., d); gradients reach the code.

        Raises:
            SubspaceError: an unknown method, or a code of another length.
        """
        up = self._up(method)
        _fits(code, self.dimension, "code", "the space")
        return self.starts[method].to(code.dtype) + up.project(code)

    def encode(self, method: str, difference: Tensor) -> Tensor:
        """The code (..., d) of a difference (..., n_t): by the encoder if one was learned, and
        otherwise the one whose decoding is nearest.

        Raises:
            SubspaceError: an unknown method, or a difference of another length.
        """
        up = self._up(method)
        _fits(difference, up.size, "difference", f"`{method}`")
        if method in self.downs:
            return self.downs[method](difference)
        gram = self._grams[method].to(difference.dtype)
        return torch.linalg.solve(gram, up.adjoint(difference).unsqueeze(-1)).squeeze(-1)

    def reconstruction(self, solutions: Solutions) -> dict[str, Tensor]:
        """method -> || D - U_t Proj_down_t(D) || / || D || of the difference D of each task."""
        found = {}
        for method, rows in solutions.each():
            again = self._up(method).project(self.encode(method, rows))
            found[method] = (rows - again).norm(dim=1) / rows.norm(dim=1)
        return found

    def attach(self, model: nn.Module, method: str) -> "Delta":
        """Attaches a method's delta as it was before training; `load_vector(space.decode(...))`
        makes of it what a code means.

        Raises:
            SubspaceError: an unknown method, or a space of solutions that were not saved as deltas.
            StoreError: the model is not the backbone of the space.
        """
        from deltune.attaching import load

        self._up(method)
        if method not in self.deltas:
            raise SubspaceError(
                f"the space does not know the delta of `{method}`, only its vectors; find it from "
                "saved deltas: `Solutions.saved`"
            )
        return load(self.deltas[method], model, name=method)

    @cached_property
    def _grams(self) -> dict[str, Tensor]:
        eye = torch.eye(self.dimension, dtype=torch.float64)
        found = {}
        for name, up in self.ups.items():
            columns = up.project(eye.to(self.starts[name].dtype)).double()
            found[name] = columns @ columns.T
        return found

    def _up(self, method: str) -> Up:
        if method not in self.ups:
            raise SubspaceError(
                f"the space knows no method `{method}`{closest(method, self.ups)}; it knows "
                f"{listing(self.ups)}"
            )
        return self.ups[method]


def _fits(given: Tensor, size: int, what: str, whose: str) -> None:
    if given.shape[-1] != size:
        raise SubspaceError(
            f"the {what} has {given.shape[-1]} numbers and {whose} {size}; give one of this space"
        )

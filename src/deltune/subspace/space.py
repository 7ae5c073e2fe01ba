"""A subspace: one code, which every method decodes with its own map."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from deltune.errors import SubspaceError, closest, listing
from deltune.subspace.maps import Encoder, Up, moved, taken_apart
from deltune.subspace.solutions import Solutions

if TYPE_CHECKING:
    from deltune.delta import Delta


@dataclass(frozen=True)
class Subspace:
    """Codes I (d) that every method t decodes:

        Proj_up_t(I) = theta_t^init + U_t I

    and encodes, by least squares where no encoder was learned:

        Proj_down_t(Delta theta) = (U_t^T U_t)^-1 U_t^T Delta theta

    A decoder need not be linear: then U_t I stands for what it makes of the code, and an encoder
    was learned with it.

    Source: Yi et al., "Different Tunes Played with Equal Skill", 2022, arXiv:2210.13311; the linear
    decoder without bias is that of its released code.

    Args:
        ups: method -> U_t, or another decoder.
        starts: method -> theta_t^init (n_t).
        codes: method -> codes of the tasks that the space was found with (tasks, d); none of a
            method that only decodes the codes of others.
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
    downs: Mapping[str, Encoder] = field(default_factory=dict)
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
        ups = {name: moved(up, device) for name, up in self.ups.items()}
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
            SubspaceError: an unknown method, a difference of another length, or a decoder that is
                not linear and has no encoder.
        """
        up = self._up(method)
        _fits(difference, up.size, "difference", f"`{method}`")
        if method in self.downs:
            return self.downs[method](difference)
        if not up.linear:
            raise SubspaceError(
                f"the decoder of `{method}` is not linear and the space has no encoder of it; "
                "learn the space from its solutions, or train the code"
            )
        gram = self._grams[method].to(difference.dtype)
        return torch.linalg.solve(gram, _adjoint(up, difference).unsqueeze(-1)).squeeze(-1)

    def reconstruction(self, solutions: Solutions) -> dict[str, Tensor]:
        """method -> || D - U_t Proj_down_t(D) || / || D || of the difference D of each task."""

        def left(method: str, rows: Tensor) -> Tensor:
            again = self._up(method).project(self.encode(method, rows))
            return (rows - again).norm(dim=1) / rows.norm(dim=1)

        return solutions.rowwise(left)

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

    def digest(self, *methods: str) -> str:
        """The same of two spaces in which these methods, all if none is named, decode alike."""
        found = hashlib.blake2b(digest_size=16)
        for name in methods or self.methods:
            tensors, said = taken_apart(self._up(name))
            found.update(repr((name, said)).encode())
            for tensor in (self.starts[name], *tensors.values()):
                found.update(tensor.detach().cpu().contiguous().view(-1).numpy().tobytes())
        return found.hexdigest()

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


def _adjoint(up: Up, y: Tensor) -> Tensor:
    """U^T y, the derivative of the linear map U; gradients reach y."""
    graph = torch.is_grad_enabled() and y.requires_grad
    with torch.enable_grad():
        v = y.new_zeros(*y.shape[:-1], up.dimension, requires_grad=True)
        (back,) = torch.autograd.grad(up.project(v), v, y, create_graph=graph)
    return back


def _fits(given: Tensor, size: int, what: str, whose: str) -> None:
    if given.shape[-1] != size:
        raise SubspaceError(
            f"the {what} has {given.shape[-1]} numbers and {whose} {size}; give one of this space"
        )

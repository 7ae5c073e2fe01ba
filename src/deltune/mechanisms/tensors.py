"""Declaring a method's tensors: shape and initialisation."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Init = Callable[[Tensor, torch.Generator | None], object]


class Param(NamedTuple):
    """A tensor that a method owns at a site: its shape and how it starts.

    One that is not `trained` (indices, packed bits, the state of a schedule) is kept and saved with
    the delta, and is no part of its vector.
    """

    shape: tuple[int, ...]
    init: Init
    trained: bool = True
    dtype: torch.dtype | None = None
    """Instead of the backbone's (float32 where that is narrower)."""

    def build(
        self, device: torch.device, dtype: torch.dtype, generator: torch.Generator | None
    ) -> Tensor:
        """The initialised tensor (left empty on the meta device); call it without gradients."""
        tensor = torch.empty(self.shape, device=device, dtype=dtype)
        if device.type != "meta":
            self.init(tensor, generator)
        return tensor


def zeros(tensor: Tensor, generator: torch.Generator | None) -> None:
    """All zeros."""
    tensor.zero_()


def ones(tensor: Tensor, generator: torch.Generator | None) -> None:
    """All ones."""
    tensor.fill_(1.0)


def constant(value: float) -> Init:
    """`value` everywhere."""
    return lambda tensor, generator: tensor.fill_(value)


def normal(std: float) -> Init:
    """N(0, std^2)."""
    return lambda tensor, generator: tensor.normal_(0.0, std, generator=generator)


def uniform(low: float, high: float) -> Init:
    """U(low, high)."""
    return lambda tensor, generator: tensor.uniform_(low, high, generator=generator)


def truncated(std: float) -> Init:
    """N(0, std^2) cut at two standard deviations."""
    return lambda tensor, generator: torch.nn.init.trunc_normal_(
        tensor, 0.0, std, -2 * std, 2 * std, generator=generator
    )


def kaiming(tensor: Tensor, generator: torch.Generator | None) -> None:
    """U(-1/sqrt(in), 1/sqrt(in)) over the last dimension: PyTorch's default for a linear map,
    Kaiming-uniform with a = sqrt(5)."""
    fan_in_uniform(tensor.shape[-1])(tensor, generator)


def orthonormal(tensor: Tensor, generator: torch.Generator | None) -> None:
    """Rows, or columns where they are fewer, that are orthonormal, at random."""
    torch.nn.init.orthogonal_(tensor, generator=generator)


def glorot(gain: float = 1.0) -> Init:
    """U(-a, a) with a = gain sqrt(6 / (rows + columns)), for the last two dimensions."""

    def start(tensor: Tensor, generator: torch.Generator | None) -> object:
        bound = gain * math.sqrt(6 / sum(tensor.shape[-2:]))
        return tensor.uniform_(-bound, bound, generator=generator)

    return start


def fan_in_uniform(fan_in: int) -> Init:
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)), for the bias of a linear map with `fan_in` inputs."""
    bound = 1 / math.sqrt(fan_in)
    return uniform(-bound, bound)


def copy_of(value: Tensor) -> Init:
    """A copy of `value`."""
    return lambda tensor, generator: tensor.copy_(value)


def wide(tensor: Tensor) -> Tensor:
    """The tensor in float32 where it is narrower, as Fourier transforms want it."""
    return tensor.float() if tensor.dtype.itemsize < 4 else tensor

"""Nonlinearities of bottlenecks."""

from collections.abc import Callable, Mapping
from typing import Literal

from torch import Tensor
from torch.nn import functional as F

Activation = Literal["gelu", "gelu_exact", "relu", "silu", "tanh"]
ACTIVATIONS: Mapping[Activation, Callable[[Tensor], Tensor]] = {
    "gelu": lambda x: F.gelu(x, approximate="tanh"), "gelu_exact": F.gelu, "relu": F.relu,
    "silu": F.silu, "tanh": F.tanh,
}  # fmt: skip
"""`gelu` is the tanh approximation of `gelu_exact`."""

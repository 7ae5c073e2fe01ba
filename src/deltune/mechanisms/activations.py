"""Nonlinearities, by their names in specs."""

from collections.abc import Callable
from functools import partial
from typing import Literal

from torch import Tensor
from torch.nn import functional as F

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": partial(F.gelu, approximate="tanh"),
    "gelu_exact": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
    "tanh": F.tanh,
}
Activation = Literal["gelu", "gelu_exact", "relu", "silu", "tanh"]

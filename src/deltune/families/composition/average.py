"""Average: the mean of what several deltas do, not of their tensors."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from deltune.mechanisms.mix import Mix, MixUnit
from deltune.spec import register, require


@register
@dataclass(frozen=True)
class Average(Mix):
    """The mean of the effects of several deltas.

        W + sum_i w_i dW_i              for changes of weights and other parameters
        h <- h + sum_i w_i f_i(h)       for functions of hidden states, which all read the same h

    with the weights w_i, 1/n each if none are given. Factors are not averaged: of two LoRAs it is
    (B_1 A_1 + B_2 A_2) / 2 and not the product of the mean A and the mean B. The w_i need not sum
    to 1: `average(a, b, weights=(1.0, -1.0))` is their difference, `average(a, weights=(0.5,))` is
    a by half.

    Merges where its parts merge. What cannot be scaled (prefixes, prompts) has no mean and is
    refused, as is a task head, of which there is one.

    Example:
        >>> import deltune as dt
        >>> str(dt.parse("average(lora(rank=2), lora(rank=4), weights=(0.3, 0.7))"))
        'average(lora(rank=2), lora(rank=4), weights=(0.3, 0.7))'
    """

    kind: ClassVar[str] = "average"
    summed: ClassVar[bool] = True

    weights: tuple[float, ...] | None = None
    """w_i; None for 1/n each."""

    def __post_init__(self) -> None:
        super().__post_init__()
        n = len(self.parts)
        given = self.weights is None or len(self.weights) == n
        require(given, self, "weights", f"one for each of the {n} parts")

    @property
    def factors(self) -> tuple[float, ...]:
        return self.weights or (1.0 / len(self.parts),) * len(self.parts)

    def mix(
        self, t: MixUnit, module: nn.Module, h: Tensor, changes: Sequence[Tensor | None]
    ) -> Tensor:
        found = zip(self.factors, changes, strict=True)
        return torch.stack([w * z for w, z in found if z is not None]).sum(0)

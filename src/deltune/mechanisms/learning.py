"""What methods may ask of training: losses to look at, and rates of their own."""

from collections.abc import Iterator
from typing import NamedTuple, Protocol

from torch import Tensor


class Losses(Protocol):
    """Gives losses of training examples, for methods that look at them before the first step."""

    def __call__(
        self, most: int, size: int | None = None, training: bool = True
    ) -> Iterator[Tensor]:
        """Mean losses with their graphs, until `most` examples were seen.

        Args:
            most: number of examples, at most.
            size: examples to a loss; None for those of a batch as training uses it.
            training: whether the model is in train mode (dropout on).
        """
        ...


class Rate(NamedTuple):
    """How a tensor is stepped: its factor on the learning rate, and whether weights decay."""

    factor: float = 1.0
    decayed: bool = True

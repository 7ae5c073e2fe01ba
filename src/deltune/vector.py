"""A delta as one vector: ordered names, shapes and offsets."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from deltune.errors import AttachError


@dataclass(frozen=True, slots=True)
class Slot:
    """One tensor's place in the vector: `vector[offset : offset + size].view(shape)`."""

    name: str
    shape: tuple[int, ...]
    offset: int

    @property
    def size(self) -> int:
        """Number of scalars."""
        return prod(self.shape)


@dataclass(frozen=True, slots=True)
class Layout:
    """The trainable tensors of a delta, in their order in the model, as slots of one vector."""

    slots: tuple[Slot, ...]

    @classmethod
    def of(cls, shapes: Mapping[str, tuple[int, ...]]) -> "Layout":
        """The layout of tensors of these shapes, in this order."""
        slots, offset = [], 0
        for name, shape in shapes.items():
            slots.append(Slot(name, tuple(shape), offset))
            offset += slots[-1].size
        return cls(tuple(slots))

    @property
    def size(self) -> int:
        """Length of the vector."""
        return self.slots[-1].offset + self.slots[-1].size if self.slots else 0

    def __iter__(self) -> Iterator[Slot]:
        return iter(self.slots)

    def __len__(self) -> int:
        return len(self.slots)

    def join(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Concatenates the flattened tensors in layout order (a copy)."""
        pieces = [tensors[slot.name].reshape(-1) for slot in self.slots]
        return torch.cat(pieces) if pieces else torch.empty(0)

    def split(self, vector: Tensor) -> dict[str, Tensor]:
        """Views of the vector, by name; gradients flow to the vector.

        Raises:
            AttachError: the vector has another length or more than one dimension.
        """
        if vector.ndim != 1 or vector.numel() != self.size:
            raise AttachError(
                f"the vector has shape {tuple(vector.shape)}, this delta's layout takes "
                f"({self.size},); use a vector of a delta with the same spec on the same model"
            )
        return {s.name: vector[s.offset : s.offset + s.size].view(s.shape) for s in self.slots}


def sharded(tensor: Tensor) -> bool:
    """Whether a tensor lies in pieces in several processes (a `DTensor`, as FSDP2 makes them)."""
    return hasattr(tensor, "full_tensor")


def gathered(tensor: Tensor) -> Tensor:
    """The whole tensor, without a gradient. Of one in pieces every process must ask for it."""
    whole: Any = tensor.detach()
    return whole.full_tensor() if sharded(whole) else whole


def write(onto: Tensor, values: Tensor) -> None:
    """Copies whole values into a tensor; where it is in pieces, each process its own."""
    like: Any = onto
    if sharded(like):
        from torch.distributed.tensor import distribute_tensor

        # Each process has the values: no one has to send them.
        values = distribute_tensor(
            values.to(like.device), like.device_mesh, like.placements, src_data_rank=None
        )
    with torch.no_grad():
        onto.copy_(values)

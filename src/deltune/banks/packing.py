"""The tensors of a delta in a few flat buffers, so that one copy puts a delta in its place."""

from collections.abc import Mapping
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

Group = tuple[torch.device, torch.dtype]
Flats = dict[Group, Tensor]
ALIGNED = 64  # bytes to which each tensor's start is rounded, as matrix products like it


class Place(NamedTuple):
    """Where a tensor lies: in the buffer of a device and type, from an element on."""

    group: Group
    offset: int
    shape: tuple[int, ...]


class Packing:
    """Where every tensor of a delta lies in one flat buffer for each device and type.

    Args:
        like: tensors by name, of which shape, device and type are read.
    """

    def __init__(self, like: Mapping[str, Tensor]) -> None:
        self.places: dict[str, Place] = {}
        self.sizes: dict[Group, int] = {}
        for name, tensor in like.items():
            group = tensor.device, tensor.dtype
            offset, step = self.sizes.get(group, 0), ALIGNED // tensor.dtype.itemsize
            self.places[name] = Place(group, offset, tuple(tensor.shape))
            self.sizes[group] = offset + -(-prod(tensor.shape) // step) * step

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers."""
        return sum(size * dtype.itemsize for (_, dtype), size in self.sizes.items())

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor."""
        return {name: place.shape for name, place in self.places.items()}

    def buffers(self, device: torch.device | None = None) -> Flats:
        """Buffers of zeros, each on its device or all on this one."""
        return {
            (own, dtype): torch.zeros(size, dtype=dtype, device=device or own)
            for (own, dtype), size in self.sizes.items()
        }

    def views(self, flats: Flats) -> dict[str, Tensor]:
        """The tensors in these buffers, by name."""
        return {
            name: flats[group][offset : offset + prod(shape)].view(shape)
            for name, (group, offset, shape) in self.places.items()
        }

    def pack(self, tensors: Mapping[str, Tensor]) -> Flats:
        """A copy of these tensors in buffers in the memory of the processor."""
        flats = self.buffers(torch.device("cpu"))
        for name, view in self.views(flats).items():
            view.copy_(tensors[name].detach())
        return flats

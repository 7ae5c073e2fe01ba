"""Piles: parameters of one shape, of several deltas, as one tensor with one gradient.

While deltas are trained at once their factors at a place would be stacked in every forward pass,
and the gradient of the stack taken apart in every backward pass. In a pile the parameters lie in
one memory, each a row of it, and what is read is the whole.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Piles:
    """The piles of some deltas, made as they are asked for."""

    def __init__(self) -> None:
        self._wholes: dict[tuple[int, ...], Tensor] = {}
        self._parts: dict[int, nn.Parameter] = {}

    def whole(self, tensors: Sequence[Tensor]) -> Tensor | None:
        """(tensors, ...): a leaf whose gradient becomes that of the parameters in it. None where
        they are no parameters in training, of several shapes, or in another pile too."""
        key = tuple(map(id, tensors))
        if key not in self._wholes:
            parts = [t for t in tensors if isinstance(t, nn.Parameter) and t.requires_grad]
            kinds = {(part.shape, part.dtype, part.device) for part in parts}
            new = len(parts) == len(set(key) - self._parts.keys()) == len(key)
            if not new or len(kinds) > 1:
                return None
            self._wholes[key] = _piled(parts)
            self._parts |= zip(key, parts, strict=True)
        return self._wholes[key]

    def end(self) -> None:
        """Gives each parameter memory of its own again."""
        for part in self._parts.values():
            part.data = part.data.clone()
        self._wholes, self._parts = {}, {}


def _piled(parts: Sequence[nn.Parameter]) -> Tensor:
    whole = torch.stack([part.data for part in parts])
    for part, row in zip(parts, whole.unbind(), strict=True):
        part.data = row

    def spread(whole: Tensor) -> None:
        assert whole.grad is not None
        for part, row in zip(parts, whole.grad.unbind(), strict=True):
            part.grad = row if part.grad is None else part.grad + row
        whole.grad = None

    whole.requires_grad_().register_post_accumulate_grad_hook(spread)
    return whole

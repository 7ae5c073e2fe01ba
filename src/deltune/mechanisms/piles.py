"""Piles: parameters of one shape, of several deltas, as one tensor with one gradient.

While deltas are trained at once their factors at a place would be stacked in every forward pass,
and the gradient of the stack taken apart in every backward pass. In a pile the parameters lie in
one memory, each a row of it, and what is read is the whole.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Pile:
    """Parameters of one shape.

    Attributes:
        parts: the parameters, each a row of the whole.
        whole: (parts, ...), a leaf.
    """

    def __init__(self, parts: Sequence[nn.Parameter]) -> None:
        self.parts = tuple(parts)
        self.whole = torch.stack([part.data for part in parts])
        self._gradient: Tensor | None = None
        self._rows: tuple[Tensor | None, ...] = (None,) * len(parts)
        for part, row in zip(parts, self.whole.unbind(), strict=True):
            part.data = row
        self.whole.requires_grad_()
        self._hook = self.whole.register_post_accumulate_grad_hook(self._spread)

    def take(self) -> Tensor | None:
        """(parts, ...): the gradients of the parts. None where one has none."""
        found, rows = self._gradient, self._rows
        self._gradient, self._rows = None, (None,) * len(self.parts)
        gradients = [part.grad for part in self.parts]
        if found is not None and all(a is b for a, b in zip(gradients, rows, strict=True)):
            return found
        given = [gradient for gradient in gradients if gradient is not None]
        return torch.stack(given) if len(given) == len(gradients) else None

    def end(self) -> None:
        """Gives each parameter memory of its own again."""
        self._hook.remove()
        for part in self.parts:
            part.data = part.data.clone()

    def _spread(self, whole: Tensor) -> None:
        assert whole.grad is not None
        self._gradient, whole.grad = whole.grad, None
        self._rows = self._gradient.unbind()
        for part, row in zip(self.parts, self._rows, strict=True):
            part.grad = row if part.grad is None else part.grad + row


class Piles:
    """The piles of some deltas, made as they are asked for."""

    def __init__(self) -> None:
        self._piles: dict[tuple[int, ...], Pile] = {}
        self._parts: set[int] = set()

    def whole(self, tensors: Sequence[Tensor]) -> Tensor | None:
        """(tensors, ...): a leaf whose gradient becomes that of the parameters in it, or None."""
        found = self.pile(tensors)
        return None if found is None else found.whole

    def pile(self, tensors: Sequence[Tensor]) -> Pile | None:
        """That of the tensors. None where they are no parameters in training, of several shapes,
        or in another pile too."""
        key = tuple(map(id, tensors))
        if key not in self._piles:
            parts = [t for t in tensors if isinstance(t, nn.Parameter) and t.requires_grad]
            kinds = {(part.shape, part.dtype, part.device) for part in parts}
            new = len(parts) == len(set(key) - self._parts) == len(key)
            if not new or len(kinds) > 1:
                return None
            self._piles[key] = Pile(parts)
            self._parts |= set(key)
        return self._piles[key]

    def end(self) -> None:
        """Gives each parameter memory of its own again."""
        for pile in self._piles.values():
            pile.end()
        self._piles, self._parts = {}, set()

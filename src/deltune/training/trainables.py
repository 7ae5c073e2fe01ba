"""The tensors that a run trains."""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from deltune.errors import TrainError, listing
from deltune.vector import sharded


class Trainables:
    """Parameters to train, by name, and what else changes with them.

    Args:
        model: the model in which they are.
        delta: an attached delta, whose parameters they are; without one, all parameters of the
            model that require gradients.

    Raises:
        TrainError: there are none, or a parameter of the delta is frozen, not in the model or not
            whole.
    """

    def __init__(self, model: nn.Module, delta: Any = None) -> None:
        names = {id(p): name for name, p in model.named_parameters()}
        wanted = list(model.parameters() if delta is None else delta.parameters())
        if delta is None:
            wanted = [p for p in wanted if p.requires_grad]
        if not wanted and delta is not None:
            raise TrainError(
                f"delta `{delta.name}` is `{delta.spec}`, which has no trained tensors; train the "
                "method that it was folded from, or another delta beside it"
            )
        if not wanted:
            raise TrainError(
                "there is nothing to train: no parameter requires a gradient; attach a delta and "
                "pass it as `delta`, or unfreeze parameters with `requires_grad_(True)`"
            )
        if any(map(sharded, wanted)):
            raise TrainError(
                f"this {type(model).__name__} lies in pieces in several processes, and this loop "
                "keeps the whole in each; use a loop of your own, or transformers' Trainer with "
                "`DeltaCallback(delta)`; or leave out `fully_shard`"
            )
        if any(id(p) not in names for p in wanted):
            raise TrainError(
                f"delta `{delta.name}` has parameters that are not in this {type(model).__name__}; "
                "pass the model that the delta is attached to"
            )
        self.parameters: list[nn.Parameter] = wanted
        self.names = [names[id(p)] for p in wanted]
        self._buffers = _buffers_beside(model, wanted)
        frozen = [n for n, p in zip(self.names, wanted, strict=True) if not p.requires_grad]
        if frozen:
            raise TrainError(
                f"{len(frozen)} tensors of the delta are frozen: {listing(frozen, 6)}; expected "
                "all of them to be trainable; call `requires_grad_(True)` on them"
            )

    @property
    def count(self) -> int:
        """Trainable scalars."""
        return sum(p.numel() for p in self.parameters)

    def live(self) -> dict[str, Tensor]:
        """Every tensor that training changes, by name, sharing memory with the model."""
        pairs = zip(self.names, self.parameters, strict=True)
        return {name: p.detach() for name, p in pairs} | self._buffers

    def copy(self) -> dict[str, Tensor]:
        """The same as copies in main memory."""
        return {name: t.to("cpu", copy=True).contiguous() for name, t in self.live().items()}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Undoes `copy`."""
        for name, tensor in self.live().items():
            tensor.copy_(tensors[name])

    def shapes(self) -> dict[str, str]:
        """`dtype[shape]` of each tensor."""
        return {n: f"{t.dtype}{list(t.shape)}" for n, t in self.live().items()}

    def clear_gradients(self) -> None:
        for p in self.parameters:
            p.grad = None


def _buffers_beside(model: nn.Module, parameters: Sequence[nn.Parameter]) -> dict[str, Tensor]:
    # Running statistics, as of a batch norm that trains, change with the parameters beside them.
    ids = {id(p) for p in parameters}
    found: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        if not any(id(p) in ids for p in module.parameters(recurse=False)):
            continue
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                found[f"{path}.{name}" if path else name] = buffer
    return found


@contextmanager
def others_frozen(model: nn.Module, parameters: Sequence[nn.Parameter]) -> Generator[None]:
    """Spares the gradients of parameters that are not in training; trainable again at the end."""
    ids = {id(p) for p in parameters}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in ids]
    for p in others:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in others:
            p.requires_grad_(True)

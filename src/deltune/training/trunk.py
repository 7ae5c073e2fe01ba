"""The trunk: the blocks below everything that is trained, run once for each example."""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from deltune.sites.discover import discover
from deltune.tasks.batching import padding_worth, sorted_batches
from deltune.training.evaluation import device_of, in_mode
from deltune.training.generators import kept_generators

Batch = dict[str, Any]


class Trunk:
    """The output of the last block of the trunk, kept for every token of every example.

    A block belongs to the trunk if no block before it, nor itself, is hooked or depends on a
    trained parameter. The trunk runs in eval mode, so without the dropout that it would have in
    training; in this alone, beside rounding, training differs.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[nn.Module], rows: Callable[[Any], int]):
        self.model, self.blocks, self.rows = model, blocks, rows
        self._kept: dict[int, tuple[Any, list[Tensor]]] = {}

    def learn(
        self,
        examples: Sequence[Any],
        collate: Callable[[Sequence[Any]], Batch],
        batch_size: int,
    ) -> None:
        """Runs the trunk on examples, in batches that depend on them alone.

        Args:
            examples: all that it will be fed.
            collate: makes a batch of examples, on the model's device.
            batch_size: examples in one forward.
        """
        with in_mode(self.model, training=False), torch.no_grad():
            lengths = [one.length for one in examples]
            for places in sorted_batches(lengths, batch_size, padding_worth(device_of(self.model))):
                chosen = [examples[at] for at in places]
                batch = collate(chosen)
                real = batch["attention_mask"].sum(dim=1).tolist()
                hidden = _output(self.model, self.blocks[-1], batch)
                rows = iter(row[:n].clone() for row, n in zip(hidden, real, strict=True))
                for one in chosen:  # kept alive, so that its id stays its own
                    self._kept[id(one)] = one, [next(rows) for _ in range(self.rows(one))]

    @contextmanager
    def feeding(self, examples: Sequence[Any]) -> Generator[None]:
        """While it is open, the model's trunk gives what was kept for these examples, which are
        those of the batch that the model is called with, in its order."""
        rows = [row for example in examples for row in self._kept[id(example)][1]]
        hidden = nn.utils.rnn.pad_sequence(rows, batch_first=True)

        def enter(inputs: Tensor, *args: Any, **options: Any) -> Tensor:
            # A batch may be padded further than to its longest text.
            return nn.functional.pad(hidden, (0, 0, 0, inputs.shape[1] - hidden.shape[1]))

        def leave(inputs: Tensor, *args: Any, **options: Any) -> Tensor:
            return inputs

        try:
            for number, block in enumerate(self.blocks):
                block.forward = leave if number else enter
            yield
        finally:
            for block in self.blocks:
                vars(block).pop("forward", None)


def find_trunk(model: nn.Module, objective: Any, batch: Batch) -> Trunk | None:
    """The trunk of a model as it is about to be trained; None where there is none.

    Args:
        model: everything that is not trained frozen.
        objective: has `rows`, the number of rows of an example in a batch, where its batches are
            all that the model is called with.
        batch: of the objective, on the model's device, padded on the right.
    """
    sites = [site for site in discover(model).sites if site.role == "block"]
    rows = getattr(objective, "rows", None)
    if rows is None or len({site.stack for site in sites}) != 1:
        return None
    blocks = [model.get_submodule(site.path) for site in sites]
    outputs: dict[int, Any] = {}
    hooks = [
        block.register_forward_hook(
            lambda module, args, output: outputs.setdefault(id(module), output)
        )
        for block in blocks
        if not _hooked(block)
    ]
    try:
        with torch.enable_grad(), kept_generators(batch["input_ids"].device):
            objective.loss(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    shape, depth = batch["attention_mask"].shape, 0
    for block in blocks:
        output = outputs.get(id(block))
        plain = isinstance(output, Tensor) and output.shape[:2] == shape
        if not plain or output.requires_grad:
            break
        depth += 1
    return Trunk(model, blocks[:depth], rows) if depth else None


class _Enough(Exception):
    """The forward has come as far as it is wanted."""


def _output(model: nn.Module, block: nn.Module, batch: Batch) -> Tensor:
    """What a block gives on a batch; the blocks above it are spared."""
    found: list[Tensor] = []

    def stop(module: nn.Module, args: Any, output: Tensor) -> None:
        found.append(output)
        raise _Enough

    hook = block.register_forward_hook(stop)
    try:
        model(**{name: batch[name] for name in ("input_ids", "attention_mask")})
    except _Enough:
        pass
    finally:
        hook.remove()
    return found[0]


def _hooked(block: nn.Module) -> bool:
    return any(one._forward_hooks or one._forward_pre_hooks for one in block.modules())

"""The loss of a frozen output layer, without the logits of all tokens at once."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deltune.errors import AttachError

HEAD = "_deltune_output"
MOST = 2**24  # logits at a time
FEWEST = 64  # tokens at a time


class LinearCrossEntropy(torch.autograd.Function):
    """-log softmax(W h + b)[label] of each token, 0 where the label is `ignored`.

    The gradient of the states is computed with the loss, some tokens at a time, and kept in the
    place of the logits: (tokens, width) for (tokens, words).
    """

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, labels: Tensor, weight: Tensor, bias: Tensor | None, ignored: int
    ) -> Tensor:
        size = max(FEWEST, MOST // weight.shape[0])
        kept = torch.empty_like(states) if ctx.needs_input_grad[0] else None
        losses = torch.empty(len(states), device=states.device, dtype=torch.float32)
        losses = losses.to(torch.promote_types(states.dtype, torch.float32))
        for start in range(0, len(states), size):
            part = slice(start, start + size)
            logits = F.linear(states[part], weight, bias)
            counted = labels[part] != ignored
            wanted = labels[part].masked_fill(~counted, 0)[:, None]
            scores = logits.to(losses.dtype).log_softmax(-1)
            losses[part] = -scores.gather(1, wanted)[:, 0].masked_fill(~counted, 0.0)
            if kept is not None:
                change = scores.exp_().scatter_add_(1, wanted, -scores.new_ones(wanted.shape))
                change = change.masked_fill_(~counted[:, None], 0.0).to(logits.dtype)
                kept[part] = (change @ weight.to(logits.dtype)).to(kept.dtype)
        ctx.save_for_backward(kept)
        return losses

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        (grad,), (kept,) = grads, ctx.saved_tensors
        return kept * grad[:, None].to(kept.dtype), None, None, None, None


class Output:
    """The output layer of a model, asked for losses instead of logits.

    Args:
        model: a language model of transformers.
        layer: its output layer.
        path: of the layer, for messages.
        plain: whether the model's loss of given labels is the usual one.
    """

    def __init__(self, model: nn.Module, layer: nn.Linear, path: str, plain: bool) -> None:
        self.model, self.layer, self.path, self.plain = model, layer, path, plain
        self.opened, self.given = False, None

    def enter(self) -> None:
        """Hides the layer's forward and the model's loss."""
        self.layer.__dict__["forward"] = self.forward
        self.model.__dict__[HEAD] = self
        self.kept = "_loss_function" in self.model.__dict__
        self.loss_before = self.model.__dict__.get("_loss_function")
        self.handles = [
            self.model.register_forward_pre_hook(self.begin, with_kwargs=True),
            self.model.register_forward_hook(self.end, always_call=True),
        ]

    def leave(self) -> None:
        """Shows them again."""
        del self.layer.__dict__["forward"], self.model.__dict__[HEAD]
        for handle in self.handles:
            handle.remove()

    @contextmanager
    def open(self) -> Generator[None]:
        """In it the model puts out states where it would put out logits."""
        self.opened = True
        try:
            yield
        finally:
            self.opened, self.given = False, None

    def forward(self, states: Tensor) -> Tensor:
        """The logits; where losses are asked for, the states themselves."""
        if not self.opened:
            return type(self.layer).forward(self.layer, states)
        hooked = [*self.layer._forward_hooks.values(), *self.layer._forward_pre_hooks.values()]
        if self.layer.weight.requires_grad or any(hasattr(hook, "__self__") for hook in hooked):
            raise AttachError(
                f"the output layer `{self.path}` is changed or trained, and a lean loss needs it "
                "frozen; pass head=False"
            )
        self.given = states
        return states

    def losses(self, states: Tensor, labels: Tensor, ignored: int = -100) -> Tensor:
        """The loss of each token, from states (tokens, width) that `forward` was given."""
        bias = self.layer.bias
        return LinearCrossEntropy.apply(states, labels, self.layer.weight, bias, ignored)

    def begin(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a forward: whether it is given labels to learn from."""
        if self.opened or kwargs.get("labels") is None or not torch.is_grad_enabled():
            return
        if not self.plain:
            raise AttachError(
                f"{type(model).__name__} computes the loss of labels in a way of its own; leave "
                "`head` out, or train with `deltune.train`"
            )
        self.opened = True
        model.__dict__["_loss_function"] = self.loss

    def end(self, model: Any, args: tuple[Any, ...], output: Any) -> Any:
        """After a forward: the output without logits."""
        if model.__dict__.get("_loss_function") != self.loss:
            return None
        self.opened, self.given = False, None
        if self.kept:
            model.__dict__["_loss_function"] = self.loss_before
        else:
            del model.__dict__["_loss_function"]
        if output is None:  # the forward failed
            return None
        if not isinstance(output, dict):
            raise AttachError(
                f"{type(model).__name__} puts out a tuple, of which the logits cannot be left "
                "out; call it with return_dict=True, or pass head=False"
            )
        kind: Any = type(output)
        return kind(**{name: value for name, value in output.items() if name != "logits"})

    def loss(
        self, logits: Tensor, labels: Tensor, vocab_size: int, num_items_in_batch: Any = None,
        ignore_index: int = -100, shift_labels: Tensor | None = None, **kwargs: Any,
    ) -> Tensor:  # fmt: skip
        """The loss that transformers gives for logits and labels, from states."""
        if logits is not self.given:
            raise AttachError(
                f"{type(self.model).__name__} changes its logits before the loss; pass head=False"
            )
        if shift_labels is None:
            shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        wanted = shift_labels.reshape(-1).to(logits.device)
        losses = self.losses(logits.flatten(0, -2), wanted, ignore_index)
        if num_items_in_batch is None:
            return losses.sum() / (wanted != ignore_index).sum()
        if isinstance(num_items_in_batch, Tensor):
            num_items_in_batch = num_items_in_batch.to(losses.device)
        return losses.sum() / num_items_in_batch

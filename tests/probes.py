"""Deltas away from their start, and what single modules of a model read and put out."""

from collections.abc import Callable
from functools import wraps
from inspect import Parameter, signature
from typing import Any

import torch
from torch import Tensor, nn

import deltune as dt
from deltune.mechanisms.modules import first_input
from zoo import Batch


def moved(
    model: nn.Module, spec: str | dt.Spec, name: str = "delta", head: bool = True
) -> dt.Delta:
    """A delta far from its start."""
    delta = dt.attach(model, spec, name, head=head, seed=1)
    generator = torch.Generator().manual_seed(1)
    return delta.load_vector(
        delta.vector() + 0.3 * torch.randn(delta.layout.size, generator=generator)
    )


def for_peft(model: nn.Module) -> nn.Module:
    """The model as PEFT 0.21.2 takes it for a prefix: with an argument `past_key_values`, which
    transformers calls `cache` since 5.24 and takes under both names."""
    forward = model.forward

    @wraps(forward)
    def named(*args: Any, past_key_values: Any = None, **kwargs: Any) -> Any:
        cache = {} if past_key_values is None else {"past_key_values": past_key_values}
        return forward(*args, **kwargs, **cache)

    known = signature(forward)
    if "past_key_values" not in known.parameters:
        extra = Parameter("past_key_values", Parameter.KEYWORD_ONLY, default=None)
        *rest, last = known.parameters.values()
        tail = [extra, last] if last.kind is Parameter.VAR_KEYWORD else [last, extra]
        named.__signature__ = known.replace(parameters=[*rest, *tail])  # type: ignore
        model.forward = named
    return model


def of(delta: dt.Delta, path: str) -> dict[str, Tensor]:
    """The tensors at one place, by their own names."""
    mark = f".{path}."
    return {n.split(mark)[1]: t for n, t in delta.tensors().items() if mark in n}


def seen(
    model: nn.Module, paths: list[str], run: Callable[[], object]
) -> dict[str, tuple[Tensor, Any]]:
    """The first input and the output of modules in one call, without gradients."""
    found: dict[str, tuple[Tensor, Any]] = {}

    def note(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            found[path] = (first_input(args, kwargs), output)

        return hook

    hooks = [
        model.get_submodule(path).register_forward_hook(note(path), with_kwargs=True)
        for path in paths
    ]
    with torch.no_grad():
        run()
    for hook in hooks:
        hook.remove()
    return found


def logits(model: nn.Module, batch: Batch) -> Tensor:
    """The model's logits, without gradients."""
    with torch.no_grad():
        return model(**batch).logits

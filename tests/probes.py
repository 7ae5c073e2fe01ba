"""Deltas away from their start, and what single modules of a model read and put out."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import deltune as dt
from deltune.mechanisms.unit import first_input
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

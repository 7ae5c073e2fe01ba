"""What merging can know of each delta's data: Gram matrices of inputs, and Fisher information."""

from collections.abc import Generator, Iterable
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from deltune.delta import Delta
from deltune.errors import MergeError
from deltune.mechanisms.modules import Shadow, at
from deltune.mechanisms.select import Select
from deltune.mechanisms.weight import Weight
from deltune.merging.work import place_of


def grams(delta: Delta, runs: Iterable[Any]) -> dict[str, Tensor]:
    """X^T X (in, in) of what each changed linear map is given, for `merge(how="regmean")`.

    Args:
        delta: attached; it acts as it is.
        runs: each made by a forward of the model while this function runs, on data that the delta
            was trained on; losses will do. All positions count: call it on rows of one length.

    Returns:
        By the name of the place, in float64.

    Raises:
        MergeError: the delta changes no linear map, or there was no forward.

    Example:
        >>> import deltune as dt, torch
        >>> from deltune.merging import grams
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 3))
        >>> delta = dt.attach(model, "lora(rank=1, where='0')")
        >>> grams(delta, (model(row) for row in torch.eye(3)))["0"].diag().tolist()
        [1.0, 1.0, 1.0]
    """
    found: dict[str, Tensor] = {}
    handles = []

    def watch(module: nn.Module, keys: list[str]) -> None:
        def note(module: nn.Module, args: tuple[Any, ...]) -> None:
            rows = args[0].detach().reshape(-1, args[0].shape[-1]).double()
            gram = rows.T @ rows
            for key in keys:
                found[key] = found[key] + gram if key in found else gram

        handles.append(module.register_forward_pre_hook(note))

    maps: dict[str, list[str]] = {}
    for unit in delta.tree.units:
        if isinstance(unit.spec, Weight) and unit.site.kind in ("linear", "conv1d"):
            keys = maps.setdefault(unit.site.path, [])
            keys += [key for key in [place_of(unit, unit.site.param)] if key not in keys]
    if not maps:
        raise MergeError(f"`{delta.spec}` changes no linear map, so no inputs can be measured")
    try:
        for path, keys in maps.items():
            watch(at(delta.model, path), keys)
        with torch.no_grad():
            for _ in runs:
                pass
    finally:
        for handle in handles:
            handle.remove()
    if not found:
        raise MergeError("the model was not called, so nothing was measured; give `runs`")
    return found


def fishers(delta: Delta, losses: Iterable[Tensor]) -> dict[str, Tensor]:
    """The mean of squared gradients of some losses to each entry that the delta changes, for
    `merge(how="fisher")`: the diagonal of the empirical Fisher information, where each loss is the
    negative log-likelihood of one example.

    Args:
        delta: attached; it acts as it is.
        losses: scalars with their graphs, computed one by one while this function runs.

    Returns:
        By the name of the place, in float64: (..., out, in) of a matrix, else of the parameter's
        shape. Matrices that no module is called on alone (experts) are left out.

    Raises:
        MergeError: there was no loss, or one has no gradient to what the delta changes.

    Example:
        >>> import deltune as dt, torch
        >>> from deltune.merging import fishers
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 1))
        >>> delta = dt.attach(model, "lora(rank=1, where='0')")
        >>> losses = (model(row).sum() for row in torch.eye(2))
        >>> fishers(delta, losses)["0"].tolist()
        [[0.5, 0.5]]
    """
    found: dict[str, Tensor] = {}
    count = 0
    with _probed(delta) as probes, torch.enable_grad():
        for loss in losses:
            count += 1
            used = [(key, probe) for key, (probe, _) in probes.items()]
            gradients = torch.autograd.grad(
                loss, [probe for _, probe in used], allow_unused=True, retain_graph=False
            )
            for (key, _), gradient in zip(used, gradients, strict=True):
                if gradient is not None:
                    square = probes[key][1](gradient).double().square()
                    found[key] = found[key] + square if key in found else square
    if not count or not found:
        raise MergeError(
            f"{count} losses were given and {len(found)} of {len(probes)} places had a gradient"
        )
    return {key: total / count for key, total in found.items()}


@contextmanager
def _probed(delta: Delta) -> Generator[dict[str, tuple[Tensor, Any]]]:
    """By place, a zero that is added to what the delta changes there and takes a gradient, and how
    to read the place's own part of that gradient."""
    probes: dict[str, tuple[Tensor, Any]] = {}
    zeros: dict[tuple[str, str], Tensor] = {}
    handles: list[Any] = []

    def probe(path: str, name: str) -> Tensor:
        if (path, name) not in zeros:
            module = at(delta.model, path)
            value = module._parameters[name]
            assert value is not None
            zero = torch.zeros((), dtype=value.dtype, device=value.device)
            zeros[path, name] = made = zero.expand(value.shape).requires_grad_()

            def cast(module: nn.Module, args: tuple[Any, ...]) -> None:
                Shadow.cast(module, name, made)

            def lift(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
                Shadow.lift(module, name)

            handles.append(module.register_forward_pre_hook(cast))
            handles.append(module.register_forward_hook(lift, always_call=True))
        return zeros[path, name]

    try:
        for unit in delta.tree.units:
            if isinstance(unit.spec, Weight) and not unit.site.anchor:
                key = place_of(unit, unit.site.param)
                probes[key] = probe(unit.site.path, unit.site.param), unit.site.matrix
            elif isinstance(unit.spec, Select) and not unit.spec.owns:
                for name in dict.fromkeys(place[0] for place in unit.site.places):
                    key = place_of(unit, name)
                    probes[key] = probe(unit.site.path, name), lambda gradient: gradient
        yield probes
    finally:
        for handle in handles:
            handle.remove()

"""Biases beside LoRA in PEFT's format, whole values: `<module>.bias`, of adapted modules
`<module>.base_layer.bias`; or `<module>.lora_B.bias`, which is added at LoRA's scale."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from deltune.delta import Delta
from deltune.errors import ExchangeError, listing
from deltune.exchange.foreign import Held, Told
from deltune.exchange.names import named
from deltune.families.specification.bitfit import BitFit
from deltune.mechanisms.modules import pretrained
from deltune.mechanisms.select import places
from deltune.mechanisms.unit import Unit
from deltune.sites.discover import Atlas, discover
from deltune.spec import Spec

ADAPTED, ADDED = ".base_layer.bias", ".lora_B.bias"
KINDS = ("none", "lora_only", "all")
Changes = dict[str, Tensor]
"""Bias -> its change."""


def read_beside(
    told: Told, held: Held, atlas: Atlas, scales: Mapping[str, float]
) -> tuple[list[Spec], Changes]:
    """The spec of the biases that a LoRA checkpoint trains too, and their changes.

    Args:
        told: its configuration.
        held: its tensors.
        atlas: of the model.
        scales: module that a pair adapts -> the scale of the pair.
    """
    kind = told.take("bias", str, "none")
    if kind not in KINDS:
        raise ExchangeError(f"{told.where}: `bias` is {kind!r}; expected one of {', '.join(KINDS)}")
    told.take("lora_bias", bool, False)
    changes: Changes = {}
    for path, scale in scales.items():
        if f"{path}{ADDED}" in held.left:
            now = _own(held, atlas, f"{path}.bias")
            changes[f"{path}.bias"] = scale * held.take(path + ADDED, tuple(now.shape)).float()
    if kind != "none":
        for name in list(held.left):
            bias = name.removesuffix(ADAPTED) + ".bias" if name.endswith(ADAPTED) else name
            if bias.endswith(".bias") and not atlas.in_head(bias):
                now = _own(held, atlas, bias)
                changed = held.take(name, tuple(now.shape)).float() - now.detach().float().cpu()
                changes[bias] = changed + changes.get(bias, 0.0)
    biases = _biases(atlas)
    shared: dict[int, str] = {}
    for place in biases:
        shared.setdefault(id(_bias(atlas, *place)), ".".join(place))
    meant = {"none": (), "lora_only": [f"{path}.bias" for path in scales], "all": shared.values()}
    lacking = [name for name in meant[kind] if name in shared.values() and name not in changes]
    if lacking:
        raise ExchangeError(
            f"{held.where} lacks {listing(lacking, 4)}, which `bias = {kind!r}` of {told.where} "
            "means; save it again"
        )
    if not changes:
        return [], {}
    found: Changes = {}
    for name, change in changes.items():
        first = shared[id(_own(held, atlas, name))]
        if not torch.equal(found.setdefault(first, change), change):
            raise ExchangeError(f"{held.where} has two values for `{name}`; save it again")
    paths = [name.rpartition(".")[0] for name in found]
    everywhere = found.keys() == {".".join(place) for place in BitFit().chosen(atlas)}
    where = "" if everywhere else named(atlas, paths, places(atlas, [p for p, _ in biases]))
    return [BitFit(where=where)], found


def write_beside(
    delta: Delta, units: Iterable[Unit], adapted: Iterable[str]
) -> tuple[str, dict[str, Tensor]]:
    """PEFT's word for the biases that are trained, and their values with those of the others
    that the word means.

    Args:
        delta: the delta.
        units: those of its biases.
        adapted: the modules that pairs adapt.
    """
    atlas, linear, values = discover(delta.model), set(adapted), dict[str, Tensor]()
    for unit in units:
        for own, anchor, inner, name in unit.site.places:
            path = ".".join(part for part in (anchor, inner) if part)
            value = values.get(f"{path}.{name}", pretrained(atlas.modules[path], name).detach())
            values[f"{path}.{name}"] = value + unit.scale * unit.own(own)
    if not values:
        return "none", {}
    odd = [name for name in values if not name.endswith(".bias")]
    if odd:
        raise ExchangeError(
            f"`{delta.name}` trains `{odd[0]}`, which PEFT counts among no biases; merge the delta"
        )
    kind = "all" if {name.removesuffix(".bias") for name in values} - linear else "lora_only"
    meant = atlas.modules if kind == "all" else linear
    tensors: dict[str, Tensor] = {}
    for path in meant:
        module = atlas.modules[path]
        if module._parameters.get("bias") is not None and not atlas.in_head(path):
            value = values.get(f"{path}.bias", pretrained(module, "bias"))
            tensors[path + (ADAPTED if path in linear else ".bias")] = value
    return kind, tensors


def _biases(atlas: Atlas) -> list[tuple[str, str]]:
    """(module, name) of what PEFT counts as the biases of a backbone."""
    return [
        (path, "bias")
        for path, module in atlas.modules.items()
        if module._parameters.get("bias") is not None and not atlas.in_head(path)
    ]


def _bias(atlas: Atlas, path: str, name: str) -> Any:
    return atlas.modules[path]._parameters[name]


def _own(held: Held, atlas: Atlas, bias: str) -> Tensor:
    """The model's bias of this name."""
    module = atlas.modules.get(bias.rpartition(".")[0])
    found = module._parameters.get("bias") if module is not None else None
    if found is None:
        raise ExchangeError(
            f"{held.where} has a value for `{bias}`, and {type(atlas.model).__name__} has no bias "
            "there; load the model that it was trained on, or train without `lora_bias`"
        )
    return found

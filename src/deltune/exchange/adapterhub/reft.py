"""LoReFT in AdapterHub's format: `<block>.reft_layer.refts.<name>.units.<0 or 1>`, of the first and
of the last tokens, each with a `learned_source` and an orthonormal `projection`."""

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from deltune.errors import ExchangeError
from deltune.exchange.foreign import Held, Told
from deltune.exchange.parts import Part, Tensors, addressed
from deltune.families.addition.loreft import LoReFT
from deltune.mechanisms.insert import layers
from deltune.mechanisms.interventions import LAST
from deltune.sites.discover import Atlas

WEIGHT = "projection.parametrizations.weight"
NAMES = {
    "learned_source.weight": "W", "learned_source.bias": "b", f"{WEIGHT}.original": "original",
    f"{WEIGHT}.0.base": "base",
}  # fmt: skip


def read(told: Told, held: Held, atlas: Atlas, name: str) -> list[Part]:
    """The one part of a checkpoint."""
    told.left -= {"layers", "dtype"}  # the tensors say in which layers they are
    prefix = told.take("prefix_positions", int, 3)
    suffix = told.take("suffix_positions", int, 0)
    rank, tied = told.take("r", int, 1), told.take("tied_weights", bool, False)
    dropout = float(told.take("dropout", (int, float), 0.0))
    if not told.take("orthogonality", bool, True) or not told.take("output_reft", bool, True):
        raise ExchangeError(
            f"{told.where}: `orthogonality` or `output_reft` is False. NoReFT and DiReFT have the "
            "same configuration in AdapterHub's files, which do not say whether the projection is "
            "taken away; read are files of LoReFT"
        )
    ends = [""] if tied or prefix else []
    ends += [LAST] if suffix and not tied else []
    found: dict[str, Tensors] = {}
    for block, units in _units(held, name).items():
        wanted = {"": units.get("0", {}), LAST: units.get("1", {})}
        found[block] = {
            f"{own}{end}": value
            for end in ends
            for own, value in _tensors(wanted[end], held).items()
        }
    if not found:
        return []
    candidates = layers(atlas)
    blocks = [s for s in candidates if s.role == "block" and s.path in found]
    spec = LoReFT(
        rank=rank, prefix=prefix, suffix=suffix, tied=tied, dropout=dropout,
        orthogonal=all(_is_orthonormal(unit[f"R{end}"]) for unit in found.values() for end in ends),
        where=addressed(atlas, blocks, candidates) or "block",
    )  # fmt: skip
    return [Part(spec, found)]


def _units(held: Held, name: str) -> dict[str, dict[str, Tensors]]:
    """Block -> unit -> its tensors."""
    found: dict[str, dict[str, Tensors]] = {}
    for full in list(held.left):
        block, inside, rest = full.partition(f".reft_layer.refts.{name}.units.")
        unit, _, own = rest.partition(".")
        if inside and own in NAMES:
            found.setdefault(block, {}).setdefault(unit, {})[NAMES[own]] = held.take(full)
    return found


def _tensors(unit: Tensors, held: Held) -> Tensors:
    """R, W and b, with R as torch's parametrisation makes it."""
    if set(unit) != {"W", "b", "original", "base"}:
        raise ExchangeError(f"{held.where} lacks a part of a ReFT unit; save it again")
    return {"R": _orthonormal(unit["original"], unit["base"]), "W": unit["W"], "b": unit["b"]}


def _is_orthonormal(R: Tensor) -> bool:
    """Whether the rows are, which weight decay ends: torch's parametrisation keeps signs in what it
    shrinks."""
    return torch.allclose(R @ R.mT, torch.eye(len(R)), atol=1e-4)


@torch.no_grad()
def _orthonormal(original: Tensor, base: Tensor) -> Tensor:
    linear = nn.Linear(original.shape[1], original.shape[0], bias=False)
    parametrizations.orthogonal(linear)
    stored = linear.state_dict()
    own = {f"parametrizations.weight.{n}": t for n, t in (("original", original), ("0.base", base))}
    if {n: t.shape for n, t in own.items()} != {n: t.shape for n, t in stored.items()}:
        raise ExchangeError(
            f"a projection of {tuple(original.shape)} with a base of {tuple(base.shape)} is none "
            "of torch's orthogonal parametrisation; save it again"
        )
    linear.load_state_dict(own)
    return linear.weight.detach()

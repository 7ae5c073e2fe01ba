"""LoReFT in AdapterHub's format: `<block>.reft_layer.refts.<name>.units.<0 or 1>`, of the first and
of the last tokens, each with a `learned_source` and an orthonormal `projection`."""

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from deltune.errors import ExchangeError
from deltune.exchange.foreign import Form, Held, Told
from deltune.exchange.parts import Part, Tensors, addressed
from deltune.families.addition.loreft import LoReFT
from deltune.mechanisms.insert import layers
from deltune.mechanisms.interventions import LAST
from deltune.sites.discover import Atlas

WEIGHT = "projection.parametrizations.weight"
FORMS = {
    "learned_source.weight": Form("W", "r d"), "learned_source.bias": Form("b", "r"),
    f"{WEIGHT}.original": Form("original", "r d"), f"{WEIGHT}.0.base": Form("base", "d d"),
}  # fmt: skip


def read(told: Told, held: Held, atlas: Atlas, name: str) -> list[Part]:
    """The one part of a checkpoint."""
    told.left -= {"layers", "dtype"}  # the tensors say in which layers they are
    prefix = told.take("prefix_positions", int, 3)
    suffix = told.take("suffix_positions", int, 0)
    rank, tied = told.take("r", int, 1, least=1), told.take("tied_weights", bool, False)
    dropout = float(told.take("dropout", (int, float), 0.0))
    if not told.take("orthogonality", bool, True) or not told.take("output_reft", bool, True):
        raise ExchangeError(
            f"{told.where}: `orthogonality` or `output_reft` is False. NoReFT and DiReFT have the "
            "same configuration in AdapterHub's files, which do not say whether the projection is "
            "taken away; read are files of LoReFT"
        )
    ends = [""] if tied or prefix else []
    ends += [LAST] if suffix and not tied else []
    units = {
        end: held.places(f".reft_layer.refts.{name}.units.{at}.", FORMS)
        for at, end in enumerate(("", LAST))  # a file has both, whether or not they act
    }
    found = {
        block: {
            f"{own}{end}": value
            for end in ends
            for own, value in _tensors(units[end], block, held).items()
        }
        for block in dict.fromkeys(block for one in units.values() for block in one)
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


def _tensors(units: dict[str, Tensors], block: str, held: Held) -> Tensors:
    """R, W and b of a block, with R as torch's parametrisation makes it."""
    if block not in units:
        raise ExchangeError(f"{held.where} lacks a ReFT unit of `{block}`; save it again")
    unit = units[block]
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

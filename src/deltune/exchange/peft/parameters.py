"""LoRA on parameters of modules that PEFT has no layer for: stored experts, and matrices such as a
router's. `<module>.lora_A.weight` (experts r, in), `<module>.lora_B.weight` (out, r experts).

Of several parameters of one module the last has these names, the one before it
`<module>.base_layer.lora_A.weight`, and so on.
"""

import re
from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from deltune.errors import ExchangeError
from deltune.exchange.foreign import Held, Told
from deltune.mechanisms.weight import matrices
from deltune.sites.discover import Atlas
from deltune.sites.site import Site

INSIDE = ".base_layer"
TURNED = (0, 19, 1)
"""The version from which PEFT's A reads what the experts read, and not what they give."""
Pair = dict[str, Tensor]


def parameter(site: Site, modules: Mapping[str, nn.Module]) -> str:
    """PEFT's name of the parameter that a site is a part of; '' where PEFT has a layer for it.

    Raises:
        ExchangeError: it has neither.
    """
    if site.kind != "dense":
        return ""
    dimensions = modules[site.path].get_parameter(site.param).ndim
    if site.anchor or dimensions not in (2, 3) or dimensions != len(site.shape):
        raise ExchangeError(
            f"LoRA at `{site.path}` has pairs for its `{site.param}`, which PEFT's format has no "
            "place for; convert it: `deltune convert`"
        )
    return f"{site.path}.{site.param}"


def targeted(told: Told, atlas: Atlas) -> dict[str, Site]:
    """The key of every site that a configuration asks for as a parameter -> the site."""
    targets = told.take("target_parameters", list, [])
    return {
        site.key: site
        for site in matrices(atlas)
        if site.rows is None and site.kind == "dense"
        if any(f".{site.path}.{site.param}".endswith(f".{one}") for one in targets)
    }


def unfolded(
    told: Told, held: Held, found: Mapping[str, Pair], atlas: Atlas, sites: Mapping[str, Site]
) -> dict[str, Pair]:
    """The pairs of a checkpoint by the keys of the sites, those of experts as A (experts, r, in)
    and B (experts, out, r)."""
    pairs, flipped = dict(found), _flipped(told)
    for name, site in _names(atlas.modules, sites.values()).items():
        if name not in pairs:
            raise ExchangeError(
                f"{held.where} lacks the pair `{name}`, of `{site.path}.{site.param}`; save it "
                "again"
            )
        pair = pairs.pop(name)
        pairs[site.key] = _unfold(held, name, pair, site, flipped) if site.shape[2:] else pair
    return pairs


def folded(
    modules: Mapping[str, nn.Module], pairs: Iterable[tuple[Site, Tensor, Tensor]]
) -> dict[str, Tensor]:
    """The tensors of pairs A (..., r, in) and B (..., out, r)."""
    known = {site.key: (site, down, up) for site, down, up in pairs}
    tensors: dict[str, Tensor] = {}
    for name, site in _names(modules, [site for site, _, _ in known.values()]).items():
        _, down, up = known[site.key]
        if down.ndim == 3:
            down, up = down.flatten(0, 1), up.permute(1, 2, 0).flatten(1)
        tensors |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    return tensors


def _names(modules: Mapping[str, nn.Module], sites: Iterable[Site]) -> dict[str, Site]:
    """What PEFT calls the layers around parameters."""
    owners: dict[str, list[Site]] = {}
    for site in sites:
        owners.setdefault(site.path, []).append(site)
    found = {}
    for path, inside in owners.items():
        order = list(modules[path]._parameters)
        inward = sorted(inside, key=lambda site: -order.index(site.param))
        found |= {path + depth * INSIDE: site for depth, site in enumerate(inward)}
    return found


def _unfold(held: Held, name: str, pair: Pair, site: Site, flipped: bool) -> Pair:
    (experts, out, into), (A, B) = site.shape, (pair["A"], pair["B"])
    rows = A.shape[0]
    straight = (rows, into) == A.shape and (out, rows) == B.shape
    turned = (rows, out) == A.shape and (into, rows) == B.shape
    if rows % experts or not (straight or turned):
        raise ExchangeError(
            f"{held.where}: `{name}` has lora_A {tuple(A.shape)} and lora_B {tuple(B.shape)}, and "
            f"`{site.key}` holds {experts} experts ({out}, {into}); load the model that it "
            "belongs to"
        )
    down, up = A.unflatten(0, (experts, -1)), B.unflatten(1, (-1, experts)).permute(2, 0, 1)
    if not straight or (turned and flipped and not site.transposed):
        down, up = up.mT, down.mT
    return {"A": down.contiguous(), "B": up.contiguous()}


def _flipped(told: Told) -> bool:
    """Whether the checkpoint is of a PEFT whose A reads what the experts give."""
    version = str(told.values.get("peft_version"))
    numbers = re.match(r"([0-9]{1,9})\.([0-9]{1,9})\.?([0-9]{0,9})", version)
    return numbers is None or tuple(int(n or 0) for n in numbers.groups()) < TURNED

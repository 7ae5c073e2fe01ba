"""LoRA and (IA)^3 in AdapterHub's format: `<module>.loras.<name>.lora_A` (r, in), `lora_B` (out, r)
or (out, 1); of a fused matrix those of its roles, one below another."""

from collections.abc import Sequence

from torch import Tensor

from deltune.errors import ExchangeError
from deltune.exchange.foreign import Form, Held, Told
from deltune.exchange.parts import Part, Tensors, addressed
from deltune.families.addition.ia3 import IA3
from deltune.families.reparameterization.lora import LoRA
from deltune.mechanisms.weight import matrices
from deltune.sites.discover import Atlas
from deltune.sites.site import Site

PAIR = {"lora_A": Form("A", "k i"), "lora_B": Form("B", "o r")}
FACTORS = {"lora_B": Form("B", "o 1")}


def read(told: Told, held: Held, atlas: Atlas, name: str) -> list[Part]:
    """The one part of a checkpoint."""
    for field in ("selfattn_lora", "intermediate_lora", "output_lora", "dtype"):
        told.left.discard(field)  # the tensors say where they are
    rank, alpha = told.take("r", int, 8, least=1), told.take("alpha", (int, float), 8)
    letters = told.take("attn_matrices", list, ["q", "v"])
    how = told.take("composition_mode", str, "add")
    if told.take("use_dora", bool, False):
        raise ExchangeError(
            f"{told.where}: `use_dora` is True. AdapterHub's DoRA rescales the bias too, and takes "
            "its norm without the scale; merge it with the library that wrote it"
        )
    if how not in ("add", "scale"):
        raise ExchangeError(f"{told.where}: `composition_mode` is {how!r}; expected add or scale")
    sites, own = matrices(atlas), dict[str, Tensors]()
    chosen: list[Site] = []
    forms = FACTORS if how == "scale" else PAIR
    for path, tensors in held.places(f".loras.{name}.", forms).items():
        for site, values in _places(held, path, tensors, sites, letters):
            own[site.key] = values
            chosen.append(site)
    if not chosen:
        return []
    where = addressed(atlas, chosen, sites)
    if how == "scale":
        factor = alpha / rank
        ones = {key: {"d": factor * values["B"][:, 0] - 1.0} for key, values in own.items()}
        return [Part(IA3(where=where, inputs=""), ones)]
    dropout = float(told.take("dropout", (int, float), 0.0))
    return [Part(LoRA(rank=rank, alpha=float(alpha), dropout=dropout, where=where), own)]


def _places(
    held: Held, path: str, tensors: Tensors, sites: Sequence[Site], letters: Sequence[str]
) -> list[tuple[Site, Tensors]]:
    """The sites of a module's tensors with those of each."""
    here = [site for site in sites if site.path == path and site.param == "weight"]
    whole = next((site for site in here if site.rows is None), None)
    A, B = tensors.get("A"), tensors["B"]
    if whole is None:
        raise ExchangeError(
            f"{held.where} adapts `{path}`, which is no matrix of this model; load the model that "
            "it was trained on"
        )
    roles = [site for site in here if site.rows and site.role.rpartition(".")[2] in letters]
    if not roles:
        return [(whole, tensors)]
    rows = len(roles) * B.shape[1] if A is not None else None
    if B.shape[0] != sum(site.shape[-2] for site in roles) or (A is not None and len(A) != rows):
        both = "" if A is None else f"a lora_A {tuple(A.shape)} and "
        raise ExchangeError(
            f"{held.where}: `{path}` has {both}a lora_B {tuple(B.shape)}, which is not of its "
            f"roles {', '.join(map(str, letters))}; load the model that it was trained on"
        )
    parts: list[tuple[Site, Tensors]] = []
    ups: Sequence[Tensor] = B.split([site.shape[-2] for site in roles])
    downs = A.chunk(len(roles)) if A is not None else [None] * len(roles)
    for site, up, down in zip(roles, ups, downs, strict=True):
        parts.append((site, {"B": up} if down is None else {"A": down, "B": up}))
    return parts

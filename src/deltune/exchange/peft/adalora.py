"""AdaLoRA in PEFT's format: `<module>.lora_A` (r, in), `<module>.lora_B` (out, r) and
`<module>.lora_E` (r, 1); of a pruned checkpoint only the triplets that are left.
Trained tokens may stand beside."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from deltune.delta import Delta
from deltune.errors import ExchangeError
from deltune.exchange.foreign import Held, Told
from deltune.exchange.peft import tokens
from deltune.exchange.peft.lora import OTHERS
from deltune.exchange.peft.matrices import Form, Found, Options, Tensors
from deltune.families.reparameterization.adalora import AdaLoRA
from deltune.families.specification.tokens import Tokens
from deltune.mechanisms.unit import Unit
from deltune.planning import Plan
from deltune.sites.discover import Atlas
from deltune.sites.site import Site
from deltune.spec import Spec


def _options(told: Told) -> Options:
    told.take("rank_pattern", dict, {})  # which triplets are left; the file has them in order
    rank, target = told.take("init_r", int, 12), told.take("target_r", int, 8)
    steps = max(1, told.take("total_step", int, 1))
    options = {
        "rank": rank,
        "target": min(rank, target),
        "alpha": float(told.take("lora_alpha", (int, float), 8)),
        "dropout": float(told.take("lora_dropout", (int, float), 0)),
        "orthogonality": float(told.take("orth_reg_weight", (int, float), 0.5)),
        "beta1": told.take("beta1", float, 0.85),
        "beta2": told.take("beta2", float, 0.85),
        "warmup": told.take("tinit", int, 0) / steps,
        "cooldown": told.take("tfinal", int, 0) / steps,
        "interval": told.take("deltaT", int, 1),
    }
    return lambda path, tensors: options


def _ours(site: Site, tensors: Tensors, options: Mapping[str, Any]) -> dict[str, Tensor]:
    """The triplets of a file, and empty ones up to the rank at first."""
    if set(tensors) != {"A", "B", "E"} or any(tensor.ndim != 2 for tensor in tensors.values()):
        raise ExchangeError(
            f"the checkpoint has not lora_A, lora_B and lora_E at `{site.path}`, each a matrix; "
            "save it again"
        )
    rank, most = options["rank"], max(*site.shape, *tensors["E"].shape)
    if rank > most:
        raise ExchangeError(
            f"`init_r` is {rank}, and the matrix at `{site.path}` has the shape {site.shape}: "
            f"expected at most {most}; one of the checkpoint's two files is not of it"
        )
    gap = rank - tensors["E"].shape[0]
    if gap < 0:
        raise ExchangeError(
            f"the checkpoint has {tensors['E'].shape[0]} triplets at `{site.path}`, more than its "
            f"`init_r`, {options['rank']}; one of its two files is not of it"
        )
    return {
        "A": F.pad(tensors["A"], (0, 0, 0, gap)),
        "B": F.pad(tensors["B"], (0, gap)),
        "E": F.pad(tensors["E"].flatten(), (0, gap)),
    }


def _scaled(unit: Unit) -> dict[str, Tensor]:
    return {"A": unit.A, "B": unit.B, "E": unit.scale * unit.E[:, None]}


def _config(unit: Unit) -> dict[str, Any]:
    spec, steps = unit.spec, 1000
    return {
        "init_r": spec.rank, "target_r": spec.target, "lora_alpha": spec.alpha,
        "lora_dropout": spec.dropout, "orth_reg_weight": spec.orthogonality, "beta1": spec.beta1,
        "beta2": spec.beta2, "deltaT": spec.interval, "total_step": steps,
        "tinit": round(spec.warmup * steps), "tfinal": round(spec.cooldown * steps),
    }  # fmt: skip


FORM = Form(
    "ADALORA", AdaLoRA, {"A": "lora_A", "B": "lora_B", "E": "lora_E"}, _options, _config, {},
    _scaled, ("r", "init_lora_weights", *OTHERS), {"bias": "none"}, ours=_ours,
)  # fmt: skip
Read = tuple[Found, tokens.Changes]


def read(told: Told, held: Held, atlas: Atlas) -> tuple[list[Spec], Read]:
    """The specs of a checkpoint, of trained tokens too, and its tensors."""
    specs, found = FORM.read(told, held, atlas)
    further, changes = tokens.read_beside(told, held, atlas)
    return [*specs, *further], (found, changes)


def fill(made: Plan, read: Read) -> dict[str, Tensor]:
    """The tensors of a plan."""
    found, changes = read
    return FORM.fill(made, found) | tokens.fill(made, changes)


def write(delta: Delta, units: Iterable[Unit]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The configuration and the tensors of a delta's units, of triplets and of trained tokens."""
    every = list(units)
    chosen = [unit for unit in every if isinstance(unit.spec, Tokens)]
    triplets = [unit for unit in every if not isinstance(unit.spec, Tokens)]
    config, tensors = FORM.write(delta, triplets)
    indices, rows = tokens.write_beside(delta, chosen)
    return config | {"trainable_token_indices": indices or None}, tensors | rows


FACE = replace(FORM.face(), read=read, fill=fill, write=write, beside=(Tokens,))

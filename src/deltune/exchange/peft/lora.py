"""LoRA and DoRA in PEFT's format: `<module>.lora_A.weight` (r, in), `<module>.lora_B.weight`
(out, r), `<module>.lora_magnitude_vector` (out)."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from deltune.delta import Delta
from deltune.errors import ExchangeError, listing
from deltune.exchange.foreign import Held, Told
from deltune.exchange.names import exactly, looked_up, named, stored_flipped, whole
from deltune.exchange.peft import tokens
from deltune.exchange.peft.face import PLACES, Face
from deltune.exchange.peft.matrices import backbone_tables
from deltune.families.reparameterization.dora import DoRA
from deltune.families.reparameterization.lora import LoRA
from deltune.families.specification.tokens import Tokens
from deltune.mechanisms.unit import Unit, pretrained
from deltune.mechanisms.weight import matrices
from deltune.planning import Plan
from deltune.sites.discover import Atlas
from deltune.spec import Spec

OTHERS = ("megatron_config", "megatron_core", "loftq_config", "qalora_group_size")
SILENT = (*PLACES, *OTHERS)
"""Fields that say where tensors are, which the tensors themselves say, or how training began."""
STARTS = (True, False, "gaussian", "orthogonal")
"""Initialisations that leave the backbone as it is."""
_KINDS = {
    ".lora_A.weight": "A", ".lora_B.weight": "B",
    ".lora_embedding_A": "A", ".lora_embedding_B": "B", ".lora_magnitude_vector": "m",
}  # fmt: skip


Found = tuple[dict[str, dict[str, Tensor]], tokens.Changes]
"""Module -> A and B; the changes of trained tokens."""


def read(told: Told, held: Held, atlas: Atlas) -> tuple[list[Spec], Found]:
    """The specs of a checkpoint, one for each alpha and for trained tokens, and its tensors.

    Raises:
        ExchangeError: what cannot be honoured; modules that the model lacks.
    """
    start = told.values.get("init_lora_weights", True)
    if start not in STARTS:
        raise ExchangeError(
            f"{told.where}: init_lora_weights is {start!r}, which changed the backbone's weights "
            "before training; save it converted to plain LoRA: PEFT's "
            "`path_initial_model_for_weight_conversion`"
        )
    told.left.discard("init_lora_weights")
    rank, alpha = told.take("r", int, 8), told.take("lora_alpha", (int, float), 8)
    ranks = told.take("rank_pattern", dict, {})
    alphas = told.take("alpha_pattern", dict, {})
    root, dropout = told.take("use_rslora", bool, False), told.take("lora_dropout", (int, float), 0)
    directed = told.take("use_dora", bool, False)
    tensors = _pairs(held, directed)
    backbone_tables(held, atlas)
    sites = whole(atlas)
    lacking = [path for path in tensors if path not in sites]
    if lacking or not tensors:
        raise ExchangeError(
            f"{held.where} adapts {listing(lacking, 4) or 'nothing'}, which "
            f"{type(atlas.model).__name__} has no matrices at; load the model that it belongs to"
        )
    groups: dict[float, dict[str, int]] = {}
    for path, pair in tensors.items():
        own = int(looked_up(ranks, path, rank))
        if pair["A"].shape[0] != own:
            raise ExchangeError(
                f"{held.where}: `{path}` has rank {pair['A'].shape[0]} and the configuration says "
                f"{own}; one of the two files is not of this checkpoint"
            )
        groups.setdefault(float(looked_up(alphas, path, alpha)), {})[path] = own
    scaling = "root" if root else "linear"
    specs: list[Spec] = []
    for own, paths in groups.items():
        method = DoRA if directed else LoRA
        one = method(rank=_ranks(atlas, paths), alpha=own, dropout=float(dropout), scaling=scaling)
        if isinstance(one.rank, int):
            one = replace(one, where=named(atlas, paths, matrices(atlas)))
        specs.append(one)
    further, changes = tokens.read_beside(told, held, atlas)
    return [*specs, *further], (tensors, changes)


def fill(made: Plan, read: Found) -> dict[str, Tensor]:
    """The tensors of a plan."""
    tensors, changes = read
    found = tokens.fill(made, changes)
    for step in made.steps:
        if isinstance(step.spec, LoRA):
            for own, param in step.tensors.items():
                tensor = tensors[step.site.path][own]
                if tuple(tensor.shape) != tuple(param.shape):
                    raise ExchangeError(
                        f"`{step.site.path}`: lora_{own} has the shape {tuple(tensor.shape)} and "
                        f"this model wants {tuple(param.shape)}; load the model it belongs to"
                    )
                found[f"{step.key}.{own}"] = tensor.float()
    return found


def write(delta: Delta, units: Iterable[Unit]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The configuration and the tensors of a delta's units, of LoRA and of trained tokens.

    Several pairs on one matrix, as those of the roles of a fused one, become one pair of the sum of
    their ranks, exactly.

    Raises:
        ExchangeError: gates, stored experts, several dropouts: PEFT has no words for them.
    """
    groups: dict[str, list[Unit]] = {}
    chosen = [unit for unit in units if isinstance(unit.spec, Tokens)]
    for unit in units:
        if unit not in chosen:
            groups.setdefault(unit.site.path, []).append(unit)
    every = [unit for some in groups.values() for unit in some]
    dropouts = {unit.spec.dropout for unit in every}
    if len(dropouts) > 1:
        raise ExchangeError(f"`{delta.name}` has the dropouts {sorted(dropouts)}; PEFT has one")
    directed = any(isinstance(unit.spec, DoRA) for unit in every)
    indices, tensors = tokens.write_beside(delta, chosen)
    if both := [path for path in indices if path in groups]:
        raise ExchangeError(
            f"`{delta.name}` has pairs and trained tokens at `{both[0]}`; PEFT has one of them"
        )
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    modules = dict(delta.model.named_modules())
    for path, some in groups.items():
        down, up, scale = _joined(some, modules[path])
        ranks[path], alphas[path] = down.shape[0], scale * down.shape[0]
        embedding = isinstance(modules[path], torch.nn.Embedding)
        names = (".lora_embedding_A", ".lora_embedding_B") if embedding else (
            ".lora_A.weight", ".lora_B.weight"
        )  # fmt: skip
        for name, tensor in zip(names, (down, up), strict=True):
            tensors[path + name] = tensor
        if directed:
            tensors[f"{path}.lora_magnitude_vector"] = _magnitudes(some, modules[path])
    rank, alpha = (Counter(one.values()).most_common(1)[0][0] for one in (ranks, alphas))
    config = {
        "peft_type": "LORA", "r": rank, "lora_alpha": alpha, "lora_dropout": dropouts.pop(),
        "target_modules": sorted(ranks), "bias": "none", "use_rslora": False,
        "use_dora": directed,
        "rank_pattern": {exactly(path): own for path, own in ranks.items() if own != rank},
        "alpha_pattern": {exactly(path): own for path, own in alphas.items() if own != alpha},
        "init_lora_weights": True,
        "fan_in_fan_out": stored_flipped(modules[path] for path in groups),
        "trainable_token_indices": indices or None,
    }  # fmt: skip
    return config, tensors


def _joined(units: list[Unit], module: torch.nn.Module) -> tuple[Tensor, Tensor, float]:
    """A (r, in), B (out, r) and the scale of all changes of one matrix; of several their scales are
    in B."""
    downs, ups, scale = [], [], 1.0
    for unit in units:
        inside = unit.A.ndim != 2 or unit.site.param != "weight"
        if unit.spec.gate or inside:
            what = "a gate" if unit.spec.gate else f"pairs for its `{unit.site.param}`"
            raise ExchangeError(
                f"LoRA at `{unit.site.path}` has {what}, which PEFT's format has no place for; "
                "convert it: `deltune convert`"
            )
        update = unit.spec.update(unit)
        scale = update.scale * unit.scale
        up = update.up if len(units) == 1 else scale * update.up
        downs.append(update.down)
        if unit.site.rows:
            up = unit.site.spread(up.mT, pretrained(module, "weight")).mT
        ups.append(up)
    return torch.cat(downs), torch.cat(ups, dim=1), scale if len(units) == 1 else 1.0


def _magnitudes(units: list[Unit], module: torch.nn.Module) -> Tensor:
    """The magnitudes (out) of all rows of a matrix: those of DoRA where it acts."""
    roles = [unit.site.rows for unit in units]
    one = len(units) == 1 or (all(roles) and len(set(roles)) == len(roles))
    if not one or any(unit.scale != 1.0 or not isinstance(unit.spec, DoRA) for unit in units):
        raise ExchangeError(
            f"`{units[0].site.path}` has several changes, or a DoRA that is scaled, and PEFT can "
            "write neither beside DoRA; merge the delta, or convert it: `deltune convert`"
        )
    stored = pretrained(module, "weight")
    whole = stored.mT if units[0].site.transposed else stored
    found = torch.linalg.vector_norm(whole.float(), dim=-1)
    for unit in units:
        rows = unit.site.rows
        found = rows.add(found, unit.m - rows.take(found)) if rows else unit.m
    return found


def _pairs(held: Held, directed: bool) -> dict[str, dict[str, Tensor]]:
    found: dict[str, dict[str, Tensor]] = {}
    for name in list(held.left):
        kind = next((kind for kind in _KINDS if name.endswith(kind)), None)
        if kind:
            found.setdefault(name.removesuffix(kind), {})[_KINDS[kind]] = held.take(name)
    for path, pair in found.items():
        sides = {"A": 2, "B": 2, "m": 1} if directed else {"A": 2, "B": 2}
        if {own: tensor.ndim for own, tensor in pair.items()} != sides:
            vector = " and the vector lora_magnitude_vector" if directed else ""
            raise ExchangeError(
                f"{held.where}: `{path}` has not the two matrices lora_A and lora_B{vector} alone; "
                "save it again"
            )
    return found


def _ranks(atlas: Atlas, paths: Mapping[str, int]) -> int | dict[str, int]:
    """One rank, or one for each group of modules."""
    ranks = set(paths.values())
    if len(ranks) == 1:
        return ranks.pop()
    found = {}
    for rank in sorted(ranks):
        same = [path for path, own in paths.items() if own == rank]
        found |= dict.fromkeys(named(atlas, same, matrices(atlas)).split(", "), rank)
    return found


FACE = Face(LoRA, read, fill, write, SILENT, {"bias": "none"}, beside=(Tokens,))

"""LoRA and DoRA in PEFT's format: `<module>.lora_A.weight` (r, in), `<module>.lora_B.weight`
(out, r), `<module>.lora_magnitude_vector` (out); on stored experts and with biases too."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from deltune.delta import Delta
from deltune.errors import ExchangeError, listing
from deltune.exchange.foreign import Held, Told
from deltune.exchange.names import exactly, looked_up, named, stored_flipped, whole
from deltune.exchange.parts import filled
from deltune.exchange.peft import biases, parameters, tokens
from deltune.exchange.peft.face import PLACES, Face
from deltune.exchange.peft.matrices import backbone_tables, started
from deltune.families.reparameterization.dora import DoRA
from deltune.families.reparameterization.lora import LoRA
from deltune.families.specification.bitfit import BitFit
from deltune.families.specification.tokens import Tokens
from deltune.mechanisms.modules import pretrained
from deltune.mechanisms.starts import KEPT
from deltune.mechanisms.unit import Unit
from deltune.mechanisms.weight import matrices
from deltune.planning import Plan
from deltune.sites.discover import Atlas
from deltune.sites.site import Site
from deltune.spec import Spec

OTHERS = ("megatron_config", "megatron_core", "loftq_config", "qalora_group_size", "eva_config",
          "ensure_weight_tying")  # fmt: skip
SILENT = (*PLACES, *OTHERS)
"""Fields that say where tensors are, which the tensors themselves say, or how training began."""
STARTS = (True, False, "gaussian", "orthogonal", "eva", "mica")
"""Initialisations that leave the backbone as it is."""
RETRACED = ("pissa", "olora")
"""Those that take from its weight what can be found again."""
_KINDS = {
    ".lora_A.weight": "A", ".lora_B.weight": "B",
    ".lora_embedding_A": "A", ".lora_embedding_B": "B", ".lora_magnitude_vector": "m",
}  # fmt: skip


Found = tuple[dict[str, dict[str, Tensor]], tokens.Changes, biases.Changes]
"""Module or parameter -> A and B; the changes of trained tokens and of biases."""
Inside = tuple[Site, Tensor, Tensor]
"""A parameter, A and B."""


def read(told: Told, held: Held, atlas: Atlas) -> tuple[list[Spec], Found]:
    """The specs of a checkpoint, one for each alpha, for biases and for trained tokens, and its
    tensors.

    Raises:
        ExchangeError: what cannot be honoured; modules that the model lacks.
    """
    start = _start(told)
    rank, alpha = told.take("r", int, 8), told.take("lora_alpha", (int, float), 8)
    ranks = told.take("rank_pattern", dict, {})
    alphas = told.take("alpha_pattern", dict, {})
    root, dropout = told.take("use_rslora", bool, False), told.take("lora_dropout", (int, float), 0)
    directed = told.take("use_dora", bool, False)
    stored = parameters.targeted(told, atlas)
    tensors = parameters.unfolded(told, held, _pairs(held, directed), atlas, stored)
    backbone_tables(held, atlas)
    sites = whole(atlas) | stored
    lacking = [path for path in tensors if path not in sites]
    if lacking or not tensors:
        raise ExchangeError(
            f"{held.where} adapts {listing(lacking, 4) or 'nothing'}, which "
            f"{type(atlas.model).__name__} has no matrices at; load the model that it belongs to"
        )
    groups: dict[float, dict[str, int]] = {}
    for path, pair in tensors.items():
        theirs = f"{sites[path].path}.{sites[path].param}" if path in stored else path
        own = int(looked_up(ranks, theirs, rank))
        if pair["A"].shape[-2] != own:
            raise ExchangeError(
                f"{held.where}: `{path}` has rank {pair['A'].shape[-2]} and the configuration says "
                f"{own}; one of the two files is not of this checkpoint"
            )
        groups.setdefault(float(looked_up(alphas, theirs, alpha)), {})[path] = own
    scaling = "root" if root else "linear"
    specs: list[Spec] = []
    for own, paths in groups.items():
        method = DoRA if directed else LoRA
        one = method(
            rank=_ranks(atlas, paths),
            alpha=own,
            dropout=float(dropout),
            scaling=scaling,
            init=start,
        )
        if isinstance(one.rank, int):
            one = replace(one, where=named(atlas, paths, matrices(atlas)))
        specs.append(one)
    scales = {p: a / (r**0.5 if root else r) for a, rs in groups.items() for p, r in rs.items()}
    tuned, shifts = biases.read_beside(told, held, atlas, scales)
    further, changes = tokens.read_beside(told, held, atlas)
    return [*specs, *tuned, *further], (tensors, changes, shifts)


def _start(told: Told) -> Literal["zero", "pissa", "olora"]:
    """Where the pairs of a checkpoint started, as far as it says what they change now."""
    start = told.values.get("init_lora_weights", True)
    told.left.discard("init_lora_weights")
    if start in RETRACED:
        return start
    if start not in STARTS:
        raise ExchangeError(
            f"{told.where}: init_lora_weights is {start!r}, which changed the backbone's weights "
            "before training by what the file does not say; save it converted to plain LoRA: "
            "PEFT's `path_initial_model_for_weight_conversion`"
        )
    return "zero"


def fill(made: Plan, read: Found) -> dict[str, Tensor]:
    """The tensors of a plan."""
    tensors, changes, shifts = read
    found = tokens.fill(made, changes) | filled(made, shifts, BitFit)
    for step in made.steps:
        if isinstance(step.spec, LoRA):
            for own, param in step.tensors.items():
                if own in KEPT:
                    found[f"{step.key}.{own}"] = started(param)
                    continue
                tensor = tensors[step.site.key][own]
                if tuple(tensor.shape) != tuple(param.shape):
                    raise ExchangeError(
                        f"`{step.site.key}`: lora_{own} has the shape {tuple(tensor.shape)} and "
                        f"this model wants {tuple(param.shape)}; load the model it belongs to"
                    )
                found[f"{step.key}.{own}"] = tensor.float()
    return found


def write(delta: Delta, units: Iterable[Unit]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The configuration and the tensors of a delta's units, of LoRA, of biases and of trained
    tokens.

    Several pairs on one matrix, as those of the roles of a fused one, become one pair of the sum of
    their ranks, exactly.

    Raises:
        ExchangeError: gates, several dropouts: PEFT has no words for them.
    """
    chosen, shifted, groups = list[Unit](), list[Unit](), dict[str, list[Unit]]()
    for unit in units:
        if isinstance(unit.spec, Tokens):
            chosen.append(unit)
        elif isinstance(unit.spec, BitFit):
            shifted.append(unit)
        else:
            groups.setdefault(unit.site._replace(rows=None).key, []).append(unit)
    indices, tensors = tokens.write_beside(delta, chosen)
    if both := [path for path in indices if path in groups]:
        raise ExchangeError(
            f"`{delta.name}` has pairs and trained tokens at `{both[0]}`; PEFT has one of them"
        )
    every = [unit for some in groups.values() for unit in some]
    directed = any(isinstance(unit.spec, DoRA) for unit in every)
    modules = dict(delta.model.named_modules())
    ranks, alphas, inside = dict[str, int](), dict[str, float](), dict[str, Inside]()
    for some in groups.values():
        site, module = some[0].site, modules[some[0].site.path]
        down, up, scale = _joined(some, module)
        stored = parameters.parameter(site, modules)
        path = stored or site.path
        ranks[path], alphas[path] = down.shape[-2], scale * down.shape[-2]
        if stored:
            inside[path] = (site._replace(rows=None), down, up)
        else:
            tensors |= _named(path, module, down, up)
        if directed and not stored:
            tensors[f"{path}.lora_magnitude_vector"] = _magnitudes(some, module)
    plain = [path for path in ranks if path not in inside]
    bias, shifts = biases.write_beside(delta, shifted, plain)
    rank, alpha = (Counter(one.values()).most_common(1)[0][0] for one in (ranks, alphas))
    config = {
        "peft_type": "LORA", "r": rank, "lora_alpha": alpha,
        "lora_dropout": _dropout(delta, every, plain, inside), "target_modules": sorted(plain),
        "target_parameters": sorted(inside) or None, "bias": bias, "use_rslora": False,
        "use_dora": directed,
        "rank_pattern": {exactly(path): own for path, own in ranks.items() if own != rank},
        "alpha_pattern": {exactly(path): own for path, own in alphas.items() if own != alpha},
        "init_lora_weights": True,
        "fan_in_fan_out": stored_flipped(modules[path] for path in plain),
        "trainable_token_indices": indices or None,
    }  # fmt: skip
    return config, tensors | parameters.folded(modules, inside.values()) | shifts


def _named(path: str, module: torch.nn.Module, down: Tensor, up: Tensor) -> dict[str, Tensor]:
    """The pair of a module that PEFT has a layer for."""
    names = ("lora_A.weight", "lora_B.weight")
    if isinstance(module, torch.nn.Embedding):
        names = ("lora_embedding_A", "lora_embedding_B")
    return {f"{path}.{name}": tensor for name, tensor in zip(names, (down, up), strict=True)}


def _dropout(delta: Delta, units: list[Unit], plain: Iterable[str], inside: Iterable[str]) -> float:
    """The one dropout of a delta. PEFT has none on parameters, where it never acts here."""
    if not list(plain):
        return 0.0
    dropouts = {unit.spec.dropout for unit in units}
    if len(dropouts) > 1:
        raise ExchangeError(f"`{delta.name}` has the dropouts {sorted(dropouts)}; PEFT has one")
    if any(dropouts) and list(inside):
        raise ExchangeError(
            f"`{delta.name}` has dropout, and pairs for {listing(inside, 2)}, which PEFT refuses "
            "together; train these as a delta of their own, or without dropout"
        )
    return dropouts.pop()


def _joined(units: list[Unit], module: torch.nn.Module) -> tuple[Tensor, Tensor, float]:
    """A (..., r, in), B (..., out, r) and the scale of all changes of one matrix; of several their
    scales are in B."""
    downs, ups, scale = [], [], 1.0
    for unit in units:
        site = unit.site
        if unit.spec.gate or (isinstance(unit.spec, DoRA) and site.kind == "dense"):
            what = "a gate" if unit.spec.gate else f"magnitudes for its `{site.param}`"
            raise ExchangeError(
                f"LoRA at `{site.path}` has {what}, which PEFT's format has no place for; "
                "convert it: `deltune convert`"
            )
        update = unit.spec.update(unit)
        scale = update.scale * unit.scale
        up = update.up if len(units) == 1 else scale * update.up
        downs.append(update.down)
        if site.rows:
            up = site.spread(up.mT, pretrained(module, site.param)).mT
        ups.append(up)
    return torch.cat(downs, dim=-2), torch.cat(ups, dim=-1), scale if len(units) == 1 else 1.0


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


FACE = Face(LoRA, read, fill, write, SILENT, beside=(Tokens, BitFit))

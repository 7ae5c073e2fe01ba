"""Checkpoints of OpenDelta as deltas: `config.json` and `pytorch_model.bin`, which has what was
trained under the names that it has in the model."""

from collections.abc import Callable
from pathlib import Path

from torch import nn

from deltune.delta import Delta
from deltune.errors import ExchangeError, closest, listing
from deltune.exchange.foreign import Held, Told, read_json
from deltune.exchange.names import take_head
from deltune.exchange.parts import Part, Tensors, addressed, attach_parts, read_first
from deltune.families.addition.adapter import Adapter
from deltune.families.addition.compacter import Compacter
from deltune.families.reparameterization.lora import LoRA
from deltune.families.specification.bitfit import BitFit
from deltune.mechanisms.activations import Activation
from deltune.mechanisms.insert import layers
from deltune.mechanisms.select import places
from deltune.mechanisms.weight import matrices
from deltune.sites.discover import Atlas, discover
from deltune.sites.site import Site

CONFIG, FILES = "config.json", ("pytorch_model.safetensors", "pytorch_model.bin")
SILENT = ("delta_type", "modified_modules", "exclude_modules", "unfrozen_modules",
          "common_structure", "backbone_class", "backbone_checkpoint_name", "backbone_hash",
          "transformers_version", "opendelta_version", "model_type")  # fmt: skip
"""Fields that say where tensors are, as their names do, or nothing about what they do."""
ACTIVATIONS: dict[str, Activation] = {
    "relu": "relu", "gelu_new": "gelu", "gelu_orig": "gelu_exact", "swish": "silu", "tanh": "tanh",
}  # fmt: skip
LORA = {"lora.lora_A": "A", "lora.lora_B": "B"}
ADAPTER = {
    "adapter.modulelist.down_proj.weight": "D", "adapter.modulelist.down_proj.bias": "b1",
    "adapter.modulelist.up_proj.weight": "U", "adapter.modulelist.up_proj.bias": "b2",
}  # fmt: skip
LEARNED = {"W_left": "u", "W_right": "v", "W": "S", "phm_rule": "A"}
COMPACTER = {
    **{f"compactor.{side}_sampler.{name}": f"{ours}_{end}"
       for side, end in (("down", "D"), ("up", "U")) for name, ours in LEARNED.items()},
    "compactor.down_sampler.b": "b1", "compactor.up_sampler.b": "b2",
}  # fmt: skip
LOW_RANK = {
    name.replace("compactor", "low_rank_adapter"): ours
    for name, ours in COMPACTER.items()
    if ours[0] in "uvb"
}
DRAWN = ("phm_c_init", "hypercomplex_nonlinearity", "phm_init_range", "low_rank_w_init")
UNUSED = ("bottleneck_dim", "sequential", "kronecker_prod")  # by Compacter, whose sums are the same


def load_opendelta(path: str | Path, model: nn.Module, name: str = "delta") -> Delta:
    """Attaches what `save_finetuned` of OpenDelta 0.3 wrote.

    Read are the types `lora`, `adapter`, `compacter`, `low_rank_adapter` and `bitfit`, with a new
    head where the file has one; every field of the configuration and every tensor is honoured, or
    refused by its name.

    `pytorch_model.bin` is a pickle. It is read by torch's reader of nothing but tensors; where
    there is `pytorch_model.safetensors`, that is read instead.

    Args:
        path: the folder with `config.json`.
        model: the backbone. The file has no name of it that could be compared; shapes must agree.
        name: for the delta.

    Raises:
        ExchangeError: no such folder, a damaged file, another type of delta, tensors that are not
            understood. The model is untouched then.

    Source: Hu et al., "OpenDelta: A Plug-and-play Library for Parameter-efficient Adaptation of
    Pre-trained Models", 2023, arXiv:2307.03084; the format of version 0.3.2.
    Differs: an adapter on the linear map that ends a sub-layer stands behind the dropout that
    follows the map, in training; the matrices of a low-rank adapter are read as their products.

    Example:
        >>> import json, tempfile, torch
        >>> folder = Path(tempfile.mkdtemp())
        >>> told = {"delta_type": "lora", "lora_r": 2}
        >>> size = (folder / "config.json").write_text(json.dumps(told))
        >>> tensors = {"0.lora.lora_A": torch.ones(2, 4), "0.lora.lora_B": torch.ones(4, 2)}
        >>> torch.save(tensors, folder / "pytorch_model.bin")
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> str(load_opendelta(folder, model).spec)
        "lora(where='0', rank=2)"
    """
    folder = Path(path)
    told = read_json(folder / CONFIG)
    kind = told.values.get("delta_type")
    if not isinstance(kind, str) or kind not in FORMS:
        near = closest(kind, FORMS) if isinstance(kind, str) else ""
        raise ExchangeError(
            f"{told.where} is of the `delta_type` {kind!r}{near}; this version reads "
            f"{listing(FORMS)}"
        )
    held = read_first(folder, FILES)
    atlas = discover(model)
    head = take_head(held, atlas)
    part = FORMS[kind](told, held, atlas)
    told.close((*SILENT, *DRAWN), {})
    held.close()
    return attach_parts(model, [part], name, head)


def _lora(told: Told, held: Held, atlas: Atlas) -> Part:
    rank, alpha = told.take("lora_r", int, 8), told.take("lora_alpha", (int, float), 16)
    dropout = float(told.take("lora_dropout", (int, float), 0.0))
    sites = [site for site in matrices(atlas) if site.rows is None]
    where, own = _placed(held, atlas, LORA, sites)
    return Part(LoRA(rank=rank, alpha=float(alpha), dropout=dropout, where=where), own)


def _adapter(told: Told, held: Held, atlas: Atlas) -> Part:
    width, activation = told.take("bottleneck_dim", int, 24), _activation(told)
    where, own = _placed(held, atlas, ADAPTER, layers(atlas))
    return Part(Adapter(width=width, activation=activation, where=where), own)


def _compacter(told: Told, held: Held, atlas: Atlas) -> Part:
    for name in UNUSED:
        told.left.discard(name)
    activation, n = _activation(told), told.take("hypercomplex_division", int, 4, least=1)
    reduction = float(told.take("reduction_factor", int, 16, least=1))
    rank = told.take("phm_rank", int, 1, least=1)
    rank = rank if told.take("factorized_phm", bool, True) else None
    for name in ("learn_phm", "use_bias_up_sampler", "use_bias_down_sampler"):
        if not told.take(name, bool, True):
            raise ExchangeError(
                f"{told.where}: `{name}` is false; Compacter is read with biases and rules that "
                "are trained: train it so"
            )
    where, own = _placed(held, atlas, COMPACTER, layers(atlas))
    spec = Compacter(
        n=n, rank=rank, reduction=reduction, share=False, activation=activation, where=where
    )
    return Part(spec, own)


def _low_rank(told: Told, held: Held, atlas: Atlas) -> Part:
    activation = _activation(told)
    reduction = float(told.take("reduction_factor", int, 32, least=1))
    if told.take("low_rank_rank", int, 1) != 1:
        raise ExchangeError(
            f"{told.where}: `low_rank_rank` is not 1, the only rank that OpenDelta runs with; the "
            "file is damaged: save it again"
        )
    where, factors = _placed(held, atlas, LOW_RANK, layers(atlas))
    own = {key: _multiplied(tensors, held.where) for key, tensors in factors.items()}
    return Part(Adapter(reduction=reduction, activation=activation, where=where), own)


def _multiplied(factors: Tensors, where: str) -> Tensors:
    """An adapter's tensors, D (m, d) and U (d, m), out of columns u and rows v."""
    found: Tensors = {name: factors[name] for name in ("b1", "b2") if name in factors}
    for name in "DU":
        u, v = factors.get(f"u_{name}"), factors.get(f"v_{name}")
        if u is None or v is None or u.ndim != 2 or v.ndim != 2 or u.shape[1] != 1 or len(v) != 1:
            raise ExchangeError(
                f"{where}: `W_left` and `W_right` are no column and row; save again"
            )
        found[name] = (u * v).mT.contiguous()
    return found


def _activation(told: Told) -> Activation:
    given = told.take("non_linearity", str, "gelu_new").lower()
    if given not in ACTIVATIONS:
        raise ExchangeError(
            f"{told.where}: `non_linearity` is {given!r}; known are {listing(ACTIVATIONS)}"
        )
    return ACTIVATIONS[given]


def _bitfit(told: Told, held: Held, atlas: Atlas) -> Part:
    every = [path for path, name in BitFit().chosen(atlas) if name == "bias"]
    own: dict[str, Tensors] = {}
    for path in every:
        if f"{path}.bias" in held.left:
            now = atlas.modules[path].get_parameter("bias").detach().float().cpu()
            value = held.take(f"{path}.bias", tuple(now.shape)).float()
            own[path] = {"bias": value - now}
    candidates = places(atlas, every)
    where = addressed(atlas, [site for site in candidates if site.path in own], candidates)
    if not own:
        raise ExchangeError(f"{held.where} trains no bias of {type(atlas.model).__name__}")
    return Part(BitFit(where=where), own)


FORMS: dict[str, Callable[[Told, Held, Atlas], Part]] = {
    "lora": _lora, "adapter": _adapter, "compacter": _compacter, "low_rank_adapter": _low_rank,
    "bitfit": _bitfit,
}  # fmt: skip


def _placed(
    held: Held, atlas: Atlas, names: dict[str, str], candidates: list[Site]
) -> tuple[str, dict[str, Tensors]]:
    """A `where` for the modules that a file has tensors of, and these by the keys of the sites."""
    sites = {site.path: site for site in reversed(candidates)}
    own: dict[str, Tensors] = {}
    for full in list(held.left):
        end = next((end for end in names if full.endswith(f".{end}")), "")
        path = full.removesuffix(f".{end}")
        if end and path in sites:
            own.setdefault(sites[path].key, {})[names[end]] = held.take(full)
    chosen = [site for site in candidates if site.key in own]
    if not chosen:
        raise ExchangeError(
            f"{held.where} adapts nothing of {type(atlas.model).__name__}; load the model that it "
            "belongs to"
        )
    return addressed(atlas, chosen, candidates), own

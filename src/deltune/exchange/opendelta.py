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


def load_opendelta(path: str | Path, model: nn.Module, name: str = "delta") -> Delta:
    """Attaches what `save_finetuned` of OpenDelta 0.3 wrote.

    Read are the types `lora`, `adapter` and `bitfit`, with a new head where the file has one; every
    field of the configuration and every tensor is honoured, or refused by its name.

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
    follows the map, in training.

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
    told.close(SILENT, {})
    held.close()
    return attach_parts(model, [part], name, head)


def _lora(told: Told, held: Held, atlas: Atlas) -> Part:
    rank, alpha = told.take("lora_r", int, 8), told.take("lora_alpha", (int, float), 16)
    dropout = float(told.take("lora_dropout", (int, float), 0.0))
    sites = [site for site in matrices(atlas) if site.rows is None]
    where, own = _placed(held, atlas, LORA, sites)
    return Part(LoRA(rank=rank, alpha=float(alpha), dropout=dropout, where=where), own)


def _adapter(told: Told, held: Held, atlas: Atlas) -> Part:
    width = told.take("bottleneck_dim", int, 24)
    given = told.take("non_linearity", str, "gelu_new").lower()
    if given not in ACTIVATIONS:
        raise ExchangeError(
            f"{told.where}: `non_linearity` is {given!r}; known are {listing(ACTIVATIONS)}"
        )
    where, own = _placed(held, atlas, ADAPTER, layers(atlas))
    return Part(Adapter(width=width, activation=ACTIVATIONS[given], where=where), own)


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
    "lora": _lora, "adapter": _adapter, "bitfit": _bitfit,
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

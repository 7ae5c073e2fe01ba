"""Prefixes in AdapterHub's format: `prefix_tunings.<name>.self_prefix`, either all keys and values
or the network that makes them; and again below every attention."""

import torch
from torch import Tensor
from torch.nn import functional as F

from deltune.errors import ExchangeError, listing
from deltune.exchange.foreign import Held, Told
from deltune.exchange.parts import Part, Tensors, addressed
from deltune.families.addition.prefix import Prefix
from deltune.mechanisms.insert import layers
from deltune.sites.discover import Atlas
from deltune.sites.site import Site

TYPES = ("bert", "roberta", "xlm-roberta", "camembert")
"""Types of models in which AdapterHub joins prefixes to what attention reads, and no more: T5's
have positions, and decoders' masks hide them."""


def read(told: Told, held: Held, atlas: Atlas, name: str) -> list[Part]:
    """The one part of a checkpoint, with the keys and values that its network made."""
    told.left -= {"encoder_prefix", "cross_prefix", "flat", "bottleneck_size", "shared_gating"}
    tokens = told.take("prefix_length", int, 30, least=1)
    dropout = float(told.take("dropout", (int, float), 0.0))
    kind = getattr(getattr(atlas.model, "config", None), "model_type", "")
    if told.take("non_linearity", str, "tanh") != "tanh" or told.values.get("leave_out"):
        raise ExchangeError(
            f"{told.where}: prefixes are read whose network has `tanh`, in all layers, alone"
        )
    if kind not in TYPES:
        raise ExchangeError(
            f"{told.where}: prefixes are read for models of the types {listing(TYPES)}, and this "
            f"one is of {kind or 'none'!r}; elsewhere AdapterHub's masks hide them, or they have "
            "positions"
        )
    network = _network(held, name)
    if not network:
        return []
    table = _table(network, tokens, held)
    candidates = layers(atlas)
    known = [site for site in candidates if site.role == "attn" and site.kind == "sublayer"]
    own = {site.key: _layer(table, site, held) for site in known}
    spec = Prefix(tokens=tokens, dropout=dropout, where=addressed(atlas, known, candidates))
    return [Part(spec, own)]


def _network(held: Held, name: str) -> Tensors:
    """The tensors of a prefix; they are the same ones wherever they stand."""
    found: Tensors = {}
    for full in list(held.left):
        _, inside, own = full.partition(f"prefix_tunings.{name}.self_prefix.")
        if inside:
            value = held.take(full)
            if not torch.equal(found.setdefault(own, value), value):
                raise ExchangeError(f"{held.where} has two values for `{own}` of its prefix")
    return found


def _table(own: Tensors, tokens: int, held: Held) -> Tensor:
    """(tokens, layers 2 d): keys and values of the layers, one behind the other."""
    if set(own) == {"control_trans"} and own["control_trans"].numel() % tokens == 0:
        return own["control_trans"].view(tokens, -1)
    try:
        hidden = torch.tanh(
            F.linear(own["wte.weight"], own["control_trans.0.weight"], own["control_trans.0.bias"])
        )
        made = F.linear(hidden, own["control_trans.2.weight"], own["control_trans.2.bias"])
        return made.view(tokens, -1)
    except (KeyError, RuntimeError) as error:
        raise ExchangeError(
            f"{held.where}: the network of its prefix is not understood ({error}); save it again"
        ) from None


def _layer(table: Tensor, site: Site, held: Held) -> Tensors:
    wide, at = sum(site.kv), site.layer or 0
    if table.shape[1] < (at + 1) * wide:
        raise ExchangeError(
            f"{held.where} has {table.shape[1]} numbers for each token of a prefix, too few for "
            f"layer {at}; load the model that it was trained on"
        )
    keys, values = table[:, at * wide : (at + 1) * wide].split(site.kv, 1)
    return {"K": keys.contiguous(), "V": values.contiguous()}

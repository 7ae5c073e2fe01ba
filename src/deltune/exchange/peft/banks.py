"""VB-LoRA in PEFT's format: `base_model.vblora_vector_bank`, `<module>.vblora_logits_A` and `_B`.

A file for inference holds, in place of logits, the places of the k largest and all weights of
their mixture but the last: `<module>.vblora_logits_A_topk_indices`, ..._topk_weights`.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from deltune.errors import ExchangeError
from deltune.exchange.foreign import Told
from deltune.exchange.peft.matrices import Form, Options, Tensors
from deltune.families.reparameterization.vblora import VBLoRA
from deltune.mechanisms.unit import Unit
from deltune.sites.site import Site

BELOW = 1.0  # how far logits that a file does not hold are put below those that it does


def _options(told: Told) -> Options:
    told.take("save_only_topk_weights", bool, False)  # the tensors say it
    same = {
        "rank": told.take("r", int, 4),
        "vectors": told.take("num_vectors", int, 256),
        "length": told.take("vector_length", int, 256),
        "top": told.take("topk", int, 2),
        "dropout": float(told.take("vblora_dropout", (int, float), 0.0)),
    }
    return lambda path, tensors: same


def _ours(site: Site, tensors: Tensors, options: Mapping[str, Any]) -> Tensors:
    """The logits, also where the file has the weights of the largest alone."""
    found = {own: tensors[own] for own in "PQ" if own in tensors}
    for own in "PQ":
        places, weights = tensors.get(f"{own}_places"), tensors.get(f"{own}_weights")
        if places is not None and weights is not None:
            found[own] = _logits(site, places.long(), weights.float(), options)
    return found


def _logits(site: Site, places: Tensor, weights: Tensor, options: Mapping[str, Any]) -> Tensor:
    """Logits with these largest ones; others lie below and do not act."""
    h, k = options["vectors"], options["top"]
    expected = (*places.shape[:-1], k - 1)
    apart = bool((places.sort().values.diff() > 0).all())
    inside = bool(((places >= 0) & (places < h)).all())
    if not (apart and inside and places.shape[-1:] == (k,) and weights.shape == expected):
        raise ExchangeError(
            f"the checkpoint has no {k} different places below {h} and the weights of {k - 1} at "
            f"`{site.path}`; save it again, without `save_only_topk_weights`"
        )
    whole = torch.cat([weights, 1 - weights.sum(-1, keepdim=True)], -1)
    largest = whole.clamp(min=torch.finfo(whole.dtype).tiny).log()
    others = largest.amin(-1, keepdim=True) - BELOW
    return others.expand(*places.shape[:-1], h).scatter(-1, places, largest)


def _config(unit: Unit) -> dict[str, Any]:
    spec = unit.spec
    return {
        "r": spec.rank, "num_vectors": spec.vectors, "vector_length": spec.length,
        "topk": spec.top, "vblora_dropout": spec.dropout,
    }  # fmt: skip


VBLORA = Form(
    "VBLORA", VBLoRA,
    {"P": "vblora_logits_A", "Q": "vblora_logits_B",
     "P_places": "vblora_logits_A_topk_indices", "P_weights": "vblora_logits_A_topk_weights",
     "Q_places": "vblora_logits_B_topk_indices", "Q_weights": "vblora_logits_B_topk_weights"},
    _options, _config, {}, None, ("init_vector_bank_bound", "init_logits_std"), {"bias": "none"},
    shared={"v": "base_model.vblora_vector_bank"}, ours=_ours,
    whole_numbers=("P_places", "Q_places"),
).face()  # fmt: skip

"""SHiRA in PEFT's format: `<module>.shira_weight` (k) and `<module>.shira_indices`, the rows and
columns (2, k) of these entries."""

from collections.abc import Mapping
from typing import Any

import torch

from deltune.errors import ExchangeError
from deltune.exchange.foreign import Told
from deltune.exchange.peft.matrices import Form, Options, Tensors
from deltune.families.specification.shira import SHiRA
from deltune.mechanisms.unit import Unit
from deltune.sites.site import Site


def _options(told: Told) -> Options:
    rank = told.take("r", int, 32)
    return lambda path, tensors: {"rank": rank}


def _ours(site: Site, tensors: Tensors, options: Mapping[str, Any]) -> Tensors:
    """The places as one number each; whole ones may stand in the file as float32."""
    *_, out, into = site.shape
    places = tensors.get("index")
    good = (
        places is not None and places.ndim == 2 and len(places) == 2
        and torch.equal(places, places.long().to(places.dtype))
        and bool(((places >= 0) & (places < torch.tensor([[out], [into]]))).all())
    )  # fmt: skip
    if not good or places is None:
        raise ExchangeError(
            f"the checkpoint has no `shira_indices` at `{site.path}` that are places of its {out} "
            f"x {into} matrix; save it again, for this model"
        )
    rows, columns = places.long()
    return {**tensors, "index": rows * into + columns}


def _config(unit: Unit) -> dict[str, Any]:
    if unit.spec.density is not None:
        raise ExchangeError(
            f"`{unit.spec}` has entries by their share; PEFT counts them by a rank, r (in + out)"
        )
    return {"r": unit.spec.rank, "mask_type": "random"}


def _theirs(unit: Unit) -> Tensors:
    into = unit.site.shape[-1]
    places = torch.stack([unit.index // into, unit.index % into]).int()
    return {"v": unit.scale * unit.v, "index": places}


FACE = Form(
    "SHIRA", SHiRA, {"v": "shira_weight", "index": "shira_indices"}, _options, _config, {}, _theirs,
    ("init_weights", "mask_type", "random_seed"), kinds=("linear",), ours=_ours,
    whole_numbers=("index",),
).face()  # fmt: skip

"""Shared shards in PEFT's format: `<module>.miss_block`."""

from typing import Any

from deltune.errors import ExchangeError
from deltune.exchange.foreign import Told
from deltune.exchange.peft.matrices import Form, Options, Tensors
from deltune.families.reparameterization.miss import MiSS
from deltune.mechanisms.unit import Unit


def _options(told: Told) -> Options:
    """What the change is, which PEFT calls an initialisation."""
    form = told.values.get("init_weights", True)
    told.left.discard("init_weights")
    if form not in (True, False, None, "bat", "mini"):
        raise ExchangeError(f"{told.where}: `init_weights` is {form!r}, which is not known here")
    bat, mini = form == "bat", told.take("mini_r", int, 1)
    dropout = float(told.take("miss_dropout", (int, float), 0))
    options = {
        "rank": told.take("r", int, 64),
        "mini": mini if form == "mini" else None,
        "bat": bat,
        "dropout": 0.0 if bat else dropout,  # PEFT has none there either
    }
    return lambda path, tensors: options


def _config(unit: Unit) -> dict[str, Any]:
    spec = unit.spec
    form = "bat" if spec.bat else "mini" if spec.mini else True
    return {
        "r": spec.rank, "mini_r": spec.mini or 1, "init_weights": form,
        "miss_dropout": spec.dropout,
    }  # fmt: skip


def _scaled(unit: Unit) -> Tensors:
    """Every form is linear in D."""
    return {"D": unit.D * unit.scale}


MISS = Form(
    "MISS", MiSS, {"D": "miss_block"}, _options, _config, {}, _scaled, defaults={"bias": "none"},
    kinds=("linear",),
).face()  # fmt: skip

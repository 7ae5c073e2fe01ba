"""VeRA in PEFT's format: `<module>.vera_lambda_d`, ..., and what all modules share beside them."""

from typing import Any

from deltune.exchange.foreign import Told
from deltune.exchange.peft.matrices import Form, Options, Tensors
from deltune.families.reparameterization.vera import VeRA
from deltune.mechanisms.unit import Unit

NUMBER = (int, float)


def _vera(told: Told) -> Options:
    taken = {
        "rank": told.take("r", int, 256),
        "start": float(told.take("d_initial", NUMBER, 0.1)),
        "dropout": float(told.take("vera_dropout", NUMBER, 0.0)),
        "seed": told.take("projection_prng_key", int, 0),
    }
    return lambda path, tensors: taken


def _config_vera(unit: Unit) -> dict[str, Any]:
    spec = unit.spec
    return {
        "r": spec.rank, "d_initial": spec.start, "vera_dropout": spec.dropout,
        "projection_prng_key": spec.seed, "save_projection": True,
    }  # fmt: skip


def _scaled_vera(unit: Unit) -> Tensors:
    return {"d": unit.d, "b": unit.scale * unit.b}


VERA = Form(
    "VERA", VeRA, {"d": "vera_lambda_d", "b": "vera_lambda_b"},
    _vera, _config_vera, {}, _scaled_vera, ("init_weights",), {"bias": "none"},
    {"A": "base_model.vera_A", "B": "base_model.vera_B"}, "save_projection",
).face()  # fmt: skip

"""VeRA and RandLoRA in PEFT's format: `<module>.vera_lambda_d`, `<module>.randlora_lambda`, ...;
the random matrices that all modules share stand beside them, or are drawn."""

from typing import Any

from deltune.exchange.foreign import Told
from deltune.exchange.peft.matrices import Form, Options, Tensors
from deltune.families.reparameterization.randlora import RandLoRA
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


def _randlora(told: Told) -> Options:
    sparse, very = (told.take(name, bool, False) for name in ("sparse", "very_sparse"))
    taken = {
        "rank": told.take("r", int, 32),
        "alpha": float(told.take("randlora_alpha", NUMBER, 640)),
        "bases": "very_sparse" if very else "sparse" if sparse else "dense",
        "dropout": float(told.take("randlora_dropout", NUMBER, 0.0)),
        "seed": told.take("projection_prng_key", int, 0),
    }
    return lambda path, tensors: taken


def _config_randlora(unit: Unit) -> dict[str, Any]:
    spec = unit.spec
    return {
        "r": spec.rank, "randlora_alpha": spec.alpha * unit.scale,
        "sparse": spec.bases == "sparse", "very_sparse": spec.bases == "very_sparse",
        "randlora_dropout": spec.dropout, "projection_prng_key": spec.seed,
        "save_projection": True,
    }  # fmt: skip


def _own(unit: Unit) -> Tensors:
    """The tensors as they are: the scale goes into alpha."""
    return dict(unit.named_parameters(recurse=False))


VERA = Form(
    "VERA", VeRA, {"d": "vera_lambda_d", "b": "vera_lambda_b"},
    _vera, _config_vera, {}, _scaled_vera, ("init_weights",), {"bias": "none"},
    {"A": "base_model.vera_A", "B": "base_model.vera_B"}, "save_projection",
).face()  # fmt: skip
RANDLORA = Form(
    "RANDLORA", RandLoRA, {"Lambda": "randlora_lambda", "Gamma": "randlora_gamma"},
    _randlora, _config_randlora, {}, _own, ("init_weights",), {"bias": "none"},
    {"A": "base_model.randlora_A", "B": "base_model.randlora_B"}, "save_projection",
).face()  # fmt: skip

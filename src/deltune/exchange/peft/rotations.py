"""Rotations and reflections in PEFT's format: `<module>.hra_u`."""

from typing import Any

from deltune.exchange.foreign import Told
from deltune.exchange.peft.matrices import Form, Options
from deltune.families.reparameterization.hra import HRA
from deltune.mechanisms.unit import Unit

DEFAULTS = {"bias": "none"}
START = ("init_weights",)


def _hra(told: Told) -> Options:
    options = {
        "rank": told.take("r", int, 8),
        "orthogonal": told.take("apply_GS", bool, False),
    }
    return lambda path, tensors: options


def _config_hra(unit: Unit) -> dict[str, Any]:
    return {"r": unit.spec.rank, "apply_GS": unit.spec.orthogonal}


HRA_FACE = Form(
    "HRA", HRA, {"U": "hra_u"}, _hra, _config_hra, {}, silent=START, defaults=DEFAULTS,
    places=("linear",),
).face()  # fmt: skip

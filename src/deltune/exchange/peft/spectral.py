"""FourierFT and C3A in PEFT's format: `<module>.fourierft_spectrum` (n), whose places are known by
their seed, and `<module>.c3a_kernel` (out / b, in / b, b)."""

from typing import Any

from deltune.exchange.foreign import Told
from deltune.exchange.names import BEHIND_A_DOT, behind_a_dot, looked_up
from deltune.exchange.peft.matrices import Form, Options, Tensors
from deltune.families.reparameterization.c3a import C3A
from deltune.families.reparameterization.fourierft import FourierFT
from deltune.mechanisms.unit import Unit


def _fourierft(told: Told) -> Options:
    count = told.take("n_frequency", int, 1000)
    counts = told.take("n_frequency_pattern", dict, {})
    same = {
        "alpha": float(told.take("scaling", (int, float), 150.0)),
        "seed": told.take("random_loc_seed", int, 777),
    }

    def options(path: str, tensors: Tensors) -> dict[str, Any]:
        return {"frequencies": int(looked_up(counts, path, count, BEHIND_A_DOT)), **same}

    return options


def _config_fourierft(unit: Unit) -> dict[str, Any]:
    spec = unit.spec
    return {"n_frequency": spec.frequencies, "scaling": spec.alpha, "random_loc_seed": spec.seed}


def _scaled_fourierft(unit: Unit) -> Tensors:
    return {"c": unit.scale * unit.c}


def _c3a(told: Told) -> Options:
    size, sizes = told.take("block_size", int, 256), told.take("block_size_pattern", dict, {})
    return lambda path, tensors: {"block": int(looked_up(sizes, path, size, BEHIND_A_DOT))}


def _config_c3a(unit: Unit) -> dict[str, Any]:
    return {"block_size": unit.spec.block}


def _scaled_c3a(unit: Unit) -> Tensors:
    return {"K": unit.scale * unit.K}


FOURIERFT = Form(
    "FOURIERFT", FourierFT, {"c": "fourierft_spectrum"}, _fourierft, _config_fourierft,
    {"n_frequency": "n_frequency_pattern"}, _scaled_fourierft, ("init_weights",),
    {"bias": "none"}, excepted=behind_a_dot,
).face()  # fmt: skip
C3A_FACE = Form(
    "C3A", C3A, {"K": "c3a_kernel"}, _c3a, _config_c3a, {"block_size": "block_size_pattern"},
    _scaled_c3a, ("init_weights",), {"bias": "none"}, kinds=("linear",), excepted=behind_a_dot,
).face()  # fmt: skip

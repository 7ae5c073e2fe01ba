"""LoHa and LoKr in PEFT's format: `<module>.hada_w1_a`, ...; `<module>.lokr_w1`, ..."""

from typing import Any

from deltune.exchange.foreign import Told
from deltune.exchange.names import looked_up
from deltune.exchange.peft.matrices import Form, Options, Tensors
from deltune.families.reparameterization.loha import LoHa
from deltune.families.reparameterization.lokr import LoKr
from deltune.mechanisms.unit import Unit
from deltune.sites.site import Kind

PATTERNS = {"r": "rank_pattern", "alpha": "alpha_pattern"}


def _ranked(told: Told) -> Options:
    """Rank and alpha, with their patterns."""
    rank, alpha = told.take("r", int, 8), told.take("alpha", (int, float), 8)
    ranks = told.take("rank_pattern", dict, {})
    alphas = told.take("alpha_pattern", dict, {})

    def options(path: str, tensors: Tensors) -> dict[str, Any]:
        return {
            "rank": int(looked_up(ranks, path, rank)),
            "alpha": float(looked_up(alphas, path, alpha)),
        }

    return options


def _lokr(told: Told) -> Options:
    ranked = _ranked(told)
    further = {
        "factor": told.take("decompose_factor", int, -1),
        "both": told.take("decompose_both", bool, False),
    }
    return lambda path, tensors: {**ranked(path, tensors), **further}


def _config(unit: Unit) -> dict[str, Any]:
    return {"r": unit.spec.rank, "alpha": unit.spec.alpha * unit.scale}


def _config_lokr(unit: Unit) -> dict[str, Any]:
    spec = unit.spec
    return {**_config(unit), "decompose_factor": spec.factor, "decompose_both": spec.both}


def _own(unit: Unit) -> Tensors:
    """The tensors as they are: the scale goes into alpha."""
    return dict(unit.named_parameters(recurse=False))


SILENT = ("init_weights", "rank_dropout_scale", "use_effective_conv2d")
LAYERS: tuple[Kind, ...] = ("linear", "dense")
"""Linear maps and convolutions."""
LOHA = Form(
    "LOHA", LoHa,
    {"B1": "hada_w1_a", "A1": "hada_w1_b", "B2": "hada_w2_a", "A2": "hada_w2_b"},
    _ranked, _config, PATTERNS, _own, SILENT, kinds=LAYERS,
).face()  # fmt: skip
LOKR = Form(
    "LOKR", LoKr,
    {"C": "lokr_w1", "C_B": "lokr_w1_a", "C_A": "lokr_w1_b",
     "D": "lokr_w2", "D_B": "lokr_w2_a", "D_A": "lokr_w2_b"},
    _lokr, _config_lokr, PATTERNS, _own, SILENT, kinds=LAYERS,
).face()  # fmt: skip

"""Rotations and reflections in PEFT's format: `<module>.hra_u`, `<module>.oft_R.weight`,
`<module>.boft_R` and `<module>.boft_s`."""

import re
from math import isqrt
from typing import Any

from torch import Tensor

from deltune.errors import ExchangeError
from deltune.exchange.foreign import Told
from deltune.exchange.peft.matrices import Form, Options, Tensors
from deltune.families.reparameterization.boft import BOFT
from deltune.families.reparameterization.hra import HRA
from deltune.families.reparameterization.oft import OFT
from deltune.mechanisms.unit import Unit

DEFAULTS = {"bias": "none"}
START = ("init_weights",)
SERIES, CHECKED = (0, 18), "0.21.2"
"""The version that gave the series its last term, and the one that ours was compared with."""


def _hra(told: Told) -> Options:
    options = {
        "rank": told.take("r", int, 8),
        "orthogonal": told.take("apply_GS", bool, False),
    }
    return lambda path, tensors: options


def _config_hra(unit: Unit) -> dict[str, Any]:
    return {"r": unit.spec.rank, "apply_GS": unit.spec.orthogonal}


def _oft(told: Told) -> Options:
    count, _ = told.take("r", int, 0), told.take("oft_block_size", int, 32)
    share, coft = told.take("block_share", bool, False), told.take("coft", bool, False)
    eps = float(told.take("eps", (int, float), 6e-5))
    terms = _terms(told)

    def options(path: str, tensors: Tensors) -> dict[str, Any]:
        rows, values = _sides(path, tensors.get("A"), 2)
        size = (1 + isqrt(1 + 8 * values)) // 2  # PEFT takes the next that divides the features
        if size < 2:
            raise ExchangeError(f"{told.where}: the blocks of `{path}` are of one feature each")
        by_count = count and not share
        return {
            "block": None if by_count else size, "blocks": rows if by_count else None,
            "terms": terms, "limit": eps if coft else None, "share": share,
        }  # fmt: skip

    return options


def _terms(told: Told) -> int | None:
    """Terms of the series, None for the exact inverse."""
    terms = told.take("num_cayley_neumann_terms", int, 5)
    if not told.take("use_cayley_neumann", bool, True):
        return None
    version = re.match(r"([0-9]{1,9})\.([0-9]{1,9})", str(told.values.get("peft_version")))
    if version is None or tuple(map(int, version.groups())) < SERIES:
        raise ExchangeError(
            f"{told.where} is of PEFT {told.values.get('peft_version') or 'before 0.18'}, whose "
            "series of the Cayley transform was another one; load it with that version and merge it"
        )
    if terms < 3:
        raise ExchangeError(
            f"{told.where}: `num_cayley_neumann_terms` is {terms}, too few for a rotation; load it "
            "with the library that wrote it and merge it"
        )
    return max(terms, 4)  # PEFT's 3 and 4 are the same


def _sides(path: str, tensor: Tensor | None, count: int) -> tuple[int, ...]:
    if tensor is None or tensor.ndim != count:
        what = "no rotation" if tensor is None else f"one of the shape {tuple(tensor.shape)}"
        raise ExchangeError(f"the checkpoint has {what} at `{path}`; it is damaged: save it again")
    return tuple(tensor.shape)


def _config_oft(unit: Unit) -> dict[str, Any]:
    spec = unit.spec
    return {
        "r": spec.blocks or 0, "oft_block_size": spec.block or 0, "block_share": spec.share,
        "coft": spec.limit is not None, "eps": spec.limit or 6e-5,
        "use_cayley_neumann": spec.terms is not None, "num_cayley_neumann_terms": spec.terms or 5,
        "peft_version": CHECKED,
    }  # fmt: skip


def _boft(told: Told) -> Options:
    count = told.take("boft_block_num", int, 0)

    def options(path: str, tensors: Tensors) -> dict[str, Any]:
        factors, found, size, _ = _sides(path, tensors.get("K"), 4)
        return {
            "block": None if count else size, "blocks": found if count else None,
            "factors": factors,
        }  # fmt: skip

    return options


def _config_boft(unit: Unit) -> dict[str, Any]:
    spec = unit.spec
    return {
        "boft_block_size": spec.block or 0, "boft_block_num": spec.blocks or 0,
        "boft_n_butterfly_factor": spec.factors,
    }  # fmt: skip


HRA_FACE = Form(
    "HRA", HRA, {"U": "hra_u"}, _hra, _config_hra, {}, silent=START, defaults=DEFAULTS,
    kinds=("linear",),
).face()  # fmt: skip
OFT_FACE = Form(
    "OFT", OFT, {"A": "oft_R.weight"}, _oft, _config_oft, {}, silent=START, defaults=DEFAULTS,
    kinds=("linear", "embedding"), embedded={"A": "oft_embedding_R.weight"},
).face()  # fmt: skip
BOFT_FACE = Form(
    "BOFT", BOFT, {"K": "boft_R", "g": "boft_s"}, _boft, _config_boft, {},
    # Without its CUDA kernel PEFT trains one factor whatever was asked: the tensors say how many.
    silent=(*START, "boft_block_size", "boft_n_butterfly_factor"), defaults=DEFAULTS,
    kinds=("linear",),
).face()  # fmt: skip

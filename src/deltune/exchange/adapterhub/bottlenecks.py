"""Bottleneck adapters and Compacter in AdapterHub's format:
`<place>.adapters.<name>.adapter_down.0.weight` (m, d), `adapter_up.weight` (d, m) and biases; or
factors of them beside one `shared_parameters.<name>.phm_rule` (n, n, n)."""

import re
from typing import Any

from torch import Tensor

from deltune.errors import ExchangeError
from deltune.exchange.foreign import Form, Held, Told
from deltune.exchange.parts import Part, Tensors, addressed
from deltune.families.addition.adapter import Adapter
from deltune.families.addition.compacter import Compacter
from deltune.mechanisms.activations import Activation
from deltune.mechanisms.insert import layers
from deltune.sites.discover import Atlas
from deltune.sites.site import Site

ACTIVATIONS: dict[str, Activation] = {
    "relu": "relu", "gelu": "gelu_exact", "gelu_new": "gelu", "swish": "silu", "silu": "silu",
    "tanh": "tanh",
}  # fmt: skip
PLAIN = {
    "adapter_down.0.weight": Form("D", "m d"), "adapter_down.0.bias": Form("b1", "m"),
    "adapter_up.weight": Form("U", "d m"), "adapter_up.bias": Form("b2", "d"),
}  # fmt: skip
SCALED = {"learned": "1", "channel": "d"}
"""Kinds of scales that are trained, and their sides."""
FACTORED = {
    "adapter_down.0.W_left": Form("u_D", "n p r"), "adapter_down.0.W_right": Form("v_D", "n r q"),
    "adapter_up.W_left": Form("u_U", "n q r"), "adapter_up.W_right": Form("v_U", "n r p"),
    "adapter_down.0.b": Form("b1", "m"), "adapter_up.b": Form("b2", "d"),
}  # fmt: skip
RULE = {"phm_rule": Form("A", "n n n")}
HOOKED = {
    "attention_adapters": "attn", "output_adapters": "ffn",
    "cross_attention_adapters": "cross.attn",
}  # fmt: skip


def read(told: Told, held: Held, atlas: Atlas, name: str) -> list[Part]:
    """The adapters of a checkpoint, one part for each width."""
    phm = told.take("phm_layer", bool, False)
    form = _form(told, phm)
    found = held.places(f".adapters.{name}.", form["tensors"])
    groups: dict[int, dict[str, Site]] = {}
    own: dict[str, Tensors] = {}
    candidates = layers(atlas)
    for place, tensors in found.items():
        site = place_of(place, form["before"], candidates, held)
        groups.setdefault(tensors["b1"].numel(), {})[site.key] = site
        own[site.key] = _scaled(tensors)
    rule = _rule(held, name) if phm and found else None
    parts = []
    for width, sites in groups.items():
        _fits(form, sites.values(), told)
        where = addressed(atlas, sites.values(), candidates)
        values = {key: own[key] for key in sites}
        if rule is not None:
            n, r = len(rule), next(iter(values.values()))["u_D"].shape[-1]
            spec: Any = Compacter(
                n=n, rank=r, width=width, activation=form["activation"], where=where
            )
            parts.append(Part(spec, values, {"A": rule}))
            continue
        placement = "parallel" if form["parallel"] else "serial"
        if form["before"] and all(site.norm for site in sites.values()):
            placement = "pfeiffer"
        spec = Adapter(width=width, placement=placement, activation=form["activation"],
                       scale=form["scale"], where=where)  # fmt: skip
        parts.append(Part(spec, values))
    return parts


def _form(told: Told, phm: bool) -> dict[str, Any]:
    """What the fields of a configuration say of all adapters.

    Raises:
        ExchangeError: a form that is not here.
    """
    for name in ("mh_adapter", "output_adapter", "reduction_factor", "cross_adapter"):
        told.left.discard(name)  # where they are, and how wide, is what the tensors say
    form = {
        "parallel": told.take("is_parallel", bool, False),
        "before": told.take("original_ln_before", bool, False),
    }
    if form["parallel"]:
        form["before"] = False  # a parallel one reads what comes in
    after = told.take("original_ln_after", bool, True)
    residual = told.values.get("residual_before_ln", True)
    told.left.discard("residual_before_ln")
    if not after or (form["before"] and residual is not True):
        raise ExchangeError(
            f"{told.where}: `original_ln_after` is {after} and `residual_before_ln` {residual!r}, "
            "and adapters are read where both are True alone"
        )
    activation = told.take("non_linearity", str, "relu").lower()
    if activation not in ACTIVATIONS:
        raise ExchangeError(
            f"{told.where}: `non_linearity` is {activation!r}; known are {', '.join(ACTIVATIONS)}"
        )
    scale = told.values.get("scaling")
    told.left.discard("scaling")
    trained = SCALED.get(scale, "") if isinstance(scale, str) else ""
    form["scale"] = 1.0 if trained else float(told.take("scaling", (int, float), 1.0))
    form["activation"] = ACTIVATIONS[activation]
    form["tensors"] = FACTORED if phm else PLAIN
    if trained and not phm:
        form["tensors"] = PLAIN | {"scaling": Form("scaling", trained)}
    if phm and not (
        told.take("shared_phm_rule", bool, True) and told.take("factorized_phm_W", bool, True)
        and not told.take("factorized_phm_rule", bool, False) and form["scale"] == 1.0
        and not (form["parallel"] or form["before"])
    ):  # fmt: skip
        raise ExchangeError(
            f"{told.where}: Compacter is read with one rule for all, factors of the weights, on "
            "what sub-layers put out and unscaled alone"
        )
    for name in [name for name in told.values if name.startswith(("phm_", "hypercomplex_"))]:
        told.left.discard(name)
    told.left -= {"learn_phm", "shared_phm_rule", "factorized_phm_W", "factorized_phm_rule"}
    return form


def _rule(held: Held, name: str) -> Tensor:
    """The rule that all places share.

    Raises:
        ExchangeError: there is none, or more than one.
    """
    rules = list(held.places(f".shared_parameters.{name}.", RULE).values())
    if len(rules) != 1:
        raise ExchangeError(
            f"{held.where} has {len(rules)} times `shared_parameters.{name}.phm_rule`; expected it "
            "once: save it again"
        )
    return rules[0]["A"]


def _scaled(tensors: Tensors) -> Tensors:
    """The tensors with a trained scale in those that it multiplies."""
    scale: Tensor | None = tensors.pop("scaling", None)
    if scale is None:
        return tensors
    return tensors | {"U": scale[:, None] * tensors["U"], "b2": scale * tensors["b2"]}


def place_of(place: str, before: bool, candidates: list[Site], held: Held) -> Site:
    """The sub-layer that AdapterHub calls so, or the block, where adapters of a model without a
    norm behind the sum read all of it."""
    head, _, last = place.rpartition(".")
    known = [site for site in candidates if site.role in ("attn", "ffn")]
    if last in HOOKED:
        stack, _, role = HOOKED[last].rpartition(".")
        found = [s for s in known if s.role == role and f"{s.path}.".startswith(f"{head}.")]
        found = [site for site in found if (site.stack == "cross") == (stack == "cross")]
    else:
        found = [s for s in known if re.match(rf"{re.escape(place)}(\.|$)", s.exit)]
    if len(found) != 1:
        raise ExchangeError(
            f"{held.where} has adapters at `{place}`, which is no one sub-layer of this model; "
            "load the model that it was trained on"
        )
    (site,) = found
    if not before or site.norm:
        return site
    blocks = [s for s in candidates if s.role == "block" and site.path.startswith(f"{s.path}.")]
    if site.role != "ffn" or not blocks:
        raise ExchangeError(
            f"{held.where}: the adapters at `{place}` read the sum with the residual, which is "
            "nowhere in this model; those behind feed-forward parts are read alone"
        )
    return blocks[-1]


def _fits(form: dict[str, Any], sites: Any, told: Told) -> None:
    if form["parallel"] and not all(site.norm for site in sites):
        raise ExchangeError(
            f"{told.where}: parallel adapters read what is before the norm in this model, and here "
            "what is behind it; they are read in models with the norm behind the sum alone"
        )

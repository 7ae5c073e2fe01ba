"""Norm tuning: the gains and biases of normalisation layers."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from deltune.errors import WhereError
from deltune.mechanisms.select import Select
from deltune.sites.discover import Atlas
from deltune.sites.matrices import is_norm
from deltune.sites.site import Site
from deltune.sites.where import Where, select
from deltune.spec import Family, Paper, register

TUNED = {"both": ("weight", "bias"), "gain": ("weight",), "bias": ("bias",)}


@register
@dataclass(frozen=True)
class Norms(Select):
    """Trains gains and biases of the normalisation layers.

        LN(x) = (g + s d_g) (.) (x - mean) / std + (b + s d_b),    d_g, d_b trained, zero at first

    of every norm outside the task head, or of those at `where`; those without a bias (RMSNorm) have
    their gain tuned. BERT-base: 38,400. Merges exactly. With an adapter it is what Houlsby et al.
    train: `adapter + norms`.

    Source: Qi et al., "Parameter-Efficient Tuning on Layer Normalization for Pre-trained Language
    Models", 2022, arXiv:2211.08682.
    Differs: the change d is trained, not g and b themselves: the same steps under any optimiser
    without weight decay.
    """

    kind: ClassVar[str] = "norms"
    family: ClassVar[Family] = "specification"
    paper: ClassVar[Paper | None] = Paper(
        "Qi et al.",
        "Parameter-Efficient Tuning on Layer Normalization for Pre-trained Language Models", 2022,
        "2211.08682",
    )  # fmt: skip

    tune: Literal["both", "gain", "bias"] = "both"
    """What of a norm is tuned."""
    where: Where = ""
    """Chosen norms, e.g. `norm` for those in blocks, `encoder.norm[6:]`, or names of modules such
    as `*.output.LayerNorm`; all by default."""

    def chosen(self, atlas: Atlas) -> list[tuple[str, str]]:
        norms = {
            path: [name for name in TUNED[self.tune] if module._parameters.get(name) is not None]
            for path, module in atlas.modules.items()
            if is_norm(module) and not atlas.in_head(path)
        }
        norms = {path: names for path, names in norms.items() if names}
        if not norms:
            what = {"both": "gains or biases", "gain": "gains", "bias": "biases"}[self.tune]
            raise WhereError(
                f"{type(atlas.model).__name__} has no normalisation layers with {what} to tune; "
                "use another `tune`, or another method"
            )
        paths = list(norms)
        if self.where or self.within:
            inside = [s for s in atlas.sites if s.role == "norm" and s.path in norms]
            named = {site.path for site in inside}
            others = [Site(path) for path in norms if path not in named]
            found = select(atlas, self.where or "*", [*inside, *others], self.within)
            kept = {site.path for site in found}
            paths = [path for path in norms if path in kept]
        return [(path, name) for path in paths for name in norms[path]]

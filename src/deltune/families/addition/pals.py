"""PALs: projected attention layers."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn import functional as F

from deltune.mechanisms.insert import Insert, Placement
from deltune.mechanisms.masks import attend
from deltune.mechanisms.modules import matched
from deltune.mechanisms.tensors import Param, normal, zeros
from deltune.mechanisms.unit import Unit
from deltune.sites.discover import Atlas
from deltune.sites.site import Site
from deltune.sites.where import Where, select
from deltune.spec import Family, Paper, register, require


@register
@dataclass(frozen=True)
class PALs(Insert):
    """A narrow attention layer beside each block.

        PAL(h) = GELU( D MHA(E h + b_E) + b_D ),    E (p, d), D (d, p)

    with MHA of `heads` heads over the tokens, its q, k and v (p, p) with biases and no output
    matrix. E and D are shared by the layers of a stack, q, k and v are of each layer. The block
    with feed-forward part FFN, attention output a and input h becomes

    post-norm   LN(a + FFN(a) + PAL(h))
    pre-norm    a + FFN(LN(a)) + PAL(LN(h)): what the attention reads

    The mask is the block's own, for padding and, in decoders, for what is to come. A call that
    continues a key/value cache lacks the earlier tokens and is refused: `use_cache=False`.
    Trainable: 2dp + p + d for each stack, 3 (p^2 + p) for each layer. It does not merge.

    Source: Stickland and Murray, "BERT and PALs: Projected Attention Layers for Efficient
    Adaptation in Multi-Task Learning", 2019, arXiv:1902.02671; GELU behind D as in the released
    code.
    Differs: the backbone stays frozen, LayerNorms too; the released code trains it with all tasks.
    A delta is of one task: attach one for each.
    """

    kind: ClassVar[str] = "pals"
    family: ClassVar[Family] = "addition"
    paper: ClassVar[Paper | None] = Paper(
        "Stickland and Murray",
        "BERT and PALs: Projected Attention Layers for Efficient Adaptation in Multi-Task Learning",
        2019, "1902.02671",
    )  # fmt: skip

    width: int = 204
    """Width p of the attention."""
    heads: int = 6
    """Its number of heads, a divisor of the width."""
    where: Where = "block"
    """The blocks."""

    def __post_init__(self) -> None:
        require(self.width >= 1, self, "width", "1 or more")
        require(self.heads >= 1 and self.width % self.heads == 0, self, "heads",
                f"a divisor of the width {self.width}")  # fmt: skip

    @property
    def watches(self) -> bool:
        return True

    def geometry(self, site: Site) -> Placement:
        return "parallel"

    def sites(self, atlas: Atlas) -> list[Site]:
        blocks = [site for site in atlas.sites if site.role == "block"]
        found = []
        for block in select(atlas, self.where, blocks, self.within):
            inside = [s for s in atlas.sites if s.path.startswith(f"{block.path}.")]
            groups = [s for s in inside if s.kind == "sublayer" and s.stack != "cross"]
            entry = next((s.path for s in groups if s.role == "attn"), "")
            exit_ = [s.exit for s in groups if s.role == "ffn"][-1]
            found.append(block._replace(entry=entry, exit=exit_))
        return found

    def group(self, site: Site) -> str:
        return site.stack

    def shared(self, sites: list[Site]) -> dict[str, Param]:
        d, p, small = sites[0].width, self.width, normal(0.02)
        return {
            "E": Param((p, d), small), "b_E": Param((p,), zeros),
            "D": Param((d, p), small), "b_D": Param((d,), zeros),
        }  # fmt: skip

    def tensors(self, site: Site, atlas: Atlas) -> dict[str, Param]:
        p = self.width
        return {
            name: Param((p, p), normal(0.02)) if name in "QKV" else Param((p,), zeros)
            for name in ("Q", "b_q", "K", "b_k", "V", "b_v")
        }

    def transform(self, t: Unit, x: Tensor) -> Tensor:
        s = t.shared
        encode, b_e, decode, b_d = matched(x, s.E, s.b_E, s.D, s.b_D)
        pairs = matched(x, t.Q, t.b_q, t.K, t.b_k, t.V, t.b_v)
        h = F.linear(x, encode, b_e)
        q, k, v = (F.linear(h, pairs[i], pairs[i + 1]) for i in (0, 2, 4))
        return F.gelu(F.linear(attend(q, k, v, self.heads, t.allowed()), decode, b_d))

"""BitFit: the biases of the backbone."""

from dataclasses import dataclass
from typing import ClassVar

from deltune.errors import WhereError
from deltune.mechanisms.select import Select, narrowed
from deltune.sites.discover import Atlas
from deltune.sites.where import Where
from deltune.spec import Family, Paper, register


@register
@dataclass(frozen=True)
class BitFit(Select):
    """Trains only biases of the backbone.

        b' = b + s * d,    d trained, zero at first

    for every parameter whose name ends in `bias` (LayerNorms included), or those at the sites of
    `where`. BERT-base: 102,912 with the embedding norm and pooler. Merges exactly.

    Source: Ben Zaken et al., "BitFit: Simple Parameter-efficient Fine-tuning for
    Transformer-based Masked Language-models", 2022, arXiv:2106.10199, section 3.
    Differs: the change d is trained, not b itself: the same steps under any optimiser without
    weight decay. With `where` nothing is added; the released code always adds the pooler's bias.
    A model without biases is refused; ports of BitFit to T5 give it new ones of zero.
    """

    kind: ClassVar[str] = "bitfit"
    family: ClassVar[Family] = "specification"
    paper: ClassVar[Paper | None] = Paper(
        "Ben Zaken et al.",
        "BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked "
        "Language-models", 2022, "2106.10199",
    )  # fmt: skip

    where: Where = ""
    """Chosen biases, e.g. `attn.q, ffn.up`; all of the backbone by default."""

    def chosen(self, atlas: Atlas) -> list[tuple[str, str]]:
        biases = [
            (path, name)
            for path, module in atlas.modules.items()
            if not atlas.in_head(path)
            for name, parameter in module._parameters.items()
            if parameter is not None and name.endswith("bias")
        ]
        if not biases:
            raise WhereError(
                f"{type(atlas.model).__name__} has no biases to tune (models with RMSNorm and "
                "bias-free layers have none); use LoRA or an adapter"
            )
        return narrowed(atlas, biases, self.where, self.within)

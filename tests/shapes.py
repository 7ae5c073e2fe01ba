"""Full-size architectures on the meta device: shapes and counts without memory."""

from functools import cache
from typing import Any

import torch

_BERT = {
    "bert-base": (768, 12, 12, 3072), "bert-large": (1024, 24, 16, 4096),
}  # fmt: skip


@cache
def meta_model(name: str) -> Any:
    """`bert-base`, `bert-large` (both with pooler, without head), `roberta-base` or `t5-base`.

    One model for all callers: plan on it, and attach nothing that stays.
    """
    import transformers as hf

    with torch.device("meta"):
        if name in _BERT:
            width, layers, heads, inner = _BERT[name]
            return hf.BertModel(
                hf.BertConfig(
                    hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
                    intermediate_size=inner,
                )
            )  # fmt: skip
        if name == "roberta-base":
            return hf.RobertaModel(
                hf.RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1)
            )
        if name == "t5-base":
            return hf.T5ForConditionalGeneration(
                hf.T5Config(d_model=768, d_kv=64, d_ff=3072, num_layers=12, num_heads=12)
            )
    raise KeyError(name)

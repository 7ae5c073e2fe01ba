"""What neither the shapes nor the structure of a model tell: small tables."""

from typing import Any

from torch import nn

from deltune.sites.site import Rows

LETTERS = {
    "q": frozenset({"q", "query", "queries", "wq"}),
    "k": frozenset({"k", "key", "keys", "wk"}),
    "v": frozenset({"v", "value", "values", "wv"}),
}
FUSED_NAMES = frozenset({"c_attn", "qkv", "qkv_proj", "query_key_value", "wqkv", "attn_qkv"})
CROSS = frozenset({"cross", "enc", "encoder", "crossattention", "xattn"})
OUT = frozenset({"o", "out", "output", "wo", "dense", "proj"})
NOT_OUT = frozenset({"pos", "rel", "gate", "norm", "relative"})
GATES = frozenset({"wi_0", "w1"})
EXIT_DROPOUTS = frozenset({"resid_dropout", "output_dropout", "out_drop"})
ATTENTION_NORM = "LayerNorm"

TELLING = ("is_causal", "head_dim", "head_size")  # attributes of an attention that matter here
READ_BY_PARENT = frozenset({"rel_embeddings"})
UNTRAINED = frozenset({"mask_token"})
SINUSOIDAL = "Sinusoidal"
TABLES = frozenset(  # sinusoids in an ordinary embedding
    f"{encoder}.embed_positions"
    for encoder in (
        "WhisperEncoder",
        "Qwen2AudioEncoder",
        "VoxtralEncoder",
        "AudioFlamingo3Encoder",
    )
)
SHARES = "share_att_key"  # set where query and key map relative positions too
BIASES = "relative_attention_bias"  # a table of T5, asked for distances and not for tokens
COMPARES = "logit_scale"  # the parameter of models that compare the rows of a batch with each other
WINDOWS = ("sliding_window", "local_attention")  # of attention, in configurations
CAUSAL_TOWERS = frozenset(  # model types whose attention only hears of causality when called
    {
        "clip_text_model", "clipseg_text_model", "groupvit_text_model", "metaclip_2_text_model",
        "owlv2_text_model", "owlvit_text_model", "xclip_text_model",
    }
)  # fmt: skip

INTERLEAVED = frozenset({"GPTNeoXAttention", "BloomAttention"})
CONTIGUOUS = frozenset({"GPT2Attention", "ModernBertAttention", "Phi3Attention"})
POST_NORM_MODELS = frozenset(
    {"bart", "marian", "blenderbot-small", "distilbert", "albert", "xlm", "flaubert", "fsmt"}
)
POST_NORMS = {
    "attn": ("sa_layer_norm", "self_attn_layer_norm"),
    "cross": ("encoder_attn_layer_norm",),
    "ffn": ("output_layer_norm", "full_layer_layer_norm", "final_layer_norm"),
}
STACKS = {
    "text_model": "text",
    "vision_model": "vision",
    "decoder": "decoder",
    "encoder": "encoder",
}


def stack_of(path: str, causal: bool) -> str:
    """The stack that a block belongs to, from its path, else from its attention's causality."""
    components = path.split(".")
    for name, stack in STACKS.items():
        if name in components:
            return stack
    return "decoder" if causal else "encoder"


def fused_rows(owner: str, attention: nn.Module, out: int, has_q: bool) -> dict[str, Rows]:
    """Which output features of a fused matrix are query, key and value; empty if unknown."""
    if has_q:
        return {letter: Rows(out, i * (out // 2), out // 2) for i, letter in enumerate("kv")}
    if owner in INTERLEAVED:
        width = int(getattr(attention, "head_size", 0) or getattr(attention, "head_dim", 0))
        return {letter: Rows(3 * width, i * width, width) for i, letter in enumerate("qkv")}
    if owner in CONTIGUOUS:
        config: Any = attention.config
        heads = config.num_attention_heads
        groups = getattr(config, "num_key_value_heads", None) or heads
        width = out // (heads + 2 * groups)
        q, kv = heads * width, groups * width
        return {"q": Rows(out, 0, q), "k": Rows(out, q, kv), "v": Rows(out, q + kv, kv)}
    return {}


def post_norms(config: Any, part: str) -> tuple[str, ...]:
    """Names, in the block, of the norm behind the residual addition of post-norm models."""
    kind = getattr(config, "model_type", "")
    post = kind in POST_NORM_MODELS or getattr(config, "do_layer_norm_before", None) is False
    return POST_NORMS[part] if post else ()


def rowless(model: nn.Module) -> dict[int, str]:
    """Modules that are also given what belongs to no row of a batch, with their paths."""
    found = {}
    for path, module in model.named_modules():
        names = [BIASES] if hasattr(module, BIASES) else []
        if any(name in module._parameters or name in module._modules for name in READ_BY_PARENT):
            names.append("LayerNorm")
        if getattr(module, SHARES, False):
            names += ["query_proj", "key_proj", "in_proj"]
        for name in names:
            inner = module._modules.get(name)
            if inner is not None:
                found[id(inner)] = f"{path}.{name}".lstrip(".")
    return found

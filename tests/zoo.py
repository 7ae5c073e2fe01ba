"""Tiny random models of the architectures that deltune serves, built in code: no downloads.

Every case is float32, in eval mode and seeded; building one leaves the global generator untouched.
Run `python tests/zoo.py NAME ...` to print the module tree of a model.
"""

import sys
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

Family = Literal["encoder", "decoder", "encoder-decoder", "vision", "speech", "dual", "plain"]
Batch = dict[str, Tensor]

VOCAB, HIDDEN, INNER, LAYERS, HEADS, LABELS = 64, 16, 24, 2, 4, 3
PAD, BOS, EOS, FIRST_WORD = 0, 1, 2, 4
LENGTHS = (7, 5, 3)  # tokens of each row; the shorter rows are padded on the right
IMAGE, PATCH, MELS, FRAMES = 8, 4, 6, 12


@dataclass(frozen=True)
class Case:
    name: str
    family: Family
    build: Callable[[int], nn.Module]
    batch: Callable[[int], Batch]
    output: Callable[[Any], Tensor]
    generates: bool

    def run(self, model: nn.Module, seed: int = 0) -> Tensor:
        """The main output tensor of `model` on the batch of `seed`."""
        return self.output(model(**self.batch(seed)))

    def prompt(self, seed: int = 0) -> Batch:
        """Inputs for `model.generate`: no decoder inputs; decoders are padded on the left."""
        batch = {k: v for k, v in self.batch(seed).items() if not k.startswith("decoder_")}
        return {k: v.flip(1) for k, v in batch.items()} if self.family == "decoder" else batch


def _roughen(model: nn.Module) -> None:
    # Fresh models have zero biases and unit norms, under which many mistakes do not show.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:  # sinusoidal tables stay what they are
                parameter.add_(torch.randn_like(parameter), alpha=0.1)


def _seeded(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make().to(torch.float32)
        _roughen(model)
    return model.eval()


def _hf(model_class: str, config_class: str, settings: dict[str, Any]) -> nn.Module:
    import transformers

    config = getattr(transformers, config_class)(**deepcopy(settings))
    return getattr(transformers, model_class)(config)


# --- inputs -------------------------------------------------------------------------------------


def _tokens(seed: int, pad: int = PAD, last: int | None = None) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(FIRST_WORD, VOCAB - 1, (len(LENGTHS), max(LENGTHS)), generator=generator)
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    if last is not None:
        ids[torch.arange(len(LENGTHS)), torch.tensor(LENGTHS) - 1] = last
    return ids.masked_fill(~mask, pad), mask.long()


def _text(seed: int, pad: int = PAD, last: int | None = None) -> Batch:
    ids, mask = _tokens(seed, pad, last)
    return {"input_ids": ids, "attention_mask": mask}


def _target(seed: int) -> Batch:
    ids, mask = _tokens(seed + 1)
    return {"decoder_input_ids": ids[:, :4], "decoder_attention_mask": mask[:, :4]}


def _text_to_text(seed: int) -> Batch:
    return _text(seed) | _target(seed)


def _normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(len(LENGTHS), *shape, generator=torch.Generator().manual_seed(seed))


def _image(seed: int) -> Batch:
    return {"pixel_values": _normal(seed, 3, IMAGE, IMAGE)}


def _image_and_text(seed: int) -> Batch:
    return _text(seed, last=VOCAB - 1) | _image(seed)


def _speech(seed: int) -> Batch:
    return {"input_features": _normal(seed, MELS, FRAMES)} | _target(seed)


def _plain_sequence(seed: int) -> Batch:
    return {"x": _normal(seed, max(LENGTHS), HIDDEN), "mask": _tokens(seed)[1]}


def _plain_vector(seed: int) -> Batch:
    return {"input": _normal(seed, HIDDEN)}


# --- plain PyTorch ------------------------------------------------------------------------------


class CrossBlock(nn.Module):
    """Learned queries read a sequence through `nn.MultiheadAttention`, then an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(2, HIDDEN))
        self.attention = nn.MultiheadAttention(HIDDEN, HEADS, batch_first=True)
        self.norm = nn.LayerNorm(HIDDEN)
        self.mlp = nn.Sequential(nn.Linear(HIDDEN, INNER), nn.GELU(), nn.Linear(INNER, HIDDEN))

    def forward(self, x: Tensor, padded: Tensor) -> Tensor:
        queries = self.queries.expand(len(x), -1, -1)
        read, _ = self.attention(queries, x, x, key_padding_mask=padded, need_weights=False)
        return self.mlp(self.norm(queries + read))


class PlainEncoder(nn.Module):
    """A `torch.nn.TransformerEncoder`, a custom attention block and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(HIDDEN, HEADS, INNER, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
        self.pool = CrossBlock()
        self.head = nn.Linear(HIDDEN, LABELS)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        padded = mask == 0
        x = self.encoder(x, src_key_padding_mask=padded)
        return self.head(self.pool(x, padded).mean(1))


def _sequential() -> nn.Module:
    return nn.Sequential(
        nn.Linear(HIDDEN, INNER), nn.ReLU(), nn.Linear(INNER, INNER), nn.ReLU(),
        nn.Linear(INNER, LABELS),
    )  # fmt: skip


# --- settings -----------------------------------------------------------------------------------

_SPECIAL = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
_CORE = _SPECIAL | {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 32,
}
_ENCODER = _CORE | {"num_labels": LABELS}
_GROUPED = _CORE | {"num_key_value_heads": 2}
_TWO_STACKS = _SPECIAL | {
    "vocab_size": VOCAB,
    "d_model": HIDDEN,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": INNER,
    "decoder_ffn_dim": INNER,
    "max_position_embeddings": 32,
    "decoder_start_token_id": BOS,
}
_T5 = {
    "vocab_size": VOCAB,
    "d_model": HIDDEN,
    "d_kv": 6,  # inner width 24, so attention matrices are not square
    "d_ff": 32,
    "num_layers": LAYERS,
    "num_heads": HEADS,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16,
    "decoder_start_token_id": PAD,
}
_VISION = {
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "image_size": IMAGE,
    "patch_size": PATCH,
}

# name -> (prefix of the class names, settings), the architecture's own oddities kept
_ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("Bert", _ENCODER),
    "roberta": ("Roberta", _ENCODER),
    "distilbert": ("DistilBert", {
        "vocab_size": VOCAB, "dim": HIDDEN, "hidden_dim": INNER, "n_layers": LAYERS,
        "n_heads": HEADS, "max_position_embeddings": 32, "pad_token_id": PAD,
        "num_labels": LABELS,
    }),
    "electra": ("Electra", _ENCODER | {"embedding_size": 8}),
    "albert": ("Albert", _ENCODER | {"embedding_size": 8}),
    "deberta-v2": ("DebertaV2", _ENCODER | {
        "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "share_att_key": True,
        "position_buckets": 4, "norm_rel_ebd": "layer_norm", "position_biased_input": False,
        "type_vocab_size": 0, "pooler_hidden_size": HIDDEN,
    }),
    "modernbert": ("ModernBert", _ENCODER | {
        "local_attention": 4, "global_attn_every_n_layers": 2,
        "cls_token_id": BOS, "sep_token_id": EOS,
    }),
}  # fmt: skip
_DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2LMHead", _SPECIAL | {
        "vocab_size": VOCAB, "n_embd": HIDDEN, "n_inner": INNER, "n_layer": LAYERS,
        "n_head": HEADS, "n_positions": 32,
    }),
    "gpt-neox": ("GPTNeoX", _CORE),
    "opt": ("OPT", _SPECIAL | {
        "vocab_size": VOCAB, "hidden_size": HIDDEN, "word_embed_proj_dim": HIDDEN,
        "ffn_dim": INNER, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
        "max_position_embeddings": 32,
    }),
    "llama": ("Llama", _GROUPED),
    "qwen3": ("Qwen3", _GROUPED | {"head_dim": 8}),
    "gemma3": ("Gemma3", _GROUPED | {
        "head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    }),
    "phi3": ("Phi3", _GROUPED | {"original_max_position_embeddings": 32}),
    "mixtral": ("Mixtral", _GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3-moe": ("Qwen3Moe", _GROUPED | {
        "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12,
    }),
}  # fmt: skip
_CONFIGS = {"GPT2LMHead": "GPT2Config", "Gemma3": "Gemma3TextConfig"}
_MODELS = {"GPT2LMHead": "GPT2LMHeadModel"}
_SEQ2SEQ: dict[str, tuple[str, str, dict[str, Any]]] = {
    "t5": ("T5ForConditionalGeneration", "T5Config", _T5 | {"feed_forward_proj": "relu"}),
    "t5-gated": ("T5ForConditionalGeneration", "T5Config", _T5 | {
        "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False,
    }),
    "bart": ("BartForConditionalGeneration", "BartConfig", _TWO_STACKS),
    "marian": ("MarianMTModel", "MarianConfig", _TWO_STACKS),
}  # fmt: skip
_IMAGES: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("ViT", _VISION | {"num_labels": LABELS}),
    "dinov2": ("Dinov2", _VISION | {"num_labels": LABELS, "mlp_ratio": 2}),
}
_CLIP = {
    "text_config": _CORE | {"projection_dim": HIDDEN, "eos_token_id": VOCAB - 1},
    # Two widths, so that the towers cannot be mistaken for one another.
    "vision_config": _VISION | {"hidden_size": 24, "intermediate_size": 40},
    "projection_dim": HIDDEN,
}
_WHISPER = _TWO_STACKS | {
    "num_mel_bins": MELS,
    "max_source_positions": FRAMES // 2,
    "max_target_positions": 32,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}


# --- the zoo ------------------------------------------------------------------------------------


def _logits(output: Any) -> Tensor:
    return output.logits


def _case(
    name: str,
    family: Family,
    make: Callable[[], nn.Module],
    batch: Callable[[int], Batch],
    output: Callable[[Any], Tensor] = _logits,
) -> Case:
    generates = family in ("decoder", "encoder-decoder", "speech")
    return Case(name, family, partial(_seeded, make), batch, output, generates)


def _cases() -> Iterator[Case]:
    for name, (prefix, settings) in _ENCODERS.items():
        model = f"{prefix}ForSequenceClassification"
        yield _case(name, "encoder", partial(_hf, model, f"{prefix}Config", settings), _text)
    for name, (prefix, settings) in _DECODERS.items():
        model = _MODELS.get(prefix, f"{prefix}ForCausalLM")
        config = _CONFIGS.get(prefix, f"{prefix}Config")
        yield _case(name, "decoder", partial(_hf, model, config, settings), _text)
    for name, (model, config, settings) in _SEQ2SEQ.items():
        make = partial(_hf, model, config, settings)
        yield _case(name, "encoder-decoder", make, _text_to_text)
    for name, (prefix, settings) in _IMAGES.items():
        model = f"{prefix}ForImageClassification"
        yield _case(name, "vision", partial(_hf, model, f"{prefix}Config", settings), _image)
    clip = partial(_hf, "CLIPModel", "CLIPConfig", _CLIP)
    yield _case("clip", "dual", clip, _image_and_text, lambda output: output.logits_per_image)
    whisper = partial(_hf, "WhisperForConditionalGeneration", "WhisperConfig", _WHISPER)
    yield _case("whisper", "speech", whisper, _speech)
    yield _case("torch-encoder", "plain", PlainEncoder, _plain_sequence, lambda output: output)
    yield _case("torch-mlp", "plain", _sequential, _plain_vector, lambda output: output)


ZOO: dict[str, Case] = {case.name: case for case in _cases()}


def tree(model: nn.Module) -> Iterator[str]:
    """One line per module: its path, its class, and the shapes of the parameters it owns."""
    for path, module in model.named_modules():
        shapes = [f"{k}{list(p.shape)}" for k, p in module.named_parameters(recurse=False)]
        yield f"{path or '(root)':58} {type(module).__name__:28} {' '.join(shapes)}".rstrip()


if __name__ == "__main__":
    for wanted in sys.argv[1:] or ZOO:
        print(f"=== {wanted}", *tree(ZOO[wanted].build(0)), "", sep="\n")

"""Tokenizers and tiny models built in code for the tests of tasks."""

import json
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

WORDS = ("yes", "no", "maybe", "very", "good", "bad", "film", "the", "answer", "is", "was")


def tokenizer(kind: str) -> Any:
    """A byte-level BPE tokenizer that frames texts like GPT-2, Llama, T5 or BERT."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator([" ".join(WORDS), *(f" {word}" for word in WORDS)] * 9, trainer)
    frame = {"gpt": "$A", "llama": "<s> $A", "t5": "$A </s>", "bert": "<s> $A </s>"}[kind]
    inner.post_processor = processors.TemplateProcessing(
        single=frame, special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


_SIZE: dict[str, Any] = {"vocab_size": 320, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def model(kind: str, labels: int = 0) -> Any:
    """A tiny random model in evaluation mode."""
    import transformers as hf

    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    small |= {"num_attention_heads": 2, "max_position_embeddings": 128, "num_labels": labels or 2}
    t5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    bart = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32}
    bart |= {"decoder_ffn_dim": 32, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    gpt = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 128}
    made = {
        "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_SIZE, **small)),
        "gpt": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**_SIZE, **gpt)),
        "t5": lambda: hf.T5ForConditionalGeneration(
            hf.T5Config(**_SIZE, **t5, decoder_start_token_id=0)
        ),
        "bart": lambda: hf.BartForConditionalGeneration(
            hf.BartConfig(**_SIZE, **bart, decoder_start_token_id=2, forced_eos_token_id=None)
        ),
        "bert": lambda: hf.BertForSequenceClassification(hf.BertConfig(**_SIZE, **small)),
        "llama-classes": lambda: hf.LlamaForSequenceClassification(
            hf.LlamaConfig(**_SIZE, **small)
        ),
    }[kind]()
    made = made.eval()
    with torch.no_grad():  # tiny weights give nearly uniform likelihoods; make them differ
        for parameter in made.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    return made


def texts(count: int) -> list[str]:
    """Different texts of different lengths."""
    letters = string.ascii_lowercase
    return [" ".join([*WORDS[: 1 + i % 7], letters[i % 26] * (1 + i % 3)]) for i in range(count)]


def home(folder: Path) -> Path:
    """Fills a folder with a tiny backbone without head, and a task that words decide."""
    from transformers import BertModel

    whole = model("bert")
    backbone = BertModel(whole.config)
    backbone.load_state_dict(whole.bert.state_dict())
    backbone.save_pretrained(folder / "model")
    tokenizer("bert").save_pretrained(folder / "model")
    write_task(folder / "task", ("bad", "good"))
    return folder


def write_task(folder: Path, labels: Sequence[str], **meta: Any) -> None:
    """Writes a task whose inputs say their label."""
    folder.mkdir()
    about = {"kind": "classification", "metric": "accuracy", "labels": list(labels)} | meta
    (folder / "meta.json").write_text(json.dumps(about))
    for split, size in {"train": 32, "dev": 12, "test": 14}.items():
        words = [WORDS[i % 11] for i in range(size)]
        rows = [
            {"input": f"the film was {label} {word}", "target": label}
            for word, label in zip(words, list(labels) * size, strict=False)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

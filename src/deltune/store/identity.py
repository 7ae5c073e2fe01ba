"""Which backbone a delta belongs to: names, and a cheap fingerprint of the weights."""

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from deltune.sites.packed import meant, packed, steady
from deltune.vector import gathered

TENSORS, VALUES = 24, 64


def fingerprint(parameters: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 of all names and shapes and of sampled values.

    Values are compared as bfloat16, so that a float32 checkpoint and its bfloat16 copy are one
    backbone. 24 tensors give 64 values each: milliseconds at any model size.
    """
    named = list(parameters)
    digest = hashlib.sha256(repr([(name, meant(p)) for name, p in named]).encode())
    for i in range(0, len(named), max(1, len(named) // TENSORS)):
        value = named[i][1]
        if value.is_meta:
            return ""
        value = steady(value) if packed(value) else gathered(value)
        flat = value.reshape(-1)
        sample = flat[:: max(1, flat.numel() // VALUES)][:VALUES]
        digest.update(sample.to(torch.bfloat16).cpu().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def identity(model: nn.Module, parameters: Iterable[tuple[str, Tensor]]) -> dict[str, Any]:
    """What `delta.json` says of the backbone."""
    config = getattr(model, "config", None)
    settings = config.to_diff_dict() if hasattr(config, "to_diff_dict") else {}
    volatile = ("transformers_version", "_name_or_path", "dtype", "torch_dtype", "architectures")
    stable = {k: v for k, v in settings.items() if k not in volatile}
    text = json.dumps(stable, sort_keys=True, default=str)
    return {
        "class": type(model).__name__,
        "name": str(getattr(config, "_name_or_path", "") or ""),
        "config": hashlib.sha256(text.encode()).hexdigest() if stable else "",
        "weights": fingerprint(parameters),
    }


def describe(about: dict[str, Any]) -> str:
    """One line for people."""
    name = f" `{about['name']}`" if about.get("name") else ""
    weights = str(about.get("weights", ""))[:12] or "unknown"
    return f"{about.get('class', '?')}{name}, weights {weights}"

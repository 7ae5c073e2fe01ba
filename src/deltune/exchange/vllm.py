"""Deltas for vLLM, which serves LoRA checkpoints of PEFT and reads a part of their configuration.

It scales all modules by one lora_alpha / r, knows no patterns of either, no heads, biases, trained
tokens or magnitudes, and finds modules by the names of transformers, fusing what it has fused.
"""

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deltune.delta import Delta
from deltune.errors import ExchangeError
from deltune.exchange.names import stored_flipped
from deltune.exchange.peft.checkpoint import CONFIG, TENSORS, task_of
from deltune.mechanisms.factors import LowRank
from deltune.mechanisms.modules import pretrained
from deltune.mechanisms.unit import Unit
from deltune.mechanisms.weight import Weight, WeightUnit
from deltune.store import native

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes for `--max-lora-rank`."""


def save_vllm(delta: Delta, path: str | Path, overwrite: bool = False) -> Path:
    """Writes a delta as a checkpoint that vLLM serves: `vllm serve MODEL --enable-lora
    --max-lora-rank R --lora-modules NAME=PATH`, with R the least of 1, 8, 16, 32, 64, 128, 256,
    320 and 512 that is not below the `r` of `adapter_config.json`.

        dW = B A    for every whole module, with A (r, in) and B (out, r)

    of one rank r, the largest that a module has, smaller ones filled up with zeros; all scales, the
    delta's too, are in B, so that lora_alpha = r. Written are changes of matrices by two thin ones,
    of any method (LoRA, AdaLoRA, VeRA, ...).

    Args:
        delta: attached.
        path: the folder; written whole or not at all.
        overwrite: whether an earlier checkpoint may go.

    Raises:
        ExchangeError: what vLLM has no words for: a task head, another effect than such changes, a
            rank above 512.
        StoreError: the folder exists, or the disk refuses; nothing earlier is lost.

    Source: the fields of `PEFTHelper` in vLLM's vllm/lora/peft_helper.py, the ranks of `LoRAConfig`
    in vllm/config/lora.py, and the names of vllm/lora/lora_model.py.

    Example:
        >>> import deltune as dt, tempfile, torch
        >>> delta = dt.attach(torch.nn.Sequential(torch.nn.Linear(4, 4)), "lora(rank=2, where='0')")
        >>> folder = save_vllm(delta, Path(tempfile.mkdtemp(), "saved"))
        >>> sorted(file.name for file in folder.iterdir())
        ['adapter_config.json', 'adapter_model.safetensors']
    """
    modules = dict(delta.model.named_modules())
    pairs = _pairs(delta, delta.tree.units, modules)
    rank = max(len(down) for down, _ in pairs.values())
    if rank > RANKS[-1]:
        raise ExchangeError(
            f"`{delta.name}` has the rank {rank}, and vLLM serves up to {RANKS[-1]}; convert it to "
            "a lower rank with `deltune convert`, or merge it and serve the model"
        )
    tensors: dict[str, Tensor] = {}
    for place, (down, up) in pairs.items():
        more, names = rank - len(down), _names(modules[place])
        tensors[f"base_model.model.{place}.{names[0]}"] = F.pad(down, (0, 0, 0, more))
        tensors[f"base_model.model.{place}.{names[1]}"] = F.pad(up, (0, more))
    config = {
        "peft_type": "LORA", "r": rank, "lora_alpha": rank, "lora_dropout": 0.0, "bias": "none",
        "use_rslora": False, "use_dora": False, "modules_to_save": None,
        "target_modules": sorted(pairs),
        "fan_in_fan_out": stored_flipped(modules[place] for place in pairs),
        "task_type": task_of(delta.model, head=False), "inference_mode": True,
        "base_model_name_or_path": getattr(delta.model, "name_or_path", None) or None,
    }  # fmt: skip
    text = json.dumps(config, indent=2, sort_keys=True)
    native.write_files(path, (TENSORS, CONFIG), tensors, text, overwrite, "checkpoint of PEFT")
    return Path(path)


def _pairs(
    delta: Delta, units: Iterable[Unit], modules: dict[str, nn.Module]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Module -> A and B of all that the delta changes there; scales are in B."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    with torch.no_grad():
        for unit in units:
            change, site = _low_rank(delta, unit), unit.site
            up = change.up * (change.scale * unit.scale)
            if site.rows:
                up = site.spread(up.mT, pretrained(modules[site.path], "weight")).mT
            down, up = change.down.detach().float(), up.float()
            if site.path in found:
                earlier = found[site.path]
                down, up = torch.cat([earlier[0], down]), torch.cat([earlier[1], up], dim=1)
            found[site.path] = down, up
    return found


def _low_rank(delta: Delta, unit: Unit) -> LowRank:
    """The change of a whole matrix by two thin ones that a unit makes."""
    spec, site = unit.spec, unit.site
    plain = isinstance(unit, WeightUnit) and type(unit).add_linear is WeightUnit.add_linear
    if isinstance(spec, Weight) and plain and spec.factored and not spec.gated:
        update = spec.update(unit)
        alone = site.param == "weight" and len(site.shape) == 2
        if isinstance(update, LowRank) and alone and site.kind != "dense":
            return update
    what = "a trained task head" if spec.owns else f"`{spec.kind}` at `{site.path}`"
    instead = (
        "attach without: `head=False`"
        if spec.owns
        else 'make a LoRA of it: `deltune convert run --to "lora(rank=8)" --out smaller`'
    )
    raise ExchangeError(
        f"`{delta.name}` holds {what}, and vLLM serves changes of whole matrices by two thin ones "
        f"alone; {instead}, or merge it and serve the model"
    )


def _names(module: nn.Module | None) -> tuple[str, str]:
    if isinstance(module, nn.Embedding):
        return "lora_embedding_A", "lora_embedding_B"
    return "lora_A.weight", "lora_B.weight"

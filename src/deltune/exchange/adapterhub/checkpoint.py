"""Checkpoints of AdapterHub's `adapters` as deltas."""

from collections.abc import Mapping
from pathlib import Path

from torch import nn

from deltune.delta import Delta
from deltune.errors import ExchangeError, listing
from deltune.exchange.adapterhub.fusion import heads, is_fusion, read_fusion
from deltune.exchange.adapterhub.reading import read_adapter
from deltune.exchange.parts import attach_parts, together
from deltune.sites.discover import discover


def load_adapterhub(
    path: str | Path,
    model: nn.Module,
    name: str = "",
    *,
    adapters: Mapping[str, str | Path] | None = None,
    head: bool = True,
    force: bool = False,
) -> Delta:
    """Attaches what `save_adapter`, `save_adapter_fusion` or `save_adapter_setup` of AdapterHub's
    `adapters` 1.x wrote.

    Read are bottleneck adapters in front of or behind the norm and parallel ones, Compacter, LoRA,
    (IA)^3, LoReFT, prefixes of encoders and unions of these; every field of the configuration and
    every tensor is honoured, or refused by its name. Heads are other modules there than in
    transformers' models, and are not read: a folder with one is refused unless `head` is False.
    Of setups the fusion of single adapters is read, as `fuse` with `frozen=True`.

    `pytorch_adapter.bin`, which `adapters` writes by default, is a pickle. It is read by torch's
    reader of nothing but tensors; where there is `adapter.safetensors`, that is read instead.

    Args:
        path: the folder with `adapter_config.json`, `adapter_fusion_config.json` or
            `adapter_setup.json`.
        model: the backbone.
        name: for the delta; AdapterHub's name by default.
        adapters: name -> folder of each fused adapter, where the folder of the fusion is given
            alone; a setup has them.
        head: whether a head in the folder belongs to what is wanted; with False the adapters are
            attached alone, and the model keeps the head that it has.
        force: load also where the checkpoint is of another type of model or of another model of the
            hub. Shapes must agree in any case.

    Raises:
        ExchangeError: no such folder, a damaged file, another model, a head, what cannot be
            honoured. The model is untouched then.

    Source: Poth et al., "Adapters: A Unified Library for Parameter-Efficient and Modular Transfer
    Learning", 2023, arXiv:2311.11077; the format of version 1.3.0.

    Example:
        >>> import json, tempfile, torch
        >>> folder = Path(tempfile.mkdtemp())
        >>> told = {"config": {"architecture": "lora", "r": 2, "alpha": 4}, "name": "mine"}
        >>> told["version"] = "adapters.1.3.0"
        >>> size = (folder / "adapter_config.json").write_text(json.dumps(told))
        >>> names = ["0.loras.mine.lora_A", "0.loras.mine.lora_B"]
        >>> tensors = dict(zip(names, (torch.ones(2, 4), torch.ones(4, 2))))
        >>> torch.save(tensors, folder / "pytorch_adapter.bin")
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> delta = load_adapterhub(folder, model)
        >>> delta.name, str(delta.spec)
        ('mine', "lora(where='0', rank=2, alpha=4.0)")
    """
    folder, atlas, spec = Path(path), discover(model), None
    if head and (there := heads(folder)):
        raise ExchangeError(
            f"`{folder}` has a head, {listing(there)}, which is not read; pass `head=False` for "
            "the adapters alone (`--without-head` on the command line), and train a head for them"
        )
    if is_fusion(folder):
        spec, parts, theirs = read_fusion(folder, model, atlas, dict(adapters or {}), force)
    else:
        parts, theirs = read_adapter(folder, model, atlas, force)
    return attach_parts(model, parts, name or theirs, spec=spec or together(parts))

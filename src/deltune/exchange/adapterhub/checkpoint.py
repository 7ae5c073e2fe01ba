"""Checkpoints of AdapterHub's `adapters` as deltas."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from deltune.delta import Delta
from deltune.errors import ExchangeError, listing
from deltune.exchange.adapterhub import bottlenecks, pairs, prefixes, reft
from deltune.exchange.foreign import Held, Told, read_json, read_pickled, read_safetensors
from deltune.exchange.parts import Part, attach_parts, pickled_or_not
from deltune.sites.discover import Atlas, discover

CONFIG = "adapter_config.json"
FILES = ("adapter.safetensors", "pytorch_adapter.bin")
SILENT = ("architecture", "init_weights", "init_weights_seed", "leave_out")
"""Fields that say nothing about what a trained adapter does, or what its tensors say."""
Read = Callable[[Told, Held, Atlas, str], list[Part]]
FORMS: dict[str | None, Read] = {
    None: bottlenecks.read,
    "lora": pairs.read,
    "reft": reft.read,
    "prefix_tuning": prefixes.read,
}


def load_adapterhub(
    path: str | Path, model: nn.Module, name: str = "", *, force: bool = False
) -> Delta:
    """Attaches an adapter that `save_adapter` of AdapterHub's `adapters` 1.x wrote.

    Read are bottleneck adapters in front of or behind the norm and parallel ones, Compacter, LoRA,
    (IA)^3, LoReFT, prefixes of encoders and unions of these; every field of the configuration and
    every tensor is honoured, or refused by its name. A head beside it in the folder is not read.

    `pytorch_adapter.bin`, which `adapters` writes by default, is a pickle. It is read by torch's
    reader of nothing but tensors; where there is `adapter.safetensors`, that is read instead.

    Args:
        path: the folder with `adapter_config.json`.
        model: the backbone.
        name: for the delta; AdapterHub's name by default.
        force: load also where the checkpoint is of another type of model or of another model of the
            hub. Shapes must agree in any case.

    Raises:
        ExchangeError: no such folder, a damaged file, another model, what cannot be honoured. The
            model is untouched then.

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
    folder = Path(path)
    about = read_json(folder / CONFIG)
    config, theirs = about.values.get("config"), about.values.get("name")
    if not isinstance(config, dict) or not isinstance(theirs, str) or not theirs:
        raise ExchangeError(
            f"{about.where} is not of AdapterHub's `adapters`, which writes `config` and `name`"
        )
    if not force:
        _same_model(about, model)
    file = pickled_or_not(folder, FILES)
    held = (read_pickled if file.suffix == ".bin" else read_safetensors)(file)
    atlas = discover(model)
    held.left = {_ours(n, model, atlas): tensor for n, tensor in held.left.items()}
    parts = []
    for one in _members(config, about.where):
        told = Told(one, about.where)
        kind = one.get("architecture")
        if kind not in FORMS:
            raise ExchangeError(
                f"{about.where} is of the architecture {kind!r}; this version reads bottlenecks "
                f"and {listing(str(form) for form in FORMS if form)}"
            )
        _old(told, about)
        parts += FORMS[kind](told, held, atlas, theirs)
        told.close(SILENT, {})
    held.close()
    if not parts:
        raise ExchangeError(f"`{file}` adapts nothing; save it again")
    return attach_parts(model, parts, name or theirs)


def _members(config: dict[str, Any], where: str) -> list[dict[str, Any]]:
    """The configurations of a union, or the one that there is."""
    if config.get("architecture") != "union":
        return [config]
    members = config.get("configs")
    if not isinstance(members, list) or not all(isinstance(one, dict) for one in members):
        raise ExchangeError(f"{where}: `configs` of the union is no list of configurations")
    return members


def _same_model(about: Told, model: Any) -> None:
    config = getattr(model, "config", None)
    for field, ours in (
        ("model_type", getattr(config, "model_type", None)),
        ("hidden_size", getattr(config, "hidden_size", None)),
        ("model_name", getattr(model, "name_or_path", None)),
    ):
        theirs = about.values.get(field)
        if theirs and ours and theirs != ours:
            raise ExchangeError(
                f"{about.where}: `{field}` is {theirs!r} and this model's {ours!r}; load that "
                "model, or pass `force=True` if you know that they agree"
            )


def _ours(name: str, model: Any, atlas: Atlas) -> str:
    """A tensor's name from this model's root: of a model with a head, or of one without."""
    head, _, tail = name.partition(".")
    body = getattr(model, "base_model_prefix", "")
    if head == body and body not in model._modules:
        return tail
    return f"{body}.{name}" if head not in model._modules and body in model._modules else name


def _old(told: Told, about: Told) -> None:
    """Before version 1.1.0 the scale of a LoRA was 1 whatever its alpha, which was not used."""
    version = about.values.get("version")
    numbers = str(version).removeprefix("adapters.").split(".")[:2]
    if told.values.get("architecture") == "lora" and not (
        str(version).startswith("adapters.") and [int(n) for n in numbers if n.isdigit()] >= [1, 1]
    ):
        told.values["alpha"] = told.values.get("r", 8)

"""An adapter's folder in AdapterHub's format: its configuration and its tensors, as parts."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from deltune.errors import ExchangeError, listing
from deltune.exchange.adapterhub import bottlenecks, pairs, prefixes, reft
from deltune.exchange.foreign import Held, Told, read_json
from deltune.exchange.parts import Part, read_first
from deltune.sites.discover import Atlas

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


def read_adapter(
    folder: Path, model: nn.Module, atlas: Atlas, force: bool
) -> tuple[list[Part], str]:
    """The parts of an adapter and its name; nothing is attached.

    Raises:
        ExchangeError: as `load_adapterhub`.
    """
    about, config, theirs = read_config(folder / CONFIG, model, force)
    held = read_tensors(folder, FILES, model, atlas)
    parts = []
    for one in _members(config, about.where):
        told = Told(one, about.where)
        kind = one.get("architecture")
        if not isinstance(kind, str | None) or kind not in FORMS:
            raise ExchangeError(
                f"{about.where} is of the architecture {kind!r}; this version reads bottlenecks "
                f"and {listing(str(form) for form in FORMS if form)}"
            )
        _old(told, about)
        parts += FORMS[kind](told, held, atlas, theirs)
        told.close(SILENT, {})
    held.close()
    if not parts:
        raise ExchangeError(f"{held.where} adapts nothing; save it again")
    return parts, theirs


def read_config(file: Path, model: nn.Module, force: bool) -> tuple[Told, dict[str, Any], str]:
    """All fields of a configuration's file, the configuration itself, and the name."""
    about = read_json(file)
    config, theirs = about.values.get("config"), about.values.get("name")
    if not isinstance(config, dict) or not isinstance(theirs, str) or not theirs:
        raise ExchangeError(
            f"{about.where} is not of AdapterHub's `adapters`, which writes `config` and `name`"
        )
    if not force:
        _same_model(about, model)
    return about, config, theirs


def read_tensors(folder: Path, files: tuple[str, ...], model: nn.Module, atlas: Atlas) -> Held:
    """The tensors of the first of these files that is there, named from this model's root."""
    held = read_first(folder, files)
    held.left = {_ours(n, model, atlas): tensor for n, tensor in held.left.items()}
    return held


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
    """In versions `adapters.` before 1.1.0 the scale of a LoRA was 1 whatever its alpha, which was
    not used; in those before, without this name, it was alpha / r."""
    if told.values.get("architecture") != "lora":
        return
    version = about.take("version", str, "")
    found = re.match(r"(adapters\.)?([0-9]{1,9})\.([0-9]{1,9})(\.|$)", version)
    if version and found is None:
        raise ExchangeError(
            f"{about.where}: `version` is {version!r}; expected one such as 'adapters.1.3.0', "
            "which says what `alpha` means"
        )
    if found and found[1] and (int(found[2]), int(found[3])) < (1, 1):
        told.values["alpha"] = told.values.get("r", 8)

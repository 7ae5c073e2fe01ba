"""PEFT checkpoints as deltas, and deltas as PEFT checkpoints."""

import json
import re
from collections.abc import Mapping
from inspect import signature
from pathlib import Path

from torch import Tensor, nn

from deltune.attaching import attach_values
from deltune.delta import Delta
from deltune.errors import ExchangeError, closest, listing
from deltune.exchange.foreign import Told, read_json
from deltune.exchange.names import take_head
from deltune.exchange.parts import filled, read_first
from deltune.exchange.peft import (
    adalora,
    banks,
    bases,
    ia3,
    lora,
    lycoris,
    modules,
    norms,
    prompts,
    rotations,
    shards,
    shira,
    spectral,
    tokens,
)  # fmt: skip
from deltune.families.specification.baselines import FullTuning
from deltune.mechanisms.head import HeadOnly
from deltune.planning import Plan
from deltune.sites.discover import discover
from deltune.spec import Sum
from deltune.store import native
from deltune.store.hub import local

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PICKLED = "adapter_model.bin"
SILENT = ("peft_type", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
          "auto_mapping", "task_type")  # fmt: skip
"""Fields of every type that say nothing about what a delta does."""


FACES = {
    "LORA": lora.FACE,
    "ADALORA": adalora.FACE,
    "IA3": ia3.FACE,
    "LOHA": lycoris.LOHA,
    "LOKR": lycoris.LOKR,
    "VERA": bases.VERA,
    "RANDLORA": bases.RANDLORA,
    "FOURIERFT": spectral.FOURIERFT,
    "C3A": spectral.C3A_FACE,
    "VBLORA": banks.VBLORA,
    "SHIRA": shira.FACE,
    "HRA": rotations.HRA_FACE,
    "OFT": rotations.OFT_FACE,
    "BOFT": rotations.BOFT_FACE,
    "MISS": shards.MISS,
    "LN_TUNING": norms.FACE,
    "TRAINABLE_TOKENS": tokens.FACE,
    "PROMPT_TUNING": prompts.PROMPT,
    "P_TUNING": prompts.PROMPT,  # the file has what the network made
    "PREFIX_TUNING": prompts.PREFIX,
}


def load_peft(
    path: str | Path, model: nn.Module, name: str = "delta", *, force: bool = False
) -> Delta:
    """Attaches a checkpoint of PEFT.

    Every field of its configuration and every tensor is honoured, or the checkpoint is refused by
    the name of what is not: nothing is attached in part, nothing is passed over.

    `adapter_model.bin`, which older versions of PEFT wrote, is a pickle. It is read by torch's
    reader of nothing but tensors; where there is `adapter_model.safetensors`, that is read instead.

    Args:
        path: the folder with `adapter_config.json` and one of these files, or
            `hub:OWNER/NAME`, or `hub:OWNER/NAME@REVISION`.
        model: the backbone, as transformers loads it, for the same labels.
        name: for the delta.
        force: load also where the checkpoint names another model of the hub than this one. Such a
            file says no more of its backbone than the name; shapes must agree in any case.

    Raises:
        ExchangeError: no such folder, a damaged file, another model, a method or an option that
            cannot be honoured. The model is untouched then.
        StoreError: a repository that cannot be reached.

    Example:
        >>> import deltune as dt, tempfile, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> delta = dt.attach(model, dt.LoRA(rank=2, where="0"))
        >>> folder = dt.save_peft(delta, Path(tempfile.mkdtemp(), "saved"))
        >>> delta.detach()
        >>> str(dt.load_peft(folder, model).spec)
        "lora(where='0', rank=2)"
    """
    folder = local(path, (CONFIG, TENSORS))
    if not (folder / TENSORS).is_file():
        folder = local(path, (CONFIG, PICKLED))
    told = read_json(folder / CONFIG)
    kind = told.values.get("peft_type")
    if kind is None and isinstance(told.values.get("config"), dict):
        raise ExchangeError(
            f"{told.where} is of AdapterHub's `adapters`; `load_adapterhub` of "
            "`deltune.exchange.adapterhub.checkpoint` reads it"
        )
    if not isinstance(kind, str) or kind not in FACES:
        near = closest(kind, FACES) if isinstance(kind, str) else ""
        raise ExchangeError(
            f"{told.where} is of the type {kind!r}{near}; this version reads {listing(FACES)}"
        )
    face = FACES[kind]
    if not force:
        _same_model(told, model)
    held = read_first(folder, (TENSORS, PICKLED), face.whole_numbers)
    held.left = {n.removeprefix(face.prefix): tensor for n, tensor in held.left.items()}
    atlas = discover(model)
    beside, changes = modules.read(told, held, atlas)
    specs, tensors = face.read(told, held, atlas)
    heads = take_head(held, atlas)
    told.close((*SILENT, *face.silent), face.defaults)
    held.close()
    every = (*specs, *beside)
    spec = every[0] if len(every) == 1 else Sum(every)

    def fill(made: Plan) -> Mapping[str, Tensor]:
        own = face.fill(made, tensors) | filled(made, changes, FullTuning)
        return own | {f"head.{n}": tensor for n, tensor in heads.items()}

    return attach_values(model, spec, fill, name, head=bool(heads))


def _same_model(told: Told, model: nn.Module) -> None:
    """Refuses a checkpoint of another model of the hub; paths of other machines say nothing."""
    theirs, ours = told.values.get("base_model_name_or_path"), getattr(model, "name_or_path", "")
    both = all(isinstance(n, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", n) for n in (theirs, ours))
    if both and theirs != ours:
        raise ExchangeError(
            f"{told.where} was trained on `{theirs}` and this model is `{ours}`; load that model, "
            "or pass `force=True` if you know that they agree"
        )


def save_peft(delta: Delta, path: str | Path, overwrite: bool = False) -> Path:
    """Writes a delta as a checkpoint that PEFT loads.

    Args:
        delta: of a method that PEFT has, with or without a head, and `full(where=...)` beside it.
        path: the folder; `adapter_config.json` and `adapter_model.safetensors` are written whole or
            not at all.
        overwrite: whether an earlier checkpoint may go.

    Raises:
        ExchangeError: a method or an option that PEFT has no words for.
        StoreError: the folder exists, or the disk refuses; nothing earlier is lost.

    Example:
        >>> import deltune as dt, tempfile, torch
        >>> delta = dt.attach(torch.nn.Sequential(torch.nn.Linear(4, 4)), "lora(rank=2, where='0')")
        >>> folder = dt.save_peft(delta, Path(tempfile.mkdtemp(), "saved"))
        >>> sorted(file.name for file in folder.iterdir())
        ['adapter_config.json', 'adapter_model.safetensors']
    """
    units = [unit for unit in delta.tree.units if not isinstance(unit.spec, HeadOnly)]
    mine = [unit for unit in units if not isinstance(unit.spec, FullTuning)]
    face = next((f for f in FACES.values() if f.holds(unit.spec for unit in mine)), None)
    if face is None:
        kinds = dict.fromkeys(unit.spec.kind for unit in units)
        known = dict.fromkeys(one.spec.kind for one in FACES.values())
        raise ExchangeError(
            f"`{delta.name}` is of {listing(kinds) or 'a head alone'}; PEFT keeps one method in a "
            f"folder, of {listing(known)}: save it in deltune's own format, or convert it with "
            "`deltune convert`"
        )
    config, tensors = face.write(delta, mine)
    beside = [unit for unit in units if isinstance(unit.spec, FullTuning)]
    if beside and not face.modules:
        raise ExchangeError(
            f"`{delta.name}` changes `{beside[0].site.path}` as a whole beside `{face.spec.kind}`, "
            "where PEFT keeps a new head alone; merge the delta"
        )
    whole, values = modules.write(delta, beside, tensors)
    head = {n.removeprefix("head."): t for n, t in delta.tensors().items() if n.startswith("head.")}
    own = {name if name in face.bare else face.prefix + name: t for name, t in tensors.items()}
    tensors = own | {face.prefix + name: tensor for name, tensor in (head | values).items()}
    atlas = discover(delta.model)
    task, kind = task_of(delta.model, bool(head)), type(delta.model)
    config |= {
        "task_type": task,
        "auto_mapping": None if task else {
            "base_model_class": kind.__name__, "parent_library": kind.__module__
        },
        "modules_to_save": [*(atlas.heads if head else ()), *whole] or None,
        "base_model_name_or_path": getattr(delta.model, "name_or_path", None) or None,
        "inference_mode": True,
    }  # fmt: skip
    text = json.dumps(config, indent=2, sort_keys=True)
    native.write_files(path, (TENSORS, CONFIG), tensors, text, overwrite, "checkpoint of PEFT")
    return Path(path)


def task_of(model: nn.Module, head: bool) -> str | None:
    """What PEFT calls the model's use; its prompts need to know. None of models of images or sound:
    PEFT's classes for a use hand on `inputs_embeds`, which those do not take."""
    if "inputs_embeds" not in signature(type(model).forward).parameters:
        return None
    if head:
        return "SEQ_CLS"
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return "SEQ_2_SEQ_LM"
    generates = getattr(model, "can_generate", lambda: False)()
    return "CAUSAL_LM" if generates else "FEATURE_EXTRACTION"

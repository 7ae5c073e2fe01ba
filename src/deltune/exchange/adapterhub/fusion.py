"""AdapterFusion in AdapterHub's format: `<place>.adapter_fusion_layer.<name>.query.weight` (d, d),
`key.weight` and biases, `value.weight`, beside the folders of the fused adapters."""

from pathlib import Path
from typing import Any

from torch import nn

from deltune.errors import ExchangeError, listing
from deltune.exchange.adapterhub.bottlenecks import place_of
from deltune.exchange.adapterhub.reading import SILENT, read_adapter, read_config, read_tensors
from deltune.exchange.foreign import Form, Held, Told, read_json
from deltune.exchange.parts import Part, Tensors, together
from deltune.families.addition.adapter import Adapter
from deltune.families.composition.fuse import Fuse
from deltune.mechanisms.insert import layers
from deltune.sites.discover import Atlas
from deltune.spec import Spec

CONFIG, SETUP = "adapter_fusion_config.json", "adapter_setup.json"
FILES = ("model_adapter_fusion.safetensors", "pytorch_model_adapter_fusion.bin")
SCORES = {
    "query.weight": Form("Q", "d d"), "query.bias": Form("b_q", "d"),
    "key.weight": Form("K", "d d"), "key.bias": Form("b_k", "d"),
}  # fmt: skip
VALUE = {"value.weight": Form("V", "d d")}
HEADS = ("head_config.json", "pytorch_model_head.bin", "model_head.safetensors")
LONGEST = 255  # bytes of a file's name
PENALTY = 0.01
"""What `get_fusion_regularization_loss` multiplies by."""


def is_fusion(folder: Path) -> bool:
    """Whether a folder says that it holds adapters together."""
    return any((folder / name).is_file() for name in (CONFIG, SETUP))


def heads(folder: Path) -> list[str]:
    """What says that a head belongs to an adapter, to a fusion or to a setup.

    Raises:
        ExchangeError: a damaged setup.
    """
    if not (folder / SETUP).is_file():
        return [name for name in HEADS if (folder / name).is_file()]
    said = read_json(folder / SETUP).values.get("head_setup")
    return [*([f"head_setup = {said!r}"] if said else []), *heads(_setup(folder)[0])]


def read_fusion(
    folder: Path, model: nn.Module, atlas: Atlas, adapters: dict[str, str | Path], force: bool
) -> tuple[Spec, list[Part], str]:
    """The spec of a fusion, the parts of its adapters and of itself, and its name.

    Raises:
        ExchangeError: as `load_adapterhub`.
    """
    if (folder / SETUP).is_file():
        folder, adapters = _setup(folder)
    about, config, theirs = read_config(folder / CONFIG, model, force)
    names = _members(about, theirs)
    if odd := [name for name in names if name not in adapters]:
        raise ExchangeError(
            f"{about.where} fuses {listing(names)}, and the folder of {listing(odd)} is not given; "
            "pass `adapters={name: folder}`, or the folder that `save_adapter_setup` wrote"
        )
    inner, specs = [], []
    for name in names:
        parts, _ = read_adapter(Path(adapters[name]), model, atlas, force)
        specs.append(together(parts))
        inner += parts
    told = Told(config, about.where)
    spec = Fuse(tuple(specs), frozen=True, **_form(told, inner, model))
    told.close(SILENT, {})
    held = read_tensors(folder, FILES, model, atlas)
    forms = SCORES | VALUE if spec.value else SCORES
    found = held.places(f".adapter_fusion_layer.{theirs}.", forms)
    own = _placed(found, held, inner, atlas)
    held.close()
    return spec, [*inner, Part(spec, own)], theirs


def _setup(folder: Path) -> tuple[Path, dict[str, str | Path]]:
    """The folder of the fusion in a setup, and those of its adapters."""
    about = read_json(folder / SETUP)
    block = about.values.get("adapter_setup")
    kind = block.get("type") if isinstance(block, dict) else None
    children = block.get("children") if isinstance(block, dict) else None
    names = [_single(child) for child in children] if isinstance(children, list) else []
    if kind != "Fuse" or not names or None in names:
        raise ExchangeError(
            f"{about.where} is a setup of the type {kind!r}; setups are read where they are a "
            "`Fuse` of single adapters: load each adapter from its own folder and put them "
            "together with `deltune.algebra.compose`"
        )
    known = [name for name in names if name is not None]
    for name in known:
        if Path(name).name != name or name in (".", ".."):
            raise ExchangeError(f"{about.where}: {name!r} is no name of a folder beside it")
    joined = ",".join(known)
    if (size := len(joined.encode(errors="surrogatepass"))) > LONGEST:
        raise ExchangeError(
            f"{about.where}: the names of its adapters have {size} bytes together, and the folder "
            f"called by them {LONGEST} at most; the file is damaged: save the setup again"
        )
    return folder / joined, {name: folder / name for name in known}


def _single(child: Any) -> str | None:
    """The name of a single adapter in a setup."""
    inside = child.get("children") if isinstance(child, dict) else None
    plain = isinstance(inside, list) and len(inside) == 1 and isinstance(inside[0], str)
    return inside[0] if plain and child.get("type") == "single" else None


def _members(about: Told, theirs: str) -> list[str]:
    """The names of the fused adapters."""
    names = about.values.get("adapter_names", theirs)
    names = names.split(",") if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(n, str) and n for n in names):
        raise ExchangeError(f"{about.where}: `adapter_names` is {names!r}; expected names")
    return names


def _form(told: Told, inner: list[Part], model: Any) -> dict[str, Any]:
    """What the fields of a configuration say.

    Raises:
        ExchangeError: a form that is not here.
    """
    places = {part.spec.placement for part in inner if isinstance(part.spec, Adapter)}
    if not all(isinstance(part.spec, Adapter) for part in inner) or len(places) != 1:
        raise ExchangeError(
            f"{told.where} fuses {listing(part.spec.kind for part in inner)}, placed "
            f"{listing(places) or 'nowhere'}; read are bottleneck adapters of one placement"
        )
    asked = {
        "query": told.take("query", bool, False), "key": told.take("key", bool, False),
        "residual_before": not told.take("residual_before", bool, False),
        "temperature": not told.take("temperature", bool, False),  # begins anew at 50 when loaded
        "query_before_ln": not told.take("query_before_ln", bool, False),
        "is_parallel": places != {"parallel"},
    }  # fmt: skip
    if odd := [name for name, good in asked.items() if not good]:
        said = [f"{name} = {told.values.get(name, True)!r}" for name in odd]
        raise ExchangeError(
            f"{told.where} asks for what cannot be honoured: {listing(said)}; read are fusions "
            "with query and key of what serial adapters read, without temperature"
        )
    told.left -= {"value_before_softmax", "value_initialized"}  # V is linear and in the file
    dropout = told.take("dropout_prob", (float, int), None)
    theirs = getattr(getattr(model, "config", None), "attention_probs_dropout_prob", 0.0)
    return {
        "value": told.take("value", bool, False),
        "penalty_weight": PENALTY if told.take("regularization", bool, False) else 0.0,
        "dropout": float(dropout or theirs or 0.0),
    }


def _placed(
    found: dict[str, Tensors], held: Held, inner: list[Part], atlas: Atlas
) -> dict[str, Tensors]:
    """The tensors of the fusion by the places of what it fuses."""
    own: dict[str, Tensors] = {}
    candidates, keys = layers(atlas), {key for part in inner for key in part.own}
    for place, tensors in found.items():
        site = place_of(place, False, candidates, held)
        if site.key not in keys:
            site = place_of(place, True, candidates, held)
        own[site.key] = tensors
    return own

"""What a saved delta says of itself to people and to the hub: its README.md."""

import re
from collections.abc import Iterable, Mapping
from math import prod
from typing import Any

CARD = "README.md"


def card(about: Mapping[str, Any], kinds: Iterable[str], place: str = "") -> str:
    """The model card of a delta.

    Args:
        about: what `delta.json` holds.
        kinds: of its methods.
        place: where it can be loaded from; a folder of a name that is made up, if not known.
    """
    from huggingface_hub import ModelCardData

    backbone, scalars = about["backbone"], sum(map(prod, about["layout"].values()))
    name = str(backbone.get("name", ""))
    known = name if re.fullmatch(r"[\w.-]+/[\w.-]+", name) else None
    relation: dict[str, Any] = {"base_model_relation": "adapter"} if known else {}
    tags = ["delta-tuning", "peft", *dict.fromkeys(kinds)]
    data = ModelCardData(base_model=known, library_name="deltune", tags=tags, **relation)
    rows = {
        "what": _code(about["text"]),
        "of": _code(f"{backbone.get('class', '?')} {name}".strip()),
        "trained numbers": f"{scalars:,} in {len(about['layout'])} tensors",
        "task head": "saved with it" if any(n.startswith("head.") for n in about["layout"])
        else "none",
        "scale": f"{about['scale']:g}",
        "weights of the backbone": _code(str(backbone.get("weights", ""))[:16] or "unknown"),
        "configuration of the backbone": _code(str(backbone.get("config", ""))[:16] or "unknown"),
        "written by": str(about["library"]),
    }  # fmt: skip
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    title = re.sub(r"[^\w .,+-]", " ", str(about["name"]))
    return (
        f"---\n{data.to_yaml()}\n---\n\n# {title}\n\nA delta for a frozen pre-trained model.\n\n"
        f"| | |\n|---|---|\n{table}\n\n## Load it\n\n```python\nimport deltune as dt\n\n"
        f"# model: {_plain(backbone.get('class', '?'))} {_plain(name)}, with these weights\n"
        f'delta = dt.load("{place or "path/to/this/folder"}", model)\n```\n'
    )


def _plain(text: str) -> str:
    return re.sub(r"[\r\n`]", " ", text)


def _code(text: str) -> str:
    return f"`{_plain(text).replace('|', ' ')}`"

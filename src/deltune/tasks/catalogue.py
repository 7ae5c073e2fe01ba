"""The tasks that lie in a folder, without reading their records."""

import json
from dataclasses import dataclass
from pathlib import Path

from deltune.errors import DataError, closest, listing
from deltune.tasks.types import type_of


@dataclass(frozen=True, slots=True)
class Card:
    """What the metadata of a task folder says of it."""

    name: str
    type: str
    """What it is about; told by its name where the metadata says nothing."""
    kind: str
    metric: str
    labels: int | None
    """How many there are, where there are labels."""
    train: int | None
    dev: int | None
    test: int | None
    licence: str
    place: str
    """What `load_task` reads it by."""


def list_tasks(folder: str | Path, type: str = "") -> list[Card]:
    """The tasks of a folder of task folders, by type and name.

    Args:
        folder: holds folders with `meta.json`; what has none is passed over.
        type: only tasks of this type.

    Raises:
        DataError: there is no task in it, or none of the type; a `meta.json` cannot be read.
    """
    cards = [_card(path) for path in sorted(Path(folder).glob("*/meta.json"))]
    if not cards:
        raise DataError(f"`{folder}` holds no folder with a meta.json; give a folder of tasks")
    types = sorted({card.type for card in cards})
    if type and type not in types:
        raise DataError(
            f"`{folder}` holds no task of the type `{type}`{closest(type, types)}; its types are "
            f"{listing(types)}"
        )
    wanted = [card for card in cards if not type or card.type == type]
    return sorted(wanted, key=lambda card: (card.type, card.name))


def _card(path: Path) -> Card:
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        kind, metric = str(meta["kind"]), str(meta["metric"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"`{path}` cannot be read as a task's metadata ({error!r}); correct or remove it"
        ) from None
    name, labels = path.parent.name, meta.get("labels")
    sizes = [meta.get(f"n_{split}") for split in ("train", "dev", "test")]
    return Card(
        name, str(meta.get("type") or type_of(name)), kind, metric,
        len(labels) if labels else None, *sizes, str(meta.get("licence") or ""),
        str(path.parent),
    )  # fmt: skip

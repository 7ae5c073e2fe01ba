"""Deltas on their way to a folder and to the hub."""

from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

from deltune.delta import Delta
from deltune.sites.site import noted
from deltune.store import hub, native
from deltune.store.card import CARD, card
from deltune.storing import Results
from deltune.vector import sharded


def save(
    delta: Delta, path: str | Path, overwrite: bool = False, with_card: bool = False,
    place: str = "", results: Results | None = None,
) -> Path:  # fmt: skip
    """Writes a delta to a folder: see `Delta.save`.

    Args:
        delta: attached.
        path: the folder.
        overwrite: whether a delta that is there may go.
        with_card: whether a README.md goes beside.
        place: where the card says that it can be loaded from.
        results: for the card.
    """
    tree = delta.tree
    about = {
        "library": f"deltune {version('deltune')}",
        "name": delta.name,
        "spec": delta.spec.to_json(),
        "text": str(delta.spec),
        "head": tree.with_head,
        "scale": tree.factor,
        "layout": {slot.name: list(slot.shape) for slot in delta.layout},
        "sites": noted({key: unit.site for key, unit in tree.places().items()}),
        "backbone": delta.backbone(),
    }
    tensors, together = tree.whole(), any(map(sharded, delta.model.parameters()))
    kinds = [spec.kind for spec, _ in tree.members()]
    text = card(about, kinds, place, results or {}) if with_card else None

    def beside(folder: Path) -> None:
        if text is not None:
            (folder / CARD).write_text(text, encoding="utf-8")

    native.by_first(lambda: native.write(path, tensors, about, overwrite, inside=beside), together)
    return Path(path)


def push(
    delta: Delta, repo: str, *, private: bool | None, revision: str | None, message: str,
    token: str | None, results: Results | None = None,
) -> str:  # fmt: skip
    """Saves a delta to a repository of the hub: see `Delta.push_to_hub`."""
    place = f"{hub.HUB}{repo}" + (f"@{revision}" if revision else "")
    with TemporaryDirectory() as folder:
        saved = save(delta, Path(folder, "delta"), with_card=True, place=place, results=results)
        return hub.push(
            saved, repo, private=private, revision=revision, message=message, token=token
        )

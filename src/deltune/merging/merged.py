"""A merged delta, before it is written."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

from deltune.sites.site import Site, noted
from deltune.spec import Spec
from deltune.store import native


@dataclass(frozen=True, slots=True)
class Merged:
    """A delta made of others: `save` writes it, `deltune.load` attaches it."""

    spec: Spec
    error: float
    """|| M - M' || / || M || of the merged change M and what a rank leaves of it, M', over all
    places; 0 where nothing was left out."""
    trained: Mapping[str, Tensor]
    kept: Mapping[str, Tensor]
    sites: Mapping[str, Site]
    head: bool
    scale: float
    backbone: Mapping[str, Any]
    origin: Mapping[str, Any]
    """How it was made, and of what."""

    def count(self) -> int:
        """Number of trainable scalars, the task head's included."""
        return sum(tensor.numel() for tensor in self.trained.values())

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by its name."""
        return {**self.trained, **self.kept}

    def save(self, path: str | Path, name: str = "merged", overwrite: bool = False) -> Path:
        """Writes the delta to a folder, atomically, as `Delta.save` does.

        Args:
            path: the folder.
            name: of the delta.
            overwrite: whether an earlier delta in its place may go.

        Raises:
            StoreError: the folder exists, or the disk refuses; nothing earlier is lost.
        """
        about = {
            "library": f"deltune {version('deltune')}",
            "name": name,
            "spec": self.spec.to_json(),
            "text": str(self.spec),
            "head": self.head,
            "scale": self.scale,
            "layout": {own: list(tensor.shape) for own, tensor in self.trained.items()},
            "sites": noted(self.sites),
            "backbone": dict(self.backbone),
            "merged": {**self.origin, "error": self.error},
        }
        native.write(path, self.tensors, about, overwrite)
        return Path(path)

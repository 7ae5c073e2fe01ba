"""What the handle on a delta does with folders and the hub, in deltune's words and in those of
transformers."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from deltune.delta import Delta

Results = Mapping[str, Mapping[str, float]]
"""Task -> metric -> value."""


class Storable:
    """What of a `Delta` writes and reads it."""

    model: nn.Module
    name: str

    def save(
        self, path: str | Path, overwrite: bool = False, card: bool = False,
        results: Results | None = None,
    ) -> Path:  # fmt: skip
        """Writes the delta to a folder, atomically: `delta.safetensors` and `delta.json`.

        Of a model that is sharded over processes every process must call it: what is written is
        whole, by the first of them, and all return when it is there.

        Args:
            path: the folder.
            overwrite: whether a delta that is there may go.
            card: write a README.md beside, that says what the delta is and how it is loaded.
            results: task -> metric -> value, for the card: `{"sst2": {"accuracy": 0.91}}`.

        Raises:
            StoreError: the folder exists, or the disk refuses; nothing earlier is lost. Or a tensor
                is not there whole.
        """
        from deltune.saving import save

        return save(self._handle(), path, overwrite, card, results=results)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        commit_message: str = "Upload a delta",
        token: str | None = None,
        results: Results | None = None,
    ) -> str:
        """Saves the delta to a repository of the Hugging Face hub, with a model card; then
        `dt.load("hub:OWNER/NAME", model)` attaches it.

        Args:
            repo_id: `OWNER/NAME`; made if it is not there.
            private: whether a new one is private; as the owner's settings say if None.
            revision: a branch; made if it is not there.
            commit_message: of the commit.
            token: for the hub; the one that `hf auth login` keeps if None.
            results: task -> metric -> value, for the card.

        Returns:
            The address of the commit.

        Raises:
            StoreError: no access, no network. The delta is as it was.
        """
        from deltune.saving import push

        return push(
            self._handle(), repo_id, private=private, revision=revision, message=commit_message,
            token=token, results=results,
        )  # fmt: skip

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        overwrite: bool = False,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        results: Results | None = None,
        **hub: Any,
    ) -> Path:
        """`save` with a card, in transformers' words.

        Args:
            save_directory: the folder.
            overwrite: whether a delta that is there may go. Unlike transformers this asks: the
                folder is replaced as a whole, with what else is in it.
            push_to_hub: also `push_to_hub`.
            repo_id: `OWNER/NAME` there; the folder's name if None.
            results: task -> metric -> value, for the card.
            **hub: `private`, `revision`, `commit_message` and `token` of `push_to_hub`.

        Raises:
            StoreError: as `save` and `push_to_hub`.
        """
        folder = self.save(save_directory, overwrite, card=True, results=results)
        if push_to_hub:
            self.push_to_hub(repo_id or folder.resolve().name, results=results, **hub)
        return folder

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        pretrained: str | Path,
        name: str | None = None,
        *,
        revision: str | None = None,
        force: bool = False,
    ) -> "Delta":
        """`dt.load` in PEFT's words: attaches a saved delta to a model.

        Args:
            model: the backbone that the delta was trained on.
            pretrained: a folder or, where there is none of this name, `OWNER/NAME` on the hub.
            name: a name for the delta here; the saved one by default.
            revision: a branch, tag or commit on the hub.
            force: load also on a backbone with other weights.

        Raises:
            StoreError: as `dt.load`.

        Example:
            >>> import deltune as dt, tempfile, torch
            >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
            >>> delta = dt.attach(model, dt.LoRA(rank=2, where="0"), name="mine")
            >>> folder = delta.save_pretrained(Path(tempfile.mkdtemp(), "saved"))
            >>> delta.detach()
            >>> dt.Delta.from_pretrained(model, folder).name
            'mine'
        """
        from deltune.attaching import load
        from deltune.store.hub import called

        return load(called(pretrained, revision), model, name, force=force)

    def _handle(self) -> "Delta":
        from deltune.delta import Delta

        assert isinstance(self, Delta)
        return self

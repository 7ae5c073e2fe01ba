"""`deltune export` and `deltune import`: checkpoints for other programs, and theirs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from deltune.cli import show
from deltune.cli.shelf import Shelf, delta_folder, free_folder, read_result, write_origin
from deltune.errors import ExchangeError


@dataclass(frozen=True)
class Export:
    """Write a delta as a checkpoint of PEFT, or as the part of it that vLLM serves.

    What the other program has no words for is refused by its name; `deltune convert` makes LoRA of
    other methods.
    """

    delta: Positional[Path]
    """Folder of the delta, or the folder that `deltune train` wrote."""
    to: Literal["peft", "vllm"]
    """Who is to read it."""
    out: Path
    """Folder to write."""
    model: str | None = None
    """The backbone; that of the training if not given."""
    head: str | None = None
    """Head of the model; that of the training if not given."""
    overwrite: bool = False
    """Replace the folder if it exists."""

    def run(self) -> None:
        """Writes the checkpoint."""
        import deltune as dt
        from deltune.exchange.vllm import save_vllm

        shelf = read_result(self.delta).replaced(self.model, None, self.head)
        if not self.overwrite:
            free_folder(self.out, overwrite=False, resume=False)
        delta = dt.load(delta_folder(self.delta), _backbone(shelf))
        write = save_vllm if self.to == "vllm" else dt.save_peft
        made = write(delta, self.out, overwrite=self.overwrite)
        show.out().print(f"{delta.spec}\nsaved in {made.resolve()}", markup=False)


@dataclass(frozen=True)
class Import:
    """Make a delta of a checkpoint of PEFT, AdapterHub or OpenDelta.

    Every field of its configuration and every tensor is honoured, or the checkpoint is refused by
    the name of what is not.
    """

    checkpoint: Positional[str]
    """Its folder; of PEFT also hub:OWNER/NAME."""
    source: Annotated[Literal["peft", "adapterhub", "opendelta"], arg(name="from")]
    """Which library wrote it."""
    model: str
    """The backbone."""
    out: Path
    """Folder to write."""
    task: str | None = None
    """The task that it was trained for: its labels name those of the head."""
    head: str = "auto"
    """Head of the model."""
    max_length: int = 128
    """The most tokens of an input, for the commands that use the delta."""
    without_head: bool = False
    """Leave out a head that lies beside the adapters of AdapterHub, which is not read."""
    force: bool = False
    """Load also where the checkpoint names another model of the hub."""
    overwrite: bool = False
    """Replace the folder if it exists."""

    def run(self) -> None:
        """Writes the delta, and beside it the model and the task for later commands."""
        shelf = Shelf(max_length=self.max_length).replaced(self.model, self.task, self.head)
        if not self.overwrite:
            free_folder(self.out, overwrite=False, resume=False)
        delta = self._attached(_backbone(shelf))
        free_folder(self.out, self.overwrite, resume=False)
        delta.save(self.out / "delta")
        origin = {"imported": {"from": self.source, "checkpoint": self.checkpoint}}
        write_origin(self.out, str(delta.spec), shelf, origin)
        show.out().print(f"{delta.spec}\nsaved in {self.out.resolve()}", markup=False)

    def _attached(self, model: Any) -> Any:
        from deltune.exchange.adapterhub.checkpoint import load_adapterhub
        from deltune.exchange.opendelta import load_opendelta
        from deltune.exchange.peft.checkpoint import load_peft

        if self.source == "adapterhub":
            head = not self.without_head
            return load_adapterhub(self.checkpoint, model, head=head, force=self.force)
        if self.without_head:
            raise ExchangeError(
                f"a head in a checkpoint of `{self.source}` is read; leave --without-head out"
            )
        if self.source == "peft":
            return load_peft(self.checkpoint, model, force=self.force)
        if self.force:
            raise ExchangeError("OpenDelta's checkpoints name no model; leave --force out")
        return load_opendelta(self.checkpoint, model)


def _backbone(shelf: Shelf) -> Any:
    from deltune.tasks.models import load_model

    labels = shelf.labels or None
    model, _ = load_model(shelf.need("model"), shelf.head, labels=labels, kind=shelf.kind)
    return model

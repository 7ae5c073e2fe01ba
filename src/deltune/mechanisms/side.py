"""The side mechanism: a network beside the backbone, which reads what its blocks put out.

It runs behind the last block, on detached states, and adds to the last hidden state of the stack:
no gradient flows through a block, and gradient checkpointing has nothing of it to run again.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from deltune.errors import AttachError, WhereError
from deltune.mechanisms.masks import MaskedUnit
from deltune.mechanisms.modules import at, first_input
from deltune.mechanisms.unit import Mechanism, Unit
from deltune.sites.discover import Atlas
from deltune.sites.site import Site, trunk_of
from deltune.sites.where import Where, select


class SideUnit(MaskedUnit):
    """The side network's part at one block; that of the last block runs the whole."""

    spec: "Side"

    def install(self, root: nn.Module) -> None:
        self.watch(root)
        block = at(root, self.site.path)
        self.handles.append(block.register_forward_hook(self.note, with_kwargs=True))
        if self.site.anchor:
            trunk = at(root, self.site.exit)
            self.shared.rungs = None
            self.before(trunk, self.start)
            # First of the hooks there: a prompt attached earlier has not left the states yet.
            self.handles.append(trunk.register_forward_hook(self.finish, prepend=True))

    def start(self, trunk: nn.Module, args: tuple[Any, ...]) -> None:
        self.shared.rungs = []

    def note(
        self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """Keeps what a block reads and puts out, while the stack runs forward."""
        if self.shared.rungs is not None:
            h = output if isinstance(output, Tensor) else output[0]
            mask = self.allowed() if self.spec.watches else None
            x = self.mine(first_input(args, kwargs))
            self.shared.rungs.append((self, x.detach(), self.mine(h).detach(), mask))

    def finish(self, trunk: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Runs the side network, and adds what it gives."""
        rungs, self.shared.rungs = self.shared.rungs, None  # what fails leaves nothing behind
        if not rungs:
            raise AttachError(f"no block of `{self.site.exit}` that `{self.spec}` reads was called")
        s = self.spec.bottom(self.shared, rungs[0][1])
        for unit, _, h, mask in rungs:
            s = self.spec.rung(unit, s, h, mask)
        change = self.scale * self.spec.top(self.shared, s)
        if isinstance(output, dict):
            last = output.get("last_hidden_state")
            changed = self.added(last, change)
            for name, value in list(output.items()):
                output[name] = _swapped(value, last, changed)
            return output
        last = output[0] if isinstance(output, tuple) else output
        return _swapped(output, last, self.added(last, change))

    def added(self, h: Any, change: Tensor) -> Tensor:
        """The last hidden state, changed."""
        if self.lane is not None and isinstance(h, Tensor):
            change = self.lane.whole(change, h.shape[0])
        if not isinstance(h, Tensor) or h.shape != change.shape:
            found = tuple(h.shape) if isinstance(h, Tensor) else type(h).__name__
            raise AttachError(
                f"`{self.spec.kind}` adds to the last hidden state of `{self.site.exit}`, which is "
                f"{tuple(change.shape)} behind the blocks, and {found} comes out; attach a prompt "
                "before it, not behind, and attach to a model whose stack ends with hidden states"
            )
        return h + change.to(h.dtype)


def _swapped(value: Any, last: Any, changed: Tensor) -> Any:
    """A value, or a tuple of some, with the last hidden state changed: some models read it from
    the list of all."""
    if value is last:
        return changed
    if isinstance(value, tuple):
        return tuple(_swapped(one, last, changed) for one in value)
    return value


@dataclass(frozen=True)
class Side(Mechanism):
    """A method that owns a side network: define `tensors`, `shared`, `bottom`, `rung`, `top`."""

    mechanism: ClassVar[str] = "side"
    unit: ClassVar[type[Unit]] = SideUnit

    where: Where = "block"
    """The blocks that are read."""

    def bottom(self, shared: Any, x: Tensor) -> Tensor:
        """The side state below the first block, from what that block reads."""
        raise NotImplementedError

    def rung(self, t: Unit, s: Tensor, h: Tensor, mask: Tensor | None) -> Tensor:
        """The side state behind a block.

        Args:
            t: the block's unit.
            s: the side state before.
            h: what the block put out.
            mask: True where a token may look at another, or None; given to methods that watch.
        """
        raise NotImplementedError

    def top(self, shared: Any, s: Tensor) -> Tensor:
        """What is added to the last hidden state of the stack."""
        raise NotImplementedError

    def group(self, site: Site) -> str:
        return site.stack

    def sites(self, atlas: Atlas) -> list[Site]:
        blocks = [site for site in atlas.sites if site.role == "block"]
        if any(site.stack == "decoder" for site in blocks):
            # Of two stacks only the last: beside the encoder, gradients would cross the decoder.
            blocks = [site for site in blocks if site.stack != "encoder"]
        if not blocks:
            raise WhereError(f"`{self.kind}` needs blocks; {type(atlas.model).__name__} has none")
        chosen = select(atlas, self.where, blocks, self.within)
        last = {site.stack: site for site in chosen}
        return [
            site._replace(
                exit=trunk_of(site.path), anchor=site.path if site is last[site.stack] else ""
            )
            for site in chosen
        ]

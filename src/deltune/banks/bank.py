"""A bank: hundreds of deltas of one spec, of which those that a batch names are on the device."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from deltune.banks.form import Form, Source
from deltune.banks.library import Library
from deltune.banks.packing import Flats
from deltune.container import container
from deltune.errors import AttachError
from deltune.mechanisms.compilers import heed_hooks
from deltune.mechanisms.lanes import Lane, Router
from deltune.mechanisms.unit import Unit
from deltune.planning import read
from deltune.routing import Row, route
from deltune.spec import Spec
from deltune.tree import Tree


class Slot:
    """Room for one delta on the device, in tensors that count their writes and may be written in
    any mode, whichever it is made in."""

    @torch.inference_mode(False)
    def __init__(self, form: Form) -> None:
        self.flats: Flats = form.packing.buffers()
        trained = {name for name, param in form.plan.params() if param.trained}
        self.tensors: dict[str, Tensor] = {
            name: nn.Parameter(view, requires_grad=False) if name in trained else view
            for name, view in form.packing.views(self.flats).items()
        }
        self.identity, self.scale = "", 1.0

    @torch.no_grad()
    def fill(self, identity: str, flats: Flats, scale: float) -> None:
        """Copies a member in."""
        for group, flat in self.flats.items():
            flat.copy_(flats[group])
        self.identity, self.scale = identity, scale


class Bank:
    """Many deltas of one spec beside a model, of which each row of a batch may name its own.

    Members are folders that `Delta.save` wrote, vectors, attached deltas or their tensors. On the
    device there is room for `capacity` of them; what a batch names and is not there is copied in,
    in the place of the member that was used least recently. Folders are read when they are first
    asked for, checked as `load` checks them, and kept in memory. Nothing is attached: outside of a
    `route` block the model is what it is, and inside the hooks are the same whichever members act,
    so that a compiled model is not compiled again.

    Members serve, in train mode too: without dropout of their own and without gradients. To train
    one, `load` it. The bank may be changed and asked to `fetch` by other threads while one thread
    routes and runs the model. A copy of the model has no bank.

    Args:
        model: the backbone.
        spec: of all members, or its text. Where a smaller form does the same in larger tensors
            (ranks of LoRA and DoRA, widths of adapters) smaller members are filled up with zeros.
        capacity: members on the device, at most; a batch may name as many.
        folder: whose folders of saved deltas are members by their names, also those to come.
        memory: bytes of members from folders kept in the processor's memory, at most; None for no
            bound. Members that are in no folder are always kept.
        head: whether members hold a newly initialised task head.
        force: take members that were saved for a backbone with other weights.

    Raises:
        WhereError, SpecError, AttachError: as `plan`. StoreError: no such folder.

    Example:
        >>> import deltune as dt, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> bank = dt.Bank(model, "lora(rank=2, where='0')", capacity=2)
        >>> for k in range(5):
        ...     bank.add(f"user-{k}", torch.full((16,), float(k)))
        >>> with bank.route(["user-4", None, "user-0"]), torch.no_grad():
        ...     out = model(torch.ones(3, 4))
        >>> bank.resident
        ['user-4', 'user-0']
    """

    def __init__(
        self,
        model: nn.Module,
        spec: Spec | str,
        capacity: int = 32,
        *,
        folder: str | Path | None = None,
        memory: int | None = None,
        head: bool = True,
        force: bool = False,
    ) -> None:
        if not isinstance(capacity, int) or capacity < 1:
            raise AttachError(f"capacity is {capacity!r}; expected a whole number, 1 or above")
        self.model, self.capacity = model, capacity
        self._form = Form(model, read(spec), head, force)
        self._library = Library(self._form, None if folder is None else Path(folder), memory)
        self._slots: dict[str, Slot] = {}  # by member, the least recently used one first
        self._trees: list[Tree] = []
        self._seated: list[str] = []
        held = container(model, make=True)
        assert held is not None
        try:
            self._marks = _marks(model, self._form.tree())
        except BaseException:
            held.leave(model)
            raise
        held.banks.append(self)

    @property
    def spec(self) -> Spec:
        """What the members are."""
        return self._form.spec

    @property
    def resident(self) -> list[str]:
        """The members on the device, the least recently used one first."""
        return list(self._slots)

    @property
    def nbytes(self) -> dict[str, int]:
        """Bytes on the device, in the processor's memory, and of one member."""
        one = self._form.packing.nbytes
        return {"device": len(self._slots) * one, "memory": self._library.held, "member": one}

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __iter__(self) -> Iterator[str]:
        return iter(self._library)

    def __contains__(self, name: object) -> bool:
        return name in self._library

    def __repr__(self) -> str:
        return f"Bank(`{self.spec}`, {len(self)} members, {len(self._slots)} of {self.capacity})"

    def add(self, name: str, source: Source, *, replace: bool = False) -> None:
        """Adds a member, also while rows are routed, which go on with what they began with.

        Args:
            name: of the member.
            source: the folder of a saved delta, which is read when it is first asked for; or, taken
                as they are now: a vector, an attached delta, or tensors by name.
            replace: whether a member of this name may go.

        Raises:
            AttachError: the name is taken, or the source is no such delta. StoreError: no folder of
                a saved delta.
        """
        self._library.add(name, source, replace)

    def remove(self, name: str) -> None:
        """Forgets a member; its files stay, and in the bank's own folder they remain a member.

        Raises:
            AttachError: no such member was added.
        """
        self._library.remove(name)

    def fetch(self, *names: str) -> None:
        """Reads members into the processor's memory, in a thread of your own if you like.

        Raises:
            AttachError: no such member. StoreError: as `load`.
        """
        for name in names:
            self._library.get(name)

    def route(self, rows: Sequence[Row]) -> AbstractContextManager[None]:
        """`deltune.route` of the model: rows may name members, attached deltas, or None."""
        return route(self.model, rows)

    def seat(self, names: Sequence[str]) -> list[Tree]:
        """Trees with the tensors of these members, for one block; `route` calls it.

        Raises:
            AttachError: more members than the device has room for, or no such member. StoreError:
                a member that cannot be read. The bank is as it was then.
        """
        if len(names) > self.capacity:
            raise AttachError(
                f"the rows name {len(names)} members of the bank, which has room for "
                f"{self.capacity}; split the batch, or make the bank with "
                f"capacity={len(names)} or more"
            )
        self._follow()
        found = {name: self._library.identity(name) for name in names}
        missing = {
            name: self._library.get(name)
            for name, identity in found.items()
            if name not in self._slots or self._slots[name].identity != identity
        }
        self._seated = list(names)
        for name, (identity, loaded) in missing.items():
            slot = self._slots.pop(name, None) or self._room(names)
            self._slots[name] = slot
            slot.fill(identity, *loaded)
        while len(self._trees) < len(names):
            self._trees.append(self._form.tree())
        for name, tree in zip(names, self._trees, strict=False):
            self._slots[name] = slot = self._slots.pop(name)  # now the most recently used
            _sit(tree, name, slot)
        return self._trees[: len(names)]

    def rise(self) -> None:
        """Ends what `seat` began."""
        self._seated = []

    def close(self) -> None:
        """Takes the bank off the model, and frees its memory.

        Raises:
            AttachError: its members serve a batch.
        """
        if self._seated:
            raise AttachError("members of the bank serve a batch; leave the `with` block first")
        held = container(self.model)
        if held is not None and self in held.banks:
            held.banks.remove(self)
            for handle in self._marks:
                handle.remove()
            held.leave(self.model)
        self._slots, self._trees = {}, []

    def _room(self, wanted: Sequence[str]) -> Slot:
        """A slot that no member needs: a new one, or that of the least recently used member."""
        if len(self._slots) < self.capacity:
            return Slot(self._form)
        return self._slots.pop(next(name for name in self._slots if name not in wanted))

    def _follow(self) -> None:
        """Starts anew where the model is now, if it was moved or has another type."""
        if self._form.stands():
            return
        self._form = Form(self.model, self.spec, self._form.head, self._form.force)
        self._library.move(self._form)
        self._slots, self._trees = {}, []


def _marks(root: nn.Module, tree: Tree) -> list[RemovableHandle]:
    """A hook that does nothing wherever members act, so that to a compiler rows which are routed
    change nothing."""
    lane, places = Lane(Router(1, {}), [0]), {}
    for unit in tree.units:
        unit.__dict__.update(lane=lane, crowd=Counter())
    for unit in tree.acting:
        try:
            unit.install(root)
            for handle in _handles(unit):
                hooks = handle.hooks_dict_ref()
                places[id(hooks)] = hooks
        finally:
            unit.remove(root)
    found = []
    for hooks in places.values():
        found.append(RemovableHandle(hooks))
        hooks[found[-1].id] = _nothing
    heed_hooks()
    return found


def _handles(unit: Unit) -> Iterator[RemovableHandle]:
    yield from unit.handles
    for one in unit.behind:
        yield from _handles(one)


def _nothing(*given: object) -> None:
    return None


def _sit(tree: Tree, name: str, slot: Slot) -> None:
    """Lets a tree act with the tensors of a slot."""
    if tree.__dict__.get("seat") == (slot, slot.identity):
        return
    tree.__dict__["seat"] = slot, slot.identity
    tree.name, tree.factor = name, slot.scale
    for key, owner, own in tree.entries:
        owner._parameters[own] = slot.tensors[key]  # type: ignore
    for key, owner, own in tree.kept:
        owner._buffers[own] = slot.tensors[key]
    for unit in tree.units:
        unit.scale_by(slot.scale)
        unit.renew(slot.identity)

"""The members of a bank: in folders, in memory, or both, the least recently used ones let go."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from threading import RLock
from uuid import uuid4

from torch import Tensor

from deltune.banks.form import Form, Loaded, Source, Stamp
from deltune.delta import Delta
from deltune.errors import AttachError, DeltuneError, StoreError, closest, listing
from deltune.store import native


@dataclass
class Member:
    """A delta by its name: where it is, and what of it is in memory.

    `identity` is another one after every change of it.
    """

    path: Path | None
    loaded: Loaded | None = None
    stamp: Stamp = ()
    identity: str = field(default_factory=lambda: uuid4().hex)


class Library:
    """Members by name, for several threads at once.

    Args:
        form: what a member has to be.
        folder: whose folders are members too, each by its name.
        memory: bytes of members from folders to keep, at most; None for no bound.
    """

    def __init__(self, form: Form, folder: Path | None, memory: int | None) -> None:
        self.form, self.folder, self.memory = form, folder, memory
        self.lock = RLock()
        self.reads = 0
        self._members: dict[str, Member] = {}
        self._recent: dict[str, None] = {}  # of folders and in memory, the oldest first
        if folder is not None and not folder.is_dir():
            raise StoreError(f"there is no folder `{folder}`; make it, or leave `folder` out")

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and (name in self._members or self._found(name) is not None)

    def __iter__(self) -> Iterator[str]:
        with self.lock:
            known = dict.fromkeys(self._members)
        inside = sorted(self.folder.iterdir()) if self.folder else ()
        return iter(known | dict.fromkeys(p.name for p in inside if _is_delta(p)))

    def add(self, name: str, source: Source, replace: bool) -> None:
        """Adds a member; a folder is read when it is first asked for."""
        if not isinstance(name, str) or not name or not name.isprintable():
            raise AttachError(
                f"a member needs a name of characters that can be printed, got {name!r}"
            )
        with self.lock:
            if not replace and name in self:
                raise AttachError(
                    f"the bank has a member `{name}`; choose another name or pass `replace=True`"
                )
            self._members[name] = self._made(name, source)
            self._recent.pop(name, None)

    def remove(self, name: str) -> None:
        """Forgets a member that was added; its files stay."""
        with self.lock:
            if name not in self._members:
                raise self.unknown(name)
            del self._members[name]
            self._recent.pop(name, None)

    def identity(self, name: str) -> str:
        """Another text after every change of the member."""
        return self._member(name).identity

    def get(self, name: str) -> tuple[str, Loaded]:
        """A member in memory and its identity, read if it has to be, by several threads at once.

        Raises:
            AttachError: no such member. StoreError: as `load`.
        """
        while True:
            with self.lock:
                member = self._member(name)
                if member.loaded is not None:
                    self._used(name, member)
                    return member.identity, member.loaded
                path, form = member.path, self.form
            assert path is not None
            stamp = form.stamp(path)
            try:
                loaded = form.from_folder(path)
            except DeltuneError as error:
                raise StoreError(f"the member `{name}` cannot be used: {error}") from None
            with self.lock:
                if self._members.get(name) is not member or self.form is not form:
                    continue  # replaced, removed or moved meanwhile
                if member.stamp not in ((), stamp):
                    member.identity = uuid4().hex
                self.reads += 1
                member.loaded, member.stamp = loaded, stamp
                self._used(name, member)
                return member.identity, loaded

    def move(self, form: Form) -> None:
        """Goes over to the same form on other devices or in another type."""
        with self.lock:
            old, self.form = self.form, form
            for member in self._members.values():
                if member.loaded is not None:
                    tensors = old.packing.views(member.loaded.flats)
                    member.loaded = member.loaded._replace(flats=form.packing.pack(tensors))

    def unknown(self, name: str) -> AttachError:
        """The error that there is no such member."""
        known = list(self)
        return AttachError(
            f"the bank has no member `{name}`{closest(str(name), known)}; it has "
            f"{listing(known, 6) or 'none'}"
        )

    @property
    def held(self) -> int:
        """Bytes of the members in memory."""
        with self.lock:
            count = sum(member.loaded is not None for member in self._members.values())
        return count * self.form.packing.nbytes

    def _made(self, name: str, source: Source) -> Member:
        if isinstance(source, str | Path):
            if not _is_delta(Path(source)):
                native.read_about(source)  # says what is wrong
            return Member(Path(source))
        if isinstance(source, Tensor | Delta | Mapping):
            return Member(None, self.form.given(source))
        raise AttachError(
            f"`{name}` is a {type(source).__name__}; a member is the folder of a saved delta, a "
            "vector, an attached delta or its tensors by name"
        )

    def _member(self, name: str) -> Member:
        with self.lock:
            if name not in self._members:
                path = self._found(name)
                if path is None:
                    raise self.unknown(name)
                self._members[name] = Member(path)
            return self._members[name]

    def _found(self, name: str) -> Path | None:
        """The folder of this name, if it is a saved delta in the bank's folder."""
        if self.folder is None or Path(name).name != name:
            return None
        path = self.folder / name
        return path if _is_delta(path) else None

    def _used(self, name: str, member: Member) -> None:
        """Notes the use of a member, and lets go of others where the memory is full."""
        if member.path is None:
            return
        self._recent.pop(name, None)
        self._recent[name] = None
        size = self.form.packing.nbytes
        while self.memory is not None and len(self._recent) * size > self.memory:
            oldest = next(iter(self._recent))
            del self._recent[oldest]
            self._members[oldest].loaded = None


def _is_delta(path: Path) -> bool:
    return (path / native.ABOUT).is_file()

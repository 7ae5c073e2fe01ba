"""A site: one place of a model that a delta can act on."""

from collections.abc import Mapping
from dataclasses import astuple, dataclass
from typing import Any, Literal, NamedTuple

from torch import Tensor

Kind = Literal["linear", "conv1d", "embedding", "dense", "sublayer", "module"]


@dataclass(frozen=True, slots=True)
class Rows:
    """Some output features of a fused matrix: of every group of `group`, `start : start + length`.

    GPT-2's `c_attn` is one group of 3d features and the query its first d; GPT-NeoX has a group of
    three head widths for each head.
    """

    group: int
    start: int
    length: int

    def add(self, whole: Tensor, part: Tensor) -> Tensor:
        """`whole` (..., out) with `part` (..., rows) added to these features."""
        grouped = whole.unflatten(-1, (-1, self.group))
        end = self.start + self.length
        mine = grouped[..., self.start : end] + part.unflatten(-1, (-1, self.length))
        return grouped.slice_scatter(mine, -1, self.start, end).flatten(-2)

    def take(self, whole: Tensor) -> Tensor:
        """These features of `whole` (..., out)."""
        grouped = whole.unflatten(-1, (-1, self.group))
        return grouped[..., self.start : self.start + self.length].flatten(-2)


class Segment(NamedTuple):
    """Where the entries of one parameter lie in the concatenation of several: from `offset` on, of
    `total`, of which `kept` are selected."""

    offset: int
    total: int
    kept: int


class Site(NamedTuple):
    """One place: a matrix, a sub-layer (attention or feed-forward) or any module.

    `shape` is (..., out, in) of the matrix part, whatever way the model stores it. A sub-layer has
    an `entry` (module that reads its input), an `exit` (module whose output is added to the
    residual) and, in post-norm models, the `norm` that follows the addition; `last` is the linear
    map whose output leaves there, if it is one. `attention` is the self-attention of the same
    block, noted where a method looks at masks. A `packed` matrix is held in another form than its
    numbers.
    """

    path: str
    role: str = ""
    stack: str = ""
    layer: int | None = None
    kind: Kind = "module"
    param: str = "weight"
    shape: tuple[int, ...] = ()
    rows: Rows | None = None
    transposed: bool = False
    anchor: str = ""
    entry: str = ""
    exit: str = ""
    norm: str = ""
    width: int = 0
    kv: tuple[int, int] = (0, 0)
    places: tuple[tuple[str, str, str, str], ...] = ()
    segment: Segment | None = None
    attention: str = ""
    last: str = ""
    packed: bool = False

    def moved(self, start: int, to: str, stack: str, layer: int) -> "Site":
        """The same place of a block that is alike: `to` instead of the first `start` characters."""
        anchor, entry, exit_, norm = self.anchor, self.entry, self.exit, self.norm
        return Site(
            to + self.path[start:], self.role, self.stack or stack, layer, self.kind, self.param,
            self.shape, self.rows, self.transposed, anchor and to + anchor[start:],
            entry and to + entry[start:], exit_ and to + exit_[start:], norm and to + norm[start:],
            self.width, self.kv, self.places, self.segment,
            last=self.last and to + self.last[start:], packed=self.packed,
        )  # fmt: skip

    def matrix(self, stored: Tensor) -> Tensor:
        """The matrix (..., out, in) that the site means, of the weight as the module stores it."""
        whole = stored.mT if self.transposed else stored
        return self.rows.take(whole.mT).mT if self.rows else whole.reshape(self.shape)

    def spread(self, part: Tensor, stored: Tensor) -> Tensor:
        """Values of the site's output features (..., out) as values of all features of the map
        whose weight is stored so, zero at those of other roles."""
        if self.rows is None:
            return part
        out = stored.shape[1 if self.transposed else 0]
        return self.rows.add(part.new_zeros(*part.shape[:-1], out), part)

    def to_json(self) -> dict[str, Any]:
        """What is noted beside a saved delta: all that is not as by default, but for how many
        entries of a segment are selected, which the tensors say, and how a matrix is held, which
        is the model's."""
        found = {n: v for n, v in self._asdict().items() if v != self._field_defaults.get(n)}
        found.pop("packed", None)
        if self.rows is not None:
            found["rows"] = astuple(self.rows)
        if self.segment is not None:
            found["segment"] = (self.segment.offset, self.segment.total)
        return found

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Site":
        """The site of the data of `to_json`.

        Raises:
            KeyError, TypeError, ValueError: it is none.
        """
        found = dict(data)
        if unknown := set(found) - set(cls._fields):
            raise ValueError(f"a site has no {sorted(unknown)}")
        for name in ("shape", "kv"):
            if name in found:
                found[name] = tuple(int(size) for size in found[name])
        if "rows" in found:
            found["rows"] = Rows(*(int(number) for number in found["rows"]))
        if "segment" in found:
            offset, total = found["segment"]
            found["segment"] = Segment(int(offset), int(total), 0)
        if "places" in found:
            found["places"] = tuple(tuple(str(part) for part in one) for one in found["places"])
        return cls(**found)

    @property
    def key(self) -> str:
        """The path of the site's tensors below the delta."""
        key = self.path if self.param == "weight" else f"{self.path}.{self.param}".lstrip(".")
        return f"{key}.{self.role.rpartition('.')[2]}" if self.rows else key

    @property
    def address(self) -> str:
        """Stack, role and layer as people say it: `encoder.attn.q[3]`."""
        name = f"{self.stack}.{self.role}" if self.stack and self.role else self.role or self.path
        return f"{name}[{self.layer}]" if self.role and self.layer is not None else name


def trunk_of(block: str) -> str:
    """The module around the outermost list of blocks that a block is in."""
    parts = block.split(".")
    return ".".join(parts[: next(i for i, part in enumerate(parts) if part.isdigit()) - 1])

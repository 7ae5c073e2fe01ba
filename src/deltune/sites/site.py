"""A site: one place of a model that a delta can act on."""

import json
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
        out = stored.shape[-1 if self.transposed else -2]
        return self.rows.add(part.new_zeros(*part.shape[:-1], out), part)

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


def noted(sites: Mapping[str, Site]) -> dict[str, Any]:
    """What a saved delta notes of its sites, by their keys, as JSON data: places that are alike but
    for layer and path share one form."""
    forms: dict[str, int] = {}
    at: dict[str, list[Any]] = {}
    for key, site in sites.items():
        text = json.dumps(form(site), sort_keys=True)
        at[key] = [forms.setdefault(text, len(forms)), site.layer]
        if site.path != key.partition(".")[2]:
            at[key].append(site.path)
    return {"forms": [json.loads(text) for text in forms], "at": at}


def form(site: Site) -> dict[str, Any]:
    """All that is not as by default but path and layer, and but for how many entries of a segment
    are selected, which the tensors say, and how a matrix is held, which is the model's."""
    found = {n: v for n, v in site._asdict().items() if v != site._field_defaults.get(n)}
    found = {n: v for n, v in found.items() if n not in ("path", "layer", "packed")}
    if site.rows is not None:
        found["rows"] = astuple(site.rows)
    if site.segment is not None:
        found["segment"] = (site.segment.offset, site.segment.total)
    own: list[Any] = []
    for name, anchor, inner, theirs in site.places:
        plain = (anchor, inner, theirs) == (site.path, "", name)
        own.append(name if plain else (name, anchor, inner, theirs))
    return {**found, "places": own} if own else found


def read_noted(data: Mapping[str, Any]) -> dict[str, Site]:
    """The sites of the data of `noted`.

    Raises:
        AttributeError, LookupError, OverflowError, TypeError, ValueError: it is none.
    """
    sites = {}
    for key, (number, layer, *path) in data["at"].items():
        found = dict(data["forms"][int(number)])
        if unknown := set(found) - set(Site._fields):
            raise ValueError(f"a site has no {sorted(unknown)}")
        found["path"] = str(path[0]) if path else key.partition(".")[2]
        for name in ("shape", "kv"):
            if name in found:
                found[name] = tuple(int(size) for size in found[name])
        if "rows" in found:
            found["rows"] = Rows(*(int(number) for number in found["rows"]))
        if "segment" in found:
            offset, total = found["segment"]
            found["segment"] = Segment(int(offset), int(total), 0)
        found["places"] = tuple(
            (one, found["path"], "", one) if isinstance(one, str) else tuple(map(str, one))
            for one in found.get("places", ())
        )
        if any(len(place) != 4 for place in found["places"]):
            raise ValueError(f"`{key}` has a place that is none")
        sites[key] = Site(**found, layer=None if layer is None else int(layer))
    return sites

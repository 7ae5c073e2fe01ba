"""Finds blocks, and in them attention and feed-forward parts, from structure.

A block is the innermost item of a module list that holds an attention and something else. In it,
the attention is where query, key and value meet; the rest is the feed-forward part, whose matrices
are told apart by their shapes. Names decide only what shapes cannot: which of three equal matrices
is the query. The tables of `quirks` hold what neither tells.
"""

import re
from collections.abc import Hashable, Iterable, Iterator
from functools import lru_cache

from torch import nn

from deltune.sites import quirks
from deltune.sites.matrices import Draft, has_experts, is_norm, matrix
from deltune.sites.site import Rows, Site

LISTS = (nn.ModuleList, nn.Sequential)
Modules = dict[str, nn.Module]


@lru_cache(maxsize=4096)
def tokens(name: str) -> frozenset[str]:
    """The words of a module's name: `EncDecAttention` is enc, dec, attention."""
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name)
    return frozenset(spaced.lower().split("_"))


@lru_cache(maxsize=4096)
def letter(name: str) -> str:
    """`q`, `k`, `v`, `qkv` or nothing, for the name of a matrix."""
    words = tokens(name)
    if words & {"pos", "rel", "position", "norm"}:
        return ""
    if name.lower() in quirks.FUSED_NAMES:
        return "qkv"
    letters = [one for one, known in quirks.LETTERS.items() if words & known]
    return letters[0] if len(letters) == 1 else ""


def block_sites(modules: Modules, matrices: set[str]) -> Iterator[Site]:
    """The sites of every block. What they are is worked out once for blocks that are alike."""
    attending = {path for path in modules if _attends(path, modules, matrices)}
    order = list(modules)
    places = {path: place for place, path in enumerate(order)}
    items = {item for leaf in attending for item in _items(leaf, modules)}
    known: dict[Hashable, tuple[str, bool, list[Site]] | None] = {}
    blocks: dict[str, tuple[str, bool, list[Site]]] = {}
    for item in sorted(items, key=lambda item: -item.count(".")):
        if any(inner.startswith(item + ".") for inner in blocks):
            continue
        block = Block(modules, item, _subtree(item, places[item], order), matrices, attending)
        likeness = block.likeness()
        if likeness not in known:
            known[likeness] = None
            if block.mixes():
                sites = [Site(**draft) for draft in block.drafts()]
                known[likeness] = item, block.causal, sites
        if found := known[likeness]:
            blocks[item] = found
    counts: dict[str, int] = {}
    for path in sorted(blocks, key=lambda path: places[path]):
        first, causal, sites = blocks[path]
        if sites:
            stack = quirks.stack_of(path, causal)
            layer = counts[stack] = counts.get(stack, -1) + 1
            yield from (site.moved(len(first), path, stack, layer) for site in sites)


def _items(leaf: str, modules: Modules) -> Iterator[str]:
    """The items of module lists that a module is in."""
    path = leaf
    while path:
        parent, _, name = path.rpartition(".")
        if name.isdigit() and isinstance(modules.get(parent), LISTS):
            yield path
        path = parent


def _subtree(path: str, place: int, order: list[str]) -> list[str]:
    """A module and all below it, which come right after it."""
    end, below = place + 1, path + "."
    while end < len(order) and order[end].startswith(below):
        end += 1
    return order[place:end]


def _attends(path: str, modules: Modules, matrices: set[str]) -> bool:
    if path in matrices:
        return letter(path.rpartition(".")[2]) in ("q", "qkv")
    return isinstance(modules[path], nn.MultiheadAttention)


def _outside(paths: Iterable[str], scopes: set[str]) -> Iterator[str]:
    """The paths that are not in one of these modules."""
    below = tuple(scope + "." for scope in scopes)
    return (path for path in paths if path not in scopes and not path.startswith(below))


def _home(leaf: str, modules: Modules) -> str:
    """The attention module of a query matrix."""
    return leaf if isinstance(modules[leaf], nn.MultiheadAttention) else leaf.rpartition(".")[0]


def _scope(item: str, leaf: str, attending: list[str], modules: Modules) -> str:
    """The highest module below the block around this one attention."""
    home = _home(leaf, modules)
    below = home[len(item) + 1 :].split(".") if home != item else []
    for depth in range(1, len(below) + 1):
        scope = ".".join([item, *below[:depth]])
        if isinstance(modules[scope], (nn.ModuleList, nn.ModuleDict)):
            continue
        if all(_home(p, modules) == home for p in attending if p.startswith(scope + ".")):
            return scope
    return home


class Block:
    """One block on the way to its sites."""

    def __init__(
        self, modules: Modules, path: str, inside: list[str], matrices: set[str],
        attending: set[str],
    ) -> None:  # fmt: skip
        self.modules, self.path, self.inside = modules, path, inside
        self.leaves = [p for p in inside if p in matrices]
        self.attending = [p for p in inside if p in attending]
        self.width, self.causal = 0, False

    def mixes(self) -> bool:
        """Whether it attends, and transforms features outside its attentions too."""
        scopes = {_scope(self.path, leaf, self.attending, self.modules) for leaf in self.attending}
        return any(
            p in self.leaves or has_experts(self.modules[p]) for p in _outside(self.inside, scopes)
        )

    def likeness(self) -> Hashable:
        """Equal for blocks with the same modules, shapes and attentions at the same places."""
        start = len(self.path)
        inside = [self.modules[path] for path in self.inside]
        return (
            tuple(path[start:] for path in self.inside),
            tuple(map(type, inside)),
            tuple(p.shape for m in inside for p in m._parameters.values() if p is not None),
            tuple(
                self.modules[_home(leaf, self.modules)].__dict__.get(name)
                for leaf in self.attending
                for name in quirks.TELLING
            ),
        )

    def drafts(self) -> list[Draft]:
        """The block's sites, all but stack and layer; none if it has no feed-forward part."""
        self.drafts_of = {p: matrix(p, self.modules[p]) for p in self.leaves}
        scopes = {
            _home(leaf, self.modules): _scope(self.path, leaf, self.attending, self.modules)
            for leaf in self.attending
        }
        found: list[Draft] = []
        for home, scope in scopes.items():
            found += self._attention(home, scope)
        taken = {scope for scope in scopes.values() if scope != self.path}
        used = {draft["path"] for draft in found}
        ffn = self._ffn([p for p in _outside(self.inside, taken) if p not in used])
        if not ffn:
            return []
        found += ffn
        found += [
            {"path": p, "role": "norm", "width": self.width}
            for p in self.inside
            if is_norm(self.modules[p])
        ]
        return [*found, {"path": self.path, "role": "block", "width": self.width}]

    def _attention(self, home: str, scope: str) -> list[Draft]:
        module = self.modules[home]
        cross = any(tokens(part) & quirks.CROSS for part in home[len(self.path) :].split("."))
        self.causal = self.causal or bool(getattr(module, "is_causal", False))
        if isinstance(module, nn.MultiheadAttention):
            parts = _multihead(home, module)
        else:
            parts = self._projections(home, scope)
        by_role = {draft["role"]: draft for draft in parts}
        first = by_role.get("attn.q") or by_role["attn.qkv"]
        self.width = self.width or first["shape"][-1]
        kv = tuple(by_role[r]["shape"][-2] if r in by_role else 0 for r in ("attn.k", "attn.v"))
        exit_, norm = home, ""
        if "attn.o" in by_role and "anchor" not in by_role["attn.o"]:
            exit_, norm = self._exit(by_role["attn.o"]["path"], "cross" if cross else "attn")
        group = {
            "path": home, "role": "attn", "kind": "sublayer", "width": self.width, "kv": kv,
            "entry": home if home != self.path else first["path"], "exit": exit_, "norm": norm,
            "last": by_role["attn.o"]["path"] if "attn.o" in by_role else "",
        }  # fmt: skip
        found = [group, *parts]
        return [{**draft, "stack": "cross"} for draft in found] if cross else found

    def _projections(self, home: str, scope: str) -> list[Draft]:
        found: list[Draft] = []
        letters: dict[str, str] = {}
        for path in self.leaves:
            parent, _, name = path.rpartition(".")
            if parent == home and letter(name):
                letters.setdefault(letter(name), path)
        for one in ("q", "k", "v"):
            if one in letters:
                found.append({**self.drafts_of[letters[one]], "role": f"attn.{one}"})
        if "qkv" in letters:
            whole: Draft = {**self.drafts_of[letters["qkv"]], "role": "attn.qkv"}
            out, into = whole["shape"]
            owner = type(self.modules[home]).__name__
            split = quirks.fused_rows(owner, self.modules[home], out, "q" in letters)
            found.append(whole)
            found += [
                {**whole, "role": f"attn.{one}", "rows": rows,
                 "shape": (out // rows.group * rows.length, into)}
                for one, rows in split.items()
            ]  # fmt: skip
        last = self._output(home, scope, set(letters.values()), found[0]["shape"][-1])
        return [*found, {**last, "role": "attn.o"}] if last else found

    def _output(self, home: str, scope: str, taken: set[str], width: int) -> Draft | None:
        """The projection back to the hidden width."""
        found = None
        for path in self.leaves:
            parent, _, name = path.rpartition(".")
            if scope != self.path:
                near = path.startswith(scope + ".")
            else:
                near = parent == home and bool(tokens(name) & quirks.OUT)
            draft = self.drafts_of[path]
            if (
                near and path not in taken and not tokens(name) & quirks.NOT_OUT
                and draft["kind"] in ("linear", "conv1d") and draft["shape"][0] == width
            ):  # fmt: skip
                found = draft
        return found

    def _ffn(self, rest: list[str]) -> list[Draft]:
        experts = [p for p in rest if has_experts(self.modules[p])]
        if experts:
            return [draft for p in experts for draft in self._experts(p)]
        linear = [self.drafts_of[p] for p in rest if p in self.drafts_of]
        linear = [d for d in linear if d["kind"] in ("linear", "conv1d")]
        groups: dict[str, list[Draft]] = {"": linear}
        inner = [d for d in linear if d["shape"][0] == self.width != d["shape"][1]]
        if len(inner) > 1:  # several networks: each in a module of its own
            groups = {}
            for draft in linear:
                groups.setdefault(draft["path"].rpartition(".")[0], []).append(draft)
        return [draft for group in groups.values() for draft in self._feed(group)]

    def _feed(self, linear: list[Draft]) -> list[Draft]:
        """Up, gate and down of one feed-forward network."""
        downs = [d for d in linear if d["shape"][0] == self.width]
        if not downs:
            return []
        down = downs[-1]
        inner = down["shape"][1]
        ups = [
            d for d in linear
            if d is not down and d["shape"][1] == self.width and d["shape"][0] in (inner, 2 * inner)
        ]  # fmt: skip
        if not ups:
            return []
        if len(ups) == 1 and ups[0]["shape"][0] == 2 * inner:
            found = _gate_up(ups[0], -2)
        else:
            found = []
            for draft in ups:
                name = draft["path"].rpartition(".")[2]
                gate = len(ups) > 1 and (name in quirks.GATES or "gate" in tokens(name))
                found.append({**draft, "role": "ffn.gate" if gate else "ffn.up"})
        found.append({**down, "role": "ffn.down"})
        exit_, norm = self._exit(down["path"], "ffn")
        path = _common(ups[0]["path"], down["path"])
        called = path.startswith(self.path + ".") and not isinstance(
            self.modules[path], nn.ModuleList | nn.ModuleDict
        )
        group = {
            "path": path if called else down["path"], "role": "ffn", "kind": "sublayer",
            "width": self.width, "entry": ups[0]["path"], "exit": exit_, "norm": norm,
            "last": down["path"],
        }  # fmt: skip
        return [group, *found]

    def _experts(self, path: str) -> list[Draft]:
        """The 3-D weights (experts, out, in) of a mixture of experts."""
        found: list[Draft] = []
        for name, weight in self.modules[path]._parameters.items():
            if weight is None or weight.ndim != 3:
                continue
            count, out, into = weight.shape
            words = tokens(name)
            down = "down" in words or name == "w2"
            flipped = (into if down else out) == self.width != (out if down else into)
            shape = (count, into, out) if flipped else (count, out, into)
            draft = {"path": path, "kind": "dense", "param": name, "shape": shape,
                     "transposed": flipped}  # fmt: skip
            if not down and {"gate", "up"} <= words:
                found += _gate_up(draft, -2)
            else:
                role = "ffn.down" if down else "ffn.gate" if "gate" in words else "ffn.up"
                found.append({**draft, "role": role})
        parent = path.rpartition(".")[0]
        home = path if parent == self.path else parent
        group = {"path": home, "role": "ffn", "kind": "sublayer", "width": self.width,
                 "entry": home, "exit": home}  # fmt: skip
        return [group, *found]

    def _exit(self, last: str, part: str) -> tuple[str, str]:
        """Where the output leaves for the residual, and the norm behind that addition."""
        parent, _, name = last.rpartition(".")
        children = self.modules[parent]._modules
        drops = [n for n, m in children.items() if isinstance(m, nn.Dropout | nn.Identity)]
        norms = [n for n, m in children.items() if m is not None and is_norm(m)]
        alone = [n for n in children if f"{parent}.{n}" in self.drafts_of] == [name]
        known = [n for n in drops if n in quirks.EXIT_DROPOUTS]
        exit_ = last
        if alone and len(drops) == 1:
            exit_ = f"{parent}.{drops[0]}"
        elif len(known) == 1:
            exit_ = f"{parent}.{known[0]}"
        inside = alone or (quirks.ATTENTION_NORM in norms and part == "attn")
        if parent != self.path and len(norms) == 1 and inside:
            return exit_, f"{parent}.{norms[0]}"
        config = getattr(self.modules[self.path], "config", None)
        config = config or getattr(self.modules[""], "config", None)
        after = (f"{self.path}.{n}" for n in quirks.post_norms(config, part))
        return exit_, next((path for path in after if path in self.modules), "")


def _gate_up(draft: Draft, at: int) -> list[Draft]:
    """A fused [gate; up] matrix: the whole, and its halves."""
    shape = draft["shape"]
    half = shape[at] // 2
    part = (*shape[:at], half, *shape[at + 1 :])
    return [{**draft, "role": "ffn.gate_up"}] + [
        {**draft, "role": role, "shape": part, "rows": Rows(2 * half, i * half, half)}
        for i, role in enumerate(("ffn.gate", "ffn.up"))
    ]


def _multihead(home: str, module: nn.MultiheadAttention) -> list[Draft]:
    """`nn.MultiheadAttention` uses its weights functionally: they are reached as parameters."""
    d = module.embed_dim
    whole = {"path": home, "kind": "dense"}
    if module.in_proj_weight is not None:
        whole["param"] = "in_proj_weight"
        found: list[Draft] = [{**whole, "role": "attn.qkv", "shape": (3 * d, d)}]
        found += [
            {**whole, "role": f"attn.{one}", "shape": (d, d), "rows": Rows(3 * d, i * d, d)}
            for i, one in enumerate("qkv")
        ]
    else:
        found = [
            {**whole, "role": f"attn.{one}", "param": f"{one}_proj_weight",
             "shape": tuple(getattr(module, f"{one}_proj_weight").shape)}
            for one in "qkv"
        ]  # fmt: skip
    out = {"path": f"{home}.out_proj", "role": "attn.o", "kind": "dense", "shape": (d, d),
           "width": d, "anchor": home}  # fmt: skip
    return [*found, out]


def _common(a: str, b: str) -> str:
    shared = []
    for x, y in zip(a.split(".")[:-1], b.split(".")[:-1], strict=False):
        if x != y:
            break
        shared.append(x)
    return ".".join(shared)

"""Finds the roles of a model's parts from its structure.

A block is the innermost item of a module list that holds an attention and something else. In it,
the attention is where query, key and value meet; the rest is the feed-forward part, whose matrices
are told apart by their shapes. Names decide only what shapes cannot: which of three equal matrices
is the query. Four small tables hold what neither tells (see `quirks`).
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache

from torch import nn

from deltune.sites import quirks
from deltune.sites.site import Rows, Site

DELTAS = "deltas"


@dataclass
class Atlas:
    """Everything of a model that can be addressed."""

    model: nn.Module
    modules: dict[str, nn.Module]
    sites: list[Site] = field(default_factory=list)
    heads: tuple[str, ...] = ()

    def roles(self) -> list[str]:
        """The roles that this model has, in model order."""
        return list(dict.fromkeys(site.role for site in self.sites if site.role))


def walk(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The model's own modules with their paths, each once, deltas left out."""
    seen, stack = set(), [("", model)]
    while stack:
        path, module = stack.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        yield path, module
        prefix = path + "." if path else ""
        for name, child in reversed(module._modules.items()):
            if child is not None and not (path == "" and name == DELTAS):
                stack.append((prefix + name, child))


def discover(model: nn.Module) -> Atlas:
    """The atlas of a model: its modules, and its sites with their roles."""
    atlas = Atlas(model, dict(walk(model)))
    matrices = {path: m for path, m in atlas.modules.items() if _is_matrix(m)}
    counts: dict[str, int] = {}
    claimed: dict[str, Site] = {}
    for block, leaves in _blocks(atlas.modules, matrices):
        found = _Block(atlas.modules, block, leaves).sites()
        if not found:
            continue
        stack = next(site.stack for site in found if site.stack != "cross")
        layer = counts.setdefault(stack, 0)
        counts[stack] += 1
        for site in found:
            placed = replace(site, layer=layer)
            atlas.sites.append(placed)
            claimed.setdefault(placed.path, placed)
    atlas.heads = _heads(model)
    atlas.sites += _rest(atlas, matrices, claimed)
    order = {path: i for i, path in enumerate(atlas.modules)}
    atlas.sites.sort(key=lambda site: order[site.path])
    return atlas


def matrix_site(path: str, module: nn.Module) -> Site:
    """The site of a module's whole weight matrix."""
    weight = module._parameters["weight"]
    shape = tuple(weight.shape)
    if isinstance(module, nn.Embedding):
        return Site(path, kind="embedding", shape=(shape[1], shape[0]), transposed=True)
    if isinstance(module, nn.Linear):
        return Site(path, kind="linear", shape=shape, width=shape[0])
    if type(module).__name__ == "Conv1D":
        return Site(path, kind="conv1d", shape=shape[::-1], transposed=True, width=shape[1])
    return Site(path, kind="dense", shape=(shape[0], weight.numel() // shape[0]), width=shape[0])


def reader(path: str, modules: dict[str, nn.Module]) -> str:
    """The module whose forward reads the parameters of `path`: itself, or a parent that uses them
    without calling it."""
    parent, _, name = path.rpartition(".")
    inside = isinstance(modules.get(parent), nn.MultiheadAttention)
    return parent if path and (inside or name in quirks.READ_BY_PARENT) else path


def _is_matrix(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return weight is not None and weight.ndim >= 2


@lru_cache(maxsize=4096)
def _tokens(name: str) -> frozenset[str]:
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name)
    return frozenset(spaced.lower().split("_"))


@lru_cache(maxsize=4096)
def _letter(name: str) -> str:
    """`q`, `k`, `v`, `qkv` or nothing, for the name of a matrix."""
    tokens = _tokens(name)
    if tokens & {"pos", "rel", "position", "norm"}:
        return ""
    if name.lower() in quirks.FUSED_NAMES:
        return "qkv"
    letters = [letter for letter, words in quirks.LETTERS.items() if tokens & words]
    return letters[0] if len(letters) == 1 else ""


def _blocks(
    modules: dict[str, nn.Module], matrices: dict[str, nn.Module]
) -> Iterator[tuple[str, list[str]]]:
    """Blocks with the paths of the matrices in them, in model order."""
    holders: dict[str, list[str]] = {}
    for path in modules:
        for item in _items(path, modules):
            holders.setdefault(item, []).append(path)
    chosen: set[str] = set()
    for item in sorted(holders, key=lambda item: -item.count(".")):
        inside = holders[item]
        if any(inner.startswith(item + ".") for inner in chosen):
            continue
        leaves = [path for path in inside if path in matrices]
        attention = any(_attends(path, modules) for path in inside)
        other = any(not _letter(path.rpartition(".")[2]) for path in leaves)
        wide = _has_ffn(item, inside, modules, matrices)
        if attention and other and wide:
            chosen.add(item)
    for item in holders:
        if item in chosen:
            yield item, [path for path in holders[item] if path in matrices]


def _items(path: str, modules: dict[str, nn.Module]) -> Iterator[str]:
    """The ancestors of a path (itself included) that are items of a module list."""
    parts = path.split(".")
    for i, part in enumerate(parts):
        if part.isdigit() and isinstance(
            modules.get(".".join(parts[:i])), nn.ModuleList | nn.Sequential
        ):
            yield ".".join(parts[: i + 1])


def _attends(path: str, modules: dict[str, nn.Module]) -> bool:
    if isinstance(modules[path], nn.MultiheadAttention):
        return True
    return _is_matrix(modules[path]) and _letter(path.rpartition(".")[2]) in ("q", "qkv")


def _has_ffn(
    item: str, inside: list[str], modules: dict[str, nn.Module], matrices: dict[str, nn.Module]
) -> bool:
    """Whether something outside every attention transforms features in this item."""
    scopes = [_scope(item, path, inside, modules) for path in inside if _attends(path, modules)]
    outside = [p for p in inside if not any(p == s or p.startswith(s + ".") for s in scopes)]
    return any(
        p in matrices or any(w is not None and w.ndim == 3 for w in modules[p]._parameters.values())
        for p in outside
    )


def _scope(item: str, leaf: str, inside: list[str], modules: dict[str, nn.Module]) -> str:
    """The highest module below the block around this one attention."""
    home = leaf if isinstance(modules[leaf], nn.MultiheadAttention) else leaf.rpartition(".")[0]
    below = home[len(item) + 1 :].split(".") if home != item else []
    for depth in range(1, len(below) + 1):
        scope = ".".join([item, *below[:depth]])
        if isinstance(modules[scope], nn.ModuleList | nn.ModuleDict):
            continue
        others = {
            p.rpartition(".")[0]
            for p in inside
            if p.startswith(scope + ".") and _attends(p, modules) and p != home
        }
        if others <= {home, home.rpartition(".")[0]} or others <= {home}:
            return scope
    return home


class _Block:
    """One block on the way to its sites."""

    def __init__(self, modules: dict[str, nn.Module], path: str, leaves: list[str]) -> None:
        self.modules, self.path, self.leaves = modules, path, leaves
        self.inside = [p for p in modules if p == path or p.startswith(path + ".")]
        self.width = 0
        self.causal = False

    def sites(self) -> list[Site]:
        homes: dict[str, list[str]] = {}
        for leaf in self.inside:
            if _attends(leaf, self.modules):
                is_mha = isinstance(self.modules[leaf], nn.MultiheadAttention)
                homes.setdefault(leaf if is_mha else leaf.rpartition(".")[0], []).append(leaf)
        scopes = {
            home: _scope(self.path, leaves[0], self.inside, self.modules)
            for home, leaves in homes.items()
        }
        found: list[Site] = []
        for home, scope in scopes.items():
            found += self._attention(home, scope)
        taken = [scope for scope in scopes.values() if scope != self.path]
        used = {site.path for site in found}
        rest = [
            p
            for p in self.inside
            if p not in used and not any(p == s or p.startswith(s + ".") for s in taken)
        ]
        ffn = self._ffn(rest)
        if not ffn:
            return []
        found += ffn
        found += [
            Site(p, role="norm", kind="module", width=self.width)
            for p in self.inside
            if "norm" in type(self.modules[p]).__name__.lower()
        ]
        found.append(Site(self.path, role="block", kind="module", width=self.width))
        stack = quirks.stack_of(self.path, self.causal)
        return [site if site.stack else replace(site, stack=stack) for site in found]

    def _attention(self, home: str, scope: str) -> list[Site]:
        module = self.modules[home]
        cross = any(_tokens(part) & quirks.CROSS for part in home[len(self.path) :].split("."))
        self.causal = self.causal or bool(getattr(module, "is_causal", False))
        if isinstance(module, nn.MultiheadAttention):
            parts = _multihead(home, module)
        else:
            parts = self._projections(home, scope)
        self.width = self.width or next((s.shape[-1] for s in parts if s.role == "attn.q"), 0)
        self.width = self.width or parts[0].shape[-1]
        by_role = {site.role: site for site in parts}
        first = by_role.get("attn.q") or by_role["attn.qkv"]
        kv = tuple(by_role[r].shape[-2] if r in by_role else 0 for r in ("attn.k", "attn.v"))
        exit_, norm = home, ""
        if "attn.o" in by_role and not by_role["attn.o"].anchor:
            exit_, norm = self._exit(by_role["attn.o"].path, "cross" if cross else "attn")
        group = Site(
            home,
            role="attn",
            kind="sublayer",
            width=self.width,
            kv=(kv[0], kv[1]),
            entry=home if home != self.path else first.path,
            exit=exit_,
            norm=norm,
        )
        stack = "cross" if cross else ""
        return [replace(site, stack=stack) for site in [group, *parts]]

    def _projections(self, home: str, scope: str) -> list[Site]:
        found: list[Site] = []
        owner = type(self.modules[home]).__name__
        letters = {}
        for path in self.leaves:
            letter = _letter(path.rpartition(".")[2])
            if letter and path.rpartition(".")[0] == home:
                letters.setdefault(letter, path)
        for letter in ("q", "k", "v"):
            if letter in letters:
                path = letters[letter]
                site = matrix_site(path, self.modules[path])
                found.append(replace(site, role=f"attn.{letter}"))
        if "qkv" in letters:
            path = letters["qkv"]
            whole = replace(matrix_site(path, self.modules[path]), role="attn.qkv")
            found.append(whole)
            split = quirks.fused_rows(owner, self.modules[home], whole.shape[0], "q" in letters)
            found += [
                replace(
                    whole,
                    role=f"attn.{letter}",
                    rows=rows,
                    shape=(whole.shape[0] // rows.group * rows.length, whole.shape[1]),
                )
                for letter, rows in split.items()
            ]
        width = found[0].shape[-1]
        others = [
            path
            for path in self.leaves
            if (
                path.startswith(scope + ".")
                if scope != self.path
                else path.rpartition(".")[0] == home
                and _tokens(path.rpartition(".")[2]) & quirks.OUT
            )
            and path not in letters.values()
            and not _tokens(path.rpartition(".")[2]) & quirks.NOT_OUT
            and matrix_site(path, self.modules[path]).kind in ("linear", "conv1d")
            and matrix_site(path, self.modules[path]).shape[0] == width
        ]
        if others:
            site = matrix_site(others[-1], self.modules[others[-1]])
            found.append(replace(site, role="attn.o"))
        return found

    def _ffn(self, rest: list[str]) -> list[Site]:
        experts = [
            p
            for p in rest
            if any(w is not None and w.ndim == 3 for w in self.modules[p]._parameters.values())
        ]
        if experts:
            return [s for p in experts for s in self._experts(p)]
        sites = [matrix_site(p, self.modules[p]) for p in rest if p in set(self.leaves)]
        sites = [s for s in sites if s.kind in ("linear", "conv1d")]
        downs = [s for s in sites if s.shape[0] == self.width]
        if not downs:
            return []
        groups: dict[str, list[Site]] = {"": sites}
        if len([s for s in downs if s.shape[1] != self.width]) > 1:
            groups = {}
            for site in sites:
                groups.setdefault(site.path.rpartition(".")[0], []).append(site)
        return [site for group in groups.values() for site in self._feed(group)]

    def _feed(self, sites: list[Site]) -> list[Site]:
        """Up, gate and down of one feed-forward network."""
        downs = [s for s in sites if s.shape[0] == self.width]
        if not downs:
            return []
        down = downs[-1]
        inner = down.shape[1]
        ups = [
            s
            for s in sites
            if s is not down and s.shape[1] == self.width and s.shape[0] in (inner, 2 * inner)
        ]
        found: list[Site] = []
        for site in ups:
            if site.shape[0] == 2 * inner and len(ups) == 1:
                found.append(replace(site, role="ffn.gate_up"))
                for i, role in enumerate(("ffn.gate", "ffn.up")):
                    found.append(
                        replace(
                            site,
                            role=role,
                            rows=Rows(2 * inner, i * inner, inner),
                            shape=(inner, site.shape[1]),
                        )
                    )
            else:
                name = site.path.rpartition(".")[2]
                gate = len(ups) > 1 and (name in quirks.GATES or "gate" in _tokens(name))
                found.append(replace(site, role="ffn.gate" if gate else "ffn.up"))
        if not found:
            return []
        found.append(replace(down, role="ffn.down"))
        exit_, norm = self._exit(down.path, "ffn")
        entry = found[0].path
        shared = _common(entry, down.path)
        path = shared if shared.startswith(self.path + ".") else down.path
        if isinstance(self.modules[path], nn.ModuleList | nn.ModuleDict):
            path = down.path
        group = Site(
            path, role="ffn", kind="sublayer", width=self.width, entry=entry, exit=exit_, norm=norm
        )
        return [group, *found]

    def _experts(self, path: str) -> list[Site]:
        """The 3-D weights (experts, out, in) of a mixture of experts."""
        found: list[Site] = []
        for name, weight in self.modules[path]._parameters.items():
            if weight is None or weight.ndim != 3:
                continue
            shape = tuple(weight.shape)
            tokens = _tokens(name)
            down = "down" in tokens or name == "w2"
            flipped = (
                shape[-1 if down else -2] == self.width and shape[-2 if down else -1] != self.width
            )
            shape = (shape[0], shape[2], shape[1]) if flipped else shape
            site = Site(path, kind="dense", param=name, shape=shape, transposed=flipped)
            if down:
                found.append(replace(site, role="ffn.down"))
            elif {"gate", "up"} <= tokens:
                half = shape[1] // 2
                found.append(replace(site, role="ffn.gate_up"))
                found += [
                    replace(
                        site,
                        role=role,
                        shape=(shape[0], half, shape[2]),
                        rows=Rows(shape[1], i * half, half),
                    )
                    for i, role in enumerate(("ffn.gate", "ffn.up"))
                ]
            else:
                found.append(replace(site, role="ffn.gate" if "gate" in tokens else "ffn.up"))
        parent = path.rpartition(".")[0]
        home = path if parent == self.path else parent
        return [
            Site(home, role="ffn", kind="sublayer", width=self.width, entry=home, exit=home),
            *found,
        ]

    def _exit(self, last: str, part: str) -> tuple[str, str]:
        """Where the sub-layer's output leaves for the residual, and the norm behind the addition."""
        parent, _, name = last.rpartition(".")
        children = self.modules[parent]._modules
        drops = [n for n, m in children.items() if isinstance(m, nn.Dropout | nn.Identity)]
        norms = [
            n for n, m in children.items() if m is not None and "norm" in type(m).__name__.lower()
        ]
        matrices = [n for n, m in children.items() if m is not None and _is_matrix(m)]
        exit_ = last
        known = [n for n in drops if n in quirks.EXIT_DROPOUTS]
        if matrices == [name] and len(drops) == 1:
            exit_ = f"{parent}.{drops[0]}"
        elif len(known) == 1:
            exit_ = f"{parent}.{known[0]}"
        if (
            parent != self.path
            and len(norms) == 1
            and (matrices == [name] or (quirks.ATTENTION_NORM in norms and part == "attn"))
        ):
            return exit_, f"{parent}.{norms[0]}"
        return exit_, self._post_norm(part)

    def _post_norm(self, part: str) -> str:
        config = getattr(self.modules[self.path], "config", None) or getattr(
            self.modules[""], "config", None
        )
        names = quirks.post_norms(config, part)
        return next((f"{self.path}.{n}" for n in names if f"{self.path}.{n}" in self.modules), "")


def _multihead(home: str, module: nn.MultiheadAttention) -> list[Site]:
    """`nn.MultiheadAttention` uses its weights functionally: they are reached as parameters."""
    d = module.embed_dim
    found = []
    if module.in_proj_weight is not None:
        whole = Site(home, role="attn.qkv", kind="dense", param="in_proj_weight", shape=(3 * d, d))
        found.append(whole)
        found += [
            replace(whole, role=f"attn.{letter}", rows=Rows(3 * d, i * d, d), shape=(d, d))
            for i, letter in enumerate("qkv")
        ]
    else:
        found += [
            Site(
                home,
                role=f"attn.{letter}",
                kind="dense",
                param=f"{letter}_proj_weight",
                shape=tuple(module._parameters[f"{letter}_proj_weight"].shape),
            )
            for letter in "qkv"
        ]
    found.append(
        Site(f"{home}.out_proj", role="attn.o", kind="dense", shape=(d, d), width=d, anchor=home)
    )
    return found


def _common(a: str, b: str) -> str:
    shared = []
    for x, y in zip(a.split(".")[:-1], b.split(".")[:-1], strict=False):
        if x != y:
            break
        shared.append(x)
    return ".".join(shared)


def _heads(model: nn.Module) -> tuple[str, ...]:
    """Paths of task heads: what a classification model has outside its pre-trained body."""
    body = getattr(model, "base_model_prefix", "")
    if not body or body not in model._modules or not hasattr(model, "get_output_embeddings"):
        return ()
    if model.get_output_embeddings() is not None:
        return ()
    return tuple(
        name
        for name, child in model._modules.items()
        if child is not None
        and name not in (body, DELTAS)
        and any(True for _ in child.parameters())
    )


def _rest(atlas: Atlas, matrices: dict[str, nn.Module], claimed: dict[str, Site]) -> Iterator[Site]:
    """Embeddings, heads, and every other matrix, which only its name can reach."""
    embeddings = _token_embeddings(atlas)
    for path, module in matrices.items():
        if path in claimed:
            continue
        site = matrix_site(path, module)
        anchor = reader(path, atlas.modules)
        if anchor != path:
            site = replace(site, kind="dense", anchor=anchor)
        role = ""
        if id(module) in embeddings:
            role = "embed"
        elif (
            any(path == head or path.startswith(head + ".") for head in atlas.heads)
            or getattr(atlas.model, "get_output_embeddings", lambda: None)() is module
        ):
            role = "head"
        yield replace(site, role=role)


def _token_embeddings(atlas: Atlas) -> set[int]:
    """The modules that embed tokens; of one table under several modules, the ones that are called."""
    tables = set()
    for module in atlas.modules.values():
        if hasattr(module, "get_input_embeddings"):
            try:
                found = module.get_input_embeddings()
            except (NotImplementedError, AttributeError):
                continue
            if isinstance(found, nn.Embedding):
                tables.add(id(found.weight))
    found = {
        p: m
        for p, m in atlas.modules.items()
        if isinstance(m, nn.Embedding) and id(m.weight) in tables
    }
    called = {id(m) for p, m in found.items() if p.rpartition(".")[2] != "shared"}
    return called or {id(m) for m in found.values()}

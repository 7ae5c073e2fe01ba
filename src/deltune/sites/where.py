"""The `where` language: which sites of a model a spec means.

    where   := term ("," term)*            a union; `!term` takes sites away again
    term    := [stack "."] role [layers]   attn.q   encoder.ffn   cross.attn.v   attn.q[4:8]
             | glob on module paths        *.layer.3.*.dense   classifier   or, where none is
               such a name, on parameters  *.experts.down_proj
             | "re:" regular expression    re:.*layer\\.[02]\\..*query
    layers  := "[" n | n:m | -n: | n:m:k "]"

A role is a whole or one of its parts: `attn` stands for `attn.q attn.k attn.v attn.o` where
matrices are asked for, and for the attention itself where a sub-layer is.
"""

import fnmatch
import re
from collections.abc import Callable, Iterable

from torch import nn

from deltune.errors import WhereError, closest, listing
from deltune.sites.discover import Atlas
from deltune.sites.site import Site

Where = str | Callable[[str, nn.Module], bool]
STACKS = ("encoder", "decoder", "cross", "text", "vision")
ROLES = (
    "attn", "attn.q", "attn.k", "attn.v", "attn.o", "attn.qkv",
    "ffn", "ffn.up", "ffn.gate", "ffn.gate_up", "ffn.down",
    "block", "norm", "embed", "head",
)  # fmt: skip
_WHOLE = {"attn.qkv", "ffn.gate_up"}


def select(atlas: Atlas, where: Where, candidates: Iterable[Site], within: str = "") -> list[Site]:
    """The candidates that `where` means, in model order.

    Raises:
        WhereError: a term or `within` matches nothing; the message lists what exists.
    """
    sites = list(candidates)
    if callable(where):
        chosen = [s for s in sites if s.rows is None and where(s.path, atlas.modules[s.path])]
        if not chosen:
            raise WhereError(
                "the `where` function is true for no module that this method can serve"
            )
    else:
        chosen = _union(atlas, where, sites)
    if not within:
        return chosen
    kept = [site for site in chosen if _inside(within, site, sites)]
    if not kept:
        raise WhereError(
            f"`[{within}]` leaves none of the {len(chosen)} sites of `{where}`; they are in "
            f"{listing(sorted({s.stack or 'no stack' for s in chosen}))}, "
            f"layers {_span(chosen)}"
        )
    return kept


def terms(where: str) -> list[str]:
    """The terms of a `where`, split at commas outside brackets."""
    found = [term.strip() for term in re.split(r",(?![^\[]*\])", where)]
    if not all(found):
        raise WhereError(f"`where={where!r}` has an empty term; write e.g. `attn.q, attn.v`")
    return found


def _union(atlas: Atlas, where: str, sites: list[Site]) -> list[Site]:
    chosen: set[int] = set()
    for term in terms(where):
        meant = _meaning(term.lstrip("!"), sites)
        matched = {i for i, site in enumerate(sites) if meant(site)}
        if not matched:
            raise WhereError(_nothing(atlas, term, where, sites))
        chosen = chosen - matched if term.startswith("!") else chosen | matched
    if not chosen:
        raise WhereError(f"`where={where!r}` takes away every site that it names")
    return [site for i, site in enumerate(sites) if i in chosen]


def _meaning(term: str, sites: list[Site]) -> Callable[[Site], bool]:
    """Whether a site is meant by a term."""
    if term.startswith("re:"):
        try:
            pattern = re.compile(term[3:])
        except re.error as error:
            raise WhereError(f"`{term}` is not a regular expression: {error}") from None
        return _named(lambda name: pattern.fullmatch(name) is not None, sites)
    name, bracket, layers = term.partition("[")
    stack, role = _role(name)
    if role is None:
        return _named(lambda name: name == term or fnmatch.fnmatchcase(name, term), sites)
    below = role + "."

    def meant(site: Site) -> bool:
        if site.role != role and not site.role.startswith(below):
            return False
        if stack and site.stack != stack:
            return False
        if bracket and not in_layers(layers.rstrip("]"), site, sites, term):
            return False
        whole = site.role in _WHOLE and site.role != role
        return not whole or not any(s.rows and s.path == site.path for s in sites)

    return meant


def _named(matches: Callable[[str], bool], sites: list[Site]) -> Callable[[Site], bool]:
    """Whether the module of a site has such a name or, where no module has, its parameter."""
    if any(site.rows is None and matches(site.path) for site in sites):
        return lambda site: site.rows is None and matches(site.path)
    return lambda site: site.rows is None and matches(site.key)


def _role(name: str) -> tuple[str, str | None]:
    head, _, tail = name.partition(".")
    if name in ROLES:
        return "", name
    if head in STACKS and (tail in ROLES or not tail):
        return head, tail or None
    return "", None


def in_layers(text: str, site: Site, sites: list[Site], term: str) -> bool:
    if site.layer is None:
        return False
    count = 1 + max(s.layer for s in sites if s.layer is not None and s.stack == site.stack)
    try:
        numbers = [int(part) if part.strip() else None for part in text.split(":")]
    except ValueError:
        numbers = []
    if not 1 <= len(numbers) <= 3 or numbers == [None]:
        raise WhereError(
            f"`[{text}]` in `{term}` is not a layer range; write `[4:8]`, `[-2:]` or `[3]`"
        )
    first, most = numbers[0], 1 + max(s.layer for s in sites if s.layer is not None)
    beyond = [n for n in numbers[:2] if n is not None and not -most <= n <= most]
    if beyond and len(numbers) > 1:
        raise WhereError(
            f"`[{text}]` in `{term}` reaches to {beyond[0]}, and the model has {most} layers, 0 to "
            f"{most - 1}; leave the bound out to go to the end: `[4:]`"
        )
    if len(numbers) == 1 and first is not None:
        return site.layer == (first if first >= 0 else first + count)
    return site.layer in range(count)[slice(*numbers)]


def _inside(within: str, site: Site, sites: list[Site]) -> bool:
    """Whether a site is in the stack and layers of a spec's brackets."""
    for part in (p.strip().strip("'\"") for p in within.split(",")):
        if part in STACKS:
            if site.stack != part:
                return False
        elif part[:1].isalpha():
            raise WhereError(
                f"`[{within}]`: no stack `{part}`{closest(part, STACKS)}; {listing(STACKS)}"
            )
        elif not in_layers(part, site, sites, f"[{within}]"):
            return False
    return True


def _nothing(atlas: Atlas, term: str, where: str, sites: list[Site]) -> str:
    term = term.lstrip("!")
    name = term.partition("[")[0]
    here = [role for role in dict.fromkeys(s.role for s in sites) if role]
    model = type(atlas.model).__name__
    inside = f" in `where={where!r}`" if term != where else ""
    if _role(name)[1] is not None:
        return (
            f"`{term}`{inside} matches nothing in {model}; roles here: "
            f"{listing(here) or 'none (no attention blocks found; use module names)'}"
        )
    paths = [site.path for site in sites if site.rows is None]
    return (
        f"`{term}`{inside} is no role and matches no module of {model} that this method can serve"
        f"{closest(name, [*ROLES, *paths])}; roles here: {listing(here) or 'none'}; "
        f"modules: {listing(paths, 8)}"
    )


def _span(sites: list[Site]) -> str:
    layers = sorted({s.layer for s in sites if s.layer is not None})
    return f"{layers[0]} to {layers[-1]}" if layers else "none"

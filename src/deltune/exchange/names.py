"""Modules by their names, as other libraries know them: what they are, and a `where` for them."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from deltune.errors import ExchangeError, listing
from deltune.exchange.foreign import MOST_NUMBER, Held
from deltune.mechanisms.weight import matrices
from deltune.sites.discover import Atlas
from deltune.sites.site import Site
from deltune.sites.where import ROLES, STACKS, select


def named(atlas: Atlas, paths: Iterable[str], candidates: Iterable[Site]) -> str:
    """A `where` that means exactly these modules or stored parameters, whole ones, among the
    candidates."""
    sites, left, terms = list(candidates), list(dict.fromkeys(paths)), []
    present = {site.role for site in sites if site.role}
    for role in ROLES:  # the coarse ones stand before their parts
        if role not in present and not any(one.startswith(role + ".") for one in present):
            continue
        meant = select(atlas, role, sites)
        if meant and all(site.rows is None and site.key in left for site in meant):
            terms.append(role)
            taken = {site.key for site in meant}
            left = [path for path in left if path not in taken]
    return ", ".join([*terms, *map(alone, left)])


def alone(path: str) -> str:
    """A term that means the module of this path and no other."""
    head, _, tail = path.partition(".")
    role = path in ROLES or (head in STACKS and tail in ROLES)
    plain = re.fullmatch(r"[\w.\-]+", path) is not None
    return path if plain and not role else "re:" + re.escape(path).replace(",", r"\x2c")


def whole(atlas: Atlas) -> dict[str, Site]:
    """path -> the whole weight of every module that has one."""
    return {s.path: s for s in matrices(atlas) if s.rows is None and s.param == "weight"}


def head_shapes(atlas: Atlas) -> dict[str, tuple[int, ...]]:
    """The parameters of a new head and their shapes."""
    return {
        f"{path}.{name}" if path else name: tuple(parameter.shape)
        for path, module in atlas.modules.items()
        if atlas.in_head(path)
        for name, parameter in module._parameters.items()
        if parameter is not None
    }


def take_head(held: Held, atlas: Atlas) -> dict[str, Tensor]:
    """The parameters of a new head, where a checkpoint has them.

    Raises:
        ExchangeError: it has some of them alone, or of other shapes.
    """
    shapes = head_shapes(atlas)
    there = [name for name in shapes if name in held.left]
    if there and len(there) < len(shapes):
        lacking = [name for name in shapes if name not in there]
        raise ExchangeError(
            f"{held.where} has a part of the head and lacks {listing(lacking)}; save it again with "
            "the whole head"
        )
    return {name: held.take(name, shapes[name]) for name in there}


def stored_flipped(modules: Iterable[nn.Module]) -> bool:
    """Whether one of them is transformers' `Conv1D`, whose weight is (in, out)."""
    return any(type(module).__name__ == "Conv1D" for module in modules)


ENDS = r"(.*\.)?({})$"
"""How PEFT matches a pattern against a module's name, for most methods."""
BEHIND_A_DOT = r".*\.{}$"
"""The same, for some: there a name without a dot is known by itself alone."""


def looked_up(patterns: Mapping[str, Any], path: str, default: Any, how: str = ENDS) -> Any:
    """The value of the first pattern that matches a path, as PEFT looks it up; else of the path."""
    for pattern, value in patterns.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not abs(value) < MOST_NUMBER:
            raise ExchangeError(f"the pattern `{pattern}` stands for {value!r}; expected a number")
        # A pattern in a file may be made to keep a search busy for ever.
        if len(pattern) > 1000 or re.search(r"[+*}][^|]*\)[+*{]", pattern):
            raise ExchangeError(f"the pattern `{pattern[:80]}` is not one for the name of a module")
        try:
            if re.match(how.format(pattern), path):
                return value
        except re.error as error:
            raise ExchangeError(f"`{pattern}` is no regular expression: {error}") from None
    return patterns.get(path, default)


def exactly(path: str) -> str:
    """A pattern that is this path alone."""
    return "^" + re.escape(path)


def exceptions(values: Mapping[str, Any], common: Any) -> dict[str, Any]:
    """Patterns for the modules whose value is not the common one, each for its path alone."""
    return {exactly(path): value for path, value in values.items() if value != common}


def behind_a_dot(values: Mapping[str, Any], common: Any) -> dict[str, Any]:
    """The same for `BEHIND_A_DOT`: every path has a pattern, since a name without a dot is the end
    of others too, whose own ones have to stand before it."""
    found = {}
    for path, value in values.items():
        head, dot, last = path.rpartition(".")
        own = rf"(?<=^{re.escape(head + dot)}){re.escape(last)}"
        found[own if dot else path] = value
    return dict(sorted(found.items()))

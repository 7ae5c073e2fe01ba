"""Trained tokens in PEFT's format: `<table>.trainable_tokens_delta`, whole rows; beside LoRA
`<table>.token_adapter.trainable_tokens_delta`."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from deltune.delta import Delta
from deltune.errors import ExchangeError, listing
from deltune.exchange.foreign import Held, Told
from deltune.exchange.names import named
from deltune.exchange.peft.face import Face
from deltune.families.specification.tokens import Tokens
from deltune.mechanisms.modules import pretrained
from deltune.mechanisms.unit import Unit
from deltune.mechanisms.weight import matrices
from deltune.planning import Plan
from deltune.sites.discover import Atlas, discover
from deltune.spec import Spec

ALONE, BESIDE = ".trainable_tokens_delta", ".token_adapter.trainable_tokens_delta"
Changes = dict[str, Tensor]
"""Table -> the changes of its rows."""
Ids = tuple[int, ...]


class Rows(NamedTuple):
    """Tokens, every module that is tied to their table, and their rows in it."""

    ids: Ids
    places: list[str]
    rows: Tensor


def read(told: Told, held: Held, atlas: Atlas) -> tuple[list[Spec], Changes]:
    """The spec of a checkpoint, and the changes of its tables."""
    ids = _ids(told, told.take("token_indices", list, []))
    specs, changes = _tables(held, atlas, ALONE, lambda path: ids)
    if not specs:
        raise ExchangeError(f"{held.where} trains no token; save it again")
    return specs, changes


def read_beside(told: Told, held: Held, atlas: Atlas) -> tuple[list[Spec], Changes]:
    """The specs of the tokens that another method's checkpoint trains too, and their changes."""
    given = told.take("trainable_token_indices", (list, dict), [])

    def ids(path: str) -> Ids:
        if isinstance(given, list):
            return _ids(told, given)
        found = [rows for name, rows in given.items() if f".{path}".endswith(f".{name}")]
        if len(found) != 1:
            raise ExchangeError(
                f"{told.where}: `trainable_token_indices` names {listing(given)}, and the rows of "
                f"`{path}` are not those of one of them; save it again"
            )
        return _ids(told, found[0])

    return _tables(held, atlas, BESIDE, ids)


def fill(made: Plan, changes: Changes) -> dict[str, Tensor]:
    """The tensors of a plan."""
    return {
        f"{step.key}.d": changes[step.site.path]
        for step in made.steps
        if isinstance(step.spec, Tokens)
    }


def write(delta: Delta, units: Iterable[Unit]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The configuration and the rows of a delta that trains tokens alone."""
    written = _written(delta, units)
    several = {own.ids for own in written.values()}
    if len(several) > 1:
        raise ExchangeError(
            f"`{delta.name}` trains other tokens of one table than of another "
            f"({listing(map(str, sorted(several)))}); PEFT has one list"
        )
    tensors = {path + ALONE: own.rows for own in written.values() for path in own.places}
    config = {"token_indices": list(several.pop()), "target_modules": sorted(written)}
    return {"peft_type": "TRAINABLE_TOKENS", **config}, tensors


def write_beside(
    delta: Delta, units: Iterable[Unit]
) -> tuple[dict[str, list[int]], dict[str, Tensor]]:
    """Table -> tokens, and their rows, for the checkpoint of another method."""
    written = _written(delta, units)
    tensors = {table + BESIDE: own.rows for table, own in written.items()}
    return {table: list(own.ids) for table, own in written.items()}, tensors


def _ids(told: Told, given: Any) -> Ids:
    if not isinstance(given, list) or not all(type(one) is int and one >= 0 for one in given):
        raise ExchangeError(
            f"{told.where}: {str(given)[:80]} are no tokens; expected a list of numbers, 0 or more"
        )
    return tuple(given)


def _tables(
    held: Held, atlas: Atlas, end: str, ids: Callable[[str], Ids]
) -> tuple[list[Spec], Changes]:
    """The specs of the tables that a file has rows of, one for those with the same tokens. Rows
    that stand at several tied modules are the same ones."""
    groups: dict[Ids, list[str]] = {}
    changes: Changes = {}
    whole: dict[str, Tensor] = {}
    for name in [name for name in held.left if name.endswith(end)]:
        path = name.removesuffix(end)
        tables = [one for one in _sharing(atlas, path) if _is_table(atlas, one)]
        if not tables:
            raise ExchangeError(
                f"{held.where} trains tokens of `{path}`, which is no table of embeddings of "
                f"{type(atlas.model).__name__}, nor tied to one; load the model that it belongs to"
            )
        table, own = (
            atlas.modules[tables[0]].get_parameter("weight").detach().float().cpu(),
            ids(path),
        )
        rows = held.take(name, (len(own), table.shape[1])).float()
        if max(own, default=0) >= len(table):
            raise ExchangeError(
                f"{held.where} trains token {max(own)} of `{path}`, which has {len(table)} rows; "
                "resize the model's embeddings as they were in training"
            )
        if not torch.equal(whole.setdefault(tables[0], rows), rows):
            raise ExchangeError(
                f"{held.where} has other rows for `{path}` than for `{tables[0]}`, which is tied "
                "to it; save it again"
            )
        changes |= dict.fromkeys(tables, rows - table[list(own)])
        groups.setdefault(own, []).extend(_called(atlas, tables))
    candidates = [site for site in matrices(atlas) if _is_table(atlas, site.path)]
    return [Tokens(own, where=named(atlas, p, candidates)) for own, p in groups.items()], changes


def _written(delta: Delta, units: Iterable[Unit]) -> dict[str, Rows]:
    """What PEFT calls a table -> the rows of the unit there."""
    atlas, found = discover(delta.model), {}
    for unit in units:
        places = _sharing(atlas, unit.site.path)
        path = _input(atlas) if _input(atlas) in places else unit.site.path
        if path in found:
            raise ExchangeError(
                f"`{delta.name}` trains tokens of `{path}` twice; PEFT has one list for a table"
            )
        table = pretrained(atlas.modules[unit.site.path], "weight").detach()
        rows = table[list(unit.spec.ids)].float() + unit.scale * unit.d.detach()
        found[path] = Rows(unit.spec.ids, places, rows)
    return found


def _sharing(atlas: Atlas, path: str) -> list[str]:
    """The modules that have the weight of this one, which PEFT changes all if it changes one.

    Raises:
        ExchangeError: it would leave some, or drop a bias.
    """
    modules = atlas.modules
    weight = modules[path]._parameters.get("weight") if path in modules else None
    places = [p for p, m in modules.items() if weight is not None and _has(m, weight)]
    if not any(_is_table(atlas, one) for one in places):
        return []
    ties = getattr(getattr(atlas.model, "config", None), "tie_word_embeddings", False)
    if len(places) > 1 and not (ties and _input(atlas) in places):
        raise ExchangeError(
            f"{listing(places)} share one table, and PEFT would change a part of them alone; merge "
            "the delta"
        )
    biased = [p for p in places if modules[p]._parameters.get("bias") is not None]
    if biased:
        raise ExchangeError(
            f"`{biased[0]}` is tied to a table and has a bias, which PEFT leaves out where tokens "
            "are trained; merge the delta"
        )
    return places


def _has(module: nn.Module, weight: Tensor) -> bool:
    return any(parameter is weight for parameter in module._parameters.values())


def _is_table(atlas: Atlas, path: str) -> bool:
    return isinstance(atlas.modules[path], nn.Embedding)


def _called(atlas: Atlas, tables: list[str]) -> list[str]:
    """Of one table in several modules, those that embed tokens."""
    roles = {site.path for site in atlas.sites if site.role == "embed"}
    return [path for path in tables if path in roles] or tables[:1]


def _input(atlas: Atlas) -> str:
    """The module that a model calls its input embeddings; '' if none."""
    try:
        found = getattr(atlas.model, "get_input_embeddings", lambda: None)()
    except (NotImplementedError, AttributeError):
        return ""
    return next((path for path, module in atlas.modules.items() if module is found), "")


SILENT = ("target_modules", "exclude_modules", "init_weights")
FACE = Face(Tokens, read, fill, write, SILENT, modules=False)

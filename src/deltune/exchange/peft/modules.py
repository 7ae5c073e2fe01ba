"""Modules beside a method in PEFT's format, whole values: `<module>.weight`, `<module>.bias` and so
on, of those that `modules_to_save` names by the ends of their paths."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from deltune.container import DELTAS
from deltune.delta import Delta
from deltune.errors import ExchangeError, listing
from deltune.exchange.foreign import Held, Told
from deltune.exchange.names import named
from deltune.families.specification.baselines import FullTuning
from deltune.mechanisms.modules import pretrained
from deltune.mechanisms.select import backbone, places, tied
from deltune.mechanisms.unit import Unit
from deltune.sites.discover import Atlas, discover
from deltune.spec import Spec

BEFORE, AGAIN = ".original_module.", ".modules_to_save."
"""In further names of a value: of what it was before, and of itself once more."""
Changes = dict[str, Tensor]
"""Parameter -> its change."""


def read(told: Told, held: Held, atlas: Atlas) -> tuple[list[Spec], Changes]:
    """The spec of the modules that a checkpoint trains whole beside its method, and the changes of
    their parameters; a new head is not among them."""
    wanted = told.take("modules_to_save", list, [])
    if not all(isinstance(one, str) and one for one in wanted):
        raise ExchangeError(f"{told.where}: `modules_to_save` is {wanted!r}; expected names")
    tops = [p for p in atlas.modules if p.endswith(tuple(wanted)) and not atlas.in_head(p)]
    meant = _below(atlas, tops)
    if told.values.get("bias") == "all" and any(name == "bias" for _, name in meant.values()):
        raise ExchangeError(
            f"{told.where} trains the biases of {listing(tops, 4)} twice, by `bias = 'all'` and by "
            "`modules_to_save`; train them by one of the two"
        )
    _once(held)
    if not meant:
        return [], {}
    ties = [
        {_join(*place): (_join(*place[:2]), place[2]) for place in found}
        for found in tied(atlas, {id(_at(atlas, place)) for place in meant.values()}).values()
    ]
    for tie in ties:  # PEFT has a tied module's tensors in the file, and not its name
        meant |= {name: place for name, place in tie.items() if name in held.left}
    if lacking := [name for name in meant if name not in held.left]:
        raise ExchangeError(
            f"{held.where} lacks {listing(lacking, 4)}, which `modules_to_save` of {told.where} "
            "means; save it again"
        )
    changes: Changes = {}
    for name, place in meant.items():
        now = _at(atlas, place)
        changes[name] = held.take(name, tuple(now.shape)).float() - now.detach().float().cpu()
    for tie in ties:
        _check_tied(held, atlas, list(tie), changes)
    paths = [path for path, _ in meant.values()]
    spec = FullTuning(where=named(atlas, paths, places(atlas, [p for p, _ in backbone(atlas)])))
    if odd := meant.keys() ^ {_join(*place) for place in spec.chosen(atlas)}:
        raise ExchangeError(
            f"{held.where} has values for {listing(sorted(odd), 4)}, which "
            f"{type(atlas.model).__name__} does not learn; load it with PEFT and merge it"
        )
    return [spec], changes


def write(
    delta: Delta, units: Iterable[Unit], others: Mapping[str, Tensor]
) -> tuple[list[str], dict[str, Tensor]]:
    """The modules that units change as a whole, and all their values. Of a tied weight every
    module is one of them.

    Args:
        delta: the delta.
        units: those that hold changes of whole modules.
        others: what the rest of the delta writes.

    Raises:
        ExchangeError: PEFT would have something else there too, or take other modules for these.
    """
    atlas, values = discover(delta.model), dict[str, Tensor]()
    for unit in units:
        for own, anchor, inner, name in unit.site.places:
            path = _join(anchor, inner)
            value = pretrained(atlas.modules[path], name).detach()
            whole = _join(path, name)
            values[whole] = values.get(whole, value) + unit.scale * unit.own(own)
    owners = dict.fromkeys(name.rpartition(".")[0] for name in values)
    tops = [p for p in owners if not any(p.startswith(f"{other}.") for other in owners)]
    for whole, (path, name) in _below(atlas, tops).items():
        values.setdefault(whole, pretrained(atlas.modules[path], name).detach())
    _check_written(delta, atlas, tops, values, others)
    return tops, values


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def _at(atlas: Atlas, place: tuple[str, str]) -> Tensor:
    return atlas.modules[place[0]].get_parameter(place[1])


def _below(atlas: Atlas, tops: Iterable[str]) -> dict[str, tuple[str, str]]:
    """The parameters of these modules and of those in them: name -> (module, own name)."""
    known = tuple(tops)
    return {
        _join(path, name): (path, name)
        for path, module in atlas.modules.items()
        if any(path == top or path.startswith(f"{top}.") for top in known)
        for name, parameter in module._parameters.items()
        if parameter is not None
    }


def _once(held: Held) -> None:
    """Takes the further names of what a file has already."""
    for name in list(held.left):
        if AGAIN in name:
            value, plain = held.left.pop(name), name.replace(AGAIN, ".")
            if plain not in held.left or not torch.equal(value, held.left[plain]):
                raise ExchangeError(f"{held.where} has two values for `{plain}`; save it again")
        elif name.replace(BEFORE, ".") in held.left and BEFORE in name:
            held.left.pop(name)


def _check_tied(held: Held, atlas: Atlas, names: list[str], changes: Changes) -> None:
    """Refuses changes of a part of the modules that have one weight."""
    found = [changes[name] for name in names if name in changes]
    if len(found) < len(names) or not all(torch.equal(one, found[0]) for one in found):
        raise ExchangeError(
            f"{held.where} has values for a part of {listing(names)} alone, or several ones, and "
            f"{type(atlas.model).__name__} has one weight there, which PEFT parts; part it before "
            "loading: `module.weight = torch.nn.Parameter(module.weight.detach().clone())`"
        )


def _check_written(
    delta: Delta, atlas: Atlas, tops: list[str], values: Mapping[str, Tensor],
    others: Mapping[str, Tensor],
) -> None:  # fmt: skip
    """Refuses modules that PEFT would not find back as they are."""
    if "" in tops:
        raise ExchangeError(
            f"`{delta.name}` changes `{next(iter(values))}` of the model itself, which PEFT has no "
            "name for; merge the delta"
        )
    for path in tops:
        below = path + "."
        if both := next((name for name in others if name.startswith(below)), None):
            raise ExchangeError(
                f"`{delta.name}` changes `{path}` as a whole and has `{both}` too; PEFT has one of "
                "them at a module: merge the delta"
            )
        state = {below + name for name in atlas.modules[path].state_dict()}
        if state - values.keys():
            raise ExchangeError(
                f"`{delta.name}` changes `{path}`, whose {listing(state - values.keys(), 4)} no "
                "delta has; merge the delta"
            )
    every = [path for path, _ in delta.model.named_modules(remove_duplicate=False)]
    own = [path for path in every if path.partition(".")[0] != DELTAS]
    ended = [path for path in own if path.endswith(tuple(tops)) and path not in tops]
    if more := [path for path in ended if not any(path.startswith(f"{top}.") for top in tops)]:
        raise ExchangeError(
            f"PEFT finds modules by the ends of their names, and would take {listing(more, 4)} for "
            f"one of {listing(tops, 4)}, which `{delta.name}` changes; merge the delta"
        )

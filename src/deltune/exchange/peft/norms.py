"""Tuned norms in PEFT's format: `<norm>.ln_tuning_layers.weight` and `.bias`, whole values."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from deltune.delta import Delta
from deltune.errors import ExchangeError, listing
from deltune.exchange.foreign import Held, Told
from deltune.exchange.names import alone
from deltune.exchange.peft.face import Face
from deltune.families.specification.norms import Norms
from deltune.mechanisms.unit import Unit
from deltune.planning import Plan
from deltune.sites.discover import Atlas
from deltune.sites.matrices import is_norm
from deltune.spec import Spec

INFIX = ".ln_tuning_layers."
Values = dict[str, Tensor]


def read(told: Told, held: Held, atlas: Atlas) -> tuple[list[Spec], Values]:
    """The spec of the norms that a checkpoint has, and the changes of their parameters."""
    changes: Values = {}
    paths: dict[str, None] = {}
    for name in list(held.left):
        path, infix, own = name.partition(INFIX)
        if not infix:
            continue
        module = atlas.modules.get(path)
        now = module._parameters.get(own) if module is not None and is_norm(module) else None
        if now is None:
            raise ExchangeError(
                f"{held.where} tunes `{path}`, which is no norm with a {own} of "
                f"{type(atlas.model).__name__}; load the model that it belongs to"
            )
        value = held.take(name, tuple(now.shape))
        changes[f"{path}.{own}"] = value.float() - now.detach().float().cpu()
        paths[path] = None
    if not paths:
        raise ExchangeError(f"{held.where} tunes no norm; save it again")
    return [Norms(where=", ".join(map(alone, paths)))], changes


def fill(made: Plan, changes: Values) -> dict[str, Tensor]:
    """The tensors of a plan."""
    wanted = {
        f"{step.key}.{own}": f"{step.site.path}.{own}"
        for step in made.steps
        if isinstance(step.spec, Norms)
        for own in step.tensors
    }
    lacking = [place for place in wanted.values() if place not in changes]
    if lacking:
        raise ExchangeError(f"the checkpoint lacks {listing(lacking, 4)} of norms that it tunes")
    return {name: changes[place] for name, place in wanted.items()}


def write(delta: Delta, units: Iterable[Unit]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The norms with the changes of a delta in them."""
    modules: dict[str, nn.Module] = dict(delta.model.named_modules())
    tensors: dict[str, Tensor] = {}
    for unit in units:
        module, path = modules[unit.site.path], unit.site.path
        own = dict(unit.named_parameters(recurse=False))
        for name, value in module._parameters.items():
            if value is not None:
                changed = value + unit.scale * own[name] if name in own else value
                tensors[f"{path}{INFIX}{name}"] = changed
    paths = sorted({name.partition(INFIX)[0] for name in tensors})
    return {"peft_type": "LN_TUNING", "target_modules": paths}, tensors


FACE = Face(Norms, read, fill, write, ("target_modules", "exclude_modules"))

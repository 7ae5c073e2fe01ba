"""(IA)^3 in PEFT's format: `<module>.ia3_l`, (out, 1) for outputs and (1, in) for inputs."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from deltune.delta import Delta
from deltune.errors import ExchangeError
from deltune.exchange.foreign import Held, Told
from deltune.exchange.names import named, stored_flipped, whole
from deltune.exchange.peft.face import Face
from deltune.families.addition.ia3 import IA3
from deltune.mechanisms.unit import Unit
from deltune.mechanisms.weight import matrices
from deltune.planning import Plan
from deltune.sites.discover import Atlas
from deltune.spec import Spec

END = ".ia3_l"
Factors = dict[str, Tensor]


def read(told: Told, held: Held, atlas: Atlas) -> tuple[list[Spec], Factors]:
    """The spec, and l - 1 of each module."""
    sites = whole(atlas)
    changes: Factors = {}
    inputs: list[str] = []
    for name in [name for name in held.left if name.endswith(END)]:
        path, table = name.removesuffix(END), held.take(name)
        if path not in sites or table.ndim != 2 or 1 not in table.shape:
            raise ExchangeError(
                f"{held.where}: `{name}` {tuple(table.shape)} is no factor of a matrix of "
                f"{type(atlas.model).__name__}; load the model that it belongs to"
            )
        if table.shape[0] == 1:
            inputs.append(path)
        changes[path] = table.float().flatten() - 1
    if not changes:
        raise ExchangeError(f"{held.where} rescales nothing; save it again")
    candidates = matrices(atlas)
    where = named(atlas, changes, candidates)
    return [IA3(where=where, inputs=named(atlas, inputs, candidates) if inputs else "")], changes


def fill(made: Plan, changes: Factors) -> dict[str, Tensor]:
    """The tensors of a plan."""
    return {f"{s.key}.d": changes[s.site.path] for s in made.steps if isinstance(s.spec, IA3)}


def write(delta: Delta, units: Iterable[Unit]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The factors; those of the roles of a fused matrix as one."""
    modules: dict[str, nn.Module] = dict(delta.model.named_modules())
    tensors: dict[str, Tensor] = {}
    inputs: list[str] = []
    for unit in units:
        site, change = unit.site, unit.scale * unit.d
        if site.entry:
            inputs.append(site.path)
            tensors[site.path + END] = 1 + change[None]
            continue
        change = site.spread(change, modules[site.path].get_parameter("weight"))
        tensors[site.path + END] = tensors.get(site.path + END, 1) + change[:, None]
    paths = [name.removesuffix(END) for name in tensors]
    config = {
        "peft_type": "IA3", "feedforward_modules": sorted(inputs),
        "target_modules": sorted(paths),
        "fan_in_fan_out": stored_flipped(modules[path] for path in paths),
        "init_ia3_weights": True,
    }  # fmt: skip
    return config, tensors


FACE = Face(
    IA3, read, fill, write,
    ("target_modules", "exclude_modules", "feedforward_modules", "fan_in_fan_out",
     "init_ia3_weights"),
)  # fmt: skip

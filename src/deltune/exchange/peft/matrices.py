"""Changes of matrices in PEFT's format: the tensors of a module stand under its name."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from deltune.delta import Delta
from deltune.errors import ExchangeError, listing
from deltune.exchange.foreign import Held, Told
from deltune.exchange.names import exceptions, named, stored_flipped, whole
from deltune.exchange.peft.face import PLACES, Face
from deltune.mechanisms.tensors import Param
from deltune.mechanisms.unit import Unit
from deltune.mechanisms.weight import Weight, matrices
from deltune.planning import Plan
from deltune.sites.discover import Atlas
from deltune.sites.site import Kind, Site
from deltune.spec import Spec

PEFTS: Mapping[str, str] = {
    "linear": "`nn.Linear`", "conv1d": "transformers' `Conv1D`", "embedding": "`nn.Embedding`",
    "dense": "a convolution or a matrix that is read by a module above",
}  # fmt: skip
"""What sites of a kind are, as PEFT tells them apart."""
Tensors = Mapping[str, Tensor]
Options = Callable[[str, Tensors], Mapping[str, Any]]
"""(module, its tensors by our names) -> options of the spec there."""


class Found(NamedTuple):
    """The tensors of a checkpoint: those of each module, and those that all share, by our names."""

    modules: dict[str, dict[str, Tensor]]
    shared: dict[str, Tensor]


@dataclass(frozen=True)
class Form:
    """A method of changes of matrices.

    Args:
        kind: PEFT's type.
        spec: the method.
        names: our tensors -> what follows the module's name in the file.
        options: takes the fields of a configuration; what it returns says the options of a module.
        config: unit -> the fields of the configuration that it asks for. What units disagree in
            goes to the pattern that `patterns` names.
        patterns: field -> the field that holds its exceptions by module.
        scaled: gives a unit's tensors with its scale in them; None where only 1 can be written.
        silent: further fields that say nothing about what a trained delta does.
        defaults: what other fields hold, beside nothing, when they ask for nothing.
        shared: our tensors that all modules share -> their names in the file.
        stored: the field that says whether the file has them; where it has not, they are as a spec
            starts them.
        kinds: of sites whose modules PEFT has a layer for.
        ours: (site, tensors of a module, its options) -> these tensors as the method has them,
            where the file has them otherwise.
        whole_numbers: our names of tensors that hold these.
        excepted: (module -> value, the common value) -> patterns by which PEFT finds the others.
        embedded: what follows the name of an embedding in the file, where it is something else.
    """

    kind: str
    spec: type[Weight]
    names: Mapping[str, str]
    options: Callable[[Told], Options]
    config: Callable[[Unit], dict[str, Any]]
    patterns: Mapping[str, str]
    scaled: Callable[[Unit], Tensors] | None = None
    silent: tuple[str, ...] = ()
    defaults: Mapping[str, Any] | None = None
    shared: Mapping[str, str] = field(default_factory=dict)
    stored: str = ""
    kinds: tuple[Kind, ...] = ("linear", "conv1d")
    excepted: Callable[[Mapping[str, Any], Any], dict[str, Any]] = exceptions
    ours: Callable[[Site, Tensors, Mapping[str, Any]], Tensors] | None = None
    whole_numbers: tuple[str, ...] = ()
    embedded: Mapping[str, str] | None = None

    def face(self) -> Face:
        """The method as the checkpoints' reader and writer want it."""
        silent, bare = (*PLACES, *self.silent), tuple(self.shared.values())
        whole_numbers = tuple(f".{self.names[own]}" for own in self.whole_numbers)
        return Face(
            self.spec, self.read, self.fill, self.write, silent, self.defaults or {}, bare=bare,
            whole_numbers=whole_numbers,
        )  # fmt: skip

    def read(self, told: Told, held: Held, atlas: Atlas) -> tuple[list[Spec], Found]:
        """The specs of a checkpoint, one for modules with the same options, and its tensors."""
        options, sites = self.options(told), whole(atlas)
        shared = self._shared(told, held)
        backbone_tables(held, atlas)
        ends = [*self.names.items(), *(self.embedded or {}).items()]
        found: dict[str, dict[str, Tensor]] = {}
        for name in list(held.left):
            own, end = next((one for one in ends if name.endswith(f".{one[1]}")), ("", ""))
            path = name.removesuffix(f".{end}")
            if own and (path not in sites or self._names(sites[path])[own] == end):
                found.setdefault(path, {})[own] = held.take(name)
        lacking = [path for path in found if path not in sites]
        if lacking or not found:
            raise ExchangeError(
                f"{held.where} adapts {listing(lacking, 4) or 'nothing'}, which "
                f"{type(atlas.model).__name__} has no matrices at; load the model that it belongs "
                "to"
            )
        groups: dict[Weight, list[str]] = {}
        for path, tensors in found.items():
            self._has(sites[path])
            chosen = options(path, tensors)
            groups.setdefault(self.spec(**chosen), []).append(path)
            if self.ours:
                found[path] = dict(self.ours(sites[path], tensors, chosen))
        return [
            replace(spec, where=named(atlas, paths, matrices(atlas)))
            for spec, paths in groups.items()
        ], Found(found, shared)

    def fill(self, made: Plan, found: Found) -> dict[str, Tensor]:
        """The tensors of a plan."""
        filled = {}
        for step in made.steps:
            if not isinstance(step.spec, self.spec):
                continue
            theirs, path = found.modules[step.site.path], step.site.path
            names = self._names(step.site)
            for own, param in step.tensors.items():
                if own not in names:  # what training keeps beside
                    filled[f"{step.key}.{own}"] = started(param)
                    continue
                name = f"{path}.{names[own]}"
                filled[f"{step.key}.{own}"] = _fitting(name, theirs.get(own), param, step.spec)
            for own, param in made.shared.get(step.shared, {}).items():
                key = f"{step.shared}.{own}"
                if key not in filled:
                    common = found.shared if found.shared else {own: started(param)}
                    filled[key] = _fitting(self.shared[own], common.get(own), param, step.spec)
            if further := [names[own] for own in theirs if own not in step.tensors]:
                raise ExchangeError(
                    f"the checkpoint has {listing(further)} at `{path}`, where `{step.spec}` has "
                    "none; its configuration is not of these tensors"
                )
        return filled

    def write(
        self, delta: Delta, units: Iterable[Unit]
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The configuration and the tensors of a delta's units."""
        units = list(units)
        modules: dict[str, nn.Module] = dict(delta.model.named_modules())
        tensors = self._common(delta, units)
        fields: dict[str, dict[str, Any]] = {}
        for unit in units:
            path = self._alone(unit)
            own = self.scaled(unit) if self.scaled else dict(unit.named_parameters(recurse=False))
            names = self._names(unit.site)
            tensors |= {f"{path}.{names[name]}": value for name, value in own.items()}
            for name, value in self.config(unit).items():
                fields.setdefault(name, {})[path] = value
        paths = [*dict.fromkeys(path for one in fields.values() for path in one)]
        config: dict[str, Any] = {"peft_type": self.kind, "target_modules": sorted(paths)}
        for name, values in fields.items():
            config |= self._agreed(delta, name, values)
        if stored_flipped(modules[path] for path in paths):
            config["fan_in_fan_out"] = True
        return config, tensors

    def _shared(self, told: Told, held: Held) -> dict[str, Tensor]:
        """The tensors that all modules share; some methods of PEFT repeat them at each module."""
        if self.stored and not told.take(self.stored, bool, True):
            return {}
        found = {own: held.take(name) for own, name in self.shared.items()}
        for own, name in self.shared.items():
            end = f".{name.rpartition('.')[2]}"
            for again in [other for other in held.left if other.endswith(end)]:
                if not torch.equal(held.take(again), found[own]):
                    raise ExchangeError(
                        f"{held.where}: `{again}` is not `{name}`, which all modules share; save "
                        "it again"
                    )
        return found

    def _common(self, delta: Delta, units: list[Unit]) -> dict[str, Tensor]:
        """The shared tensors of a delta's units, by their names in the file."""
        owners = {id(unit.shared): unit.shared for unit in units if unit.shared is not None}
        if len(owners) > 1:
            raise ExchangeError(
                f"`{delta.name}` has {len(owners)} sets of {listing(self.shared)}; PEFT has one in "
                f"a {self.kind} checkpoint: use one spec for all matrices"
            )
        own = {
            name: tensor
            for owner in owners.values()
            for name, tensor in (*owner._parameters.items(), *owner._buffers.items())
        }
        return {self.shared[name]: tensor for name, tensor in own.items() if tensor is not None}

    def _alone(self, unit: Unit) -> str:
        """The module of a unit that PEFT's format has a place for."""
        site = unit.site
        if site.rows is not None or site.param != "weight" or len(site.shape) != 2:
            what = "a role of a fused matrix" if site.rows else "a matrix that no module is"
            raise ExchangeError(
                f"`{unit.spec.kind}` acts at `{site.path}` on {what}, and PEFT has {self.kind} for "
                f"whole modules alone; train it with `where='re:...'` that names the modules, or "
                "convert it: `deltune convert`"
            )
        self._has(site)
        if unit.scale != 1.0 and self.scaled is None:
            raise ExchangeError(
                f"`{unit.spec.kind}` is scaled by {unit.scale:g}, which PEFT has no word for in "
                f"{self.kind}; set `delta.scale = 1`, or merge the delta"
            )
        return site.path

    def _names(self, site: Site) -> Mapping[str, str]:
        """Our tensors -> what follows the name of the site's module."""
        return self.embedded if self.embedded and site.kind == "embedding" else self.names

    def _has(self, site: Site) -> None:
        """Refuses a place that PEFT has no layer for, or one that means something else."""
        if site.kind not in self.kinds:
            names = " or ".join(PEFTS.get(kind, kind) for kind in self.kinds)
            raise ExchangeError(
                f"`{site.path}` is {PEFTS.get(site.kind, site.kind)}, and a {self.kind} checkpoint "
                f"is exchanged for {names} alone; leave it out, or merge it where it was trained"
            )

    def _agreed(self, delta: Delta, field: str, values: Mapping[str, Any]) -> dict[str, Any]:
        """The field of a configuration, with a pattern for modules that differ."""
        counted = Counter(values.values())
        most = counted.most_common(1)[0][0]
        found = {field: most}
        if len(counted) > 1:
            if field not in self.patterns:
                raise ExchangeError(
                    f"`{delta.name}` has {listing(map(str, counted))} for `{field}`; PEFT has one "
                    f"in a {self.kind} checkpoint"
                )
            found[self.patterns[field]] = self.excepted(values, most)
        return found


def _fitting(name: str, theirs: Tensor | None, param: Param, spec: Spec) -> Tensor:
    """A tensor of a checkpoint, which has the shape that a plan wants."""
    shape = "nothing" if theirs is None else tuple(theirs.shape)
    if theirs is None or shape != tuple(param.shape):
        raise ExchangeError(
            f"`{name}` of the checkpoint is {shape}, and `{spec}` has {tuple(param.shape)} there; "
            "load the model that it was trained on"
        )
    return theirs if param.dtype else theirs.float()


def started(param: Param) -> Tensor:
    """A tensor as its spec starts it."""
    return param.build(torch.device("cpu"), torch.float32, None)


def backbone_tables(held: Held, atlas: Atlas) -> None:
    """Takes the tables that PEFT keeps beside changes of embeddings and output layers; they are
    the backbone's own.

    Raises:
        ExchangeError: they are other ones than this model's.
    """
    for name in [name for name in held.left if name.endswith(".base_layer.weight")]:
        path = name.removesuffix(".base_layer.weight")
        module = atlas.modules.get(path)
        own = module._parameters.get("weight") if module is not None else None
        if own is None or not torch.equal(held.left[name].to(own.device, own.dtype), own):
            raise ExchangeError(
                f"{held.where} has its own weights for `{path}`, other ones than this model's; "
                "load the model that it was trained on, with the same vocabulary"
            )
        held.take(name)

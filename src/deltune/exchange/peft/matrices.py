"""Changes of matrices in PEFT's format: the tensors of a module stand under its name."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from deltune.delta import Delta
from deltune.errors import ExchangeError, listing
from deltune.exchange.foreign import Held, Told
from deltune.exchange.names import exactly, named, stored_flipped, whole
from deltune.exchange.peft.face import PLACES, Face
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
Found = dict[str, dict[str, Tensor]]
"""Module -> its tensors by our names."""
Options = Callable[[str, Tensors], Mapping[str, Any]]
"""(module, its tensors by our names) -> options of the spec there."""


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
        places: kinds of sites that PEFT has the method for, with the same meaning.
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
    places: tuple[Kind, ...] = ("linear", "dense")
    embedded: Mapping[str, str] | None = None

    def face(self) -> Face:
        """The method as the checkpoints' reader and writer want it."""
        silent = (*PLACES, *self.silent)
        return Face(self.spec, self.read, self.fill, self.write, silent, self.defaults or {})

    def read(self, told: Told, held: Held, atlas: Atlas) -> tuple[list[Spec], Found]:
        """The specs of a checkpoint, one for modules with the same options, and its tensors."""
        options, sites = self.options(told), whole(atlas)
        backbone_tables(held, atlas)
        ends = [*self.names.items(), *(self.embedded or {}).items()]
        found: Found = {}
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
            groups.setdefault(self.spec(**options(path, tensors)), []).append(path)
        return [
            replace(spec, where=named(atlas, paths, matrices(atlas)))
            for spec, paths in groups.items()
        ], found

    def fill(self, made: Plan, found: Found) -> dict[str, Tensor]:
        """The tensors of a plan."""
        filled = {}
        for step in made.steps:
            if not isinstance(step.spec, self.spec):
                continue
            theirs, path = found[step.site.path], step.site.path
            for own, param in step.tensors.items():
                shape = tuple(theirs[own].shape) if own in theirs else "nothing"
                if shape != tuple(param.shape):
                    raise ExchangeError(
                        f"`{path}.{self.names[own]}` of the checkpoint is {shape}, and "
                        f"`{step.spec}` has {tuple(param.shape)} there; load the model that it was "
                        "trained on"
                    )
                filled[f"{step.key}.{own}"] = theirs[own].float()
            if further := [self.names[own] for own in theirs if own not in step.tensors]:
                raise ExchangeError(
                    f"the checkpoint has {listing(further)} at `{path}`, where `{step.spec}` has "
                    "none; its configuration is not of these tensors"
                )
        return filled

    def write(
        self, delta: Delta, units: Iterable[Unit]
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The configuration and the tensors of a delta's units."""
        modules: dict[str, nn.Module] = dict(delta.model.named_modules())
        tensors: dict[str, Tensor] = {}
        fields: dict[str, dict[str, Any]] = {}
        for unit in units:
            path = self._alone(unit)
            own = self.scaled(unit) if self.scaled else dict(unit.named_parameters(recurse=False))
            names = self._names(unit.site)
            tensors |= {f"{path}.{names[name]}": value for name, value in own.items()}
            for field, value in self.config(unit).items():
                fields.setdefault(field, {})[path] = value
        paths = [*dict.fromkeys(path for one in fields.values() for path in one)]
        config: dict[str, Any] = {"peft_type": self.kind, "target_modules": sorted(paths)}
        for field, values in fields.items():
            config |= self._agreed(delta, field, values)
        if stored_flipped(modules[path] for path in paths):
            config["fan_in_fan_out"] = True
        return config, tensors

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
        if site.kind not in self.places:
            names = " or ".join(PEFTS.get(kind, kind) for kind in self.places)
            raise ExchangeError(
                f"`{site.path}` is {PEFTS.get(site.kind, site.kind)}, and a {self.kind} checkpoint "
                f"is exchanged for {names} alone; leave it out, or merge it where it was "
                "trained"
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
            found[self.patterns[field]] = {
                exactly(path): value for path, value in values.items() if value != most
            }
        return found


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

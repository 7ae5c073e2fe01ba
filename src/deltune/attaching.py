"""Attaching: from a spec or a folder to a delta that acts."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from deltune.container import Deltas, container, key_of
from deltune.delta import Delta, deltas
from deltune.errors import AttachError, StoreError, listing
from deltune.mechanisms.modules import Node, place
from deltune.mechanisms.standing import check_whole
from deltune.mechanisms.step import arrange
from deltune.mechanisms.tensors import Param
from deltune.mechanisms.unit import Unit
from deltune.planning import Plan, read, resolve
from deltune.sites.discover import Atlas, discover
from deltune.spec import Spec, from_json
from deltune.store import identity, native
from deltune.store.hub import local
from deltune.tree import Tree


def attach(
    model: nn.Module,
    spec: Spec | str,
    name: str = "delta",
    *,
    head: bool = True,
    seed: int | None = None,
) -> Delta:
    """Attaches a delta: freezes the backbone and adds the delta's trainable tensors.

    The model keeps its class, its state-dict keys and its train or eval mode. Several deltas may
    be attached, each independent of the others.

    Args:
        model: any PyTorch model; transformers models are addressed by roles.
        spec: what to attach, as a spec or its text.
        name: the delta's name; any text.
        head: whether a newly initialised task head trains and is saved with the delta.
        seed: makes the initialisation independent of torch's global generator.

    Raises:
        WhereError, SpecError, AttachError: as `plan`; or the name is taken. The model is
            untouched then.

    Example:
        >>> import deltune as dt, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> delta = dt.attach(model, dt.LoRA(rank=2, where="0"))
        >>> delta.count()
        16
    """
    atlas = discover(model)
    made = resolve(atlas, read(spec), head)
    if fixed := next((step for step in made.steps if step.fixed), None):
        raise AttachError(
            f"in `{made.spec}` the tensors of `{fixed.part}` would stay as they start, since they "
            "are frozen; give it those of a trained delta with `deltune.algebra.compose`, or leave "
            "`frozen` out"
        )
    return apply(model, atlas, made, name, head, seed, {})


class Description(NamedTuple):
    """What the description of a saved delta says."""

    path: Path
    spec: Spec
    head: bool
    backbone: dict[str, Any]
    name: str
    scale: float
    layout: dict[str, tuple[int, ...]]
    sites: dict[str, Any] | None
    """The places of its tensors; None in folders of versions that did not note them."""

    @classmethod
    def read(cls, path: str | Path) -> "Description":
        """The description in a folder.

        Raises:
            StoreError: none there, or one that is damaged.
        """
        path = local(path, (native.ABOUT, native.TENSORS))
        about = native.read_about(path)
        try:
            spec, head = from_json(about["spec"]), bool(about["head"])
            theirs, label = dict(about["backbone"]), str(about["name"])
            scale = float(about["scale"])
            if not math.isfinite(scale):
                raise ValueError(f"`scale` is {scale}")
            layout = {name: tuple(shape) for name, shape in about["layout"].items()}
            sites = None if about.get("sites") is None else dict(about["sites"])
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
            raise StoreError(
                f"`{path}/{native.ABOUT}` is incomplete or damaged: {error!r}"
            ) from None
        return cls(Path(path), spec, head, theirs, label, scale, layout, sites)

    def check_backbone(self, ours: dict[str, Any]) -> None:
        """Refuses a delta of a backbone with other weights than `ours`."""
        if self.backbone.get("weights") != ours["weights"]:
            theirs, here = identity.describe(self.backbone), identity.describe(ours)
            raise StoreError(
                f"the delta `{self.path}` was trained on another backbone:\n"
                f"  delta: {theirs}\n  here:  {here}\n"
                "load the right model, or pass `force=True` if you know that they agree"
            )

    def check_layout(self, made: Plan) -> None:
        """Refuses a delta whose tensors are not those of its spec on this model."""
        shapes = {slot.name: slot.shape for slot in made.layout}
        if self.layout != shapes:
            every = {**self.layout, **shapes}
            wrong = [name for name in every if self.layout.get(name) != shapes.get(name)]
            raise StoreError(
                f"the layout of `{self.path}` is not that of `{self.spec}` on this model: "
                f"{listing(wrong, 6)}"
            )

    def check_scale(self, made: Plan) -> None:
        """Refuses a scale of what has none."""
        fixed = [step.spec.kind for step in made.steps if not step.spec.unit.scalable]
        if fixed and self.scale != 1.0:
            raise StoreError(
                f"`{self.path}` has the scale {self.scale}, and `{fixed[0]}` has none; its "
                "description is damaged: save the delta again"
            )


def load(
    path: str | Path, model: nn.Module, name: str | None = None, *, force: bool = False
) -> Delta:
    """Attaches a saved delta to a model.

    Args:
        path: the folder that `Delta.save` wrote, or `hub:OWNER/NAME` or `hub:OWNER/NAME@REVISION`
            for what `Delta.push_to_hub` has.
        model: the backbone that the delta was trained on.
        name: a name for it here; the saved one by default.
        force: load also on a backbone with other weights (its shapes must still agree).

    Raises:
        StoreError: another backbone (both identities shown), missing, unexpected, misshapen or
            non-finite tensors, a damaged file, a repository that cannot be reached. The model is
            untouched then.

    Example:
        >>> import deltune as dt, tempfile, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> delta = dt.attach(model, dt.LoRA(rank=2, where="0"), name="mine")
        >>> folder = delta.save(Path(tempfile.mkdtemp(), "saved"))
        >>> delta.detach()
        >>> dt.load(folder, model).name
        'mine'
    """
    atlas = discover(model)
    saved = read_saved(path, model, atlas, force)
    named = saved.name if name is None else name
    delta = apply(model, atlas, saved.made, named, saved.head, None, saved.values)
    if saved.scale != 1.0:
        delta.scale = saved.scale
    return delta


class Saved(NamedTuple):
    """A saved delta, as it would be on a model."""

    made: Plan
    values: dict[str, Tensor]
    name: str
    head: bool
    scale: float


def read_saved(path: str | Path, model: nn.Module, atlas: Atlas, force: bool) -> Saved:
    """Reads the folder of a delta for a model; raises as `load`."""
    about = Description.read(path)
    made = resolve(atlas, about.spec, about.head)
    if not force:
        about.check_backbone(backbone_of(model, atlas))
    about.check_layout(made)
    about.check_scale(made)
    shapes = {name: param.shape for name, param in made.params()}
    values = native.read_tensors(about.path, shapes)
    return Saved(made, values, about.name, about.head, about.scale)


def backbone_of(model: nn.Module, atlas: Atlas) -> dict[str, Any]:
    """The identity of a model without its deltas, as a saved delta has it."""
    held = container(model) or Deltas()
    return identity.identity(model, held.backbone(model, atlas.heads))


def attach_values(
    model: nn.Module, spec: Spec, fill: Callable[[Plan], Mapping[str, Tensor]], name: str,
    head: bool,
) -> Delta:  # fmt: skip
    """Attaches a delta whose tensors come from elsewhere.

    Args:
        model: the backbone.
        spec: what to attach.
        fill: gives the tensors of a plan, by the names of its params.
        name: the delta's name.
        head: whether it holds the head.

    Raises:
        AttachError: a tensor of another shape, one too few or too many. The model is untouched
            then, as it is when `fill` raises.
    """
    atlas = discover(model)
    made = resolve(atlas, spec, head)
    values, shapes = fill(made), {n: tuple(param.shape) for n, param in made.params()}
    found = {n: tuple(tensor.shape) for n, tensor in values.items()}
    if found != shapes:
        wrong = [n for n in {**shapes, **found} if found.get(n) != shapes.get(n)]
        raise AttachError(f"the tensors given for `{spec}` do not fit: {listing(wrong, 6)}")
    return apply(model, atlas, made, name, head, None, values)


def apply(
    model: nn.Module, atlas: Atlas, made: Plan, name: str, head: bool,
    seed: int | None, values: Mapping[str, Tensor],
) -> Delta:  # fmt: skip
    """Executes a plan; tensors that `values` does not have are initialised."""
    key = _free_key(model, name)
    check_whole(model, "attached")
    held = container(model, make=True)
    assert held is not None
    delta = Delta(model, name)
    tree = Tree(name, made.spec, head)
    tree.training = model.training
    held._modules[key] = tree
    try:
        build(tree, atlas, made, seed, values)
        held.freeze(atlas.modules.values())
        tree.enabled = True
        held.join(model, tree)
    except BaseException:
        tree.enabled = False
        held.act(model)
        del held._modules[key]
        held.leave(model)
        raise
    return delta


def _free_key(model: nn.Module, name: str) -> str:
    if not isinstance(name, str) or not name or not name.isprintable():
        raise AttachError(f"a delta needs a name of characters that can be printed, got {name!r}")
    held, key = container(model), key_of(name)
    if held is not None and key in held._modules:
        raise AttachError(
            f"a delta named `{name}` is attached already; attached: {listing(deltas(model))}. "
            "Detach it, or pass another `name`"
        )
    return key


@torch.no_grad()
def build(
    tree: Tree, atlas: Atlas, made: Plan, seed: int | None, values: Mapping[str, Tensor]
) -> None:
    """Makes the units and tensors of a plan below a tree, from these values or as they start."""
    shared: dict[str, nn.Module] = {}
    generators: dict[torch.device, torch.Generator] = {}

    def fill(owner: nn.Module, key: str, params: Mapping[str, Param], like: Tensor) -> None:
        for own, param in params.items():
            device, dtype = like.device, param.dtype or like.dtype
            if param.dtype is None and (not dtype.is_floating_point or dtype.itemsize < 4):
                dtype = torch.float32
            if f"{key}.{own}" in values:
                tensor = values[f"{key}.{own}"].to(device, dtype, copy=True)  # aligned
            else:
                generator = None
                if seed is not None and device.type != "meta":
                    generator = generators.get(device)
                    if generator is None:
                        generator = torch.Generator(device).manual_seed(seed)
                        generators[device] = generator
                tensor = param.build(device, dtype, generator)
            if param.trained:
                owner._parameters[own] = nn.Parameter(tensor)
            else:
                owner._buffers[own] = tensor
            entries = tree.entries if param.trained else tree.kept
            entries.append((f"{key}.{own}", owner, own))
            tree.shapes[f"{key}.{own}"] = tuple(tensor.shape)

    units: dict[str, Unit] = {}
    for step in made.steps:
        like = _like(atlas, step.site.path)
        if step.shared and step.shared not in shared:
            shared[step.shared] = Node()
            fill(shared[step.shared], step.shared, made.shared[step.shared], like)
            place(tree, step.shared, shared[step.shared])
        unit: Unit = step.spec.unit(step.spec, step.site, shared.get(step.shared))
        fill(unit, step.key, step.tensors, like)
        place(tree, step.key, unit)
        tree.parts.setdefault(step.part, []).append(unit)
        units[step.key] = unit
    arrange(made.steps, units, atlas)


def _like(atlas: Atlas, path: str) -> Tensor:
    """A parameter whose device and dtype the tensors at a path follow."""
    module = atlas.modules[path]
    found = next((p for p in module._parameters.values() if p is not None), None)
    if found is None:
        found = next(module.parameters(), None)
    if found is None:
        found = next(atlas.model.parameters(), None)
    return found if found is not None else torch.empty(0)

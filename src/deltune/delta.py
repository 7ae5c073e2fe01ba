"""Attach a delta to a model, and the handle on it."""

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deltune.container import Deltas, Tree, container, key_of
from deltune.errors import AttachError, StoreError, listing
from deltune.mechanisms.tensors import Param
from deltune.mechanisms.unit import Node, Unit, place
from deltune.planning import Plan, read, resolve
from deltune.sites.discover import DELTAS, Atlas, discover
from deltune.spec import Spec, from_json
from deltune.store import identity, native
from deltune.vector import Layout


class Delta:
    """A handle on one delta of one model; made by `attach`, `load` and `deltas`.

    The handle itself holds no state: everything lives in the model, so a copy of the model carries
    its own deltas, and `deltune.deltas(copy)` gives the handles on them.
    """

    def __init__(self, model: nn.Module, name: str) -> None:
        self.model, self.name = model, name

    @property
    def tree(self) -> Tree:
        """The module that holds this delta's tensors."""
        held = container(self.model)
        tree = held._modules.get(key_of(self.name)) if held is not None else None
        if not isinstance(tree, Tree):
            raise AttachError(
                f"delta `{self.name}` is not attached to this {type(self.model).__name__}; "
                "attach it again, or load it from its folder"
            )
        return tree

    @property
    def spec(self) -> Spec:
        """What the delta is."""
        return self.tree.spec

    @property
    def layout(self) -> Layout:
        """Ordered names, shapes and offsets of the vector."""
        return self.tree.layout()

    @property
    def enabled(self) -> bool:
        """Whether the delta acts (merged counts as acting)."""
        return self.tree.enabled or self.tree.merged

    @property
    def merged(self) -> bool:
        """Whether the delta is merged into the weights."""
        return self.tree.merged

    @property
    def scale(self) -> float:
        """Factor on the delta's effect, 1 at first; the task head is not scaled."""
        return self.tree.factor

    @scale.setter
    def scale(self, value: float) -> None:
        tree = self.tree
        fixed = next((unit for unit in tree.units if not unit.scalable), None)
        if fixed is not None and value != 1.0:
            raise AttachError(
                f"`{fixed.spec.kind}` has no scale: its effect is not a sum with the model's own "
                f"(asked for {value}); enable or disable it instead"
            )
        tree.factor = float(value)
        for unit in tree.units:
            unit.scale = float(value)
        if tree.merged:
            self._container().remerge(self.model)

    def enable(self) -> "Delta":
        """Lets the delta act again."""
        tree = self.tree
        if not tree.enabled and not tree.merged:
            for unit in tree.units:
                unit.install(self.model)
            tree.enabled = True
        return self

    def disable(self) -> "Delta":
        """Stops the delta from acting; it stays attached.

        Raises:
            AttachError: the delta is merged.
        """
        tree = self.tree
        if tree.merged:
            raise AttachError(
                f"delta `{self.name}` is merged into the weights; `unmerge()` it first"
            )
        if tree.enabled:
            for unit in tree.units:
                unit.remove(self.model)
            tree.enabled = False
        return self

    @contextmanager
    def disabled(self) -> Generator[None]:
        """Without the delta inside a `with` block."""
        was = self.tree.enabled
        self.disable()
        try:
            yield
        finally:
            if was:
                self.enable()

    def detach(self) -> None:
        """Takes the delta off the model; without any left the model is what it was, bit for bit."""
        if self.tree.merged:
            self.unmerge()
        self.disable()
        held = self._container()
        del held._modules[key_of(self.name)]
        if not held._modules:
            _dismiss(self.model, held)

    def merge(self) -> "Delta":
        """Adds the delta's change to the weights: same outputs, no cost at inference.

        Changed weights are new parameters (computed in at least float32, then rounded to the
        backbone's dtype); the original ones are kept, so `unmerge` restores them bit for bit.

        Raises:
            AttachError: the delta's effect is no change of weights.
        """
        tree = self.tree
        if not tree.merged:
            for unit in tree.units:
                next(iter(unit.weights(self.model)), None)
            self.disable()
            tree.merged = True
            self._container().remerge(self.model)
        return self

    def unmerge(self) -> "Delta":
        """Undoes `merge`; the delta acts through its hooks again."""
        tree = self.tree
        if tree.merged:
            tree.merged = False
            self._container().remerge(self.model)
            self.enable()
        return self

    def parameters(self) -> list[nn.Parameter]:
        """The trainable tensors, the task head's included, in layout order."""
        return list(self.tree.named().values())

    def count(self, head: bool = True) -> int:
        """Number of trainable scalars, with or without those of the task head."""
        named = self.tree.named()
        return sum(p.numel() for n, p in named.items() if head or not n.startswith("head."))

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the delta by its name (live, detached from the graph)."""
        return {name: p.detach() for name, p in self.tree.named().items()}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> "Delta":
        """Copies these values in: exactly the delta's names and shapes.

        Raises:
            AttachError: missing or unexpected names, other shapes; nothing is changed then.
        """
        named = self.tree.named()
        if named.keys() != tensors.keys():
            odd = sorted(named.keys() ^ tensors.keys())
            raise AttachError(
                f"these are not the tensors of `{self.spec}`: {listing(odd, 6)} differ"
            )
        for name, parameter in named.items():
            if tensors[name].shape != parameter.shape:
                raise AttachError(
                    f"`{name}` has shape {tuple(tensors[name].shape)}, "
                    f"expected {tuple(parameter.shape)}"
                )
        with torch.no_grad():
            for name, parameter in named.items():
                parameter.copy_(tensors[name])
        return self._written()

    def vector(self) -> Tensor:
        """The delta as one vector (a copy), in layout order."""
        return self.layout.join(self.tensors())

    def load_vector(self, vector: Tensor) -> "Delta":
        """Writes a vector back into the tensors."""
        pieces = self.layout.split(vector.detach())
        with torch.no_grad():
            for name, parameter in self.tree.named().items():
                parameter.copy_(pieces[name])
        return self._written()

    def call(self, vector: Tensor, **batch: Any) -> Any:
        """`model(**batch)` with `vector` in place of this delta's tensors; gradients reach it.

        Raises:
            AttachError: the delta is merged or disabled, or the vector has another length.
        """
        if not self.tree.enabled:
            state = "merged" if self.tree.merged else "disabled"
            raise AttachError(
                f"delta `{self.name}` is {state}: `call` needs it to act through its hooks"
            )
        prefix = f"{DELTAS}.{key_of(self.name)}."
        pieces = {prefix + name: piece for name, piece in self.layout.split(vector).items()}
        return torch.func.functional_call(self.model, pieces, (), batch)

    def save(self, path: str | Path, overwrite: bool = False) -> Path:
        """Writes the delta to a folder, atomically: `delta.safetensors` and `delta.json`.

        Raises:
            StoreError: the folder exists, or the disk refuses; nothing earlier is lost.
        """
        tree = self.tree
        about = {
            "library": f"deltune {version('deltune')}",
            "name": self.name,
            "spec": self.spec.to_json(),
            "text": str(self.spec),
            "head": tree.with_head,
            "scale": tree.factor,
            "layout": [{"name": s.name, "shape": list(s.shape)} for s in self.layout],
            "backbone": self.backbone(),
        }
        native.write(path, self.tensors(), about, overwrite)
        return Path(path)

    def backbone(self) -> dict[str, Any]:
        """The identity of the backbone: class, name, digest of its configuration, fingerprint."""
        heads = discover(self.model).heads
        return identity.identity(self.model, self._container().backbone(self.model, heads))

    def fold(self) -> "Delta":
        """Replaces training-time forms (a reparameterised prefix) by their plain equivalent.

        Outputs stay the same; the delta becomes smaller and its spec the plain one.

        Raises:
            AttachError: nothing in the delta folds.
        """
        from deltune.fold import folded

        return folded(self)

    def __repr__(self) -> str:
        from deltune.show import delta_text

        return delta_text(self)

    def _repr_html_(self) -> str:
        from deltune.show import delta_html

        return delta_html(self)

    def _container(self) -> Deltas:
        held = container(self.model)
        assert held is not None
        return held

    def _written(self) -> "Delta":
        if self.tree.merged:
            self._container().remerge(self.model)
        return self


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
    return _apply(model, atlas, made, name, head, seed, None)


def load(
    path: str | Path, model: nn.Module, name: str | None = None, *, force: bool = False
) -> Delta:
    """Attaches a saved delta to a model.

    Args:
        path: the folder that `Delta.save` wrote.
        model: the backbone that the delta was trained on.
        name: a name for it here; the saved one by default.
        force: load also on a backbone with other weights (its shapes must still agree).

    Raises:
        StoreError: another backbone (both identities shown), missing, unexpected, misshapen or
            non-finite tensors, a damaged file. The model is untouched then.
    """
    about = native.read_about(path)
    try:
        spec, head = from_json(about["spec"]), bool(about["head"])
        theirs, label, scale = about["backbone"], str(about["name"]), float(about["scale"])
        layout = [(str(slot["name"]), tuple(slot["shape"])) for slot in about["layout"]]
    except (KeyError, TypeError, ValueError) as error:
        raise StoreError(f"`{path}/{native.ABOUT}` is incomplete or damaged: {error!r}") from None
    atlas = discover(model)
    made = resolve(atlas, spec, head)
    held = container(model) or Deltas()
    ours = identity.identity(model, held.backbone(model, atlas.heads))
    if not force and theirs.get("weights") != ours["weights"]:
        raise StoreError(
            f"the delta `{path}` was trained on another backbone:\n"
            f"  delta: {identity.describe(theirs)}\n  here:  {identity.describe(ours)}\n"
            "load the right model, or pass `force=True` if you know that they agree"
        )
    shapes = {slot.name: slot.shape for slot in made.layout}
    if layout != list(shapes.items()):
        wrong = [n for n, shape in layout if shapes.get(n) != shape] or sorted(shapes)[:3]
        raise StoreError(
            f"the layout of `{path}` is not that of `{spec}` on this model: {listing(wrong, 6)}"
        )
    values = native.read_tensors(path, shapes)
    delta = _apply(model, atlas, made, label if name is None else name, head, None, values)
    if scale != 1.0:
        delta.scale = scale
    return delta


def deltas(model: nn.Module) -> dict[str, Delta]:
    """The handles on all deltas of a model, by name, in the order in which they were attached."""
    held = container(model)
    return {tree.name: Delta(model, tree.name) for tree in held.trees()} if held else {}


def _apply(
    model: nn.Module, atlas: Atlas, made: Plan, name: str, head: bool,
    seed: int | None, values: Mapping[str, Tensor] | None,
) -> Delta:  # fmt: skip
    key = _free_key(model, name)
    held = container(model, make=True)
    assert held is not None
    delta = Delta(model, name)
    tree = Tree(name, made.spec, head)
    held._modules[key] = tree
    try:
        _build(tree, atlas, made, seed, values)
        tree.train(model.training)
        held.freeze(model)
        tree.enabled = True
        for unit in tree.units:
            unit.install(model)
    except BaseException:
        for unit in tree.units:
            unit.remove(model)
        del held._modules[key]
        if not held._modules:
            _dismiss(model, held)
        raise
    return delta


def _free_key(model: nn.Module, name: str) -> str:
    if not isinstance(name, str) or not name:
        raise AttachError(f"a delta needs a name, got {name!r}")
    taken = deltas(model)
    if name in taken:
        raise AttachError(
            f"a delta named `{name}` is attached already; attached: {listing(taken)}. "
            "Detach it, or pass another `name`"
        )
    return key_of(name)


def _build(
    tree: Tree, atlas: Atlas, made: Plan, seed: int | None, values: Mapping[str, Tensor] | None
) -> None:
    shared: dict[str, nn.Module] = {}
    generators: dict[torch.device, torch.Generator] = {}

    def fill(owner: nn.Module, key: str, params: Mapping[str, Param], like: Tensor) -> None:
        for own, param in params.items():
            device, dtype = like.device, like.dtype
            if not dtype.is_floating_point or dtype.itemsize < 4:
                dtype = torch.float32
            if values is not None:
                tensor = values[f"{key}.{own}"].to(device, dtype, copy=True)  # aligned
            else:
                generator = None
                if seed is not None and device.type != "meta":
                    generator = generators.get(device)
                    if generator is None:
                        generator = torch.Generator(device).manual_seed(seed)
                        generators[device] = generator
                tensor = param.build(device, dtype, generator)
            owner._parameters[own] = nn.Parameter(tensor)
            tree.entries.append((f"{key}.{own}", owner, own))

    for step in made.steps:
        like = _like(atlas, step.site.path)
        if step.shared and step.shared not in shared:
            shared[step.shared] = Node()
            fill(shared[step.shared], step.shared, made.shared[step.shared], like)
            place(tree, step.shared, shared[step.shared])
        unit: Unit = step.spec.unit(step.spec, step.site, shared.get(step.shared))
        fill(unit, step.key, step.tensors, like)
        place(tree, step.key, unit)
        tree.units.append(unit)


def _like(atlas: Atlas, path: str) -> Tensor:
    """A parameter whose device and dtype the tensors at a path follow."""
    found = next(atlas.modules[path].parameters(), None)
    if found is None:
        found = next(atlas.model.parameters(), None)
    return found if found is not None else torch.empty(0)


def _dismiss(model: nn.Module, held: Deltas) -> None:
    held.hook.remove()
    held.thaw()
    del model._modules[DELTAS]

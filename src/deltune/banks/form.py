"""What a member of a bank has to be: the bank's spec on its model, or a smaller form of it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from deltune.attaching import Description, build
from deltune.banks.packing import Flats, Packing
from deltune.container import Deltas, container
from deltune.delta import Delta
from deltune.errors import AttachError, StoreError
from deltune.mechanisms.filling import filled
from deltune.planning import Plan, resolve
from deltune.sites.discover import discover
from deltune.spec import Spec
from deltune.store import identity, native
from deltune.tree import Tree

Source = str | Path | Tensor | Delta | Mapping[str, Tensor]
Stamp = tuple[int, ...]


class Loaded(NamedTuple):
    """A member in the memory of the processor."""

    flats: Flats
    scale: float


class Form:
    """The bank's spec on its model; makes skeletons, and members from whatever they come in.

    Args:
        model: the backbone.
        spec: of the bank.
        head: whether members hold a task head.
        force: take members that were saved for a backbone with other weights.
    """

    def __init__(self, model: nn.Module, spec: Spec, head: bool, force: bool) -> None:
        self.model, self.spec, self.head, self.force = model, spec, head, force
        self.atlas = discover(model)
        self.plan = resolve(self.atlas, spec, head)
        self.packing = Packing(self.tree().stored())
        held = container(model) or Deltas()
        self.backbone: dict[str, Any] = {}
        if not force:
            self.backbone = identity.identity(model, held.backbone(model, self.atlas.heads))
        self._plans: dict[Spec, Plan] = {}
        self._stood = self._stand()

    def stands(self) -> bool:
        """Whether the model is where it was, in the type that it had."""
        return self._stood == self._stand()

    def _stand(self) -> list[tuple[torch.device, torch.dtype]]:
        modules = self.atlas.modules.values()
        found = (p for module in modules for p in module._parameters.values() if p is not None)
        return [(p.device, p.dtype) for p in found]

    def tree(self) -> Tree:
        """A skeleton: units at every site of the spec, whose tensors wait to be replaced."""
        tree = Tree("", self.spec, self.head).eval()
        build(tree, self.atlas, self.plan, 0, {})
        return tree

    def stamp(self, path: Path) -> Stamp:
        """Tells whether the files of a saved delta were written again."""
        try:
            about, tensors = (path / native.ABOUT).stat(), (path / native.TENSORS).stat()
        except OSError:
            return ()
        return about.st_mtime_ns, about.st_size, tensors.st_mtime_ns, tensors.st_size

    def from_folder(self, path: Path) -> Loaded:
        """A saved delta, checked as `load` checks it.

        Raises:
            StoreError: see `load`; or a delta of another spec that does not fit in.
        """
        saved = Description.read(path)
        if not self.force:
            saved.check_backbone(self.backbone)
        plan = self._plan(saved.spec, saved.head, str(path))
        saved.check_layout(plan)
        saved.check_scale(plan)
        shapes = {name: param.shape for name, param in plan.params()}
        return self._packed(native.read_tensors(path, shapes), plan, saved.scale, str(path))

    def given(self, source: Tensor | Delta | Mapping[str, Tensor]) -> Loaded:
        """A member from a vector, from tensors by name or from an attached delta.

        Raises:
            AttachError: another length, other names or shapes, or another spec.
        """
        if isinstance(source, Delta):
            plan = self._plan(source.spec, source.tree.with_head, f"the delta `{source.name}`")
            return self._packed(source.tensors(), plan, source.scale, f"`{source.name}`")
        if isinstance(source, Tensor):
            kept = [name for name, param in self.plan.params() if not param.trained]
            if kept:
                raise AttachError(
                    f"`{self.spec}` has tensors that are no part of its vector, such as "
                    f"`{kept[0]}`; give the folder or the delta, or all tensors by name"
                )
            source = self.plan.layout.split(source.detach())
        shapes = self.packing.shapes()
        found = {name: tuple(tensor.shape) for name, tensor in source.items()}
        if found != shapes:
            wrong = [n for n in {**shapes, **found} if found.get(n) != shapes.get(n)]
            raise AttachError(
                f"the tensors given are not those of `{self.spec}` on this model: `{wrong[0]}` has "
                f"shape {found.get(wrong[0], 'none')}, expected {shapes.get(wrong[0], 'none')}"
            )
        return Loaded(self.packing.pack(source), 1.0)

    def _plan(self, spec: Spec, head: bool, what: str) -> Plan:
        if head != self.head:
            raise StoreError(
                f"{what} is {'with' if head else 'without'} a task head and the bank is not; make "
                f"the bank with head={head}, or attach this delta"
            )
        if spec == self.spec:
            return self.plan
        if spec not in self._plans:
            self._plans[spec] = resolve(self.atlas, spec, head)
        return self._plans[spec]

    def _packed(self, tensors: Mapping[str, Tensor], plan: Plan, scale: float, what: str) -> Loaded:
        if plan is not self.plan:
            tensors = self._fitted(tensors, plan, what)
        return Loaded(self.packing.pack(tensors), scale)

    def _fitted(self, tensors: Mapping[str, Tensor], plan: Plan, what: str) -> dict[str, Tensor]:
        """The tensors of a smaller form of the spec, filled up."""
        found: dict[str, Tensor] = {}
        ours, theirs = self.plan.steps, plan.steps
        same = [step.key for step in ours] == [step.key for step in theirs]
        for mine, other in zip(ours, theirs, strict=False) if same else ():
            own = {name: tensors[f"{other.key}.{name}"] for name in other.tensors}
            shapes = {name: param.shape for name, param in mine.tensors.items()}
            taken = own if mine.spec == other.spec else filled(mine.spec, other.spec, own, shapes)
            if taken is None:
                break
            found |= {f"{mine.key}.{name}": tensor for name, tensor in taken.items()}
        if found.keys() != self.packing.places.keys():
            raise StoreError(
                f"{what} is `{plan.spec}` and the bank holds `{self.spec}`; of another spec "
                "members fit whose effect is the same in larger tensors, such as LoRA of a smaller "
                "rank at the same places: use a bank of their own"
            )
        return found

"""The handle on a delta of a model."""

from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from deltune.container import Deltas, container, key_of
from deltune.errors import AttachError, listing
from deltune.mechanisms.quantised import check_mergeable
from deltune.mechanisms.standing import check_whole
from deltune.sites.discover import discover
from deltune.spec import Spec
from deltune.store import identity
from deltune.storing import Storable
from deltune.tree import Tree
from deltune.vector import Layout, sharded, write


class Delta(Storable):
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
            unit.scale_by(tree.factor)
        if tree.merged:
            self._container().remerge(self.model)

    def enable(self) -> "Delta":
        """Lets the delta act again."""
        tree = self.tree
        if not tree.enabled and not tree.merged:
            tree.enabled = True
            self._container().act(self.model)
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
            tree.enabled = False
            self._container().act(self.model)
        return self

    def skip(self, layers: Iterable[int]) -> "Delta":
        """Stops the delta in some layers of every stack, as AdapterDrop does at inference.

        What belongs to no layer, such as a prompt or the task head, goes on acting; `skip(())` lets
        all act again. Disabling and enabling keeps it; a saved delta is whole.

        Args:
            layers: numbers of layers, counted from 0: `range(5)` for the lowest five.

        Raises:
            AttachError: the delta is merged, or is in none of a layer's sites.

        Example:
            >>> import deltune as dt, torch
            >>> layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            >>> delta = dt.attach(torch.nn.TransformerEncoder(layer, 3), "adapter(width=2)")
            >>> delta.skip(range(2)).enabled
            True
        """
        tree, chosen = self.tree, frozenset(layers)
        if tree.merged:
            raise AttachError(
                f"delta `{self.name}` is merged into the weights; `unmerge()` it before skipping "
                "layers, and merge it again"
            )
        here = {unit.site.layer for unit in tree.units if unit.site.layer is not None}
        if wrong := chosen - here:
            raise AttachError(
                f"delta `{self.name}` has nothing in the layers {sorted(wrong)} to skip; it is in "
                f"{sorted(here) or 'no layer'}"
            )
        tree.skipped = chosen
        self._container().act(self.model)
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
        tree, held = self.tree, self._container()
        merged, tree.merged, tree.enabled = tree.merged, False, False
        held.act(self.model)
        if merged:
            held.remerge(self.model)
        del held._modules[key_of(self.name)]
        held.leave(self.model)

    def merge(self, requantise: bool = False) -> "Delta":
        """Adds the delta's change to the weights: same outputs, no cost at inference.

        Changed weights are new parameters (computed in at least float32, then rounded to the
        backbone's dtype); the original ones are kept, so `unmerge` restores them bit for bit.

        Args:
            requantise: merge into quantised weights too: their values, the change added, are
                quantised again as they were, and outputs change by that rounding.

        Raises:
            AttachError: the delta's effect is no change of weights, or it reads what another delta
                changes beside the weights; or weights are quantised, with the error that merging
                would make.
        """
        tree, held = self.tree, self._container()
        if not tree.merged:
            check_whole(self.model, "merged")
            for unit in tree.acting:
                first = next(iter(unit.weights(self.model)), None)
                if first is not None:
                    owner, name, _, change = first
                    check_mergeable(self.name, owner, name, change, requantise)
            held.check_merging(tree)
            self.disable()
            tree.merged = True
            held.remerge(self.model)
        return self

    def unmerge(self) -> "Delta":
        """Undoes `merge`; the delta acts through its hooks again.

        Raises:
            AttachError: another delta that is merged reads what this one changes.
        """
        tree, held = self.tree, self._container()
        if tree.merged:
            held.check_merging(tree)
            tree.merged = False
            held.remerge(self.model)
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
        """Every tensor of the delta by its name (live, detached from the graph): the trained ones,
        and those only kept, such as the indices of a sparse delta."""
        return {name: p.detach() for name, p in self.tree.stored().items()}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> "Delta":
        """Copies these values in: exactly the delta's names and shapes.

        Raises:
            AttachError: missing or unexpected names, other shapes; nothing is changed then.
        """
        named = self.tree.stored()
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
        for name, parameter in named.items():
            write(parameter, tensors[name])
        return self._written()

    def vector(self) -> Tensor:
        """The delta as one vector (a copy), in layout order. Of a sharded model every process must
        ask for it, and gets the whole."""
        return self.layout.join(self.tree.whole())

    def load_vector(self, vector: Tensor) -> "Delta":
        """Writes a vector back into the tensors."""
        pieces = self.layout.split(vector.detach())
        for name, parameter in self.tree.named().items():
            write(parameter, pieces[name])
        return self._written()

    def call(self, vector: Tensor, **batch: Any) -> Any:
        """`model(**batch)` with `vector` in place of this delta's tensors; gradients reach it.

        Raises:
            AttachError: the delta is merged or disabled, the vector has another length, or
                gradient checkpointing is at work: it would recompute with the delta's own tensors.
        """
        if not self.tree.enabled:
            state = "merged" if self.tree.merged else "disabled"
            raise AttachError(
                f"delta `{self.name}` is {state}: `call` needs it to act through its hooks"
            )
        if any(sharded(parameter) for parameter in self.parameters()):
            raise AttachError(
                f"delta `{self.name}` lies in pieces in several processes, and `call` would run "
                "with those, not with the vector; use `load_vector`, or a model that is whole"
            )
        if torch.is_grad_enabled() and any(
            m.training and getattr(m, "gradient_checkpointing", False) for m in self.model.modules()
        ):
            raise AttachError(
                f"`call` of delta `{self.name}` under gradient checkpointing would give wrong "
                "gradients, since the backward pass runs parts of the model again, then with the "
                "delta's own tensors; use `model.gradient_checkpointing_disable()` or `eval()`"
            )
        pieces, entries = self.layout.split(vector), self.tree.entries
        kept = [owner._parameters[own] for _, owner, own in entries]
        try:
            for name, owner, own in entries:
                owner._parameters[own] = pieces[name]  # type: ignore
            return self.model(**batch)
        finally:
            for (_, owner, own), parameter in zip(entries, kept, strict=True):
                owner._parameters[own] = parameter

    def reference(self) -> nn.Module:
        """The model without this delta, beside it and on the same tensors: see
        `deltune.reference.reference`."""
        from deltune.reference import reference

        return reference(self)

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


def deltas(model: nn.Module) -> dict[str, Delta]:
    """The handles on all deltas of a model, by name, in the order in which they were attached.

    Example:
        >>> import deltune as dt, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> delta = dt.attach(model, "lora(rank=2, where='0')", name="mine")
        >>> list(dt.deltas(model))
        ['mine']
    """
    held = container(model)
    return {tree.name: Delta(model, tree.name) for tree in held.trees()} if held else {}

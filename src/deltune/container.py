"""What a model carries while deltas are attached: their tree, and how to undo everything."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from deltune.errors import AttachError, TrainError, listing
from deltune.mechanisms.compilers import heed_hooks
from deltune.mechanisms.modules import ORIGINALS, Node, at
from deltune.mechanisms.quantised import Passage, changed
from deltune.mechanisms.standing import check_home
from deltune.mechanisms.unit import Unit
from deltune.sites.discover import DELTAS, walk
from deltune.tree import Tree


class Seats(Protocol):
    """A bank: what rows may name beside the deltas of a model."""

    def __contains__(self, name: object) -> bool:
        """Whether it has a member of this name."""
        ...

    def __iter__(self) -> Iterator[str]:
        """The names of its members."""
        ...

    def seat(self, names: Sequence[str]) -> list[Tree]:
        """A tree with the tensors of each of these members, for one block."""
        ...

    def rise(self) -> None:
        """The block has ended."""
        ...


class Deltas(Node):
    """All deltas of one model, registered at its root as `deltas`.

    Attributes:
        banks: whose members rows may name.
        guests: the trees of members of banks, while rows are routed.
        routes: routers of earlier blocks and their lanes, by which rows have the same deltas.
    """

    def __init__(self) -> None:
        super().__init__()
        self.frozen: list[nn.Parameter] = []
        self.passage = Passage()
        self.originals: list[tuple[nn.Module, str, nn.Parameter]] = []
        self.untied = False
        self.acting: list[Unit] = []
        self.banks: list[Seats] = []
        self.guests: list[Tree] = []
        self.routes: dict[Any, Any] = {}
        self.crowd: Counter[str] = Counter()
        self.hook: Any = None

    def forward(self, x: Any) -> Any:
        """Nothing: `nn.Sequential` calls every module that it holds."""
        return x

    def trees(self) -> Iterator[Tree]:
        """The deltas in the order in which they were attached."""
        for tree in self._modules.values():
            assert isinstance(tree, Tree)
            yield tree

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the model has its own deltas, and no banks: they belong to the first one.
        return {**self.__dict__, "banks": [], "guests": [], "routes": {}}

    def freeze(self, modules: Iterable[nn.Module]) -> None:
        """Takes the gradient from the backbone, remembering who had it, and lets through what
        flows to the deltas."""
        modules = list(modules)
        self.passage.open(modules)
        for module in modules:
            for parameter in module._parameters.values():
                if parameter is not None and parameter.requires_grad:
                    parameter.requires_grad_(False)
                    self.frozen.append(parameter)

    def thaw(self) -> None:
        """Gives the gradient back."""
        for parameter in self.frozen:
            parameter.requires_grad_(True)
        self.frozen.clear()
        self.passage.close()

    def leave(self, root: nn.Module) -> None:
        """Without deltas the backbone has its gradients again; without banks too, the container is
        off the model."""
        if not self._modules:
            self.thaw()
            if not self.banks:
                self.hook.remove()
                del root._modules[DELTAS]

    def act(self, root: nn.Module) -> None:
        """Installs and removes hooks until just the enabled deltas act: changes of weights first,
        then what acts on the results, each in the order in which the deltas were attached."""
        trees = (*self.trees(), *self.guests)
        units = [unit for tree in trees if tree.enabled for unit in tree.acting]
        wanted = sorted(units, key=lambda unit: unit.when)
        known, acting = {id(unit) for unit in wanted}, self.acting
        self.acting = [unit for unit in acting if id(unit) in known]
        for unit in acting:
            if id(unit) not in known:
                self._remove(root, unit)
        there = {id(unit) for unit in self.acting}
        try:
            self._insert(root, wanted, there)
        except BaseException:
            for unit in self.acting:
                self._remove(root, unit)
            self.acting = []
            self._install(root, [unit for unit in wanted if id(unit) in there])
            raise
        self.acting = wanted

    def _insert(self, root: nn.Module, wanted: list[Unit], there: set[int]) -> None:
        """Installs those that are not there yet; of those behind them just what shares a place
        with one has to be installed again, to come after it."""
        places: set[int] = set()
        for unit in wanted:
            if id(unit) not in there:
                self._install(root, [unit])
            elif places and not places.isdisjoint(unit.hooked):
                self._remove(root, unit)
                self.crowd.update(unit.changed)
                unit.install(root)
            else:
                continue
            places.update(unit.hooked)

    def join(self, root: nn.Module, tree: Tree) -> None:
        """Lets the delta that was attached last act, in the time that it takes alone unless others
        have to act after it."""
        units = sorted(tree.acting, key=lambda unit: unit.when)
        if units and self.acting and units[0].when < self.acting[-1].when:
            self.act(root)
        else:
            self._install(root, units)

    def _install(self, root: nn.Module, units: list[Unit]) -> None:
        for unit in units:
            self.acting.append(unit)  # before, so that one that fails is removed again
            self.crowd.update(unit.changed)
            unit.__dict__.update(crowd=self.crowd, home=at(root, unit.site.path))
            unit.install(root)
        heed_hooks()

    def _remove(self, root: nn.Module, unit: Unit) -> None:
        self.crowd.subtract(unit.changed)
        unit.remove(root)

    def settle(self, root: Any, args: tuple[Any, ...]) -> None:
        """Before each forward: nothing is trained wrongly, and under gradient checkpointing no
        gradient is taken below the lowest delta.

        transformers makes the embeddings require gradients when checkpointing is switched on,
        which only reentrant checkpointing needs; without it nothing below the lowest delta is
        recomputed or back-propagated.
        """
        if self.acting and not torch.compiler.is_compiling():
            for unit in (self.acting[0], self.acting[-1]):
                check_home(root, unit)
        if root.training and torch.is_grad_enabled():
            for tree in self.trees():
                if tree.neglected:
                    raise TrainError(_demanding(tree))
                self.passage.check(tree.name, tree.parameters())
        if getattr(root, "_require_grads_hooks", None) and not _reentrant(root):
            root.disable_input_require_grads()

    def check_merging(self, tree: Tree) -> None:
        """Refuses to merge or unmerge a delta where the order of effects would be another: what is
        in the weights comes before all that is not, and what reads an output sees what came before.
        """
        trees = list(self.trees())
        inside = {id(one) for one in trees if one.merged != (one is tree)}
        outside = {id(one) for one in trees if (one.merged if one is tree else one.enabled)}
        units = sorted(((u, one) for one in trees for u in one.acting), key=lambda it: it[0].when)
        for i, (unit, one) in enumerate(units):
            if unit.turn == 0 or id(one) not in inside:
                continue
            for before, other in units[:i]:
                if (
                    id(other) in outside and tree in (one, other)
                    and (unit.reads or before.reads) and unit.stream & before.stream
                ):  # fmt: skip
                    raise AttachError(
                        f"with `{one.name}` in the weights and `{other.name}` not, outputs would "
                        f"be others, since both act on what `{unit.site.path}` puts out; merge "
                        f"`{other.name}` first and unmerge it last, or disable it"
                    )

    def remerge(self, root: nn.Module) -> None:
        """Brings the backbone's weights in line with which deltas are merged."""
        for owner, name, original in self.originals:
            owner._parameters[name] = original
            owner.__dict__.pop(ORIGINALS, None)
        self.originals.clear()
        units = [unit for tree in self.trees() if tree.merged for unit in tree.acting]
        self._change(root, [unit for unit in units if unit.turn == 0])
        for unit in sorted(units, key=lambda unit: unit.when):
            if unit.turn:
                self._change(root, [unit])
        self._tie(root)

    def _change(self, root: nn.Module, units: Iterable[Unit]) -> None:
        """Puts the changes by some units in force, in addition to those that are."""
        changes: dict[tuple[int, str], list[tuple[tuple[int, str], Tensor]]] = {}
        owners: dict[tuple[int, str], nn.Module] = {}
        for unit in units:
            for owner, name, own, change in unit.weights(root):
                owners[id(owner), name] = owner
                entry = ((id(unit), own), change.detach())
                changes.setdefault((id(owner), name), []).append(entry)
        made: dict[tuple[Any, ...], nn.Parameter] = {}
        for place, entries in changes.items():
            owner, name = owners[place], place[1]
            original = owner._parameters[name]
            assert original is not None
            token = (id(original), *(key for key, _ in entries))
            if token not in made:
                made[token] = changed(owner, original, [change for _, change in entries])
            owner._parameters[name] = made[token]
            if name not in owner.__dict__.setdefault(ORIGINALS, {}):
                owner.__dict__[ORIGINALS][name] = original
                self.originals.append((owner, name, original))

    def backbone(self, root: nn.Module, skip: tuple[str, ...]) -> Iterator[tuple[str, Tensor]]:
        """The backbone's own parameters, as they are without any merged delta."""
        originals = {(id(owner), name): p for owner, name, p in self.originals}
        for path, module in walk(root):
            if any(path == head or path.startswith(head + ".") for head in skip):
                continue
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    yield f"{path}.{name}", originals.get((id(module), name), parameter)

    def _tie(self, root: Any) -> None:
        """Keeps `config.tie_word_embeddings` true to what the merged weights are."""
        config: Any = getattr(root, "config", None)
        if self.untied:
            config.tie_word_embeddings, self.untied = True, False
        if getattr(config, "tie_word_embeddings", False) and self.originals:
            embed, out = root.get_input_embeddings(), root.get_output_embeddings()
            if embed is not None and out is not None and embed.weight is not out.weight:
                originals = {(id(o), n): p for o, n, p in self.originals}
                pair = [originals.get((id(m), "weight"), m.weight) for m in (embed, out)]
                if pair[0] is pair[1]:
                    config.tie_word_embeddings, self.untied = False, True

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Deltas":
        for _, _, original in self.originals:
            original.data = fn(original.data)
        return super()._apply(fn, recurse)


def _demanding(tree: Tree) -> str:
    kinds = listing(dict.fromkeys(spec.kind for spec, _ in tree.members() if spec.asks))
    return (
        f"delta `{tree.name}` is about to be trained by plain optimiser steps, and {kinds} asks "
        "for more (a schedule, a penalty, a mask from the data, a learning rate of its own); train "
        "with `deltune.train`, pass `DeltaCallback(delta)` to `transformers.Trainer`, or use "
        "`deltune.training.course.Course` and `deltune.training.optim.groups` in your own loop"
    )


def _reentrant(root: nn.Module) -> bool:
    for module in root.modules():
        function = getattr(module, "_gradient_checkpointing_func", None)
        if function is not None and getattr(module, "gradient_checkpointing", False):
            return bool(getattr(function, "keywords", {}).get("use_reentrant", True))
    return True


def container(model: nn.Module, make: bool = False) -> Deltas | None:
    """The model's deltas; made, if asked for and missing.

    Raises:
        AttachError: the model has something else under that name.
    """
    found = model._modules.get(DELTAS)
    if found is None and make:
        if hasattr(model, DELTAS):
            raise AttachError(
                f"{type(model).__name__} has an attribute `{DELTAS}` of its own, which is where "
                "deltas are registered; wrap the model in another module"
            )
        found = Deltas()
        found.training = model.training
        model.add_module(DELTAS, found)
        found.hook = model.register_forward_pre_hook(found.settle)
        heed_hooks()
    if found is not None and not isinstance(found, Deltas):
        raise AttachError(f"`{type(model).__name__}.{DELTAS}` is no container of deltas")
    return found


def key_of(name: str) -> str:
    """The name of a delta as a module name: no dots, and none of `nn.Module`'s own."""
    key = re.sub(r"[^A-Za-z0-9_-]", lambda m: "".join(f"%{b:02X}" for b in m[0].encode()), name)
    return f"%_{key}" if hasattr(Deltas, key) or key in _OWN else key


_OWN = frozenset(vars(Deltas()))
"""What a container has of its own; a delta of such a name gets another one as a module."""

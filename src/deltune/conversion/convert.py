"""Conversion: a delta of one method from a delta of another, on the same backbone."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from deltune.attaching import attach
from deltune.conversion.likeness import (
    Likeness,
    Texts,
    acting,
    answered,
    copy_head,
    divergence,
    free_name,
    likeness,
    outputs_of,
)
from deltune.delta import Delta
from deltune.errors import AttachError, ConversionError, DeltuneError, listing
from deltune.mechanisms.modules import at, pretrained
from deltune.mechanisms.unit import Unit
from deltune.mechanisms.weight import Weight
from deltune.spec import Spec, from_json, parse
from deltune.store.native import read_about
from deltune.subspace.space import Subspace
from deltune.tasks.task import Record, Task
from deltune.training.evaluation import in_mode
from deltune.training.events import OnEvent
from deltune.training.loop import train
from deltune.training.settings import TrainSettings

How = Literal["auto", "weights", "space", "distil"]
Changes = dict[tuple[int, str], Tensor]
"""(module, parameter) -> what is added to it."""


@dataclass(frozen=True)
class Conversion:
    """A delta that was converted, attached and acting in the place of its source."""

    delta: Delta
    how: str
    """`weights`, `space` or `distil`."""
    error: float | None
    """|| dW - dW' || / || dW || over all changed weights, where both are changes of weights."""
    before: Likeness | None
    """The backbone with the source's head alone against the source."""
    after: Likeness | None
    """The converted delta against the source."""


def convert(
    source: Delta,
    to: Spec | str,
    how: How = "auto",
    *,
    tokenizer: Any = None,
    texts: Sequence[str] = (),
    probe: Sequence[str] = (),
    space: Subspace | None = None,
    settings: TrainSettings | None = None,
    max_length: int = 128,
    seed: int = 0,
    on_event: OnEvent | None = None,
) -> Conversion:
    """Makes a delta of another method that does what a delta does. Three ways:

        weights   source and target change weights: the target's factors of dW that are nearest to
                  it in every matrix (truncated SVD); exact where the rank of dW allows. Of
                  several units of one matrix each gets what those before it have left
        space     both methods share a subspace: Proj_up_target(Proj_down_source(D))
        distil    min over the target of E_x KL(p_source(. | x) || p_target(. | x)), on texts
                  without labels, in text-to-text models along what the source writes; of hidden
                  states their squared distance

    `auto` tries all that can be done and keeps the one with the least divergence on `probe`. The
    source's trained head goes along unchanged (`distil` trains it on).

    Args:
        source: attached and acting; it is disabled at the end.
        to: the target's spec.
        how: the way.
        tokenizer: of the model; needed for texts.
        texts: unlabelled, for `distil`.
        probe: unlabelled, to compare on; other texts than `texts`.
        space: for `space`; it knows the source's method by the name of the source, and has just
            one method with the spec of the target.
        settings: of `distil`; 3 passes at 1e-3 if not given.
        max_length: longest text in tokens.
        seed: of the target's first values.
        on_event: called with each event of `distil`.

    Returns:
        The conversion; its delta acts, the source and other candidates do not.

    Raises:
        ConversionError: a way that cannot be gone, or none that can; `auto` without a probe.
    """
    spec = parse(to) if isinstance(to, str) else to
    if how == "auto" and not probe:
        raise ConversionError("`auto` chooses by a probe and there is none; give `probe`, or a way")
    ways: dict[str, Callable[[Delta], float | None]] = {
        "weights": lambda target: _by_weights(source, target),
        "space": lambda target: _by_space(source, target, space),
        "distil": lambda target: _by_imitation(
            source, target, tokenizer, texts, settings, max_length, on_event
        ),
    }
    made, reasons = [], []
    shown = Texts(tokenizer, probe, max_length) if probe else None
    before = likeness(source, None, shown) if shown else None
    for way in ways if how == "auto" else (how,):
        target = _begun(source, spec, seed)
        try:
            error = ways[way](target)
            after = likeness(source, target, shown) if shown else None
        except DeltuneError as reason:
            target.detach()
            reasons.append(f"{way}: {reason}")
        except BaseException:
            for one in (target, *(earlier.delta for earlier in made)):
                one.detach()
            raise
        else:
            made.append(Conversion(target, way, error, before, after))
    if not made:
        said = "; ".join(reasons)
        raise ConversionError(f"`{source.spec}` cannot be converted to `{spec}`; {said}")
    best, *others = sorted(made, key=lambda one: one.after.divergence if one.after else 0.0)
    for one in others:
        one.delta.detach()
    source.disable()
    best.delta.enable()
    return best


class Imitation:
    """The objective of distillation: the student's outputs to be those of the teacher."""

    def __init__(self, teacher: Delta, student: Delta, texts: Texts) -> None:
        self.teacher, self.student, self.texts = teacher, student, texts

    def encode(self, records: Sequence[Record]) -> list["_Text"]:
        """The tokens of each record's input."""
        return [_Text(row) for row in self.texts.tokens([record.input for record in records])]

    def collate(self, examples: Sequence["_Text"]) -> dict[str, Tensor]:
        """A batch."""
        return self.texts.batch([example.tokens for example in examples])

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """KL(teacher || student), or the squared distance of hidden states over the teacher's."""
        with acting(self.teacher, self.student), in_mode(model, training=False), torch.no_grad():
            batch = answered(model, batch)
            wanted, decides = outputs_of(model, batch)
        found, _ = outputs_of(model, batch)
        if decides:
            return divergence(wanted, found).mean()
        return (found - wanted).square().sum() / wanted.square().sum()

    def predict(self, model: nn.Module, batch: dict[str, Tensor]) -> list[str]:
        """Nothing is predicted: training has no dev split here."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class _Text:
    tokens: list[int]

    @property
    def length(self) -> int:
        return len(self.tokens)


def _begun(source: Delta, spec: Spec, seed: int) -> Delta:
    """A new delta beside the source, with its head; it does not act."""
    name = free_name(source.model, "converted")
    target = attach(source.model, spec, name, head=source.tree.with_head, seed=seed).disable()
    copy_head(source, target)
    return target


def _by_weights(source: Delta, target: Delta) -> float:
    """Sets the factors of each of the target's units to the nearest of what those before it have
    left of the source's change; the relative error."""
    left = _changes(source.tree.acting, source.model)
    size = _norm(left)
    with torch.no_grad():
        for unit in target.tree.acting:
            if unit.spec.owns:
                continue
            spec, site = unit.spec, unit.site
            if not isinstance(spec, Weight):
                raise ConversionError(f"`{spec}` is no change of weights")
            owner = at(target.model, site.path)
            value = pretrained(owner, site.param)
            rest = left.get((id(owner), site.param))
            spec.nearest(unit, site.matrix(torch.zeros_like(value) if rest is None else rest))
            for key, change in _changes([unit], target.model).items():
                left[key] = left[key] - change if key in left else -change
    return _norm(left) / max(size, 1e-30)


def _norm(changes: Changes) -> float:
    """|| . || over all matrices."""
    return sum(float(change.double().square().sum()) for change in changes.values()) ** 0.5


def _changes(units: Iterable[Unit], model: nn.Module) -> Changes:
    """The changes by some units, the head's values aside."""
    found: Changes = {}
    for unit in units:
        if unit.spec.owns:
            continue
        try:
            for owner, name, _, change in unit.weights(model):
                key, change = (id(owner), name), change.detach().float()
                found[key] = found[key] + change if key in found else change
        except AttachError as error:
            raise ConversionError(str(error)) from None
    return found


def _by_space(source: Delta, target: Delta, space: Subspace | None) -> None:
    if space is None:
        raise ConversionError("no space was given")
    if source.name not in space.methods:
        raise ConversionError(
            f"the space knows {listing(space.methods)} and the source is called `{source.name}`; "
            "attach it under the name that its method has there"
        )
    alike = [name for name in space.methods if name != source.name and _is(space, name, target)]
    if len(alike) != 1:
        raise ConversionError(
            f"{len(alike)} methods of the space ({listing(space.methods)}) are `{target.spec}` "
            f"with {target.layout.size} numbers; it has to be one"
        )
    start, vector = space.starts[source.name], source.vector()
    known, scale = len(start), _scale(space, source.name)
    if (len(vector), source.scale) != (known, scale):
        raise ConversionError(
            f"`{source.name}` has {known:,} numbers at the scale {scale:g} in the space and the "
            f"source {len(vector):,} at {source.scale:g}; give a delta of that method and scale"
        )
    target.scale = _scale(space, alike[0])
    target.load_vector(space.decode(alike[0], space.encode(source.name, vector.to(start) - start)))


def _scale(space: Subspace, name: str) -> float:
    """The scale at which a method's vectors were found."""
    place = space.deltas.get(name)
    return 1.0 if place is None else float(read_about(place)["scale"])


def _is(space: Subspace, name: str, target: Delta) -> bool:
    """Whether a method of a space is that of a delta: by its spec, where the space knows it."""
    place = space.deltas.get(name)
    said = place is None or from_json(read_about(place)["spec"]) == target.spec
    return said and space.starts[name].numel() == target.layout.size


def _by_imitation(
    source: Delta, target: Delta, tokenizer: Any, texts: Sequence[str],
    settings: TrainSettings | None, max_length: int, on_event: OnEvent | None,
) -> None:  # fmt: skip
    if not texts:
        raise ConversionError("no texts to learn from were given")
    chosen = settings or TrainSettings(learning_rate=1e-3, num_train_epochs=3)
    chosen = replace(chosen, eval_steps="no", load_best_model_at_end=False)
    rows = [Record(text, "") for text in texts]
    task = Task("texts", "generation", "exact_match", None, rows, [], [])
    objective = Imitation(source, target, Texts(tokenizer, texts, max_length))
    with acting(target, source):
        train(source.model, tokenizer, task, target, chosen, objective=objective,
              on_event=on_event)  # fmt: skip

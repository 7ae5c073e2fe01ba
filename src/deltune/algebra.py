"""The algebra of deltas: operators on specs as functions, and on deltas that are there already.

    a + b, a >> b                    at once; b on what a has made of the model
    average(a, b, weights=...)       the mean of their effects
    split(a, b, at=k)                by tokens of each row
    gate(a, b), fuse(a, b)           learned shares; attention over what they give
    drop(a, layers="0:4")            without some layers

Rows of a batch are given deltas by `deltune.route`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from deltune.attaching import apply, backbone_of, read_saved
from deltune.delta import Delta
from deltune.errors import AttachError, SpecError, listing
from deltune.planning import Plan, named, nodes, read, resolve
from deltune.sites.discover import discover
from deltune.spec import OPERATORS, Spec, build, methods


def _made(kind: str, parts: Sequence[Spec | str], **options: Any) -> Spec:
    methods()
    return build(kind, {"parts": tuple(read(part) for part in parts), **options})


def average(*parts: Spec | str, weights: Sequence[float] | None = None) -> Spec:
    """The mean of the effects of several deltas: see `Average`.

    Example:
        >>> import deltune as dt
        >>> from deltune.algebra import average
        >>> str(average(dt.LoRA(rank=2), "bitfit", weights=(0.3, 0.7)))
        'average(lora(rank=2), bitfit, weights=(0.3, 0.7))'
    """
    return _made("average", parts, weights=weights)


def split(*parts: Spec | str, at: int | Sequence[int]) -> Spec:
    """Each delta on the tokens between two positions of every row: see `Split`.

    Example:
        >>> from deltune.algebra import split
        >>> str(split("lora", "adapter", at=5))
        'split(lora, adapter, at=5)'
    """
    return _made("split", parts, at=at)


def gate(*parts: Spec | str, **options: Any) -> Spec:
    """Several deltas with learned shares: see `Gate`, also for the options.

    Example:
        >>> from deltune.algebra import gate
        >>> str(gate("lora", "adapter", by="example"))
        "gate(lora, adapter, by='example')"
    """
    return _made("gate", parts, **options)


def fuse(*parts: Spec | str, **options: Any) -> Spec:
    """Attention over what several inserted functions give: see `Fuse`, also for the options.

    Example:
        >>> from deltune.algebra import fuse
        >>> str(fuse("adapter(width=8)", "adapter(width=4)"))
        'fuse(adapter(width=8), adapter(width=4))'
    """
    return _made("fuse", parts, **options)


def drop(*parts: Spec | str, layers: str) -> Spec:
    """Deltas without some layers: see `Drop`.

    Example:
        >>> from deltune.algebra import drop
        >>> str(drop("adapter", layers="0:5"))
        "drop(adapter, layers='0:5')"
    """
    return _made("drop", parts, layers=layers)


def compose(
    model: nn.Module,
    operator: str,
    sources: Sequence[Delta | str | Path],
    name: str = "composed",
    *,
    head: bool = True,
    seed: int | None = None,
    force: bool = False,
    **options: Any,
) -> Delta:
    """Attaches one delta made of others, with copies of their tensors.

    Sources that are attached to this model are disabled, since the new delta acts in their place;
    nothing else about them changes. A source's scale goes along, as `average(a, weights=(scale,))`.
    Task heads do not: the new delta has one of its own, which starts as the model's.

    Args:
        model: the backbone of all sources.
        operator: `sum`, `stack`, `average`, `split`, `gate`, `fuse` or `drop`.
        sources: deltas that are attached, or folders of saved ones.
        name: of the new delta.
        head: whether it has a task head, where the model has a new one.
        seed: of the tensors that no source has.
        force: take saved deltas of a backbone with other weights too.
        options: of the operator, such as `weights` or `frozen`.

    Raises:
        SpecError, WhereError, AttachError: as `attach`; or a source of another backbone.
        StoreError: as `load`. The model is untouched then.

    Example:
        >>> import deltune as dt, torch
        >>> from deltune.algebra import compose
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> a, b = (dt.attach(model, "adapter(width=2, where='0')", name=n) for n in "ab")
        >>> fused = compose(model, "fuse", [a, b], frozen=True)
        >>> fused.count(), a.enabled
        (56, False)
    """
    methods()
    if operator not in OPERATORS:
        raise SpecError(f"no operator `{operator}`; operators: {listing(OPERATORS)}")
    atlas = discover(model)
    found = [_taken(source, model, force) for source in sources]
    spec = _made(operator, [spec for spec, _ in found], **options)
    made = resolve(atlas, spec, head)
    values = _values(made, found)
    delta = apply(model, atlas, made, name, head, seed, values)
    for source in sources:
        if isinstance(source, Delta) and source.model is model and not source.merged:
            source.disable()
    return delta


Source = tuple[Spec, list[dict[str, Tensor]]]
"""A spec, and for each of its nodes the tensors by their names below the node."""


def _taken(source: Delta | str | Path, model: nn.Module, force: bool) -> Source:
    if isinstance(source, Delta):
        ours = source.model is model
        if ours and source.merged:
            raise AttachError(
                f"delta `{source.name}` is merged into the weights and would act twice; "
                "`unmerge()` it first"
            )
        same = (
            ours or source.backbone()["weights"] == backbone_of(model, discover(model))["weights"]
        )
        if not same and not force:
            raise AttachError(
                f"delta `{source.name}` is of another backbone; load its own model, or pass "
                "`force=True` if you know that they agree"
            )
        spec, tensors, scale = source.spec, source.tensors(), source.scale
    else:
        saved = read_saved(source, model, discover(model), force)
        spec, tensors, scale = saved.made.spec, saved.values, saved.scale
    pieces = [
        {n.removeprefix(f"{name}."): t for n, t in tensors.items() if n.startswith(f"{name}.")}
        for name, _ in named(nodes(spec))
    ]
    if scale != 1.0:
        return _made("average", [spec], weights=(scale,)), [*pieces, {}]
    return spec, pieces


def _values(made: Plan, found: Sequence[Source]) -> Mapping[str, Tensor]:
    """The tensors of the sources by their names in the plan."""
    pieces = [piece for _, each in found for piece in each]
    names = [name for name, _ in named(nodes(made.spec))][: len(pieces)]
    shapes = {name: tuple(param.shape) for name, param in made.params()}
    values = {
        f"{name}.{own}": tensor
        for name, piece in zip(names, pieces, strict=True)
        for own, tensor in piece.items()
    }
    values = {n: t for n, t in values.items() if n in shapes}  # `drop` leaves some out
    if wrong := [n for n, t in values.items() if tuple(t.shape) != shapes[n]]:
        raise AttachError(
            f"the tensors of the sources do not fit `{made.spec}`: {listing(wrong, 6)}"
        )
    return values

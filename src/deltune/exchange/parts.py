"""Deltas of other libraries' checkpoints, part by part: a spec and its tensors at each place."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, nn

from deltune.attaching import attach_values
from deltune.delta import Delta
from deltune.errors import ExchangeError, listing
from deltune.exchange.foreign import Held, read_pickled, read_safetensors
from deltune.exchange.names import alone
from deltune.mechanisms.head import HeadOnly
from deltune.mechanisms.unit import Mechanism
from deltune.planning import Plan, named, nodes
from deltune.sites.discover import Atlas
from deltune.sites.site import Site
from deltune.sites.where import ROLES, select
from deltune.spec import Spec, Sum

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Part:
    """A method with the tensors of a checkpoint.

    Args:
        spec: the method.
        own: key of a site -> the tensors there, by our names; of an operator the site of what acts
            through it.
        shared: those that all sites share.
    """

    spec: Mechanism
    own: Mapping[str, Tensors]
    shared: Tensors = field(default_factory=dict)


def together(parts: Sequence[Part]) -> Spec:
    """The spec of parts that act side by side."""
    return parts[0].spec if len(parts) == 1 else Sum(tuple(part.spec for part in parts))


def attach_parts(
    model: nn.Module, parts: Sequence[Part], name: str,
    heads: Mapping[str, Tensor] | None = None, spec: Spec | None = None,
) -> Delta:  # fmt: skip
    """Attaches the parts as one delta, with the parameters of a new head if they are given.

    Args:
        model: the backbone.
        parts: one for each node of the spec, in their order.
        name: of the delta.
        heads: parameters of a new head.
        spec: what the parts make; their sum by default.

    Raises:
        ExchangeError: a tensor of another shape than the model wants, one too few or too many.
    """
    spec = spec or together(parts)
    names = (name for name, _ in named(nodes(spec)))
    of = dict(zip(names, parts, strict=True))

    def fill(made: Plan) -> Tensors:
        found: Tensors = {f"head.{own}": value for own, value in (heads or {}).items()}
        sites = {step.inside: step.site for step in made.steps if step.inside}
        for step in made.steps:
            if isinstance(step.spec, HeadOnly):
                continue
            part, site = of[step.part], sites.get(step.key, step.site)
            theirs = {f"{step.key}.{own}": value for own, value in _at(part, site).items()}
            if step.shared:
                theirs |= {f"{step.shared}.{own}": value for own, value in part.shared.items()}
            found |= {n: value.float() for n, value in theirs.items()}
        wanted = {n: tuple(param.shape) for n, param in made.params()}
        given = {n: tuple(tensor.shape) for n, tensor in found.items()}
        if wrong := [n for n in {**wanted, **given} if given.get(n) != wanted.get(n)]:
            said = [f"{n} {given.get(n, 'missing')}, not {wanted.get(n, 'none')}" for n in wrong]
            raise ExchangeError(
                f"the checkpoint does not fit {type(model).__name__}: {listing(said, 4)}; load the "
                "model that it was trained on"
            )
        return found

    return attach_values(model, spec, fill, name, head=bool(heads))


def _at(part: Part, site: Site) -> Tensors:
    if site.key not in part.own:
        raise ExchangeError(f"the checkpoint has no tensors for `{site.key}`; save it again")
    return part.own[site.key]


def filled(made: Plan, changes: Mapping[str, Tensor], kind: type[Mechanism]) -> Tensors:
    """The tensors of a plan for the changes of parameters, by their names in the model, that a
    method of this kind makes."""
    return {
        f"{step.key}.{own}": changes[f"{step.site.path}.{own}"]
        for step in made.steps
        if isinstance(step.spec, kind)
        for own in step.tensors
    }


def addressed(atlas: Atlas, chosen: Iterable[Site], candidates: Sequence[Site]) -> str:
    """A `where` that means exactly these sites among the candidates: roles where all of one are
    meant, else each by its role and layer, or by its path."""
    keys = {site.key: site for site in chosen}
    present = {site.role for site in candidates}
    terms = []
    for role in ROLES:
        if not any(one == role or one.startswith(f"{role}.") for one in present):
            continue
        meant = select(atlas, role, candidates)
        if meant and all(site.key in keys for site in meant):
            terms.append(role)
            for site in meant:
                del keys[site.key]
    for site in keys.values():
        one = site.role and len(select(atlas, site.address, candidates)) == 1
        terms.append(site.address if one or site.rows else alone(site.path))
    return ", ".join(terms)


def read_first(folder: Path, names: Sequence[str], whole_numbers: tuple[str, ...] = ()) -> Held:
    """The tensors of the first of these files that is in a folder; `.bin` are pickles.

    Raises:
        ExchangeError: there is none; as the reader of the file.
    """
    found = next((folder / name for name in names if (folder / name).is_file()), None)
    if found is None:
        beside = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
        raise ExchangeError(
            f"`{folder}` has none of {listing(names)}; it holds {listing(beside, 6) or 'nothing'}"
        )
    return (read_pickled if found.suffix == ".bin" else read_safetensors)(found, whole_numbers)

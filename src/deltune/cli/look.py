"""`deltune methods`, `tasks`, `inspect` and `plan`: look before anything is trained."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tyro.conf import Positional

from deltune.cli import show
from deltune.errors import SpecError, closest, listing

if TYPE_CHECKING:
    from deltune.catalogue import Entry


@dataclass(frozen=True)
class Methods:
    """List the methods, or describe one with its options."""

    name: Positional[str | None] = None
    """A method, e.g. lora, or an operator on methods, e.g. average."""
    json: bool = False
    """Write JSON to standard output."""
    markdown: bool = False
    """Write the whole catalogue as a page."""

    def run(self) -> None:
        """Prints the table, or one method."""
        from deltune import catalogue
        from deltune.spec import OPERATORS, methods

        known = {**methods(), **OPERATORS}
        if self.markdown:
            show.out().file.write(catalogue.markdown())
        elif self.name is None:
            _list(catalogue.entries(), self.json)
        elif self.name in known:
            _describe(catalogue.entry(self.name), self.json)
        else:
            raise SpecError(
                f"unknown method `{self.name}`{closest(self.name, known)}; "
                f"methods: {listing(methods())}; operators: {listing(OPERATORS)}"
            )


@dataclass(frozen=True)
class Tasks:
    """List the tasks that lie in a folder, with their types and sizes."""

    folder: Positional[Path]
    """Holds task folders."""
    type: str = ""
    """Only tasks of this type, e.g. sentiment."""
    json: bool = False
    """Write JSON to standard output."""

    def run(self) -> None:
        """Prints the table."""
        from deltune.tasks.catalogue import list_tasks

        cards = list_tasks(self.folder, self.type)
        if self.json:
            show.say_json([dataclasses.asdict(card) for card in cards])
            return
        names = [field.name for field in dataclasses.fields(cards[0]) if field.name != "place"]
        rows = [
            ["–" if (value := getattr(card, name)) is None else str(value) for name in names]
            for card in cards
        ]
        show.out().print(show.table(names, rows, right=(4, 5, 6, 7), wrap=(8,)))
        types = len({card.type for card in cards})
        show.out().print(f"{len(cards)} tasks of {types} types")


@dataclass(frozen=True)
class Inspect:
    """Show a model's tree with roles, shapes and shared blocks."""

    model: Positional[str]
    """Hub name, folder or pkg:NAME."""
    json: bool = False
    """Write JSON to standard output."""

    def run(self) -> None:
        """Prints the tree."""
        import deltune as dt
        from deltune.tasks.models import load_backbone

        found = dt.inspect(load_backbone(self.model))
        if not self.json:
            show.out().print(str(found), markup=False)
            return
        names = ("path", "role", "class", "shape", "parameters")
        modules = [dict(zip(names, row, strict=True)) for row in found.rows()]
        show.say_json({"model": self.model, "roles": found.roles(), "modules": modules})


@dataclass(frozen=True)
class Plan:
    """Show what a delta would add to a model: each site with role, shape, tensors and cost."""

    model: Positional[str]
    """Hub name, folder or pkg:NAME."""
    spec: Positional[str]
    """The delta, e.g. "lora(rank=8) + bitfit"."""
    json: bool = False
    """Write JSON to standard output."""

    def run(self) -> None:
        """Prints the plan."""
        import deltune as dt
        from deltune.tasks.models import load_backbone

        spec = dt.parse(self.spec)
        plan = dt.plan(load_backbone(self.model), spec)
        if self.json:
            show.say_json(_plan_json(plan))
        else:
            show.out().print(str(plan), markup=False)


def _plan_json(plan: Any) -> dict[str, Any]:
    return {
        "spec": plan.spec.to_json(),
        "model": plan.model,
        "backbone": plan.backbone,
        "trainable": plan.count(),
        "sites": [
            {
                "path": step.site.path,
                "role": step.site.role,
                "method": step.spec.kind,
                "tensors": {name: list(param.shape) for name, param in step.tensors.items()},
                "trainable": step.scalars,
            }
            for step in plan.steps
        ],
    }


def _row(one: "Entry") -> dict[str, Any]:
    return {
        "method": one.kind,
        "family": one.family,
        "mechanism": one.mechanism,
        "merges": one.merges,
        "trained": one.trainable(),
        "paper": one.paper,
        "about": one.about,
        "equation": one.equation,
        "checked": one.checked,
    }


def _list(known: "list[Entry]", json: bool) -> None:
    rows = [_row(one) for one in known]
    if json:
        show.say_json(rows)
        return
    console = show.out()
    for one, row in zip(known, rows, strict=True):
        merges = "merges exactly" if one.merges else "does not merge"
        about = f"{one.family}, {one.mechanism}, {merges}, trains {row['trained']}"
        console.print(f"[bold]{one.kind}[/]  {about}")
        first = one.equation.split("\n")[0].strip()
        source = f"{one.paper or 'no paper'}; checked against {one.checked}"
        for line in (one.about, first, source):
            if line:
                console.print(f"    {line}", markup=False)


def _text(value: object) -> str:
    return ("yes" if value else "no") if isinstance(value, bool) else str(value)


def _describe(one: "Entry", json: bool) -> None:
    if json:
        fields = [dataclasses.asdict(option) for option in one.options]
        show.say_json(_row(one) | {"doc": one.doc, "example": one.example, "fields": fields})
        return
    console = show.out()
    console.print(f"{one.kind}: {one.doc}\n", markup=False)
    about = {
        "family": one.family, "mechanism": one.mechanism, "merges": _text(one.merges),
        "trained": one.trainable(), "paper": f"{one.paper} {one.title}".strip(),
        "checked": one.checked, "example": f'dt.attach(model, "{one.example}")',
    }  # fmt: skip
    console.print(show.table(("", ""), [[k, v] for k, v in about.items() if v], wrap=(1,)))
    rows = [(o.name, repr(o.default), o.type, o.doc) for o in one.options]
    console.print(show.table(("option", "default", "type", "what it is"), rows, wrap=(2, 3)))

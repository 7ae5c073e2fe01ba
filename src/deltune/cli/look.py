"""`deltune methods`, `inspect` and `plan`: look before anything is trained."""

import ast
import dataclasses
import inspect
import itertools
import re
import textwrap
from dataclasses import dataclass
from typing import Any

from tyro.conf import Positional

from deltune.cli import show
from deltune.errors import SpecError, closest, listing


@dataclass(frozen=True)
class Methods:
    """List the methods, or describe one with its options."""

    name: Positional[str | None] = None
    """A method, e.g. lora."""
    json: bool = False
    """Write JSON to standard output."""

    def run(self) -> None:
        """Prints the table, or one method."""
        from deltune.spec import methods

        known = methods()
        if self.name is None:
            _list(known, self.json)
            return
        if self.name not in known:
            raise SpecError(
                f"unknown method `{self.name}`{closest(self.name, known)}; "
                f"methods: {listing(known)}"
            )
        _describe(known[self.name], self.json)


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
                "trainable": step.count,
            }
            for step in plan.steps
        ],
    }


def _row(cls: type[Any]) -> dict[str, Any]:
    paper = str(cls.paper) if cls.paper else ""
    about = (inspect.getdoc(cls) or "").split("\n")[0]
    return {
        "method": cls.kind,
        "family": cls.family,
        "mechanism": cls.mechanism,
        "merges": cls.merges,
        "paper": paper,
        "about": about,
    }


def _list(known: dict[str, type[Any]], json: bool) -> None:
    rows = [_row(cls) for cls in known.values()]
    if json:
        show.say_json(rows)
        return
    names = ("method", "family", "mechanism", "merges", "about")
    lines = [[_text(row[name]) for name in names] for row in rows]
    show.out().print(show.table((*names[:4], "what it is"), lines, wrap=(4,)))


def _text(value: object) -> str:
    return ("yes" if value else "no") if isinstance(value, bool) else str(value)


def _describe(cls: type[Any], json: bool) -> None:
    docs = _field_docs(cls)
    fields = [
        {
            "name": field.name,
            "type": _type(field.type),
            "default": _default(field),
            "doc": docs.get(field.name, ""),
        }
        for field in dataclasses.fields(cls)
    ]
    if json:
        show.say_json(_row(cls) | {"doc": inspect.getdoc(cls), "fields": fields})
        return
    console = show.out()
    console.print(f"{cls.kind}: {inspect.getdoc(cls)}\n", markup=False)
    rows = [(one["name"], repr(one["default"]), one["type"], one["doc"]) for one in fields]
    console.print(show.table(("option", "default", "type", "what it is"), rows, wrap=(2, 3)))


def _type(hint: Any) -> str:
    text = hint.__name__ if isinstance(hint, type) else str(hint)
    return re.sub(r"\b(typing|collections\.abc|[a-z_.]+)\.(?=[A-Z])", "", text)


def _field_docs(cls: type[Any]) -> dict[str, str]:
    """The string literals under the fields of a dataclass and its bases."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        assert isinstance(body, ast.ClassDef)
        for one, following in itertools.pairwise(body.body):
            match one, following:
                case ast.AnnAssign(ast.Name(name)), ast.Expr(ast.Constant(str(text))):
                    docs[name] = " ".join(text.split())
    return docs


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else None

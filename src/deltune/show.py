"""Plans, deltas and models as text and HTML for people."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

from torch import nn

from deltune.sites.discover import Atlas, discover
from deltune.sites.packed import size

if TYPE_CHECKING:
    from deltune.delta import Delta
    from deltune.planning import Plan

Row = tuple[str, ...]


def table(header: Row, rows: Iterable[Row], right: Sequence[int] = ()) -> str:
    """Columns lined up; those in `right` to the right."""
    lines = [header, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def html_table(header: Row, rows: Iterable[Row], title: str) -> str:
    """The same as an HTML table."""
    head = "".join(f"<th style='text-align:left'>{escape(cell)}</th>" for cell in header)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<p><b>{escape(title)}</b></p><table><thead><tr>{head}</tr></thead>{body}</table>"


def plan_text(plan: "Plan") -> str:
    """A plan: one line for each kind of site, repeated layers folded."""
    rows = _plan_rows(plan)
    return f"{_title(plan)}\n" + table(_PLAN, rows, right=(3, 4))


def plan_html(plan: "Plan") -> str:
    """A plan as HTML."""
    return html_table(_PLAN, _plan_rows(plan), _title(plan))


def delta_text(delta: "Delta") -> str:
    """A handle in one line."""
    return f"Delta {delta.name!r} on {type(delta.model).__name__}: {_state(delta)}"


def delta_html(delta: "Delta") -> str:
    """A handle as HTML: its tensors, repeated layers folded."""
    shapes: dict[tuple[str, str], list[int]] = {}
    for slot in delta.layout:
        shapes.setdefault((_folded(slot.name), str(list(slot.shape))), []).append(slot.size)
    rows = [(n, s, f"x{len(sizes)}", f"{sum(sizes):,}") for (n, s), sizes in shapes.items()]
    return html_table(("tensor", "shape", "times", "scalars"), rows, delta_text(delta))


@dataclass(frozen=True, slots=True)
class Inspection:
    """A model as a tree with roles, shapes and parameter counts; print it."""

    atlas: Atlas

    def rows(self) -> list[Row]:
        """(path, role, class, shape, parameters), repeated layers folded."""
        return _model_rows(self.atlas)

    def roles(self) -> list[str]:
        """The roles that `where` can name on this model."""
        return self.atlas.roles()

    def __str__(self) -> str:
        roles = ", ".join(self.roles()) or "none found: use module names"
        name = type(self.atlas.model).__name__
        return f"{name}: roles {roles}\n" + table(_MODEL, self.rows(), right=(4,))

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return html_table(_MODEL, self.rows(), type(self.atlas.model).__name__)


def inspect(model: nn.Module) -> Inspection:
    """The tree of a model with roles, shapes and counts, repeated blocks shown once.

    Example:
        >>> import deltune as dt, torch
        >>> print(dt.inspect(torch.nn.Sequential(torch.nn.Linear(2, 3))).roles())
        []
    """
    return Inspection(discover(model))


_PLAN = ("site", "method", "tensors", "times", "scalars")
_MODEL = ("module", "role", "class", "shape", "parameters")


def _title(plan: "Plan") -> str:
    share = plan.count() / max(1, plan.backbone)
    cost = f"{plan.count():,} trainable ({share:.3%} of {plan.backbone:,})"
    return f"{plan.spec} on {plan.model}: {cost}"


def _plan_rows(plan: "Plan") -> list[Row]:
    kinds: dict[Row, list[int]] = {}
    for step in plan.steps:
        where = step.site.role and f"{step.site.stack}.{step.site.role}".strip(".")
        tensors = ", ".join(f"{n}{list(p.shape)}" for n, p in step.tensors.items())
        label = f"{_folded(step.site.path)}" + (f" ({where})" if where else "")
        kinds.setdefault((label or "(root)", step.spec.kind, tensors), []).append(step.scalars)
    rows: list[Row] = []
    for (label, kind, tensors), counts in kinds.items():
        rows.append((label, kind, tensors, f"x{len(counts)}", f"{sum(counts):,}"))
    for key, params in plan.shared.items():
        layout = ", ".join(f"{n}{list(p.shape)}" for n, p in params.items())
        size = sum(slot.size for slot in plan.layout if slot.name.startswith(key + "."))
        rows.append((key, "", layout, "x1", f"{size:,}"))
    return rows


def _state(delta: "Delta") -> str:
    tree = delta.tree
    state = "merged" if tree.merged else "on" if tree.enabled else "off"
    scale = f", scale {tree.factor:g}" if tree.factor != 1.0 else ""
    backbone = sum(map(size, delta.model.parameters())) - delta.count()
    notes = [part.note(units, delta.model) for part, units in tree.members()]
    return (
        f"{tree.spec}, {delta.count():,} trainable "
        f"({delta.count() / max(1, backbone):.3%}), {state}{scale}"
        + "".join(f", {note}" for note in notes if note)
    )


def _folded(path: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", path)


def _model_rows(atlas: Atlas) -> list[Row]:
    roles: dict[str, list[str]] = {}
    for site in atlas.sites:
        if site.role:
            roles.setdefault(site.path, []).append(f"{site.stack}.{site.role}".strip("."))
    folded: dict[Row, int] = {}
    times: dict[Row, int] = {}
    for path, module in atlas.modules.items():
        own = [p for p in module._parameters.values() if p is not None]
        if not own and path not in roles and path:
            continue
        shape = " ".join(str(list(p.shape)) for p in own)
        row = (
            _folded(path) or "(root)",
            ", ".join(roles.get(path, [])),
            type(module).__name__,
            shape,
        )
        folded[row] = folded.get(row, 0) + sum(map(size, own))
        times[row] = times.get(row, 0) + 1
    rows: list[Row] = []
    for row, count in folded.items():
        path, role, cls, shape = row
        label = f"{path}  x{times[row]}" if times[row] > 1 else path
        rows.append((label, role, cls, shape, f"{count:,}" if count else ""))
    return rows

"""Pieces of HTML: escaping is done here and nowhere else forgotten."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import zip_longest

from deltune.study import numbers


@dataclass(frozen=True, slots=True)
class Cell:
    """A table cell: what is read, what it is sorted by, and a class."""

    text: str
    value: float | str | None = None
    css: str = ""
    raw: bool = False
    """The text is HTML already."""

    def html(self, tag: str = "td") -> str:
        """The cell as an element."""
        value = self.text if self.value is None else self.value
        css = self.css or ("num" if isinstance(value, int | float) else "")
        body = self.text if self.raw else escape(self.text)
        return f'<{tag} class="{css}" data-v="{escape(str(value), quote=True)}">{body}</{tag}>'


def table(columns: Sequence[str], rows: Iterable[Sequence[Cell]], css: str = "") -> str:
    """A table that scrolls in its own box, its first column fixed, sortable by its headings."""
    rows = list(rows)
    numeric = [isinstance(cell.value, int | float) for cell in rows[0]] if rows else []
    head = "".join(
        f'<th scope="col" class="{"num" if right else ""}"><button>{escape(name)}</button></th>'
        for name, right in zip_longest(columns, numeric)
    )
    body = "".join(
        "<tr>"
        + row[0].html("th").replace("<th ", '<th scope="row" ', 1)
        + "".join(cell.html() for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    return (
        f'<div class="scroll {css}"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def plain(value: str | float) -> Cell:
    """A cell of plain data."""
    return Cell(value if isinstance(value, str) else f"{value:g}", value)


def metrics(values: Sequence[float], spreads: Sequence[float | None] = ()) -> list[Cell]:
    """Cells of metrics with their spreads, the best of them marked."""
    padded = [*spreads, *[None] * (len(values) - len(spreads))]
    return [
        Cell(numbers.metric(value, spread), value, "num best" if value == max(values) else "")
        for value, spread in zip(values, padded, strict=True)
    ]


def section(title: str, *parts: str, css: str = "") -> str:
    """A section of the page."""
    return f'<section class="{css}"><h2>{escape(title)}</h2>' + "".join(parts) + "</section>"


def paragraph(text: str, css: str = "") -> str:
    """A paragraph of plain text."""
    return f'<p class="{css}">{escape(text)}</p>'


def items(lines: Iterable[str]) -> str:
    """A list of plain lines."""
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"


def details(summary: str, *parts: str) -> str:
    """A part that opens on demand."""
    return f"<details><summary>{escape(summary)}</summary>" + "".join(parts) + "</details>"


def code(text: str) -> str:
    """Preformatted text."""
    return f"<pre>{escape(text)}</pre>"

"""Records out of rows, checked strictly: the first wrong row is named with its line."""

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltune.errors import DataError, closest, listing
from deltune.tasks.readers import Place, Row, rows, suffix_of
from deltune.tasks.task import Record


@dataclass(frozen=True, slots=True)
class Columns:
    """The names under which the fields of a record stand in the data."""

    input: str | tuple[str, ...] = "input"
    """One column, or several (a text pair) that are joined by a line end."""
    target: str = "target"
    options: str = "options"
    references: str = "references"
    ignore: tuple[str, ...] = ()
    """Columns of a file to leave out; any other unknown column is an error."""

    @property
    def inputs(self) -> tuple[str, ...]:
        """The input columns, always as a tuple."""
        return (self.input,) if isinstance(self.input, str) else self.input

    def names(self) -> tuple[str, ...]:
        """All columns that are read."""
        return (*self.inputs, self.target, self.options, self.references)


def read_records(
    path: Path | str,
    *,
    columns: Columns | None = None,
    labels: Collection[str] | None = None,
    need_target: bool = True,
) -> list[Record]:
    """Reads the records of one jsonl, jsonl.gz, csv or parquet file.

    In csv the cells of `options` and `references` hold a JSON list; in parquet a target may be a
    whole number, which becomes its text. The first thing that is wrong raises a `DataError` with
    its line.

    Args:
        path: The file.
        columns: The names of its columns; `input`, `target`, `options`, `references` by default.
        labels: The label set that every target must be in.
        need_target: Whether a record without target is an error (not so for prediction).

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp(), "toy.csv")
        >>> _ = file.write_text("input,target\\nfine,good\\n")
        >>> read_records(file)
        [Record(input='fine', target='good', options=(), references=())]
    """
    path, columns = Path(path), columns or Columns()
    reader = _Reader(columns, labels, need_target, strict=True, form=suffix_of(path))
    return reader.read(rows(path), f"`{path}`")


def records_of(
    data: Iterable[Mapping[str, Any]],
    place: str,
    *,
    columns: Columns | None = None,
    labels: Collection[str] | None = None,
    need_target: bool = True,
) -> list[Record]:
    """Returns the records of mappings in memory; columns that are not named are left out."""
    reader = _Reader(columns or Columns(), labels, need_target, strict=False, form=".parquet")
    return reader.read(((f"{place}, row {i}", dict(row)) for i, row in enumerate(data, 1)), place)


@dataclass(frozen=True, slots=True)
class _Reader:
    columns: Columns
    labels: Collection[str] | None
    need_target: bool
    strict: bool
    form: str

    def read(self, data: Iterable[Row], place: str) -> list[Record]:
        records = [self.record(row, where) for where, row in data]
        if not records:
            raise DataError(f"{place} holds no record; expected at least one; check the file")
        return records

    def record(self, row: dict[str, Any], where: Place) -> Record:
        columns = self.columns
        if self.strict:
            self._refuse_unknown(row, where)
        texts = [_text(row, name, where) for name in columns.inputs]
        target = self._target(row, where)
        options = self._list(row, columns.options, where)
        references = self._list(row, columns.references, where)
        if options and target and target not in options:
            raise DataError(
                f"{where}: the target `{target}` is not among the options {listing(options)}"
                f"{closest(target, options)}; correct the target or add it to the options"
            )
        if options and len(set(options)) < 2:
            raise DataError(
                f"{where}: the only option is `{options[0]}`; at least two different ones are "
                "expected; add another or remove `options`"
            )
        if self.labels is not None and target and target not in self.labels:
            raise DataError(
                f"{where}: the label `{target}` is not in the label set"
                f"{closest(target, self.labels)}; the labels are {listing(sorted(self.labels))}; "
                "correct the record or add the label to the set"
            )
        return Record("\n".join(texts), target, options, references)

    def _refuse_unknown(self, row: dict[str, Any], where: Place) -> None:
        known = (*self.columns.names(), *self.columns.ignore)
        for name in row:
            if name not in known:
                raise DataError(
                    f"{where}: unknown field `{name}`{closest(str(name), known)}; a record has "
                    f"{listing(self.columns.names())}; remove the field, or name it in the "
                    "columns to read or to ignore"
                )

    def _target(self, row: dict[str, Any], where: Place) -> str:
        name = self.columns.target
        value = row.get(name)
        typed = self.form == ".parquet" and isinstance(value, int) and not isinstance(value, bool)
        if typed:
            return str(value)
        if value is None or (isinstance(value, str) and not value.strip()):
            if self.need_target:
                raise DataError(
                    f"{where}: the record has no target (`{name}` is {value!r}); expected a text; "
                    "add it or remove the record"
                )
            return ""
        return _text(row, name, where)

    def _list(self, row: dict[str, Any], name: str, where: Place) -> tuple[str, ...]:
        value = row.get(name)
        if self.form == ".csv" and isinstance(value, str):
            value = _cell_list(value, name, where)
        if value is None:
            return ()
        if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
            raise DataError(
                f"{where}: `{name}` is {value!r}; expected a list of texts; correct the record"
            )
        for text in value:
            _check_text(text, name, where)
        return tuple(value)


def _text(row: dict[str, Any], name: str, where: Place) -> str:
    value = row.get(name)
    if name not in row:
        raise DataError(
            f"{where}: the record has no `{name}`{closest(name, map(str, row))}; it has "
            f"{listing(map(str, row)) or 'nothing'}; add the field or give the right column name"
        )
    if not isinstance(value, str):
        raise DataError(
            f"{where}: `{name}` is {value!r} ({type(value).__name__}); expected a text; "
            'write it in quotes ("...")'
        )
    if not value.strip():
        raise DataError(f"{where}: `{name}` is empty; expected words; fill it or remove the record")
    _check_text(value, name, where)
    return value


def _check_text(text: str, name: str, where: Place) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: `{name}` holds the lone surrogate {text[error.start]!r}, which is no "
            "character; correct the text"
        ) from None


def _cell_list(cell: str, name: str, where: Place) -> Any:
    if not cell.strip():
        return None
    try:
        return json.loads(cell)
    except ValueError as error:
        raise DataError(
            f"{where}: the cell `{name}` is `{cell}`; expected a JSON list of texts like "
            f'["yes", "no"] ({error}); correct the cell'
        ) from None

"""Rows out of files, each with the place where it stands; knows formats, not records."""

import csv
import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from deltune.errors import DataError, listing

SUFFIXES = (".jsonl.gz", ".jsonl", ".csv", ".parquet")
LONGEST_LINE = 64 * 2**20
"""Bytes that one line may have, so that a broken file cannot take all memory."""

Place = str
Row = tuple[Place, dict[str, Any]]


def suffix_of(path: Path) -> str:
    """Returns the ending of a data file that names its format."""
    for suffix in SUFFIXES:
        if path.name.lower().endswith(suffix):
            return suffix
    raise DataError(
        f"`{path}` has no known ending; expected one of {listing(SUFFIXES)}; "
        "convert the file or rename it"
    )


def rows(path: Path) -> Iterator[Row]:
    """Yields every row of a data file as a mapping, with its place for messages."""
    suffix = suffix_of(path)
    if not path.is_file():
        raise DataError(f"there is no data file `{path}`; check the path")
    if suffix == ".parquet":
        return _parquet(path)
    return _csv(path) if suffix == ".csv" else _jsonl(path, packed=suffix.endswith(".gz"))


def _jsonl(path: Path, packed: bool) -> Iterator[Row]:
    for number, line in _lines(path, packed):
        if not line.strip():
            continue
        place = f"`{path}`, line {number}"
        try:
            value = json.loads(line, object_pairs_hook=_unique)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{place} is unreadable as JSON ({error}): `{_short(line)}`; expected one object "
                'a line like {"input": ..., "target": ...}; correct or remove the line'
            ) from None
        if not isinstance(value, dict):
            raise DataError(
                f"{place} is {_short(line)!r}; expected one JSON object a line like "
                '{"input": ..., "target": ...}; correct or remove the line'
            )
        yield place, value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} stands twice")
        found[key] = value
    return found


def _csv(path: Path) -> Iterator[Row]:
    reader = csv.reader((line for _, line in _lines(path, packed=False)), strict=True)
    try:
        yield from _cells(path, reader, next(reader, []))
    except csv.Error as error:
        raise DataError(
            f"`{path}`, line {reader.line_num} is unreadable as CSV ({error}); expected "
            'comma-separated cells, those with commas or quotes inside "..."; correct the line'
        ) from None


def _cells(path: Path, reader: Any, header: list[str]) -> Iterator[Row]:
    if len(set(header)) < len(header) or "" in header:
        raise DataError(
            f"`{path}`, line 1 has the column names {header!r}; each needs a name of its own; "
            "correct the header"
        )
    last = reader.line_num
    for cells in reader:
        first, last = last + 1, reader.line_num
        if not cells:
            continue
        if len(cells) != len(header):
            raise DataError(
                f"`{path}`, line {first} has {len(cells)} cells and the header has {len(header)}; "
                'put texts with commas or line ends inside "..."'
            )
        yield f"`{path}`, line {first}", dict(zip(header, cells, strict=True))


def _lines(path: Path, packed: bool) -> Iterator[tuple[int, str]]:
    number = 0
    try:
        with gzip.open(path, "rb") if packed else path.open("rb") as handle:
            for number, line in enumerate(_bounded(path, handle), start=1):
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"`{path}`, line {number} is unreadable as UTF-8 ({error.reason} at byte "
            f"{error.start} of the line); save the file as UTF-8"
        ) from None
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"`{path}` is unreadable after line {number} ({error}); the file may be cut off or "
            "not be what its ending says; get it again"
        ) from None


def _bounded(path: Path, handle: BinaryIO | gzip.GzipFile) -> Iterable[bytes]:
    number = 0
    while line := handle.readline(LONGEST_LINE + 1):
        number += 1
        if len(line) > LONGEST_LINE:
            raise DataError(
                f"`{path}`, line {number} is longer than {LONGEST_LINE} bytes; expected one "
                "record a line; split the file into lines"
            )
        yield line


def _parquet(path: Path) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        missing("pyarrow", f"to read `{path}`")
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield f"`{path}`, row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(
            f"`{path}` is unreadable as parquet after row {number} ({error}); the file may be cut "
            "off or not be what its ending says; get it again"
        ) from None


def missing(package: str, purpose: str, extra: str = "data") -> NoReturn:
    """Raises the error for an optional package that is not installed."""
    raise DataError(
        f"the package `{package}` is needed {purpose} and is not installed; "
        f'run `pip install "deltune[{extra}]"`'
    )


def _short(text: str, most: int = 60) -> str:
    text = text.strip()
    return text if len(text) <= most else text[:most] + "..."
